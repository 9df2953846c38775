"""What the table of graph models compares, on which sets, and with which settings.

    MODELS        row of the table -> what makes it
    SETS          column -> settings that all models share there
    settings      set, row, seed -> Config of `scanweave.graph.train`
    match_width   the width at which a model has as many parameters as the others

All models of a set have the same features, encodings, convolutions, number of layers, dropout,
optimiser, batch size, schedule and epochs; widths are chosen so that parameters are equal.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scanweave.core.training import TrainConfig
from scanweave.graph.build import build_model
from scanweave.graph.datasets import GraphSplits
from scanweave.graph.settings import Config

# papers break ties of the degree order with fresh noise; orders of the transform are fixed
_FRESH = {"ties": "fresh"}
MODELS: dict[str, dict[str, Any]] = {
    "GMN": {"model": "gmn", "order": ("degree",), "num_repeats": 1, **_FRESH},
    "GraphMambaConv, degree": {"order": ("degree",), **_FRESH},
    "GraphMambaConv, BFS": {"order": ("bfs",), "precompute_order": True},
    "GraphMambaConv, Fiedler": {"order": ("fiedler",), "precompute_order": True},
    "GraphMambaConv, random": {"order": ("random",), **_FRESH},
    "gated CNN, BFS": {
        "mixer": "gated_cnn_bidirectional",
        "order": ("bfs",),
        "precompute_order": True,
    },
    "GPSConv, attention": {"model": "gps", "attn_type": "multihead"},
    "GPSConv, Performer": {"model": "gps", "attn_type": "performer"},
    "convolution alone": {"mixer": "none"},
}
# widths are multiples of it, so that four attention heads divide them
_STEP = 4


@dataclass(frozen=True)
class Set:
    """A column of the table.

    Attributes:
        dataset: Name for `scanweave.graph.train`.
        metric: What the set's authors measure.
        parameters: Of every model, within 5 %.
        epochs: Passes over the training part.
        seeds: How many runs; each has its own weights and batches.
        own_splits: Whether each run also has a split of its own (a random split, an official
            one of several, or a fold); otherwise all have the one official split.
        config: Settings of the model and the data.
        train: Settings of the loop.
        together: Runs of one model in one process: starting one costs more than small runs.
    """

    dataset: str
    metric: str
    parameters: int
    epochs: int
    seeds: int
    own_splits: bool
    config: dict[str, Any]
    train: dict[str, Any]
    together: bool = True


def _graphs(parameters: int, epochs: int, seeds: int, **config: Any) -> dict[str, Any]:
    return {
        "metric": "accuracy",
        "parameters": parameters,
        "epochs": epochs,
        "seeds": seeds,
        "own_splits": True,
        "config": {"num_layers": 3, "dropout": 0.1, "rwse": 16, "test_fraction": 0.1, **config},
        "train": {"batch_size": 32, "lr": 1e-3},
    }


def _one_graph(dataset: str, **train: Any) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "metric": "auroc",
        "parameters": 120_000,
        "epochs": 300,
        "seeds": 3,
        "own_splits": True,
        "config": {"num_layers": 3, "dropout": 0.2},
        "train": {"lr": 3e-3, "eval_every": 10, **train},
    }


_CITATIONS: dict[str, Any] = {
    "metric": "accuracy",
    "parameters": 120_000,
    "epochs": 100,
    "seeds": 5,
    "own_splits": False,
    # batch norm and dropout of one half do not go together: 48 % instead of 76 % on Cora
    "config": {"num_layers": 2, "dropout": 0.5, "conv": "gcn", "norm": "layer_norm"},
    "train": {"lr": 5e-3, "eval_every": 5, "weight_decay": 0.05},
}
SETS: dict[str, Set] = {
    "Peptides-func": Set(
        dataset="Peptides-func",
        metric="ap",
        parameters=400_000,
        epochs=200,
        seeds=3,
        own_splits=False,
        config={"num_layers": 4, "dropout": 0.1, "rwse": 16, "head_layers": 2},
        train={"batch_size": 128, "lr": 2e-3},
        together=False,
    ),
    "Minesweeper": Set(**_one_graph("Minesweeper")),
    "Tolokers": Set(**_one_graph("Tolokers")),
    "PROTEINS": Set("PROTEINS", **_graphs(120_000, 50, 3)),
    "ENZYMES": Set("ENZYMES", **_graphs(120_000, 100, 3)),
    "MUTAG": Set("MUTAG", **_graphs(60_000, 50, 10, folds=10)),
    "Cora": Set("Cora", **_CITATIONS),
    "CiteSeer": Set("CiteSeer", **{**_CITATIONS, "parameters": 250_000}),
}


def settings(
    name: str, model: str, seed: int, *, epochs: int, folder: Path, data_dir: Path, cache_dir: Path
) -> Config:
    """Settings of one run; the width is still to be matched.

    Args:
        name: A key of `SETS`.
        model: A key of `MODELS`.
        seed: Of weights and batches, and number of the split where splits differ.
        epochs: Passes over the training part; 0 for those of the set.
        folder: Of the run.
        data_dir: As in `Config`.
        cache_dir: As in `Config`.
    """
    chosen = SETS[name]
    loop: dict[str, Any] = {
        "output_dir": folder,
        "epochs": epochs or chosen.epochs,
        "seed": seed,
        "weight_decay": 0.01,
        "log_every": 50,
        "save_every": 10**9,
        "keep_last": 1,
        "best_metric": chosen.metric if chosen.metric != "accuracy" else "",
        "progress": False,
        "tensorboard": False,
        "resume": True,
    }
    return Config(
        dataset=chosen.dataset,
        data_dir=data_dir,
        cache_dir=cache_dir,
        metric=chosen.metric,  # type: ignore[arg-type]
        split_seed=seed if chosen.own_splits else 0,
        **chosen.config | MODELS[model],
        train=TrainConfig(**loop | chosen.train),
    )


def match_width(config: Config, splits: GraphSplits, parameters: int) -> Config:
    """The same settings with the width whose number of parameters is nearest."""

    def count(steps: int) -> int:
        wide = dataclasses.replace(config, hidden_channels=_STEP * steps)
        return sum(p.numel() for p in build_model(wide, splits).parameters())

    low, high = 1, 1
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    best = min((low, high), key=lambda steps: abs(count(steps) - parameters))
    return dataclasses.replace(config, hidden_channels=_STEP * best)
