"""What is computed once per graph of a set, kept in a file for the runs that follow.

    add_order         node order -> `node_order` of every graph
    add_encoding      Laplacian eigenvectors or return probabilities -> columns behind `x`

Files are `<folder>/<set>-<what>.npz`, small: places as the smallest integers that hold them,
encodings in float16, and every row that occurs more than once kept once (graphs of molecules have
few different neighbourhoods). Encodings are rounded to float16 with or without a file, so that
runs do not depend on it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from .encodings import AddLapPE, AddRWSE
from .transforms import AddNodeOrder

# a structure that few graphs have would stand hundreds of deviations out, and a mixer without a
# norm in front answers with a power of that: infinity after three layers
_FAR = 10.0


def add_order(graphs: Sequence[Data], order: Sequence[str], file: Path | None = None) -> None:
    """Give every graph a `node_order`, (n,) int64.

    Args:
        graphs: Graphs, changed in place.
        order: Names of orders, the first decides first.
        file: Where to keep it, or where it is; nowhere when absent.

    Raises:
        ValueError: the file does not fit the graphs, or no order has such a name.
    """
    rows = _cached(graphs, AddNodeOrder(order), "node_order", file)
    for graph, row in zip(graphs, rows, strict=True):
        graph.node_order = row.long()


def add_encoding(
    graphs: Sequence[Data], *, rwse: int = 0, lap_pe: int = 0, folder: Path | None, name: str
) -> None:
    """Put encodings behind the columns of `x`, with mean 0 and deviation 1, cut off at ten of them.

    Args:
        graphs: All graphs of the set, changed in place.
        rwse: Steps of `AddRWSE`, 0 for none.
        lap_pe: Eigenvectors of `AddLapPE`, 0 for none.
        folder: Where files are kept; nowhere when absent.
        name: Name of the set, the first part of the files' names.

    Raises:
        ValueError: a file does not fit the graphs.
    """
    for steps, transform, attr in (
        (rwse, AddRWSE(max(rwse, 1)), "rwse"),
        (lap_pe, AddLapPE(max(lap_pe, 1)), "lap_pe"),
    ):
        if not steps:
            continue
        file = None if folder is None else folder / f"{name}-{attr}{steps}.npz"
        rows = _cached(graphs, transform, attr, file)
        every = torch.cat(rows)
        mean, deviation = every.mean(0), every.std(0)
        # odd steps of a bipartite graph never come back
        deviation[deviation == 0] = 1
        for graph, row in zip(graphs, rows, strict=True):
            columns = ((row - mean) / deviation).clamp(-_FAR, _FAR)
            graph.x = torch.cat([graph["x"].float(), columns], 1)


def _cached(
    graphs: Sequence[Data], transform: BaseTransform, attr: str, file: Path | None
) -> list[Tensor]:
    """`attr` of every graph, from the file or from the transform."""
    counts = [int(graph.num_nodes or 0) for graph in graphs]
    if file is not None and file.is_file():
        with np.load(file, allow_pickle=False) as stored:
            values = stored["rows"][stored["number"]] if "rows" in stored else stored["values"]
            if stored["counts"].tolist() != counts:
                raise ValueError(f"file must fit the graphs of the set, got {file}; delete it")
    else:
        values = np.concatenate([_compact(transform(graph)[attr]) for graph in graphs])
        if file is not None:
            _write(file, values, counts)
    wide = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
    return list(torch.from_numpy(wide).split(counts))


def _compact(value: Tensor) -> np.ndarray:
    array = value.cpu().numpy()
    return array.astype(np.float16 if array.dtype.kind == "f" else np.int32)


def _write(file: Path, values: np.ndarray, counts: Sequence[int]) -> None:
    """Write whole or not at all: several runs may want the same file at once."""
    arrays: dict[str, np.ndarray] = {"counts": np.array(counts, np.int32)}
    if values.ndim > 1:
        rows, number = np.unique(values, axis=0, return_inverse=True)
        arrays |= {"rows": rows, "number": _smallest(number.reshape(-1))}
    else:
        arrays["values"] = _smallest(values)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{os.getpid()}-{file.name}")
    np.savez_compressed(fresh, allow_pickle=False, **arrays)
    os.replace(fresh, file)


def _smallest(numbers: np.ndarray) -> np.ndarray:
    top = int(numbers.max(initial=0))
    return numbers.astype(np.min_scalar_type(top))
