"""Draw results: `python -m benchmarks.plot benchmarks/results/h100.csv`, a figure beside the CSV.

One line per op and shape, one panel per pass, time to the right on a logarithmic scale: scanweave,
other packages and the floor. Numbers say how many times as long the fastest other package takes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Row, ratio, read_csv

OURS = "scanweave"
# Okabe and Ito's palette, which colour-blind readers tell apart; shapes repeat the difference
STYLES = (("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^"), ("#e69f00", "v"), ("#56b4e9", "P"))
BLUE, GREY, PALE = "#0072b2", "#555555", "#dddddd"
TITLES = {"forward": "forward", "forward+backward": "forward and backward"}
SHORT = {
    "selective_scan": "scan",
    "bidirectional_selective_scan": "both directions",
    "path_selective_scan": "four paths",
    "selective_scan_step": "step",
    "causal_conv1d": "convolution",
    "bidirectional_conv": "convolutions, both directions",
    "causal_conv1d_step": "convolution, step",
    "gated_linear_scan_step": "SSD, step",
    "ssd": "SSD",
    "bidirectional_ssd": "SSD, both directions",
    "gated_linear_attention": "Gated linear attention",
    "rwkv6": "RWKV-6",
    "rms_norm_gated": "gated norm",
    "layer_norm": "sum and layer norm",
    "rms_norm": "sum and RMS norm",
    "linear_scan": "linear scan",
}

# label of a line -> passes -> implementation -> its last row
Lines = dict[str, dict[str, dict[str, Row]]]


def lines(rows: Sequence[Row]) -> Lines:
    """Rows by the line of the figure that shows them; of a repeated measurement the last."""
    found: Lines = {}
    # ops in the order of this table, others after them
    order = list(SHORT)
    for row in sorted(rows, key=lambda r: order.index(r.op) if r.op in order else len(order)):
        if row.time_us is None:
            continue
        size = f"{row.batch}x{row.length}x{row.dim}" + (f", N{row.state}" if row.state else "")
        label = f"{SHORT.get(row.op, row.op)} {row.shape.removeprefix('step_')} ({size})"
        found.setdefault(label, {}).setdefault(row.passes, {})[row.implementation] = row
    return {
        label: passes for label, passes in found.items() if any(OURS in p for p in passes.values())
    }


def _panel(axes: Any, found: Lines, passes: str, colours: dict[str, tuple[str, str]]) -> None:
    for y, cells in enumerate(found.values()):
        rows = cells.get(passes, {})
        own = rows.get(OURS)
        if own is None or own.time_us is None:
            continue
        others = {n: r for n, r in rows.items() if n != OURS and r.time_us is not None}
        if own.floor_us is not None:
            axes.plot(own.floor_us, y, "|", color=GREY, markersize=13, markeredgewidth=2)
        for name, row in others.items():
            colour, marker = colours[name]
            axes.plot(row.time_us, y, marker, color=colour, markersize=7)
        if others:
            best = min(others.values(), key=lambda r: ratio(r, own) or 0.0)
            axes.plot([own.time_us, best.time_us], [y, y], color=PALE, linewidth=3, zorder=0)
            right = max(r.time_us or 0.0 for r in (own, *others.values()))
            axes.annotate(
                *(f"{ratio(best, own):.1f}x", (right, y)),
                **{"xytext": (8, 0), "textcoords": "offset points", "va": "center"},
                **{"fontsize": 9, "color": GREY},
            )
        axes.plot(own.time_us, y, "o", color=BLUE, markersize=8, zorder=3)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_title(TITLES.get(passes, passes), loc="left", fontsize=11)
    axes.set_xlabel("microseconds")
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw(rows: Sequence[Row], title: str) -> Any:
    """The figure.

    Raises:
        ValueError: there is no timed row of ours.
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError(
            "benchmarks.plot needs matplotlib: pip install 'scanweave[train]'"
        ) from error
    found = lines(rows)
    if not found:
        raise ValueError(f"rows must hold times of {OURS}, got {len(rows)} rows without")
    passes = [p for p in TITLES if any(p in cells for cells in found.values())]
    names = sorted({n for c in found.values() for p in c.values() for n in p} - {OURS})
    colours = {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}
    # so that the same rows give the same file
    matplotlib.rcParams["svg.hashsalt"] = OURS
    figure = Figure(figsize=(13, 1.7 + 0.34 * len(found)), layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, passes, strict=True):
        _panel(axes, found, name, colours)
    panels[0].set_yticks(range(len(found)), list(found), fontsize=9)
    panels[0].set_ylim(len(found) - 0.4, -0.6)
    keys = [Line2D([], [], color=BLUE, marker="o", linestyle="", label=OURS)]
    keys += [
        Line2D([], [], color=c, marker=m, linestyle="", label=n) for n, (c, m) in colours.items()
    ]
    floor = {"color": GREY, "marker": "|", "markersize": 12, "markeredgewidth": 2}
    keys.append(Line2D([], [], linestyle="", label="floor of the hardware", **floor))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="default: the CSV's name, ending in .svg")
    parser.add_argument("--ops", help="only these, with commas between")
    args = parser.parse_args(arguments)
    rows = read_csv(args.csv)
    if args.ops is not None:
        wanted = set(args.ops.split(","))
        if wanted - {row.op for row in rows}:
            parser.error(f"--ops must be among {sorted({row.op for row in rows})}, got {args.ops}")
        rows = [row for row in rows if row.op in wanted]
    kinds = ", ".join(dict.fromkeys(row.dtype for row in rows if row.time_us is not None))
    figure = draw(rows, f"{device_of(args.csv)}, {kinds}; times of kernels where they are known")
    out = args.out or args.csv.with_suffix(".svg")
    # the date would differ for the same rows
    metadata = {"Date": None} if out.suffix == ".svg" else {}
    figure.savefig(out, dpi=150, metadata=metadata)
    sys.stdout.write(f"{out}\n")
    return 0


def device_of(path: Path) -> str:
    """Devices that the rows of a CSV were measured on."""
    import csv

    with path.open(newline="") as file:
        return ", ".join(dict.fromkeys(line["device"] for line in csv.DictReader(file)))


if __name__ == "__main__":
    sys.exit(main())
