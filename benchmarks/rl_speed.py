"""Speed of acting and of training on a CPU, at the sizes of the published Hopper model.

    OMP_NUM_THREADS=1 python -m benchmarks.rl_speed --csv benchmarks/results/rl_speed.csv

D 128, three blocks, K 20, 11 state channels, 3 actions, with action tokens and timestep table.

    official     one environment; the last K steps padded to K are read anew in every step
    window, ...  `Agent.act` with 1, 64 and 1024 environments in each of its modes
    updates      one training step on 64 windows: forward, backward, clipping, AdamW

Acting is timed without an environment's own work, after the windows are full. Both sides run the
same kernels, so the ratio is that of the ways to act. Seconds are the process's own time on its
core where that is the only thread (`--clock cpu`), so that a loaded machine distorts them little;
the wall clock is what a latency needs (`--clock wall`).

    Row              one figure
    measure_acting   mode, environments -> steps per second, latency, bytes per environment
    measure_updates  mixer -> updates per second
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scanweave.rl import Agent, AgentConfig, DecisionMamba, Episode, TrajectoryWindows

STATE, ACTION, LENGTH = 11, 3, 20
MODES = ("window", "recurrent", "periodic", "staggered")


@dataclass(frozen=True)
class Row:
    """One figure.

    `per_second` counts environment steps or updates; `median_ms` and `p95_ms` are of one call.
    """

    what: str
    envs: int
    per_second: float
    median_ms: float
    p95_ms: float
    bytes_per_env: int
    device: str
    torch: str


def make_agent(mixer: str = "mamba", *, pad_mode: str = "masked", device: str = "cpu") -> Agent:
    """An untrained agent of the published size."""
    torch.manual_seed(0)
    model = DecisionMamba(STATE, ACTION, 128, 3, LENGTH, mixer=mixer)
    config = AgentConfig(targets=[1.0], pad_mode=pad_mode)
    return Agent(model, config).to(device).eval()


def held_bytes(thing: object, seen: set[int] | None = None) -> int:
    """Bytes of the tensors that an agent's memory holds, without the model's."""
    seen = set() if seen is None else seen
    if isinstance(thing, nn.Module) or id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return thing.numel() * thing.element_size()
    parts: Sequence[object] = ()
    if isinstance(thing, dict):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = thing
    elif hasattr(thing, "__dict__"):
        parts = list(vars(thing).values())
    return sum(held_bytes(part, seen) for part in parts)


def measure_acting(
    agent: Agent, mode: str, envs: int, *, calls: int, clock: Callable[[], float]
) -> tuple[list[float], int]:
    """Seconds of single `act` calls with full windows, and bytes held per environment."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((8, envs, STATE)).astype(np.float32)
    rewards = rng.standard_normal((8, envs))
    agent.reset(num_envs=envs, mode=mode)
    seconds = []
    for t in range(LENGTH + calls):
        began = clock()
        agent.act(states[t % 8], rewards[t % 8] if t else None)
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return seconds[LENGTH:], held_bytes(agent._memory) // envs


def measure_updates(
    agent: Agent, *, calls: int, clock: Callable[[], float], batch: int = 64
) -> list[float]:
    """Seconds of single updates on random episodes."""
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            rng.standard_normal((200, STATE)),
            rng.uniform(-1, 1, (200, ACTION)),
            rng.standard_normal(200),
        )
        for _ in range(8)
    ]
    windows = TrajectoryWindows(episodes, LENGTH)
    agent.train()
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-4)
    seconds = []
    for _ in range(calls + 2):
        began = clock()
        drawn = windows.__getitems__(rng.integers(len(windows), size=batch).tolist())
        loss, _ = agent({name: value.to(agent.device) for name, value in drawn.items()})
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.25)
        optimizer.step()
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return seconds[2:]


def rows(
    counts: Sequence[int], *, calls: int, clock: Callable[[], float], device: str = "cpu"
) -> Iterator[Row]:
    """All figures, one after the other."""

    def row(what: str, envs: int, seconds: Sequence[float], held: int) -> Row:
        ordered = sorted(1000 * value for value in seconds)
        median = statistics.median(ordered)
        worst = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        place = name if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
        rate = 1000 * max(envs, 1) / median
        return Row(
            what,
            envs,
            round(rate, 1),
            round(median, 3),
            round(worst, 3),
            held,
            place,
            str(torch.__version__),
        )

    official = make_agent(pad_mode="official", device=device)
    seconds, held = measure_acting(official, "window", 1, calls=calls, clock=clock)
    yield row("act: official", 1, seconds, held)
    agent = make_agent(device=device)
    for mode in MODES:
        for envs in counts:
            # a call for many rows is long, and its time varies less
            few = calls if envs == 1 else max(3, calls // (4 if envs < 256 else 16))
            seconds, held = measure_acting(agent, mode, envs, calls=few, clock=clock)
            yield row(f"act: {mode}", envs, seconds, held)
    for mixer in ("mamba", "attention", "mamba2", "gated_cnn"):
        trained = make_agent(mixer, device=device)
        seconds = measure_updates(trained, calls=max(3, calls // 4), clock=clock)
        yield row(f"update: {mixer}", 0, seconds, 0)


def main(given: Sequence[str] | None = None) -> list[Row]:
    """Measure, print as it goes, write the CSV."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl_speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--envs", type=int, nargs="+", default=[1, 64, 1024])
    add("--calls", type=int, default=60, help="timed calls of each kind")
    add("--clock", choices=("cpu", "wall"), default="cpu")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--csv", type=Path)
    options = parser.parse_args(given)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    found = []
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    sys.stdout.write(f"clock {options.clock}; load of the machine {load}\n")
    for row in rows(options.envs, calls=options.calls, clock=clock, device=options.device):
        found.append(row)
        sys.stdout.write(
            f"{row.what:18} {row.envs:5} {row.per_second:10.1f}/s {row.median_ms:9.3f} ms "
            f"(p95 {row.p95_ms:.3f})  {row.bytes_per_env} B\n"
        )
        sys.stdout.flush()
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in found)
    return found


if __name__ == "__main__":
    main()
