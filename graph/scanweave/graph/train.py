"""Train a graph classifier: `python -m scanweave.graph.train`.

Without options: handwritten digits as pixel graphs, which need no download. With pixels read row
by row, a TUDataset, and the same model without its mixers:

    python -m scanweave.graph.train --order index
    python -m scanweave.graph.train --dataset PROTEINS --data-dir data
    python -m scanweave.graph.train --dataset PROTEINS --data-dir data --mixer none

Expect 97 to 98 % of the test digits from the first line, in about half a minute on one CPU core
(`OMP_NUM_THREADS=1`: on a busy machine more threads are slower), and 82 to 86 % without mixers.
A run refuses a folder that holds another one: `--train.overwrite`, or another `--train.output-dir`.

    Config          settings
    build_model     settings and data -> model
    fit             train on some splits, keep the best epoch's weights
    evaluate        loss and accuracy on a list of graphs
    train           load, fit, test: what `main` runs
"""

import functools
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import global_add_pool, global_max_pool, global_mean_pool

from scanweave.core import create_mixer
from scanweave.core.training import (
    TrainConfig,
    Trainer,
    TrainResult,
    load_checkpoint,
    seed_everything,
)

from .datasets import GraphSplits, load_splits
from .mixing import Ties
from .model import GraphMamba, gcn_conv, gin_conv
from .transforms import AddNodeOrder

_POOLS = {"mean": global_mean_pool, "add": global_add_pool, "max": global_max_pool}


def _train_defaults() -> TrainConfig:
    return TrainConfig(
        output_dir=Path("runs/graph"),
        epochs=12,
        batch_size=32,
        lr=4e-3,
        weight_decay=0.01,
        warmup_steps=40,
        clip_grad=1.0,
    )


@dataclass(frozen=True)
class Config:
    """Settings of one run."""

    dataset: str = "digits"
    """`digits`, or the name of a TUDataset in `data_dir`."""
    data_dir: Path = Path("data")
    """Folder with `<dataset>/raw/<dataset>_A.txt` and so on."""
    coordinates: Literal[0, 1, 2] = 0
    """Coordinates that a pixel of `digits` knows: none, its row, or both."""
    val_fraction: float = 0.1
    """Share of each class for validation, which picks the epoch."""
    test_fraction: float = 0.2
    """Share of each class for the test."""
    split_seed: int = 0
    """Seed of the split; apart from the training's seed."""

    hidden_channels: int = 48
    """Channels of the layers."""
    num_layers: int = 3
    """Number of layers."""
    conv: Literal["gin", "gcn", "none"] = "gin"
    """Local convolution; `gin` uses edge features where the set has them."""
    mixer: str = "bimamba"
    """Registered mixer, or `none` for the same model without mixers."""
    d_state: int = 0
    """State size of Mamba mixers, unused by others; 0 leaves the mixer's default."""
    order: tuple[str, ...] = ("degree",)
    """Node order; several names are compared one after another."""
    precompute_order: bool = False
    """Compute the order once per graph, not in every layer; ties are then the same in all."""
    bidirectional: bool = True
    """Give a causal mixer a partner that reads backwards."""
    num_perms: int = 1
    """Node orders to average, in training."""
    eval_perms: int = 0
    """Node orders to average, in evaluation; 0 takes as many as in training."""
    ties: Ties = "noise"
    """How nodes of equal score are ordered."""
    dropout: float = 0.0
    """Dropout probability."""
    norm: str = "batch_norm"
    """Normalization; `none` for none."""
    pool: Literal["mean", "add", "max"] = "mean"
    """From node vectors to a graph vector."""

    train: TrainConfig = field(default_factory=_train_defaults)
    """The training loop."""


def build_model(config: Config, splits: GraphSplits) -> GraphMamba:
    """The model of these settings, with weights drawn from `config.train.seed`.

    Raises:
        ValueError: the settings name a mixer, order or normalization that does not exist.
    """
    seed_everything(config.train.seed)
    makers = {
        "gin": functools.partial(gin_conv, edge_dim=splits.edge_dim),
        "gcn": gcn_conv,
        "none": None,
    }
    return GraphMamba(
        splits.in_channels,
        config.hidden_channels,
        config.num_layers,
        splits.num_classes,
        dropout=config.dropout,
        norm=None if config.norm == "none" else config.norm,
        conv=makers[config.conv],
        mixer=None if config.mixer == "none" else config.mixer,
        pool=_POOLS[config.pool],
        order=config.order,
        bidirectional=config.bidirectional,
        num_perms=config.num_perms,
        eval_perms=config.eval_perms or None,
        ties=config.ties,
        mixer_kwargs=_mixer_kwargs(config),
    )


