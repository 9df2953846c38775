"""Train on graphs: `python -m scanweave.graph.train`.

Without options: handwritten digits as pixel graphs, which need no download. With pixels read row
by row; classes of graphs, of nodes, missing edges; a set with official splits and metric:

    python -m scanweave.graph.train --order index
    python -m scanweave.graph.train --dataset PROTEINS --data-dir data
    python -m scanweave.graph.train --dataset Cora --data-dir data --train.epochs 200
    python -m scanweave.graph.train --dataset Cora --data-dir data --task link
    python -m scanweave.graph.train --dataset Peptides-func --data-dir data --model gmn --rwse 16
    accelerate launch --multi_gpu -m scanweave.graph.train --dataset PROTEINS --data-dir data

Expect 97 to 98 % of the test digits from the first line, in about half a minute on one CPU core
(`OMP_NUM_THREADS=1`: on a busy machine more threads are slower), and 82 to 86 % without mixers.
A run refuses a folder that holds another one: `--train.overwrite`, or another `--train.output-dir`.

    Config          settings, from `scanweave.graph.settings`
    predict         a batch -> scores
    evaluate        loss and metric on a list of graphs
    fit             train on some splits, keep the best epoch's weights
    train           load, fit, test: what `main` runs
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader as GraphLoader
from torch_geometric.loader import NeighborLoader, RandomNodeLoader
from torch_geometric.typing import WITH_PYG_LIB, WITH_TORCH_SPARSE

from scanweave.core.training import (
    Trainer,
    TrainResult,
    load_checkpoint,
    plot_history,
    script_settings,
)

from .batches import PackedGraphs, PartitionLoader, cut_by_order, first
from .build import build_model
from .datasets import GraphSplits, load_splits
from .ordering import rcm_order
from .precompute import add_encoding, add_order
from .settings import Config
from .tasks import Meter, Task

__all__ = ["Config", "build_model", "evaluate", "fit", "main", "predict", "train"]

# settings that may differ between a run and its continuation
_FREE = ("data_dir", "cache_dir", "download")


def predict(model: nn.Module, batch: Data | Batch, pairs: Tensor | None = None) -> Tensor:
    """Scores of a batch from a loader.

    Args:
        model: The model, as it is or wrapped for several processes.
        batch: The batch.
        pairs: Pairs of nodes, (2, P), for models that score links.

    Returns:
        Scores of graphs (B, outputs), of nodes (n, outputs), or of the pairs (P,).
    """
    fields = cast(Data, batch).to_dict()
    inner = getattr(model, "module", model)
    takes_edges = getattr(inner, "supports_edge_attr", "edge_attr" in fields)
    options: dict[str, Any] = {}
    if (order := fields.get("node_order")) is not None:
        options["node_order"] = order
    if (graph := fields.get("batch")) is not None:
        options |= {"batch": graph, "batch_size": cast(Batch, batch).num_graphs}
    if pairs is not None:
        options["edge_label_index"] = pairs
    return model(
        fields["x"],
        fields["edge_index"],
        edge_attr=fields.get("edge_attr") if takes_edges else None,
        **options,
    )


def scored(task: Task, model: nn.Module, batch: Data | Batch) -> tuple[Tensor, Tensor]:
    """Scores and targets of what is labelled in a batch.

    Graphs all count. Of nodes those at `rows`, or those that a NeighborLoader started from, or
    those with `mask`, or all. Of links those in `edge_label_index`; in training, where all of them
    are edges, as many random pairs besides, which hardly ever are edges.
    """
    fields = cast(Data, batch).to_dict()
    if task.level == "link":
        pairs, labels = fields["edge_label_index"], fields["edge_label"]
        if model.training:
            drawn = torch.randint(fields["x"].size(0), pairs.shape, device=pairs.device)
            pairs = torch.cat([pairs, drawn], 1)
            labels = torch.cat([torch.ones_like(labels), torch.zeros_like(labels)])
        return predict(model, batch, pairs), labels
    out, labels = predict(model, batch), fields["y"]
    if task.level == "graph":
        return out, labels
    if (rows := fields.get("rows")) is not None:
        return out[rows], labels[rows]
    if (seeds := fields.get("input_id")) is not None:
        return out[: seeds.numel()], labels[: seeds.numel()]
    if (mask := fields.get("mask")) is not None:
        return out[mask], labels[mask]
    return out, labels


@torch.no_grad()
def evaluate(
    model: nn.Module,
    graphs: Sequence[Data] | PackedGraphs,
    batch_size: int = 256,
    task: Task | None = None,
) -> dict[str, float]:
    """Loss and metric over `graphs`; the caller sets the mode of the model.

    Args:
        model: The model.
        graphs: Graphs, or a part of `GraphSplits` with masks or links.
        batch_size: Graphs at a time.
        task: What is measured; classes of graphs, and accuracy, when absent.

    Raises:
        ValueError: there are no graphs.
    """
    if not len(graphs):
        raise ValueError("graphs must hold at least one graph, got none")
    device = next(model.parameters()).device
    if task is None:
        task = Task("graph", "multiclass", cast(int, model.out_channels), "accuracy")
    meter = Meter(task, device)
    if isinstance(graphs, PackedGraphs):
        batches: Any = graphs.batches(batch_size)
    elif task.level == "graph" or len(graphs) > 1:
        batches = GraphLoader(list(graphs), batch_size)
    else:
        batches = graphs
    for batch in batches:
        meter.update(*scored(task, model, batch.to(str(device))))
    return meter.compute()


def fit(config: Config, splits: GraphSplits) -> tuple[nn.Module, TrainResult]:
    """Train a model and return it with the weights of its best epoch.

    The best one is that of the lowest validation loss for accuracies, else that of the best
    metric, unless `config.train.best_metric` says otherwise.

    Args:
        config: Settings; `config.train` holds those of the loop.
        splits: Graphs. Without validation graphs the last weights are kept.

    Raises:
        ValueError: a setting differs from the run that is resumed, or a loader does not fit.
    """
    model = build_model(config, splits)
    task, device = splits.target, _device(config)
    loader = make_loader(config, splits, device)
    extra = script_settings(config, _FREE)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return task.loss(*scored(task, model, batch))

    watched: Sequence[Data] | PackedGraphs = splits.val
    if splits.val and isinstance(loader.dataset, PackedGraphs):
        watched = PackedGraphs(splits.val, device)
    elif len(splits.val) == 1:
        watched = [splits.val[0].clone().to(str(device))]

    def validate(model: nn.Module) -> dict[str, float]:
        return evaluate(model, watched, task=task)

    trainer = Trainer(
        config.train, model, loss, loader, validate if splits.val else None, extra=extra
    )
    result = trainer.fit()
    if result.best_checkpoint is not None:
        load_checkpoint(result.best_checkpoint, model)
    return model.eval(), result


def make_loader(config: Config, splits: GraphSplits, device: torch.device) -> DataLoader[Any]:
    """The loader of the training part that `config.loader` names.

    Raises:
        ValueError: the loader is for one graph and there are many, or the other way round.
        ImportError: NeighborLoader lacks pyg-lib.
    """
    kind, graphs = config.loader, splits.train
    single = splits.target.level != "graph" and len(graphs) == 1
    if kind == "auto":
        kind = "full" if single else "packed"
    if single != (kind not in ("packed", "collate")):
        known = "full, random, cluster or neighbor" if single else "packed or collate"
        raise ValueError(f"loader must be {known} for {config.dataset}, got {kind!r}")
    size = config.train.batch_size
    if kind == "packed":
        packed = PackedGraphs(graphs, device)
        return DataLoader(packed, size, shuffle=True, collate_fn=first)
    if kind == "collate":
        workers = config.train.num_workers
        return GraphLoader(graphs, size, shuffle=True, num_workers=workers)
    data = graphs[0]
    if splits.target.level == "link" and kind != "full":
        raise ValueError(f"loader must be full for links, got {kind!r}")
    if kind == "neighbor":
        if not (WITH_PYG_LIB or WITH_TORCH_SPARSE):
            raise ImportError("loader='neighbor' needs pyg-lib; 'cluster' needs nothing")
        data = data.clone()
        data.node_order = None
        return NeighborLoader(
            data,
            list(config.num_neighbors),
            input_nodes=data["mask"],
            batch_size=size,
            shuffle=True,
        )
    data = data.clone().to(str(device))
    if kind == "random":
        return RandomNodeLoader(data, config.num_parts, shuffle=True)
    if kind == "cluster":
        part = cut_by_order(data, config.num_parts, rcm_order)
        return PartitionLoader(data, part, -(-config.num_parts // 10))
    if "mask" in data:
        # places of the labelled nodes: a mask would be counted, and waited for, in every step
        data["rows"] = data["mask"].nonzero().squeeze(1)
    return DataLoader([data], collate_fn=_only)  # type: ignore[arg-type]


def _only(batch: list[Data]) -> Data:
    return batch[0]


def _device(config: Config) -> torch.device:
    """Where the trainer will put the model; it is not there yet."""
    if config.train.cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))


def load(config: Config) -> GraphSplits:
    """The graphs of these settings, with orders and encodings, split."""

    def prepare(graphs: list[Data], whole: bool) -> None:
        folder = config.cache_dir if whole else None
        name = config.dataset.lower().replace(":", "-")
        if config.dataset == "digits":
            folder = None
        # first, while `x` has the set's own columns for orders such as `data.x`
        if config.precompute_order and config.model != "gps":
            kept = all(order.isidentifier() for order in config.order)
            file = f"{name}-{'-'.join(config.order)}.npz"
            add_order(graphs, config.order, folder / file if folder and kept else None)
        add_encoding(graphs, rwse=config.rwse, lap_pe=config.lap_pe, folder=folder, name=name)

    return load_splits(
        config.dataset,
        config.data_dir,
        coordinates=config.coordinates,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        folds=config.folds,
        task=config.task,
        metric=config.metric,
        cache_dir=config.cache_dir,
        download=config.download,
        prepare=prepare,
    )


def train(config: Config, splits: GraphSplits | None = None) -> dict[str, Any]:
    """Load the data, train, test; writes `results.json` and `curves.png` into the run's folder.

    Args:
        config: Settings.
        splits: What `load(config)` gives, for several runs on the same graphs.

    Returns:
        `test` and `val` (metric and loss of the best epoch), `best_step`, `parameters`, `steps`,
        `seconds`, `samples_per_second`, and the `history` of training.
    """
    splits = load(config) if splits is None else splits
    model, result = fit(config, splits)
    task = splits.target
    parts = {name: getattr(splits, name) for name in ("test", "val")}
    summary: dict[str, Any] = {
        name: evaluate(model, part, task=task) if part else {} for name, part in parts.items()
    }
    summary |= {
        "best_step": result.best_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": result.seconds,
        "samples_per_second": result.samples_per_second,
    }
    if PartialState().is_main_process:
        folder = Path(config.train.output_dir)
        plot_history(result.history, folder / "curves.png")
        (folder / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
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
