"""Pictures of an evaluation.

plot_targets   return that came out against return that was asked for
"""

from collections.abc import Mapping
from pathlib import Path

from .evaluate import Evaluation


def plot_targets(
    evaluation: Evaluation, path: str | Path, baselines: Mapping[str, Evaluation] | None = None
) -> Path:
    """Draw the mean return of every target, with the spread over episodes.

    Args:
        evaluation: Of an agent that takes targets.
        path: Picture to write; the ending chooses the format.
        baselines: Evaluations without a target by name, drawn as level lines.

    Returns:
        The picture's path.

    Raises:
        ValueError: the evaluation holds no targets.
        ImportError: matplotlib is not installed.
    """
    try:
        # not pyplot: it would choose a backend for the whole program
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "scanweave.rl.plot needs matplotlib: pip install 'scanweave[train]'"
        ) from error
    points = sorted((r.target, r.mean, r.std) for r in evaluation.results if r.target is not None)
    if not points:
        raise ValueError("evaluation must be of an agent that takes targets, got none")
    targets, means, spreads = zip(*points, strict=True)
    figure = Figure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(targets, targets, color="#8a919c", linestyle=":", label="as asked")
    axes.errorbar(
        targets, means, spreads, color="#2563c9", marker="o", capsize=3, label="agent (± 1 sd)"
    )
    # shades and dashes tell the baselines apart without colour
    for (name, other), style in zip((baselines or {}).items(), ("--", "-.", ":"), strict=False):
        axes.axhline(other.best.mean, color="#d9730d", linestyle=style, label=name)
    axes.set_xlabel("return asked for")
    axes.set_ylabel("return")
    axes.set_title(evaluation.env_id)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
