"""Graph classification sets for the training script, split and ready for a PyG loader.

GraphSplits    train, validation and test graphs, and what a model has to know about them
load_splits    name -> GraphSplits
read_tu_set    a TUDataset folder -> graphs, without writing beside it
split_graphs   stratified random split
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch_geometric.data import Data
from torch_geometric.data.separate import separate
from torch_geometric.io import read_tu_data
from torch_geometric.utils import degree

from .digits import digit_graphs


class GraphSplits(NamedTuple):
    """Graphs with `x`, `edge_index`, `y`, and `edge_attr` where the set has edge features.

    Attributes:
        train: Graphs to train on.
        val: Graphs to choose by.
        test: Graphs to report.
        in_channels: Width of `x`.
        edge_dim: Width of `edge_attr`; None without.
        num_classes: Number of classes.
    """

    train: list[Data]
    val: list[Data]
    test: list[Data]
    in_channels: int
    edge_dim: int | None
    num_classes: int


def load_splits(
    name: str,
    data_dir: Path | str = "data",
    *,
    coordinates: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> GraphSplits:
    """Load a set by name and split it.

    Args:
        name: `digits`, or a TUDataset whose files are in `data_dir/<name>/raw`.
        data_dir: Folder of the TUDataset folders.
        coordinates: Coordinates that a node of `digits` knows (see `digit_graphs`).
        val_fraction: Share of each class for validation.
        test_fraction: Share of each class for the test.
        seed: Seed of the split.

    Raises:
        ValueError: the set is not there, or the fractions leave nothing to train on.
    """
    if name == "digits":
        graphs = digit_graphs(coordinates=coordinates)
    else:
        graphs = read_tu_set(name, data_dir)
    train, val, test = split_graphs(graphs, (val_fraction, test_fraction), seed)
    if name != "digits":
        _standardize(train, val, test)
    first = graphs[0].to_dict()
    return GraphSplits(
        train,
        val,
        test,
        in_channels=first["x"].size(1),
        edge_dim=first["edge_attr"].size(1) if "edge_attr" in first else None,
        num_classes=1 + max(int(graph["y"]) for graph in graphs),
    )


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
    if min(fractions) < 0 or sum(fractions) >= 1:
        raise ValueError(f"fractions must be at least 0 with a sum below 1, got {fractions}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([int(graph["y"]) for graph in graphs])
    parts: tuple[list[Data], list[Data], list[Data]] = ([], [], [])
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)].tolist()
        first = round(len(members) * fractions[0])
        second = first + round(len(members) * fractions[1])
        for part, chosen in zip(
            parts, (members[second:], members[:first], members[first:second]), strict=True
        ):
            part.extend(graphs[index].clone() for index in chosen)
    return parts


def _standardize(train: Sequence[Data], *others: Sequence[Data]) -> None:
    """Give every column of `x` mean 0 and deviation 1 on the training graphs."""
    x = torch.cat([graph["x"] for graph in train])
    mean, deviation = x.mean(0), x.std(0)
    # a column that never changes stays as it is
    deviation[deviation == 0] = 1
    for graph in (graph for part in (train, *others) for graph in part):
        graph.x = (graph["x"] - mean) / deviation
