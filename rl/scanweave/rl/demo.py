"""Decisions: an agent learns from recorded play of mixed quality to earn what it is asked for.

The trajectories are recorded on the spot: 300 players of the pendulum swing-up, each with its own
flaws. Less than a minute on one CPU core.

    run   record, train, evaluate, draw; what `scanweave demo` calls
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scanweave.core.report import (
    CONTEXT,
    OTHER,
    OURS,
    DemoResult,
    Figure,
    Row,
    figure_style,
    save_figure,
)

from .evaluate import Evaluation
from .train import Config, load_data, train

# the best possible return is 0; a good player gets about -150, from some starts much less
_TARGETS = (0.0, -150.0, -300.0, -500.0, -750.0)


def run(folder: Path, *, fast: bool = False, seed: int = 0) -> DemoResult:
    """Record, train a Decision Mamba and two cloning baselines, play at several targets.

    Args:
        folder: Where the runs and the plots go.
        fast: A few steps, to see that everything works.
        seed: Seed of recording, weights and training.

    Returns:
        Mean returns in the environment, and plots.
    """
    base = Config(data_seed=seed, targets=_TARGETS)
    settings = replace(base.train, output_dir=folder, seed=seed, tensorboard=False, keep_last=1)
    config = replace(base, train=settings)
    if fast:
        settings = replace(settings, max_steps=20, warmup_steps=5)
        config = replace(base, train=settings, episodes=20, eval_episodes=2)
    results = train(config)
    evaluation: Evaluation = results["evaluation"]
    baselines: dict[str, Evaluation] = results["baselines"]
    data = results["episodes"]

    asked = sorted(evaluation.results, key=lambda result: -(result.target or 0.0))
    targets = np.array([result.target for result in asked])
    means = np.array([result.mean for result in asked])
    rows = [_row(f"Decision Mamba, asked for {result.target:.0f}", result) for result in asked]
    rows += [_row(_name(name), found.best) for name, found in baselines.items()]
    with figure_style():
        figures = [_draw_targets(folder, config, evaluation, baselines)]
        figures.append(_draw_curve(folder, results["history"]))
    return DemoResult(
        title="Decisions: Decision Mamba",
        text=f"{data['episodes']} recorded episodes of {config.env_id}, {data['steps']:,} steps, "
        f"with returns of {data['mean']:.0f} on average, {data['min']:.0f} at worst. The agent "
        "reads the return still to be earned and the last states, and is then asked for different "
        f"returns; behaviour cloning imitates the average player. {config.eval_episodes} episodes "
        "per row from the same starts. What a start allows differs a lot, hence the spread; the "
        "best tenth of the recordings all begin near the top, so their clone cannot swing up.",
        rows=rows,
        figures=figures,
        goal="" if fast else "earns more when asked for more, and at least as much as cloning",
        reached=bool(
            np.corrcoef(targets, means)[0, 1] > 0.8
            and means.max() >= max(found.best.mean for found in baselines.values())
        ),
    )


def _row(model: str, result: Any) -> Row:
    return Row(model, "mean return", result.mean, detail=f"± {result.std:.0f} over episodes")


def _name(baseline: str) -> str:
    return {
        "BC": "behaviour cloning, all episodes",
        "10 % BC": "behaviour cloning, best tenth",
    }.get(baseline, baseline)


def _draw_targets(
    folder: Path, config: Config, evaluation: Evaluation, baselines: dict[str, Evaluation]
) -> Figure:
    """Return against return asked for, above the histogram of the recorded returns."""
    from matplotlib.figure import Figure as Canvas

    recorded = [episode.total_reward for episode in load_data(config)[0]]
    canvas = Canvas(figsize=(8, 4.2))
    above, below = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    results = sorted(evaluation.results, key=lambda result: result.target or 0.0)
    targets = [result.target for result in results]
    above.plot(targets, targets, color=CONTEXT, linestyle=":", label="as asked")
    for result in results:
        here = [result.target] * len(result.returns)
        above.plot(here, result.returns, ".", color=OURS, alpha=0.35, markersize=5)
    means = [result.mean for result in results]
    above.plot(targets, means, color=OURS, marker="o", label="Decision Mamba: mean, episodes")
    for (name, found), style in zip(baselines.items(), ("--", "-."), strict=False):
        above.axhline(
            found.best.mean, color=OTHER, linestyle=style, linewidth=1.4, label=_name(name)
        )
    above.set(title=f"{config.env_id}: return earned")
    above.legend(fontsize=8)
    below.hist(recorded, bins=40, color=CONTEXT)
    below.set(title="Recorded episodes", xlabel="return asked for / return recorded")
    return save_figure(
        canvas,
        folder,
        "returns",
        "What the agent earns against what it is asked for. Cloning takes no target: level lines. "
        "Below, the returns in the recording.",
    )


def _draw_curve(folder: Path, history: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 2.6))
    axes = canvas.add_subplot()
    points = [(row["step"], row["loss"]) for row in history if "loss" in row]
    axes.plot(*zip(*points, strict=True), color=OURS)
    axes.set(title="Training loss (squared action error)", xlabel="step", yscale="log")
    return save_figure(canvas, folder, "curve", "Training of the agent.")
