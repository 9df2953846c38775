"""Time and peak memory of calls, on a CPU by the clock and on a GPU by events.

All calls of a shape are timed in turn, round after round, so that what else the machine does hits
all of them alike. On a CPU the time that the process itself ran, in all its threads, is kept beside
the clock's: on a shared machine it is the one that repeats. On a GPU the second-level cache is
overwritten before every call. The sum of the kernels' own times, which a profiler reports, leaves
out launches and gaps; a graph replay also leaves launches out (there the cache stays warm).
"""

import ctypes
import ctypes.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

# seconds a call gets in all, and how often it is timed at least and at most
_SECONDS = {"cpu": 2.0, "cuda": 0.15}
_SAMPLES = {"cpu": (5, 200), "cuda": (5, 100)}
# a call that takes as long as this, in microseconds, is timed only so often
_LONG, _LONG_SAMPLES = 1e6, 3
_TOY_SAMPLES = 2
# larger than the second-level cache of any GPU so far
_FLUSH_BYTES = 1 << 28
# no op that is measured uses it, so its kernel marks where a call starts
_MARK = "BitwiseXor"
_PROFILED = 10
# a tenth of a second: few calls, and their spread is small
_SLOW, _PROFILED_SLOW = 1e5, 3


@dataclass(frozen=True)
class Timing:
    """Microseconds by the clock, and the mean of the processor's time on a CPU."""

    median: float
    p20: float
    p80: float
    best: float
    samples: int
    cpu: float | None = None


@dataclass(frozen=True)
class _Sample:
    clock: float
    cpu: float | None = None


def _quantiles(samples: list[_Sample]) -> Timing:
    clocks = [s.clock for s in samples]
    cpus = [s.cpu for s in samples if s.cpu is not None]
    tenths = statistics.quantiles(clocks, n=10, method="inclusive")
    # the mean: what other threads ran is counted every few milliseconds only
    cpu = statistics.fmean(cpus) if cpus else None
    return Timing(statistics.median(clocks), tenths[1], tenths[7], min(clocks), len(clocks), cpu)


def _cpu_time(call: Call) -> _Sample:
    start, used = time.perf_counter(), time.process_time()
    call()
    used = time.process_time() - used
    return _Sample(1e6 * (time.perf_counter() - start), 1e6 * used)


class _Gpu:
    def __init__(self, device: torch.device) -> None:
        self.flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def overwrite(self) -> None:
        """Leave nothing of the inputs in the caches."""
        self.flush.bitwise_xor_(1)

    def time(self, call: Call) -> _Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # also gives the host time to queue the call, so that launches are not waited for
        self.overwrite()
        start.record()
        call()
        end.record()
        end.synchronize()
        return _Sample(1e3 * start.elapsed_time(end))


def measure(
    calls: Mapping[str, Call], device: torch.device, toy: bool = False
) -> dict[str, Timing]:
    """Time every call, in turn.

    Args:
        calls: What to time, by name; each is warmed up first.
        device: Where the calls run.
        toy: Take two samples only.
    """
    once = _Gpu(device).time if device.type == "cuda" else _cpu_time
    least, most = _SAMPLES[device.type]
    counts = {}
    for name, call in calls.items():
        estimate = once(call).clock
        if estimate < _LONG:
            # the first call also allocates
            estimate = once(call).clock
        wanted = int(1e6 * _SECONDS[device.type] / max(estimate, 1.0))
        if estimate >= _LONG:
            counts[name] = _LONG_SAMPLES
        else:
            counts[name] = max(least, min(most, wanted))
        if toy:
            counts[name] = _TOY_SAMPLES
    samples: dict[str, list[_Sample]] = {name: [] for name in calls}
    for round_ in range(max(counts.values(), default=0)):
        for name, call in calls.items():
            if round_ < counts[name]:
                samples[name].append(once(call))
    return {name: _quantiles(found) for name, found in samples.items()}


@dataclass(frozen=True)
class Kernel:
    """What ran on a GPU, from `start` for `time` microseconds."""

    name: str
    start: float
    time: float


def split_calls(kernels: Sequence[Kernel]) -> list[float]:
    """Sum of the kernels' times of every call; a marking kernel runs before each."""
    sums: list[float] = []
    for kernel in sorted(kernels, key=lambda k: k.start):
        if _MARK in kernel.name:
            sums.append(0.0)
        elif sums:
            sums[-1] += kernel.time
    return sums


def kernel_time(call: Call, device: torch.device, about: float) -> float:
    """Median over calls of the sum of their kernels' times, in microseconds.

    Copies and fills count, launches and gaps between kernels do not.

    Args:
        call: What to profile, warmed up.
        device: Where it runs.
        about: Microseconds that it takes, more or less.

    Raises:
        RuntimeError: the profiler saw no kernel, as where its library is missing.
    """
    gpu = _Gpu(device)
    calls = _PROFILED if about < _SLOW else _PROFILED_SLOW
    torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            gpu.overwrite()
            call()
        torch.cuda.synchronize(device)
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profiler.events() or []
        if event.device_type.name == "CUDA"
    ]
    sums = split_calls(kernels)
    if len(sums) != calls or not all(sums):
        raise RuntimeError(f"the profiler saw {len(kernels)} kernels in {len(sums)} calls")
    return statistics.median(sums)


def graph_time(call: Call, device: torch.device, replays: int = 50) -> float:
    """Median microseconds of a CUDA-graph replay of the call.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    samples = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / replays)
    return statistics.median(samples)


def peak_memory(call: Call, device: torch.device) -> float | None:
    """Megabytes that a warmed-up call needs beyond what exists before it, None where not known.

    On a GPU from the allocator. On Linux from the peak of the resident memory, which includes
    what the allocator keeps; elsewhere not known.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        # freed memory goes back first, or the call would find it there
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_kb("VmRSS")
        call()
        return max(0.0, (_status_kb("VmHWM") - before) / 1e3)
    except (OSError, AttributeError, TypeError):
        return None


def _status_kb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return float(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")
