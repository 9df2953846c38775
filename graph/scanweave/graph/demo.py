"""Graphs: a graph classifier with and without its sequence mixer reads digits as pixel graphs.

A node is a pixel with ink that knows nothing but how much, an edge joins touching pixels. About
a minute and a half on one CPU core.

    run   train, test, draw; what `scanweave demo` calls
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data

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
from scanweave.core.training import TrainConfig

from .datasets import GraphSplits, load_splits
from .model import GraphMamba
from .train import Config, evaluate, fit, predict

# name, what to change, colour in the plots; the first is the one to show
_MODELS = (
    ("GraphMambaConv, row by row", {"d_state": 4, "order": ("index",)}, OURS),
    ("GraphMambaConv, breadth first", {"d_state": 4, "order": ("bfs",)}, CONTEXT),
    ("the same without mixer", {"mixer": "none"}, OTHER),
)


def run(folder: Path, *, fast: bool = False, seed: int = 0) -> DemoResult:
    """Train the same graph classifier with mixer, with it in another order, and without.

    Args:
        folder: Where the runs and the plots go.
        fast: A few steps each, to see that everything works.
        seed: Seed of split, weights and training.

    Returns:
        Test accuracies with the weights of the best epoch on validation graphs, and plots.
    """
    splits = load_splits("digits", val_fraction=0.1, test_fraction=0.25, seed=seed)
    base = Config(
        split_seed=seed,
        hidden_channels=48,
        num_layers=3,
        dropout=0.1,
        train=TrainConfig(
            epochs=12,
            max_steps=10 if fast else 0,
            batch_size=32,
            lr=4e-3,
            weight_decay=0.01,
            warmup_steps=5 if fast else 60,
            seed=seed,
            tensorboard=False,
            keep_last=1,
        ),
    )
    rows, models, histories = [], [], []
    for name, changes, _ in _MODELS:
        short = changes.get("order", ("no-mixer",))[0]
        settings = replace(base.train, output_dir=folder / short)
        model, result = fit(replace(base, train=settings, **changes), splits)
        accuracy = 100 * evaluate(model, splits.test)["accuracy"]
        parameters = sum(p.numel() for p in model.parameters())
        detail = f"{parameters:,} parameters, {result.seconds:.0f} s of training"
        rows.append(Row(name, "% of test graphs right", accuracy, detail=detail))
        models.append(model)
        histories.append(result.history)
    with figure_style():
        figures = [
            _draw_graphs(folder, models[0], splits),
            _draw_curves(folder, histories),
        ]
    gain = rows[0].value - rows[-1].value
    return DemoResult(
        title="Graphs: GraphMambaConv",
        text=f"{len(splits.train)} digits as pixel graphs to train on, {len(splits.val)} to choose "
        f"the epoch by, {len(splits.test)} to test on. Nodes know how much ink they hold, not "
        "where they are. All models have the same three GIN layers; the mixer adds a sequence "
        "over each graph's nodes. Row by row, the sequence itself tells where ink is, which "
        "convolutions cannot see; breadth-first order uses nothing but the graph.",
        rows=rows,
        figures=figures,
        goal="" if fast else "better with the mixer than without",
        reached=gain > 0,
    )


def _draw_curves(folder: Path, histories: list[list[dict[str, Any]]]) -> Figure:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 2.8))
    left, right = canvas.subplots(1, 2)
    for (name, _, color), history in zip(_MODELS, histories, strict=True):
        for axes, column, factor in ((left, "loss", 1), (right, "eval/accuracy", 100)):
            points = [(row["epoch"], factor * row[column]) for row in history if column in row]
            axes.plot(*zip(*points, strict=True), color=color, label=name)
    left.set(title="Training loss", xlabel="epoch")
    right.set(title="Validation accuracy, %", xlabel="epoch")
    left.legend(fontsize=8)
    return save_figure(canvas, folder, "curves", "Training of the three models.")


def _draw_graphs(folder: Path, model: GraphMamba, splits: GraphSplits) -> Figure:
    """Test graphs with the order of their nodes and the nodes that decide."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure as Canvas

    chosen = [_first(splits.test, digit) for digit in (0, 2, 3, 4, 7)]
    canvas = Canvas(figsize=(8, 3.5))
    grid = canvas.subplots(2, len(chosen))
    for column, graph in zip(grid.T, chosen, strict=True):
        place = graph["pos"].flip(1) * torch.tensor([1.0, -1.0])
        lines = list(place[graph["edge_index"].t()].numpy())
        for axes in column:
            axes.set(xlim=(-0.8, 7.8), ylim=(-7.8, 0.8), xticks=[], yticks=[], aspect="equal")
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.add_collection(LineCollection(lines, colors="#d1d5db", linewidths=0.7, zorder=1))
        ink = graph["x"][:, 0]
        column[0].scatter(*place.t(), c=ink, cmap="Greys", vmin=-0.3, vmax=1, s=22, zorder=2)
        column[0].plot(*place.t(), color=OURS, linewidth=0.7, alpha=0.8, zorder=3)
        weight, answer = _gradient(model, graph)
        column[1].scatter(*place.t(), c=weight, cmap="Oranges", vmin=0, s=22, zorder=2)
        column[0].set_title(f"{int(graph['y'])} read as {answer}", fontsize=9)
    return save_figure(
        canvas,
        folder,
        "graphs",
        "Above: pixel graphs from the test set, darker nodes hold more ink; the blue line is the "
        "order in which the mixer reads them. Below: absolute gradient of the winning class with "
        "respect to each node's ink.",
    )


def _first(graphs: list[Data], digit: int) -> Data:
    return next(graph for graph in graphs if int(graph["y"]) == digit)


def _gradient(model: GraphMamba, graph: Data) -> tuple[torch.Tensor, int]:
    """|d winning score / d ink| of every node, and the class that won."""
    device = next(model.parameters()).device
    batch = Batch.from_data_list([graph.clone().to(str(device))])
    batch["x"].requires_grad_()
    scores = predict(model, batch)
    (gradient,) = torch.autograd.grad(scores.max(), batch["x"])
    return gradient[:, 0].abs().cpu(), int(scores.argmax())
