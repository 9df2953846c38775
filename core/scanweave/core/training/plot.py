"""Learning curves as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

# columns of metrics.csv that are no curve worth looking at
_HIDDEN = ("step", "epoch", "seconds", "samples_per_second", "grad_norm")


def plot_history(history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """Draw every metric of a run against the step, training and evaluation in one panel.

    Args:
        history: Rows as in `TrainResult.history` or `read_history`.
        path: Picture to write; the ending chooses the format, such as .png.

    Returns:
        The picture's path.

    Raises:
        ValueError: no row holds a metric.
        ImportError: matplotlib is not installed.
    """
    try:
        # not pyplot: it would choose a backend for the whole program
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "scanweave.core.training.plot_history needs matplotlib: pip install 'scanweave[train]'"
        ) from error

    names = dict.fromkeys(
        name.removeprefix("eval/") for row in history for name in row if name not in _HIDDEN
    )
    panels = [name for name in names if name != "lr"] + [name for name in names if name == "lr"]
    if not panels:
        raise ValueError(f"history must hold metrics, got {len(history)} rows without any")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * lines), layout="constrained")
    for number, name in enumerate(panels, 1):
        axes = figure.add_subplot(lines, columns, number)
        for column, label in ((name, "training"), (f"eval/{name}", "evaluation")):
            points = [(row["step"], row[column]) for row in history if column in row]
            if points:
                # few points are drawn as such: a line of one point is invisible
                marker = "o" if len(points) < 20 else ""
                axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=label)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if name != "lr":
            axes.legend(fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
