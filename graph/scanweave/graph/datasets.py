"""Data sets for the training script, split and ready for a PyG loader.

GraphSplits    training, validation and test graphs, and what a model has to know about them
load_splits    name -> GraphSplits
read_tu_set    a TUDataset folder -> graphs, without writing beside it
split_graphs   stratified random split
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.separate import separate
from torch_geometric.io import read_tu_data
from torch_geometric.utils import degree

from .digits import digit_graphs
from .sources import RawSet, find_class, read_set
from .splitting import cut_folds, split_links, split_numbers, split_one_graph
from .tasks import Task, infer_task

# what the sets' authors measure, where it is not what the labels suggest
_METRICS = {
    "minesweeper": "auroc",
    "tolokers": "auroc",
    "questions": "auroc",
    "pascalvoc-sp": "f1",
    "coco-sp": "f1",
}
# bags of words, whose rows are given the sum 1
_WORDS = ("Planetoid", "WebKB", "WikipediaNetwork", "Amazon", "Coauthor")


class GraphSplits(NamedTuple):
    """Graphs with `x`, `edge_index`, `y`, and `edge_attr` where the set has edge features.

    Nodes of one graph are split by `mask`: the three parts then hold that graph with different
    masks. Links have `edge_label_index` (2, L) and `edge_label` (L,).

    Attributes:
        train: Graphs to train on.
        val: Graphs to choose by.
        test: Graphs to report.
        in_channels: Width of `x`.
        edge_dim: Width of `edge_attr`; None without.
        num_classes: Number of classes, or of scores.
        task: What is learned; classes of graphs when absent.
    """

    train: list[Data]
    val: list[Data]
    test: list[Data]
    in_channels: int
    edge_dim: int | None
    num_classes: int
    task: Task | None = None

    @property
    def target(self) -> Task:
        """The task."""
        return self.task or Task("graph", "multiclass", self.num_classes, "accuracy")


def load_splits(
    name: str,
    data_dir: Path | str = "data",
    *,
    coordinates: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    folds: int = 0,
    task: str = "auto",
    metric: str = "auto",
    cache_dir: Path | str = "runs/data",
    download: bool = False,
    prepare: Callable[[list[Data], bool], None] | None = None,
) -> GraphSplits:
    """Load a set by name and split it, officially where it has official splits.

    Args:
        name: `digits`, a set of PyG (see `find_class`), or a TUDataset.
        data_dir: Folder with `<name>/raw`, or with a folder such as `planetoid` that has it.
        coordinates: Coordinates that a node of `digits` knows (see `digit_graphs`).
        val_fraction: Share of each class for validation, or of all edges.
        test_fraction: Share of each class for the test, or of all edges.
        seed: Seed of the split, or number of the official split or of the fold.
        folds: Parts to cut graphs into instead; 0 for the fractions.
        task: `auto`, what the labels are of, or `graph`, `node`, `link`.
        metric: `auto` or a metric.
        cache_dir: Where what PyG makes of the files is kept.
        download: Let PyG download what is missing.
        prepare: Called with all graphs before they are split, to add orders or encodings; for
            links with each part, whose edges are not all. The second argument says which.

    Raises:
        ValueError: the set is not there, the task does not fit it, or the fractions leave nothing
            to train on.
    """
    raw = _read(name, Path(data_dir), cache_dir, coordinates, download)
    graphs = _one_hot(raw)
    level = task if task != "auto" else _level(graphs)
    if prepare is not None and level != "link":
        prepare(graphs, True)
    if level == "link":
        if len(graphs) != 1:
            raise ValueError(f"task must be graph or node for {len(graphs)} graphs, got 'link'")
        parts = split_links(graphs[0], (val_fraction, test_fraction), seed)
        if prepare is not None:
            for part in parts:
                prepare(part, False)
        chosen = "auroc" if metric == "auto" else metric
        what = Task("link", "binary", 1, chosen)  # type: ignore[arg-type]
    else:
        if level != _level(graphs):
            raise ValueError(f"task must be {_level(graphs)!r} or 'link' for {name}, got {task!r}")
        fractions = (val_fraction, test_fraction)
        if level == "node" and len(graphs) == 1:
            parts = split_one_graph(graphs[0], fractions, seed)
        elif raw.split is not None and not folds:
            parts = [
                [g for g, p in zip(graphs, raw.split, strict=True) if p == n] for n in range(3)
            ]
        elif folds:
            parts = cut_folds(graphs, folds, seed)
        else:
            parts = split_graphs(graphs, fractions, seed)
        labels = torch.cat([graph["y"] for graph in graphs])
        wanted = _METRICS.get(raw.name.lower(), "auto") if metric == "auto" else metric
        what = infer_task("node" if level == "node" else "graph", labels, wanted)
    train, val, test = parts
    if raw.family == "TUDataset":
        _standardize(train, val, test)
    first = (train or val or test)[0].to_dict()
    return GraphSplits(
        train,
        val,
        test,
        in_channels=first["x"].size(1),
        edge_dim=first["edge_attr"].size(1) if "edge_attr" in first else None,
        num_classes=what.outputs,
        task=what,
    )


def _read(
    name: str, data_dir: Path, cache_dir: Path | str, coordinates: int, download: bool
) -> RawSet:
    if name == "digits":
        return RawSet(digit_graphs(coordinates=coordinates), None, "digits", name)
    if find_class(name)[0] != "TUDataset" or download:
        return read_set(name, data_dir, cache_dir, download=download)
    inner = data_dir / "tudataset"
    folder = inner if (inner / name).is_dir() else data_dir
    return RawSet(read_tu_set(name, folder), None, "TUDataset", name)


def _level(graphs: Sequence[Data]) -> str:
    """Whether labels are of nodes or of graphs."""
    of_nodes = all(graph["y"].size(0) == graph.num_nodes for graph in graphs)
    return "node" if of_nodes else "graph"


_KEPT = ("x", "edge_index", "edge_attr", "y", "pos", "train_mask", "val_mask", "test_mask")


def _one_hot(raw: RawSet) -> list[Data]:
    """Graphs with what training needs; whole numbers become columns of zeros and ones."""
    graphs = [
        Data(**{key: graph[key] for key in _KEPT if graph.get(key) is not None})
        for graph in raw.graphs
    ]
    for graph in graphs:
        if graph.x is None:
            ends = degree(graph["edge_index"][0], graph.num_nodes)
            graph.x = torch.stack([torch.ones_like(ends), ends.log1p()], dim=1)
    for key in ("x", "edge_attr"):
        if key not in graphs[0]:
            continue
        values = [g[key].reshape(g[key].size(0), -1) for g in graphs]
        if not values[0].is_floating_point():
            values = list(_columns(torch.cat(values)).split([len(v) for v in values]))
        for graph, value in zip(graphs, values, strict=True):
            graph[key] = value
    for graph in graphs:
        if raw.family in _WORDS:
            graph.x = graph["x"] / graph["x"].sum(1, keepdim=True).clamp(min=1)
        y = graph["y"]
        if y.dim() == 2 and y.size(1) == 1:
            graph.y = y.squeeze(1)
    return graphs


def _columns(numbers: Tensor) -> Tensor:
    """One column for every value that occurs in a column; columns of one value are left out."""
    columns = []
    for column in numbers.t():
        known, place = column.unique(return_inverse=True)
        if known.numel() > 1:
            columns.append(torch.nn.functional.one_hot(place, known.numel()))
    return torch.cat(columns, 1).to(torch.float32)


def read_tu_set(name: str, data_dir: Path | str) -> list[Data]:
    """Read a graph classification set of the TU collection from its text files.

    Node attributes and one-hot node labels make `x`; a set with neither gets a column of ones
    and the logarithm of the degree. Edge attributes and labels make `edge_attr`.

    Args:
        name: Name of the set, such as `PROTEINS`.
        data_dir: Folder with `<name>/raw/<name>_A.txt` and so on, the layout of
            `torch_geometric.datasets.TUDataset(data_dir, name)`.

    Raises:
        ValueError: the files are not there.

    Source: Morris et al. 2020, "TUDataset", arXiv 2007.08663.
    """
    folder = Path(data_dir) / name / "raw"
    if not (folder / f"{name}_A.txt").is_file():
        raise ValueError(
            f"dataset must be 'digits' or a TUDataset with files in {folder}, got {name!r}; "
            f"torch_geometric.datasets.TUDataset({str(data_dir)!r}, {name!r}) downloads it there"
        )
    data, slices, _ = read_tu_data(str(folder), name)
    graphs = [
        separate(Data, data, index, slices, decrement=False)
        for index in range(len(slices["y"]) - 1)
    ]
    for graph in graphs:
        if graph.x is None:
            ends = degree(graph["edge_index"][0], graph.num_nodes)
            graph.x = torch.stack([torch.ones_like(ends), ends.log1p()], dim=1)
    return graphs


def split_graphs(
    graphs: Sequence[Data], fractions: tuple[float, float], seed: int
) -> tuple[list[Data], list[Data], list[Data]]:
    """Split at random, class by class: every part has each class in nearly equal share.

    Args:
        graphs: Graphs with `y` (1,).
        fractions: Shares of the second and the third part; the first gets the rest.
        seed: Seed of the split.

    Returns:
        Train, validation and test graphs; shallow copies.

    Raises:
        ValueError: the fractions are negative or leave nothing for the first part.
    """
    labels = torch.tensor([int(graph["y"]) for graph in graphs])
    train, val, test = (
        [graphs[index].clone() for index in part] for part in split_numbers(labels, fractions, seed)
    )
    return train, val, test


def _standardize(train: Sequence[Data], *others: Sequence[Data]) -> None:
    """Give every column of `x` mean 0 and deviation 1 on the training graphs."""
    x = torch.cat([graph["x"] for graph in train])
    mean, deviation = x.mean(0), x.std(0)
    # a column that never changes stays as it is
    deviation[deviation == 0] = 1
    for graph in (graph for part in (train, *others) for graph in part):
        graph.x = (graph["x"] - mean) / deviation
