"""Where a model's time goes on a GPU: its kernels, by what they are for.

A kernel belongs to the operator that launched it; of a replayed graph only names are known.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from .report import markdown

_CALLS = 3
# by the kernel's name, then by the operator's; what matches nothing is elementwise
_KERNELS = (
    ("matmul", r"gemm|nvjet|cutlass|wgmma|xmma(?!.*fprop|.*dgrad|.*wgrad)|gemv|splitK"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("copies", r"^Memcpy|^Memset|copy|[Cc]at[AB_]|Cat|transpose|nchwToNhwc|nhwcToNchw"),
    ("conv", r"conv|fprop|dgrad|wgrad|im2col"),
    ("norm", r"[Nn]orm"),
    ("scan", r"selective|ssm_|cross_|walk|scan|ssd|mix_kernel|pair"),
)
_OPERATORS = (
    ("scan", r"scan|ssd|SelectiveScan|MambaInner|Cross"),
    ("conv", r"short_conv|causal_conv1d|convolution|_conv"),
    ("norm", r"[Nn]orm"),
    ("attention", r"attention|softmax"),
    ("matmul", r"aten::(mm|addmm|bmm|baddbmm|linear|matmul|addmv)$"),
    ("copies", r"aten::(copy_|_to_copy|to|clone|contiguous|cat|fill_|zero_|flip|zeros)$"),
)


@dataclass(frozen=True)
class Share:
    """Kernels of one family in one call: milliseconds, launches, the longest ones' names."""

    model: str
    passes: str
    mode: str
    implementation: str
    family: str
    ms: float
    launches: float
    longest: str


def family_of(kernel: str, operator: str = "") -> str:
    """Family of a kernel that `operator` launched.

    Our own scans and convolutions are told apart by their operators, as their kernels share names.
    """
    own = operator.removeprefix("scanweave::")
    if own != operator:
        for family, pattern in _OPERATORS:
            if re.search(pattern, own):
                return family
    for family, pattern in _KERNELS:
        if re.search(pattern, kernel):
            return family
    for family, pattern in _OPERATORS:
        if re.search(pattern, own):
            return family
    return "elementwise"


def shares_of(
    kernels: Iterable[tuple[str, str, float]], calls: int, labels: tuple[str, str, str, str]
) -> list[Share]:
    """Families of kernels (name, operator, microseconds) of several calls, longest first."""
    time: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    names: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for kernel, operator, us in kernels:
        family = family_of(kernel, operator)
        time[family] += us
        count[family] += 1
        names[family][f"{kernel[:60]} ({operator})" if operator else kernel[:60]] += us
    found = []
    for family in sorted(time, key=lambda f: -time[f]):
        longest = sorted(names[family].items(), key=lambda item: -item[1])[:6]
        text = "; ".join(f"{name} {us / 1e3 / calls:.3g}" for name, us in longest)
        ms, launches = time[family] / 1e3 / calls, count[family] / calls
        found.append(Share(*labels, family, ms, launches, text))
    return found


def profile_call(
    call: Callable[[], object], device: torch.device, labels: tuple[str, str, str, str]
) -> list[Share]:
    """Shares of the kernels of a call; none on a CPU.

    Args:
        call: What to profile, warmed up.
        device: Where it runs.
        labels: Model, pass, mode, implementation.
    """
    if device.type != "cuda":
        return []
    torch.cuda.synchronize(device)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize(device)
    kernels = [
        (kernel.name, event.name, float(kernel.duration))
        for event in profiler.events() or []
        for kernel in event.kernels
    ]
    return shares_of(kernels, _CALLS, labels)


def shares_table(shares: Sequence[Share]) -> str:
    """A table that pastes into a README: a line a family, a column an implementation and mode."""
    lines = []
    groups: dict[tuple[str, str, str, str], list[Share]] = {}
    for share in shares:
        key = (share.model, share.passes, share.implementation, share.mode)
        groups.setdefault(key, []).append(share)
    for key, parts in groups.items():
        total = sum(part.ms for part in parts)
        launches = sum(part.launches for part in parts)
        lines.append([*key, "all", f"{total:.2f}", "100", f"{launches:.0f}"])
        lines += [
            [*key, p.family, f"{p.ms:.2f}", f"{100 * p.ms / total:.0f}", f"{p.launches:.0f}"]
            for p in parts
        ]
    header = ["model", "pass", "implementation", "mode", "family", "ms", "%", "launches"]
    return markdown(header, lines)
