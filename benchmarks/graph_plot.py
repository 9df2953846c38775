"""Draw `benchmarks.graph growth`: time and memory over the number of nodes, both logarithmic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .graph import time_of
from .plot import BLUE, GREY, PALE, STYLES, device_of
from .report import Row, read_csv


def draw(rows: Sequence[Row], title: str) -> Any:
    """Two panels, a line for every layer and pass; grey lines are linear growth.

    Raises:
        ValueError: there is no timed row of `growth`.
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "benchmarks.graph_plot needs matplotlib: pip install 'scanweave[train]'"
        ) from error
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if row.op == "graph_growth" and time_of(row) is not None:
            # of a repeated measurement the last
            groups.setdefault((row.implementation, row.passes), {})[row.length] = row
    if not groups:
        raise ValueError(f"rows must hold times of growth, got {len(rows)} rows without")
    matplotlib.rcParams["svg.hashsalt"] = "scanweave"
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    names = list(dict.fromkeys(name for name, _ in groups))
    looks = dict(zip(names, [(BLUE, "o"), *STYLES], strict=False))
    fields = (
        (time_of, 1e-3, "milliseconds"),
        (lambda row: row.peak_mb, 1.0, "peak memory, MB"),
    )
    for axes, (value_of, scale, label) in zip(panels, fields, strict=True):
        for (name, passes), found in groups.items():
            colour, marker = looks[name]
            points = [(n, value_of(row)) for n, row in sorted(found.items())]
            points = [(n, scale * value) for n, value in points if value]
            training = "backward" in passes
            axes.plot(
                *zip(*points, strict=True),
                **{"color": colour, "marker": marker, "markersize": 5},
                **{"linestyle": "-" if training else ":", "linewidth": 1.4},
                label=f"{name}, {'training' if training else 'inference'}",
            )
            if name == names[0] and points:
                (n, value), (first, _) = points[-1], points[0]
                axes.plot([first, n], [value * first / n, value], color=GREY, linewidth=0.7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("nodes of one graph")
        axes.set_title(label, loc="left", fontsize=11)
        axes.grid(color=PALE, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def save(path: Path) -> Path:
    """Draw a CSV's rows into an SVG beside it."""
    rows = read_csv(path)
    kinds = ", ".join(dict.fromkeys(row.dtype for row in rows if time_of(row)))
    out = path.with_suffix(".svg")
    times = "processor" if any(row.cpu_us for row in rows) else "kernels"
    title = f"{device_of(path)}, {kinds}; time of the {times}; grey: linear"
    draw(rows, title).savefig(out, metadata={"Date": None})
    return out
