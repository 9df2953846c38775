"""Measure graph layers: `python -m benchmarks.graph batches`, `... growth`; see the README.

    batches      one layer on a batch of graphs: packed, padded, and PyG's GPS layers
    growth       one layer on one graph of 500 to 1,000,000 nodes, and the exponent of its growth
    plot         time and memory of `growth` over the number of nodes
    operations   how many operators those layers run

Every implementation is compared with a float64 copy of itself first, output and gradients, and the
padded layer with the packed one in float64; one that is off is not timed.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .graph_batches import SETS, GraphBatch, one_graph, set_batch
from .graph_layers import CHANNELS, GROWING, LAYERS, STATE, operations, too_large
from .report import Environment, Row, environment, markdown, version, write_csv
from .timing import graph_time, measure, peak_memory

PASSES = {"inference": "forward", "training": "forward+backward"}
SIZES = (500, 2_000, 10_000, 50_000, 200_000, 1_000_000)
# a layer rounds in several places, float32 without TF32; padding that leaks shows at 3e-5 and more
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.05}
# of five million ReLUs a few have inputs that round to the other side of zero: their gradients
# differ as a whole, which is 1e-3 of all
GRADIENT_LIMITS = {torch.float32: 5e-3, torch.bfloat16: 0.3}
# float64 runs step by step on the CPU: it checks as many graphs of a batch as have so many nodes
CHECKED_NODES = 3_000
# graphs that a fitted line starts at: launches take most of the time below
FITTED_NODES = 50_000
_PROFILED = 5


def _call(model: nn.Module, x: Tensor, passes: str, dtype: torch.dtype) -> Callable[[], object]:
    """A pass of a layer, output or gradients, in autocast for 16-bit types."""
    half = dtype != torch.float32
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)

    def run() -> Tensor:
        with torch.autocast(x.device.type, dtype, half):
            return model(x)

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad((run() * weight).sum(), leaves, allow_unused=True)

    def inference() -> Tensor:
        with torch.no_grad():
            return run()

    return training if passes == PASSES["training"] else inference


def _relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.cpu().double(), wanted.cpu().double()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def _results(model: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output, gradient of x and those of all parameters in one row, in training mode.

    In one row, because some are zero but for rounding, such as that of a bias before a norm.
    """
    model.train()
    grads = _call(model, x, PASSES["training"], dtype)()
    out = _call(model, x, PASSES["inference"], dtype)()
    assert isinstance(out, Tensor)
    assert isinstance(grads, tuple)
    rows = [grad.flatten() for grad in grads[1:] if grad is not None]
    return [out, grads[0], torch.cat([x.new_empty(0), *rows])]


