"""Draw images a second: `python -m benchmarks.vision_plot benchmarks/results/vision_h200.csv`.

One row of bars a model, one panel for inference and one for training; every implementation in the
mode that is its fastest. Numbers beside ours say how many times the official rate that is.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plot import BLUE, GREY, OURS, PALE, device_of

ORANGE, LIGHT = "#d55e00", "#999999"
COLOURS = {OURS: BLUE, "official": ORANGE, "timm": LIGHT}


@dataclass(frozen=True)
class Bar:
    """The fastest mode of one implementation."""

    rate: float
    mode: str


# model -> pass -> implementation -> its bar
Bars = dict[str, dict[str, dict[str, Bar]]]


def bars(path: Path) -> Bars:
    """Fastest modes in a CSV of `benchmarks.vision`; of a repeated measurement the last."""
    last: dict[tuple[str, str, str, str], float] = {}
    names: dict[str, str] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["images_s"]:
                key = (line["model"], line["passes"], line["implementation"], line["mode"])
                last[key] = float(line["images_s"])
                names[line["model"]] = f"{line['model']}\n{line['batch']} x {line['size']} px"
    found: Bars = {}
    for (model, passes, implementation, mode), rate in last.items():
        cells = found.setdefault(names[model], {}).setdefault(passes, {})
        if implementation not in cells or cells[implementation].rate < rate:
            cells[implementation] = Bar(rate, mode)
    return found


def draw(found: Bars, title: str) -> Any:
    """The figure.

    Raises:
        ValueError: there is nothing to draw.
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError(
            "benchmarks.vision_plot needs matplotlib: pip install 'scanweave[train]'"
        ) from error
    if not found:
        raise ValueError("csv must hold rates of models, got none")
    passes = list(dict.fromkeys(p for cells in found.values() for p in cells))
    # so that the same rows give the same file
    matplotlib.rcParams["svg.hashsalt"] = OURS
    figure = Figure(figsize=(12, 1.6 + 0.55 * len(found)), layout="constrained")
    panels = figure.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, passes, strict=True):
        _panel(axes, found, name)
    panels[0].set_yticks(range(len(found)), list(found), fontsize=9)
    panels[0].set_ylim(len(found) - 0.4, -0.6)
    shown = {i for cells in found.values() for p in cells.values() for i in p}
    keys = [Patch(color=c, label=n) for n, c in COLOURS.items() if n in shown]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _panel(axes: Any, found: Bars, passes: str) -> None:
    for y, cells in enumerate(found.values()):
        shown = cells.get(passes, {})
        height = 0.8 / max(len(shown), 1)
        official = shown.get("official")
        for i, (name, bar) in enumerate(shown.items()):
            at = y - 0.4 + height * (i + 0.5)
            axes.barh(at, bar.rate, height * 0.9, color=COLOURS[name])
            text = f"{bar.rate:,.0f}  {bar.mode}"
            if name == OURS and official is not None:
                text = f"{bar.rate:,.0f} ({bar.rate / official.rate:.1f}x)  {bar.mode}"
            axes.annotate(
                *(text, (bar.rate, at)),
                **{"xytext": (4, 0), "textcoords": "offset points", "va": "center"},
                **{"fontsize": 8, "color": GREY},
            )
    axes.margins(x=0.35)
    axes.set_title(passes, loc="left", fontsize=11)
    axes.set_xlabel("images a second")
    axes.grid(axis="x", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision_plot", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="default: the CSV's name, ending in .svg")
    args = parser.parse_args(arguments)
    title = f"{device_of(args.csv)}, bfloat16 autocast, every implementation in its fastest mode"
    figure = draw(bars(args.csv), title)
    out = args.out or args.csv.with_suffix(".svg")
    # the date would differ for the same rows
    metadata = {"Date": None} if out.suffix == ".svg" else {}
    figure.savefig(out, dpi=150, metadata=metadata)
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
