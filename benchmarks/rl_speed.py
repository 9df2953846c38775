"""Speed of acting and of training, at the sizes of the published Hopper model.

    OMP_NUM_THREADS=1 python -m benchmarks.rl_speed --csv benchmarks/results/rl_speed.csv
    python -m benchmarks.rl_speed --device cuda --clock wall --official decision-mamba

D 128, three blocks, K 20, 11 state channels, 3 actions, with action tokens and timestep table.

    protocol     one environment; the last K steps padded to K are read anew in every step, as
                 published, by our own model and kernels
    published    the published loop itself, its code imported (`--official`, see `rl_official.py`)
    window, ...  `Agent.act` with 1, 64 and 1024 environments in each of its modes
    updates      one training step on 64 windows: forward, backward, clipping, AdamW; with
                 `--compile MODE` also with the agent compiled, as `--train.compile MODE` does it

Acting is timed without an environment's own work, when windows are full. Everything that is
compared at a number of environments takes turns, call by call, so that a machine's other load is
the same for all of it. Seconds are the process's own time on its core where that is the only thread
(`--clock cpu`), so that a loaded machine distorts them little; the wall clock is what a latency
needs (`--clock wall`).

    Row              one figure
    Contestant       one way to act
    measure_acting   contestants -> seconds of their calls
    measure_updates  mixer -> seconds of updates
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

from .rl_official import Official, episode_seconds, load_official, update_seconds

STATE, ACTION, LENGTH = 11, 3, 20
MODES = ("window", "recurrent", "periodic", "staggered")
# CUDA graphs are recorded in the third
_WARM_UPDATES = 4


@dataclass(frozen=True)
class Row:
    """One figure.

    `per_second` counts environment steps or updates; `median_ms` and `p95_ms` are of one call.
    `to_protocol` and `to_published` divide `per_second` by that of one environment in the same
    turns, or by the published model's updates; 0 where that was not measured.
    """

    what: str
    envs: int
    per_second: float
    median_ms: float
    p95_ms: float
    bytes_per_env: int
    to_protocol: float
    to_published: float
    device: str
    torch: str


@dataclass(frozen=True)
class Contestant:
    """One way to act: `call` gives the seconds of one or more calls."""

    what: str
    envs: int
    call: Callable[[], list[float]]
    held: Callable[[], int] = int


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


def contestant(
    what: str, agent: Agent, mode: str, envs: int, clock: Callable[[], float]
) -> Contestant:
    """An agent with `envs` environments whose windows are full."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((8, envs, STATE)).astype(np.float32)
    rewards = rng.standard_normal((8, envs))
    agent.reset(num_envs=envs, mode=mode)
    done = 0

    def call() -> list[float]:
        nonlocal done
        began = clock()
        agent.act(states[done % 8], rewards[done % 8] if done else None)
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        done += 1
        return [clock() - began]

    for _ in range(LENGTH):
        call()
    return Contestant(what, envs, call, lambda: held_bytes(agent._memory) // envs)


def measure_acting(contestants: Sequence[Contestant], *, calls: int) -> list[list[float]]:
    """Seconds of each one's calls, which take turns."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(calls):
        for one, found in zip(contestants, seconds, strict=True):
            found += one.call()
    return seconds


def measure_updates(
    agent: Agent, *, calls: int, clock: Callable[[], float], batch: int = 64, compiled: str = ""
) -> list[float]:
    """Seconds of single updates on random episodes; `compiled` is a mode of `torch.compile`."""
    drawn = draw(agent.device.type, batch)
    agent.train()
    if compiled:
        agent.compile(mode=compiled)
    optimizer = torch.optim.AdamW(agent.parameters(), lr=1e-4)
    seconds = []
    for _ in range(calls + _WARM_UPDATES):
        began = clock()
        loss, _ = agent(drawn())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.25)
        optimizer.step()
        if agent.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return seconds[_WARM_UPDATES:]


def draw(device: str, batch: int = 64) -> Callable[[], dict[str, Tensor]]:
    """Batches of windows of random episodes."""
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

    def one() -> dict[str, Tensor]:
        drawn = windows.__getitems__(rng.integers(len(windows), size=batch).tolist())
        return {name: value.to(device) for name, value in drawn.items()}

    return one


def _ways(
    envs: int, device: str, clock: Callable[[], float], official: Official | None
) -> list[Contestant]:
    """All that is compared at one number of environments; one environment's own first."""
    ways = [contestant("act: protocol", make_agent(pad_mode="official", device=device),
                       "window", 1, clock)]  # fmt: skip
    if official is not None:
        ways.append(
            Contestant(
                f"act: published ({official.kind})",
                1,
                lambda: episode_seconds(official, STATE, steps=1, clock=clock),
            )
        )
    for mode in MODES:
        ways.append(contestant(f"act: {mode}", make_agent(device=device), mode, envs, clock))
        if device == "cuda" and mode != "window":
            agent = make_agent(device=device)
            agent.config.cuda_graph = True
            ways.append(contestant(f"act: {mode}, graph", agent, mode, envs, clock))
    return ways


def rows(
    counts: Sequence[int],
    *,
    calls: int,
    clock: Callable[[], float],
    device: str = "cpu",
    official: Official | None = None,
    batch: int = 64,
    compiled: str = "",
) -> Iterator[Row]:
    """All figures, one after the other; updates on `batch` windows, also `compiled` if not ""."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    place = name if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"

    def row(
        what: str,
        envs: int,
        seconds: Sequence[float],
        held: int,
        protocol: float,
        published: float,
    ) -> Row:
        ordered = sorted(1000 * value for value in seconds)
        median = statistics.median(ordered)
        worst = ordered[min(len(ordered) - 1, round(0.95 * len(ordered)))]
        rate = 1000 * max(envs, 1) / median
        return Row(
            what,
            envs,
            round(rate, 3 if rate < 10 else 1),
            round(median, 3),
            round(worst, 3),
            held,
            round(rate * protocol, 2),
            round(rate * published, 2),
            place,
            str(torch.__version__),
        )

    for envs in counts:
        ways = _ways(envs, device, clock, official)
        # a call for many rows is long, and its time varies less
        few = calls if envs == 1 else max(3, calls // (2 if envs < 256 else 16))
        seconds = measure_acting(ways, calls=few)
        protocol = statistics.median(seconds[0])
        published = 0.0 if official is None else statistics.median(seconds[1])
        for way, found in zip(ways, seconds, strict=True):
            yield row(way.what, way.envs, found, way.held(), protocol, published)
    published = 0.0
    if official is not None:
        drawn = draw(device, batch)()
        found = update_seconds(official, drawn, calls=max(2, calls // 20), clock=clock)
        published = statistics.median(found)
        yield row(f"update: published ({official.kind})", 0, found, 0, 0.0, published)
    for mode in ("", compiled) if compiled else ("",):
        for mixer in ("mamba", "attention", "mamba2", "gated_cnn"):
            trained = make_agent(mixer, device=device)
            few = max(3, calls // 4)
            found = measure_updates(trained, calls=few, clock=clock, batch=batch, compiled=mode)
            what = f"update: {mixer}" + (f", compiled {mode}" if mode else "")
            yield row(what, 0, found, 0, 0.0, published)


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
    add("--official", type=Path, help="checkout of the published code, to be timed beside")
    add("--compile", default="", help="mode of torch.compile that updates are also timed with")
    add("--csv", type=Path)
    options = parser.parse_args(given)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    found = []
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    sys.stdout.write(f"clock {options.clock}; load of the machine {load}\n")
    official = None
    if options.official:
        official = load_official(
            options.official, state_dim=STATE, act_dim=ACTION, length=LENGTH, device=options.device
        )
    given_rows = rows(
        options.envs,
        calls=options.calls,
        clock=clock,
        device=options.device,
        official=official,
        compiled=options.compile,
    )
    for row in given_rows:
        found.append(row)
        sys.stdout.write(
            f"{row.what:28} {row.envs:5} {row.per_second:10.1f}/s {row.median_ms:9.3f} ms "
            f"(p95 {row.p95_ms:.3f})  {row.bytes_per_env} B  "
            f"x{row.to_protocol} x{row.to_published}\n"
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
