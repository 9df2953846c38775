"""Measure ops: `python -m benchmarks.run <op>`; see benchmarks/README.md.

Every op is compared with float64 first, outputs and gradients, on the very inputs that are timed.
One that is off is not timed, and the run ends with exit code 1.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import against
from .accuracy import beyond, measure_accuracy
from .check import BLOCK_FACTOR, PEER_FACTOR, CheckError, errors, exact, output_gradient, require
from .floor import Ceilings, Work, ceilings
from .ops import OPS, Op
from .peers import PEERS, Prepared, Skip, ours
from .report import (
    AccuracyRow,
    Environment,
    Row,
    accuracy_table,
    by_op,
    environment,
    markdown,
    skipped,
    table,
    version,
    write_csv,
)
from .shapes import Shape, shapes_of
from .timing import graph_time, kernel_time, measure, peak_memory

FORWARD, BOTH = "forward", "forward+backward"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS = "scanweave"


def _passes(op: Op, prepared: Prepared, dout: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed of an implementation."""
    leaves = list(prepared.leaves.values())

    def forward() -> None:
        with torch.no_grad(), prepared.context():
            prepared.call()

    def both() -> None:
        with prepared.context():
            torch.autograd.grad(prepared.call(), leaves, gradient)

    passes: dict[str, Callable[[], object]] = {FORWARD: forward}
    if op.backward:
        gradient = prepared.to(dout)
        passes[BOTH] = both
    return passes


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _without_launches(
    call: Callable[[], object], device: torch.device, small: bool, about: float
) -> tuple[float | None, float | None, str]:
    """Kernels' time and a graph's replay on a GPU, and what could not be measured."""
    wanted: dict[str, Callable[[], float]] = {}
    if device.type == "cuda":
        wanted["kernel time"] = lambda: kernel_time(call, device, about)
        if small:
            wanted["graph"] = lambda: graph_time(call, device)
    found: dict[str, float] = {}
    notes = []
    for name, function in wanted.items():
        try:
            found[name] = function()
        except RuntimeError as reason:
            notes.append(f"no {name}: {_first_line(reason)}")
    return found.get("kernel time"), found.get("graph"), "; ".join(notes)


def measure_shape(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rates: Ceilings,
    *,
    peers: Collection[str] | None = None,
    toy: bool = False,
) -> list[Row]:
    """Check, then time an op and its peers on one shape; `peers` are names, None is all.

    Raises:
        CheckError: our op disagrees with float64; nothing was timed then.
    """
    inputs = op.make(shape, dtype, device)
    dout = output_gradient(op, inputs)
    reference = exact(op, inputs, dout)
    block = BLOCK_FACTOR if op.name == "mixer" else 1.0
    own = ours(op, inputs)
    found = {OURS: own}
    error = {OURS: require(errors(reference, own, dout), dtype, block)}
    notes: dict[str, str] = {}
    versions = {OURS: version("scanweave")}
    for peer in PEERS[op.name]:
        if peers is not None and peer.name not in peers:
            continue
        versions[peer.name] = version(peer.package)
        try:
            prepared = peer.prepare(op, inputs)
            wrong = errors(reference, prepared, dout)
            factor = 1.0 if peer.package == OURS else PEER_FACTOR
            error[peer.name] = require(wrong, dtype, block * factor)
            found[peer.name] = prepared
        except Skip as reason:
            if reason.args:
                notes[peer.name] = f"skipped: {reason}"
        except CheckError as reason:
            notes[peer.name] = f"not timed: {reason}"
        except Exception as reason:
            # foreign code on a platform that it may not know raises anything
            notes[peer.name] = f"fails: {_first_line(reason)}"
    by = reference.by
    del reference
    calls = {name: _passes(op, prepared, dout) for name, prepared in found.items()}
    rows = []
    shared = (op.name, shape.name, shape.batch, shape.length, shape.dim, shape.state)
    kind = str(dtype).removeprefix("torch.")
    for name, note in notes.items():
        rows.append(Row(*shared, kind, FORWARD, name, versions[name], note=note))
    work = None if op.work is None else op.work(shape, dtype)
    measured = []
    for passes in calls[OURS]:
        times = measure({name: calls[name][passes] for name in calls}, device, toy)
        for name, time in times.items():
            call = calls[name][passes]
            kernel, graph, note = _without_launches(call, device, shape.small, time.median)
            best = time.median if kernel is None else kernel
            needed = () if work is None else work[: 1 + (passes == BOTH)]
            moved = sum(needed, Work(0, 0)).bytes
            floor = rates.floor_us(*needed) if needed else None
            measured.append(
                Row(
                    *(*shared, kind, passes, name, versions[name]),
                    *(time.median, time.p20, time.p80, time.samples, time.cpu, kernel, graph),
                    peak_mb=peak_memory(call, device),
                    gb_s=moved / best / 1e3 if needed else None,
                    floor_us=floor,
                    floor_fraction=None if floor is None else floor / best,
                    error=error[name],
                    checked_by=by,
                    note=note,
                )
            )
    # ours first, a peer's two passes together, skipped peers last
    order = {name: i for i, name in enumerate(calls)}
    measured.sort(key=lambda row: order[row.implementation])
    return measured + rows