def check(model: nn.Module, exact: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Relative error of the output, and the largest of gradients, against a float64 module."""
    wide = x.detach().cpu().double().requires_grad_()
    wanted = _results(exact, wide, torch.float32)
    found = _results(model, x, dtype)
    out, *grads = (_relative(a, b) for a, b in zip(found, wanted, strict=True))
    return out, max(grads)


def say(text: str) -> None:
    """Write a line at once: a run that is cut short has said what it measured."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Run:
    """One command's settings, and what it has measured.

    Args:
        device: Where to run.
        dtype: Of the activations.
        names: Implementations.
        out: CSV to append to, after every row.
        toy: Two samples of each.
        deadline: By the monotonic clock; nothing is started after it.
        commit: What to write where there is no git checkout.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        names: Sequence[str],
        out: Path | None,
        toy: bool,
        deadline: float = math.inf,
        commit: str | None = None,
    ):
        self.device, self.dtype, self.names, self.out, self.toy = device, dtype, names, out, toy
        self.deadline = deadline
        self.where: Environment = environment(device, commit)
        self.rows: list[Row] = []
        self.wrong: list[str] = []

    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def emit(self, row: Row) -> None:
        """Keep a row, write it, show it."""
        self.rows.append(row)
        if self.out is not None:
            write_csv(self.out, self.where, [row])
        time_ = time_of(row)
        shown = row.note if time_ is None else f"{time_:,.0f} us, {row.peak_mb} MB"
        say(f"{row.shape} {row.passes} {row.implementation}: {shown}")

    def measure(self, op: str, batch: GraphBatch) -> None:
        """Check and time every implementation on one batch."""
        batch = batch.to(self.device)
        kind = str(self.dtype).removeprefix("torch.")
        sizes = (batch.num_graphs, batch.nodes, CHANNELS, STATE)
        x = torch.randn(batch.nodes, CHANNELS, generator=torch.Generator().manual_seed(0))
        x = x.to(self.device).requires_grad_()
        for name in self.names:
            if self.late():
                return
            package = "torch_geometric" if name.startswith("GPS") else "scanweave"
            row = Row(op, batch.name, *sizes, kind, "", name, version(package))
            if too_large(name, batch, self.device):
                self.emit(replace(row, passes=PASSES["inference"], note="not tried: quadratic"))
                continue
            try:
                self._one(row, batch, x)
            except Exception as reason:
                if package == "scanweave":
                    raise
                # foreign code on a platform or in a dtype that it may not know raises anything
                self.emit(replace(row, passes=PASSES["inference"], note=f"fails: {_line(reason)}"))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _one(self, row: Row, batch: GraphBatch, x: Tensor) -> None:
        name = row.implementation
        torch.manual_seed(0)
        model = LAYERS[name](batch).to(self.device)
        error, by = None, ""
        part = batch.first(CHECKED_NODES)
        if part.num_graphs:
            # padding must change nothing: the packed layer in float64 is what both should give
            twin = name.replace("padded", "packed")
            exact = LAYERS[twin](part.to(torch.device("cpu")))
            state = {k.replace("mixer.mixer.", "mixer."): v for k, v in model.state_dict().items()}
            exact.load_state_dict(state)
            small = LAYERS[name](part).to(self.device)
            small.load_state_dict(model.state_dict())
            by = f"{twin}, float64"
            own = x.detach()[: part.nodes].requires_grad_()
            error, slope = check(small, exact.double(), own, self.dtype)
            if not (error <= LIMITS[self.dtype] and slope <= GRADIENT_LIMITS[self.dtype]):
                note = f"not timed: off by {error:.2g} (gradients {slope:.2g}) from {by}"
                self.wrong.append(f"{batch.name} {name} {note}")
                self.emit(replace(row, passes=PASSES["inference"], note=note))
                return
        for mode, passes in PASSES.items():
            model.train(mode == "training")
            call = _call(model, x, passes, self.dtype)
            try:
                found = measure({name: call}, self.device, self.toy)[name]
            except torch.OutOfMemoryError:
                self.emit(replace(row, passes=passes, note="out of memory"))
                continue
            kernel, graph, notes = None, None, [batch.source]
            if self.device.type == "cuda":
                kernel = _tried("kernel time", lambda: kernel_time(call), notes)  # noqa: B023
                if row.op == "graph_batch":
                    graph = _tried("graph", lambda: graph_time(call, self.device), notes)  # noqa: B023
            self.emit(
                replace(
                    row,
                    passes=passes,
                    median_us=found.median,
                    p20_us=found.p20,
                    p80_us=found.p80,
                    samples=found.samples,
                    cpu_us=found.cpu,
                    kernel_us=kernel,
                    graph_us=graph,
                    peak_mb=peak_memory(call, self.device),
                    error=error,
                    checked_by=by,
                    note="; ".join(notes),
                )
            )


def kernel_time(call: Callable[[], object]) -> float:
    """Mean over calls of the sum of their kernels' times, in microseconds.

    `timing.kernel_time` marks calls by a kernel that these layers use themselves (their hashes
    are exclusive ors), so calls are not told apart here, and the caches stay warm.

    Raises:
        RuntimeError: the profiler saw no kernel.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(_PROFILED):
            call()
        torch.cuda.synchronize()
    times = [
        event.time_range.elapsed_us()
        for event in profiler.events() or []
        if event.device_type.name == "CUDA"
    ]
    if not sum(times):
        raise RuntimeError("the profiler saw no kernel")
    return sum(times) / _PROFILED


def _tried(what: str, function: Callable[[], float], notes: list[str]) -> float | None:
    """A time, or None and why in `notes`."""
    try:
        return function()
    except RuntimeError as reason:
        notes.append(f"no {what}: {_line(reason)}")
        return None


def _line(reason: Exception) -> str:
    return (str(reason).strip() or type(reason).__name__).splitlines()[0][:80]


def time_of(row: Row) -> float | None:
    """Microseconds: of kernels on a GPU, of the processor on a CPU that others use too."""
    return row.kernel_us or row.cpu_us or row.median_us


def exponents(rows: Sequence[Row], start: int = FITTED_NODES) -> list[tuple[str, str, str, float]]:
    """Slope of log value over log nodes by least squares: 1 is linear.

    Args:
        rows: Rows of `growth`.
        start: Graphs with fewer nodes are left out, unless fewer than three sizes remain.

    Returns:
        Implementation, pass, `time` or `memory`, slope.
    """
    found = []
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.op == "graph_growth" and time_of(row) is not None:
            groups.setdefault((row.implementation, row.passes), []).append(row)
    for (name, passes), group in groups.items():
        used = [row for row in group if row.length >= start]
        used = used if len(used) >= 3 else group[-3:]
        for what, value in (("time", time_of), ("memory", lambda row: row.peak_mb)):
            points = [(row.length, value(row)) for row in used]
            points = [(math.log(n), math.log(v)) for n, v in points if v]
            if len(points) > 1:
                found.append((name, passes, what, _slope(points)))
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def table(rows: Sequence[Row]) -> str:
    """Rows as they stand in the README: inference / training."""
    times = "processor, ms" if any(row.cpu_us for row in rows) else "kernels, ms"
    header = [
        "batch",
        "implementation",
        times,
        "clock, ms",
        "graph, ms",
        "million nodes/s",
        "peak MB",
    ]
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.median_us is not None:
            groups.setdefault((row.shape, row.implementation), {})[row.passes] = row
    lines = []
    for (shape, name), found in groups.items():
        cells = []
        kinds: tuple[Callable[[Row], float | None], ...] = (
            lambda r: (r.kernel_us or r.cpu_us or 0) / 1e3 or None,
            lambda r: r.median_us and r.median_us / 1e3,
            lambda r: r.graph_us and r.graph_us / 1e3,
            lambda r: r.length / (time_of(r) or math.inf) or None,
            lambda r: r.peak_mb,
        )
        cells = [
            " / ".join("-" if (v := kind(r)) is None else f"{v:,.3g}" for r in found.values())
            for kind in kinds
        ]
        lines.append([shape, name, *cells])
    return markdown(header, lines)


def operations_table(names: Sequence[str], batch: GraphBatch, device: torch.device) -> str:
    """Operators of a call of each layer: inference / training, forward and backward."""
    x = torch.randn(batch.nodes, CHANNELS, device=device, requires_grad=True)
    lines = []
    for name in names:
        model = LAYERS[name](batch).to(device)
        counts = []
        for mode, passes in PASSES.items():
            model.train(mode == "training")
            counts.append(str(operations(_call(model, x, passes, torch.float32))))
        lines.append([name, " / ".join(counts)])
    return markdown(["layer", "operators, inference / training"], lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graph", description=__doc__)
    parser.add_argument("what", choices=["batches", "growth", "plot", "operations"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--toy", action="store_true", help="sizes that cost nothing")
    parser.add_argument("--data-dir", type=Path, help="folder with the real sets' files")
    parser.add_argument("--layers", help=f"only these, with ; between: {'; '.join(LAYERS)}")
    parser.add_argument("--sets", default="peptides,proteins", help="of batches")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="nodes, of growth")
    parser.add_argument("--seconds", type=float, help="start nothing after so many")
    parser.add_argument("--out", type=Path, help="CSV to append to; of plot, the CSV to read")
    parser.add_argument("--commit", help="commit to write where there is no git checkout")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 if a check failed."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.what == "plot":
        if args.out is None:
            parser.error("--out must name the CSV to draw, got none")
        from .graph_plot import save

        sys.stdout.write(f"{save(args.out)}\n")
        return 0
    device = torch.device(args.device)
    names: Sequence[str] = GROWING if args.what == "growth" else list(LAYERS)
    if args.layers is not None:
        names = [name.strip() for name in args.layers.split(";")]
    if wrong := set(names) - set(LAYERS):
        parser.error(f"--layers must be among {'; '.join(LAYERS)}, got {sorted(wrong)}")
    if args.what == "operations":
        batch = set_batch(SETS["peptides"], 4 if args.toy else 128, args.data_dir).to(device)
        say(operations_table(names, batch, device))
        return 0
    deadline = math.inf if args.seconds is None else time.monotonic() + args.seconds
    run = Run(device, getattr(torch, args.dtype), names, args.out, args.toy, deadline, args.commit)
    if args.what == "batches":
        for name in args.sets.split(","):
            batch = set_batch(SETS[name], 4 if args.toy else 128, args.data_dir)
            say(f"{batch.name}: {batch.nodes} nodes, padding {batch.padding:.0%}, {batch.source}")
            run.measure("graph_batch", batch)
    else:
        for nodes in (50, 100, 200) if args.toy else SIZES:
            if nodes <= args.largest:
                run.measure("graph_growth", one_graph(nodes))
    say(table(run.rows))
    for name, passes, what, slope in exponents(run.rows):
        say(f"{name} {passes}: {what} grows with n^{slope:.2f}")
    for line in run.wrong:
        say(line)
    return 1 if run.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
