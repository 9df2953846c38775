"""From a batch of graphs to packed sequences and back, for K node orders at once.

All K * B sequences (B graphs in K orders) lie behind each other, without padding. `nodes` gathers
the nodes into that layout, `places` undoes it, `cu_seqlens` marks the borders.

    pack_nodes            graph ids and scores -> Sequences
    reverse_sequences     the same sequences, each read backwards
    count_nodes           nodes per graph
    positions_in_graph    place of each node among the stored nodes of its graph
    edges_of              any adjacency that PyG accepts -> edge_index

Letters: n nodes, B graphs, K permutations, E edges.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_geometric import EdgeIndex

from .ordering import lexsort, rank_of


class Sequences(NamedTuple):
    """K * B packed sequences over n nodes.

    Attributes:
        nodes: Node at each place, (K * n,) int64.
        places: Place of each node, (K, n) int64: `nodes[places[k, v]] == v`.
        cu_seqlens: First place of each sequence and the end, (K * B + 1,) int32.
    """

    nodes: Tensor
    places: Tensor
    cu_seqlens: Tensor


def pack_nodes(scores: Sequence[Tensor], ties: Tensor, batch: Tensor, counts: Tensor) -> Sequences:
    """Sort nodes by graph, then by every score in turn, then by tie number.

    Args:
        scores: Each (n,) or (K, n), any real dtype; the first decides first.
        ties: Decides between equal scores, (K, n) int64.
        batch: Graph of every node, (n,) int64 in [0, B), in any order.
        counts: Nodes per graph, (B,) int64.

    Returns:
        The K * B sequences; sequence k * B + b is graph b in order k.
    """
    perms, size = ties.shape
    first = torch.arange(perms, device=batch.device).unsqueeze(1)
    keys = [batch + first * counts.numel(), *(score.expand(perms, size) for score in scores), ties]
    index = lexsort(*(key.reshape(-1) for key in keys))
    lengths = torch.cat([counts.new_zeros(1), counts.repeat(perms)])
    # sorting runs over all K copies of the nodes; copy k of node v has number k * n + v
    return Sequences(
        index - (first * size).expand(perms, size).reshape(-1),
        rank_of(index).view(perms, size),
        lengths.cumsum(0).to(torch.int32),
    )


def reverse_sequences(sequences: Sequences) -> Sequences:
    """Read every sequence from its end to its start; borders stay where they are."""
    nodes, places, borders = sequences
    number = torch.arange(nodes.numel(), device=nodes.device)
    of = torch.searchsorted(borders[1:].long(), number, right=True)
    mirror = (borders[of] + borders[of + 1] - 1).long() - number
    return Sequences(nodes[mirror], mirror[places], borders)


def count_nodes(batch: Tensor, num_graphs: int) -> Tensor:
    """Nodes per graph, (num_graphs,) int64, without reading a number back from the device."""
    return batch.new_zeros(num_graphs).index_add_(0, batch, torch.ones_like(batch))


def positions_in_graph(batch: Tensor, counts: Tensor) -> Tensor:
    """Place of each node among the stored nodes of its graph, (n,) int64, for any `batch` order."""
    rank = rank_of(torch.argsort(batch, stable=True))
    return rank - (counts.cumsum(0) - counts)[batch]


def edges_of(adj: Any) -> Tensor:
    """Edges (2, E) int64, source above target, of an adjacency in any of PyG's forms.

    Args:
        adj: Edge index (2, E) int64, an `EdgeIndex`, or the transposed adjacency matrix as a
            torch.sparse COO, CSR or CSC tensor or a `torch_sparse.SparseTensor`.

    Raises:
        ValueError: `adj` is none of these.
    """
    if not isinstance(adj, Tensor):
        # a SparseTensor, whose package need not be there
        if not hasattr(adj, "coo"):
            raise ValueError(f"edge_index must be a tensor or sparse, got {type(adj).__name__}")
        row, col, _ = adj.coo()
        return torch.stack([col, row])
    if adj.layout == torch.sparse_coo:
        return adj.coalesce().indices().flip(0)
    if adj.layout in (torch.sparse_csr, torch.sparse_csc):
        by_row = adj.layout == torch.sparse_csr
        ptr = adj.crow_indices() if by_row else adj.ccol_indices()
        inner = adj.col_indices() if by_row else adj.row_indices()
        outer = torch.arange(ptr.numel() - 1, device=ptr.device).repeat_interleave(ptr.diff())
        return torch.stack([inner, outer] if by_row else [outer, inner]).long()
    if adj.dim() != 2 or adj.size(0) != 2 or adj.dtype != torch.int64:
        raise ValueError(
            "edge_index must be (2, E) int64 or a sparse matrix, "
            f"got {tuple(adj.shape)} {adj.dtype}"
        )
    return adj.as_tensor() if isinstance(adj, EdgeIndex) else adj
