"""Data sets of PyG by name, read from local files by PyG's own classes.

    read_set        name -> the graphs of the set and, where it has them, its official splits
    read_peptides   Peptides-func in the layout of one NumPy file

PyG writes `processed` beside `raw`. Here it writes into a cache folder with a link to `raw`, so
that the data may be read-only; and nothing is downloaded unless asked for.
"""

import inspect
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch_geometric.datasets
from filelock import FileLock
from torch import Tensor
from torch_geometric.data import Data

# which class of torch_geometric.datasets reads a set, and how it spells the name
_CLASSES: dict[str, tuple[str, ...]] = {
    "Planetoid": ("Cora", "CiteSeer", "PubMed"),
    "HeterophilousGraphDataset": (
        "roman_empire",
        "amazon_ratings",
        "minesweeper",
        "tolokers",
        "questions",
    ),
    "LRGBDataset": (
        "peptides-func",
        "peptides-struct",
        "pascalvoc-sp",
        "coco-sp",
    ),
    "GNNBenchmarkDataset": ("PATTERN", "CLUSTER", "MNIST", "CIFAR10", "CSL"),
    "WebKB": ("cornell", "texas", "wisconsin"),
    "WikipediaNetwork": ("chameleon", "squirrel"),
    "Amazon": ("Computers", "Photo"),
    "Coauthor": ("CS", "Physics"),
    "ZINC": ("zinc",),
}
# folders that sets of a class often lie in, beside the class's own name
_FOLDERS = {"HeterophilousGraphDataset": "heterophilous", "LRGBDataset": "lrgb"}


class RawSet(NamedTuple):
    """A data set as its files have it.

    Attributes:
        graphs: All graphs.
        split: 0, 1 or 2 (train, validation, test) for every graph, or None where there is no
            official split; single graphs may have masks instead.
        family: Class in `torch_geometric.datasets`, or `peptides`.
        name: Name of the set as the class spells it.
    """

    graphs: list[Data]
    split: list[int] | None
    family: str
    name: str


def find_class(name: str) -> tuple[str, str]:
    """Class in `torch_geometric.datasets` and spelling of a set.

    Args:
        name: A name such as `Cora`, or class and name such as `Amazon:Photo`; names that are not
            known belong to `TUDataset`.
    """
    family, colon, own = name.partition(":")
    if colon:
        return family, own
    for family, names in _CLASSES.items():
        for known in names:
            if _plain(known) == _plain(name):
                return family, known
    return "TUDataset", name


def read_set(
    name: str, data_dir: Path | str, cache_dir: Path | str, *, download: bool = False
) -> RawSet:
    """Read a data set by PyG's class for it.

    Args:
        name: As in `find_class`.
        data_dir: Folder that holds `<name>/raw`, or a folder with that inside, such as
            `planetoid/Cora/raw`; `peptides_func/peptides_func_graphs.npz` is read as well.
        cache_dir: Where what PyG makes of the files is kept.
        download: Let PyG download what is missing, into `data_dir`.

    Raises:
        ValueError: PyG has no such class, or the files are not there.
    """
    family, own = find_class(name)
    data_dir = Path(data_dir)
    if _plain(own) == "peptidesfunc" and (file := _peptides_file(data_dir)) is not None:
        return read_peptides(file)
    made = getattr(torch_geometric.datasets, family, None)
    if made is None:
        raise ValueError(f"dataset must be a set or class of PyG, got {name!r}")
    root = data_dir
    if not download:
        raw = _find_raw(family, own, data_dir)
        if raw is None:
            raise ValueError(
                f"dataset must have its files in {data_dir}/{own}/raw, as "
                f"torch_geometric.datasets.{family} puts them there, got {name!r}; "
                "download=True lets PyG fetch them"
            )
        root = _linked(raw, Path(cache_dir) / family)
    root.mkdir(parents=True, exist_ok=True)
    # runs that start together must not write `processed` together
    with FileLock(root / f".{_plain(own)}.lock"):
        graphs, split = _open(made, family, own, root)
    return RawSet(graphs, split, family, own)


def _open(made: Any, family: str, own: str, root: Path) -> tuple[list[Data], list[int] | None]:
    """Graphs and split that PyG's class gives."""
    takes = inspect.signature(made.__init__).parameters
    options: dict[str, Any] = {"name": own} if "name" in takes else {}
    if family == "TUDataset":
        options |= {"use_node_attr": True, "use_edge_attr": True}
    if takes.get("split") is None or takes["split"].default != "train":
        return list(made(str(root), **options)), None
    parts = [list(made(str(root), split=part, **options)) for part in ("train", "val", "test")]
    split = [number for number, part in enumerate(parts) for _ in part]
    return [graph for part in parts for graph in part], split


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _peptides_file(data_dir: Path) -> Path | None:
    for folder in (data_dir / "peptides_func", data_dir):
        file = folder / "peptides_func_graphs.npz"
        if file.is_file():
            return file
    return None


def _find_raw(family: str, name: str, data_dir: Path) -> Path | None:
    """The folder `.../<name>/raw` of a set."""
    inside = ("", family, family.lower(), _FOLDERS.get(family, ""))
    for folder in dict.fromkeys(data_dir / part for part in inside):
        if not folder.is_dir():
            continue
        for entry in sorted(folder.iterdir()):
            raw = entry / "raw"
            if _plain(entry.name) == _plain(name) and raw.is_dir() and any(raw.iterdir()):
                return raw
    return None


def _linked(raw: Path, root: Path) -> Path:
    """A root whose `<name>/raw` is a link to the files, and which may be written."""
    link = root / raw.parent.name / "raw"
    link.parent.mkdir(parents=True, exist_ok=True)
    target = raw.resolve()
    if link.resolve() != target:
        fresh = link.with_name(f".{os.getpid()}-raw")
        fresh.symlink_to(target, target_is_directory=True)
        os.replace(fresh, link)
    return root


def read_peptides(file: Path | str) -> RawSet:
    """Read Peptides-func from one file.

    The arrays are `num_nodes`, `num_edges` (G,), `node_feat` (n, 9), `edge_feat` (E, 3) with each
    bond once, `edge_index` (2, E) with node numbers inside the graph, `y` (G, 10), `split` (G,).
    Both directions of every bond are made here.

    Args:
        file: The `.npz` file.

    Returns:
        15,535 graphs with `x` int64, `edge_attr` int64 and `y` (1, 10) float32, and their split.

    Source: Dwivedi et al. 2022, "Long Range Graph Benchmark", arXiv 2206.08164.
    """
    with np.load(file, allow_pickle=False) as stored:
        arrays = {key: torch.from_numpy(stored[key].astype(np.int64)) for key in stored}
    nodes, edges = arrays["num_nodes"].tolist(), arrays["num_edges"].tolist()
    parts: list[tuple[Tensor, ...]] = [
        arrays["node_feat"].split(nodes),
        arrays["edge_index"].split(edges, 1),
        arrays["edge_feat"].split(edges),
        arrays["y"].float().split(1),
    ]
    graphs = [
        Data(
            x=x,
            edge_index=torch.cat([pair, pair.flip(0)], 1),
            edge_attr=torch.cat([bond, bond]),
            y=y,
        )
        for x, pair, bond, y in zip(*parts, strict=True)
    ]
    return RawSet(graphs, arrays["split"].tolist(), "peptides", "peptides-func")