def _mixer_kwargs(config: Config) -> dict[str, Any] | None:
    """`d_state` where it is set and the mixer has one, so that mixers compare in one command."""
    if not config.d_state or config.mixer == "none":
        return None
    # on the meta device a mixer has neither memory nor random numbers
    mixer = create_mixer(config.mixer, config.hidden_channels, device="meta")
    takes = inspect.signature(type(mixer)).parameters
    return {"d_state": config.d_state} if "d_state" in takes else None


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores, (graphs, classes), of a batch from a PyG loader."""
    fields = cast(Data, batch).to_dict()
    takes_edges = getattr(model, "supports_edge_attr", "edge_attr" in fields)
    return model(
        fields["x"],
        fields["edge_index"],
        edge_attr=fields.get("edge_attr") if takes_edges else None,
        batch=fields["batch"],
        batch_size=batch.num_graphs,
        node_order=fields.get("node_order"),
    )


@torch.no_grad()
def evaluate(model: nn.Module, graphs: Sequence[Data], batch_size: int = 256) -> dict[str, float]:
    """Mean cross-entropy and accuracy over `graphs`; the caller sets the mode of the model.

    Raises:
        ValueError: there are no graphs.
    """
    if not graphs:
        raise ValueError("graphs must hold at least one graph, got none")
    device = next(model.parameters()).device
    loss, right = 0.0, 0
    for batch in DataLoader(list(graphs), batch_size):
        batch = batch.to(device)
        scores = predict(model, batch)
        loss += F.cross_entropy(scores, batch.y, reduction="sum").item()
        right += int((scores.argmax(1) == batch.y).sum())
    # the loss comes first and picks the best epoch: accuracies of few graphs are often equal
    return {"loss": loss / len(graphs), "accuracy": right / len(graphs)}


def fit(config: Config, splits: GraphSplits) -> tuple[GraphMamba, TrainResult]:
    """Train a model and return it with the weights of its lowest validation loss.

    Args:
        config: Settings; `config.train` holds those of the loop.
        splits: Graphs. Without validation graphs the last weights are kept.
    """
    model = build_model(config, splits)
    loader = DataLoader(
        splits.train,
        config.train.batch_size,
        shuffle=True,
        num_workers=config.train.num_workers,
    )

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(predict(model, batch), batch["y"])

    def validate(model: nn.Module) -> dict[str, float]:
        return evaluate(model, splits.val)

    trainer = Trainer(config.train, model, loss, loader, validate if splits.val else None)
    result = trainer.fit()
    if result.best_checkpoint is not None:
        load_checkpoint(result.best_checkpoint, model)
    return model.eval(), result


def train(config: Config) -> dict[str, Any]:
    """Load the data, train, test; writes `results.json` into the run's folder.

    Returns:
        `test` and `val` (accuracy and loss of the best epoch), `parameters`, `steps`, `seconds`,
        and the `history` of training.
    """
    splits = load_splits(
        config.dataset,
        config.data_dir,
        coordinates=config.coordinates,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )
    if config.precompute_order:
        add_order = AddNodeOrder(config.order)
        for part in (splits.train, splits.val, splits.test):
            part[:] = [add_order(graph) for graph in part]
    model, result = fit(config, splits)
    summary: dict[str, Any] = {
        "test": evaluate(model, splits.test) if splits.test else {},
        "val": evaluate(model, splits.val) if splits.val else {},
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": result.seconds,
    }
    if PartialState().is_main_process:
        path = config.train.output_dir / "results.json"
        path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return {**summary, "history": result.history}


def main() -> None:
    """Read the settings from the command line, train, show the results."""
    import tyro
    from rich.console import Console

    results = train(tyro.cli(Config, description=__doc__))
    results.pop("history")
    Console().print_json(json.dumps(results))


if __name__ == "__main__":
    main()