def measure_op(
    op: Op,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: torch.device,
    rates: Ceilings,
    *,
    peers: Collection[str] | None = None,
    toy: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Row], list[str]]:
    """Rows of every shape that passes its check, and a line for every one that does not."""
    rows: list[Row] = []
    refused = []
    for shape in shapes:
        say(f"{op.name} {shape.name}")
        try:
            rows += measure_shape(op, shape, dtype, device, rates, peers=peers, toy=toy)
        except CheckError as reason:
            refused.append(f"{op.name} {shape.name}: not timed, {reason}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, refused


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("op", choices=[*OPS, "accuracy", "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--toy", action="store_true", help="every shape at a size that costs nothing"
    )
    parser.add_argument("--shapes", help="only these, by name, with commas between")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--no-peers", action="store_true", help="do not measure other packages")
    parser.add_argument("--peers", help="only these other packages, by name, with commas between")
    parser.add_argument("--out", type=Path, help="CSV to append to; accuracy goes beside it")
    parser.add_argument("--against", metavar="REF", help="also measure core as of this git ref")
    parser.add_argument("--commit", help="commit to write where there is no git checkout")
    return parser


def _show(rows: Sequence[Row]) -> None:
    """The compact table: one per op, and one line for the peers that did not run."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for op, part in by_op(rows).items():
            print(f"\n{op}\n{markdown(*table(part))}")
    else:
        # files and pipes are not 80 columns wide
        console = Console(width=None if sys.stdout.isatty() else 200)
        for op, part in by_op(rows).items():
            header, lines = table(part)
            shown = Table(box=None, header_style="bold", title=op, title_justify="left")
            for name in header:
                shown.add_column(name, no_wrap=True)
            last = ""
            for line in lines:
                # a shape that repeats the line above says nothing
                shown.add_row("" if line[0] == last else line[0], *line[1:])
                last = line[0]
            console.print(shown)
    for line in skipped(rows):
        print(line)


def _write(
    out: Path | None, where: Environment, rows: list[Row], errors_: list[AccuracyRow]
) -> None:
    if out is None:
        return
    write_csv(out, where, rows)
    write_csv(out.with_suffix(".accuracy.csv"), where, errors_)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 if a check failed."""
    parser = _parser()
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device must be available here, got {args.device}")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    names = list(OPS) if args.op == "all" else [n for n in OPS if n == args.op]
    wanted = None if args.shapes is None else set(args.shapes.split(","))
    chosen = {
        name: [
            s for s in shapes_of(name, device.type, args.toy) if wanted is None or s.name in wanted
        ]
        for name in names
    }
    if wanted is not None:
        known = {s.name for name in names for s in shapes_of(name, device.type, args.toy)}
        if wanted - known:
            parser.error(f"--shapes must be among {sorted(known)}, got {sorted(wanted - known)}")
    peers = None if args.peers is None else set(args.peers.split(","))
    if peers is not None:
        named = {peer.name for name in names for peer in PEERS[name]}
        if peers - named:
            parser.error(f"--peers must be among {sorted(named)}, got {sorted(peers - named)}")
    if args.no_peers:
        peers = set()
    where = environment(device, args.commit)
    print(
        f"{where.device}, {where.threads} threads, torch {where.torch}, triton {where.triton}, "
        f"commit {where.commit}, load {where.load}"
    )
    rows: list[Row] = []
    refused: list[str] = []
    if names:
        rates = ceilings(device, args.toy)
        known = f"{rates.exponentials / 1e12:.3g} T" if rates.exponentials else "unknown"
        print(f"ceilings: copy {rates.bytes / 1e9:.4g} GB/s, exponentials a second {known}")
        for name in names:
            found, failed = measure_op(
                *(OPS[name], chosen[name], dtype, device, rates),
                peers=peers,
                toy=args.toy,
                say=lambda text: print(text, file=sys.stderr),
            )
            rows += found
            refused += failed
    accuracy: list[AccuracyRow] = []
    if args.op in ("accuracy", "all"):
        accuracy = list(measure_accuracy(device, args.toy))
        print(markdown(*accuracy_table(accuracy)))
        refused += [f"accuracy: {row}" for row in beyond(accuracy)]
    _write(args.out, where, rows, accuracy)
    if args.against and rows:
        older = against.measure(args, rows)
        rows = against.merge(rows, older)
    if rows:
        _show(rows)
    for line in refused:
        print(line, file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
