"""Handwritten digits as pixel graphs: real graphs that need no download.

A node is a pixel with ink, an edge joins two touching pixels, corners included. A node knows its
ink and, where asked, its coordinates. Edges carry no direction, so without coordinates the class
lies in the shape that the graph as a whole draws.
"""

import torch
from torch import Tensor
from torch_geometric.data import Data

_SIDE = 8
_MAX_INK = 16.0


def digit_graphs(threshold: float = 0.0, coordinates: int = 0) -> list[Data]:
    """Turn scikit-learn's 1,797 digits of 8 x 8 pixels into graphs.

    Args:
        threshold: Pixels with more ink than this, of 1, become nodes.
        coordinates: How many coordinates a node knows: 0, 1 (its row) or 2, each in [-1, 1].

    Returns:
        Graphs in the set's own order, each with `x` (n, 1 + coordinates) float32, `edge_index`
        (2, E) with both directions of every edge, `pos` (n, 2) row and column, and `y` (1,).
        Nodes are stored row by row.

    Raises:
        ValueError: `threshold` or `coordinates` is out of range.
        ImportError: scikit-learn is not installed.

    Source: Alpaydin & Kaynak 1998, "Optical recognition of handwritten digits", UCI; the copy
    (its test part) that ships inside scikit-learn.
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    if coordinates not in (0, 1, 2):
        raise ValueError(f"coordinates must be 0, 1 or 2, got {coordinates}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "scanweave.graph.digits needs scikit-learn: pip install 'scanweave[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    ink = torch.as_tensor(pixels, dtype=torch.float32).div(_MAX_INK)
    touching = _touching()
    number = torch.arange(_SIDE)
    grid = torch.cartesian_prod(number, number).float()
    return [
        _pixel_graph(row, row > threshold, int(label), touching, grid, coordinates)
        for row, label in zip(ink, labels, strict=True)
    ]


def _pixel_graph(
    ink: Tensor, kept: Tensor, label: int, touching: Tensor, grid: Tensor, coordinates: int
) -> Data:
    nodes = kept.nonzero().squeeze(1)
    centred = grid[nodes] * (2 / (_SIDE - 1)) - 1
    return Data(
        x=torch.cat([ink[nodes].unsqueeze(1), centred[:, :coordinates]], dim=1),
        edge_index=touching[nodes][:, nodes].nonzero().t().contiguous(),
        pos=grid[nodes],
        y=torch.tensor([label]),
    )


def _touching() -> Tensor:
    """Which of the 64 pixels touch: (64, 64) bool, symmetric, without the diagonal."""
    place = torch.arange(_SIDE * _SIDE)
    row, column = place // _SIDE, place % _SIDE
    rows_apart = (row.unsqueeze(1) - row).abs()
    columns_apart = (column.unsqueeze(1) - column).abs()
    return torch.maximum(rows_apart, columns_apart) == 1
