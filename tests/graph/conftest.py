"""Batches of graphs that the graph tests share."""

from collections.abc import Callable, Sequence

import pytest
import torch

# PyG warns while it is imported; scanweave.graph is what keeps that quiet, so it goes first
from torch import Tensor
from torch_geometric.utils import to_undirected

Graphs = tuple[Tensor, Tensor, Tensor]


def _random_graphs(sizes: Sequence[int], channels: int = 16, seed: int = 0) -> Graphs:
    generator = torch.Generator().manual_seed(seed)
    xs, edges, batch, offset = [], [], [], 0
    for number, size in enumerate(sizes):
        xs.append(torch.randn(size, channels, generator=generator, dtype=torch.float64))
        if size > 1:
            pair = torch.randint(0, size, (2, 2 * size), generator=generator)
            edges.append(to_undirected(pair, num_nodes=size) + offset)
        batch += [number] * size
        offset += size
    edge_index = torch.cat(edges, 1) if edges else torch.empty(2, 0, dtype=torch.int64)
    return torch.cat(xs), edge_index, torch.tensor(batch, dtype=torch.int64)


@pytest.fixture
def random_graphs() -> Callable[..., Graphs]:
    """`random_graphs(sizes, channels=16, seed=0)` -> x float64, edge_index, sorted batch."""
    return _random_graphs


@pytest.fixture
def four_nodes() -> Graphs:
    """Four nodes of 16 channels in two graphs of two: x float32, edge_index, batch."""
    edge_index = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    return torch.randn(4, 16), edge_index, torch.tensor([0, 0, 1, 1])
