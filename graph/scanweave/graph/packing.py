"""From a batch of graphs to packed sequences and back, for K node orders at once.

All K * B sequences (B graphs in K orders) lie behind each other, without padding. `nodes` gathers
the nodes into that layout, `places` undoes it, `cu_seqlens` marks the borders.

    pack_nodes            graph ids and scores -> Sequences
    split_sequences       sequences over L * K orders -> those of L layers with K each
    to_sequences          nodes -> sequences; its gradient is a gather too
    to_nodes              sequences -> nodes, the mean over K orders
    reverse_sequences     the same sequences, each read backwards
    mirrored              places in that order
    places_in_graphs      place of each node among the stored nodes of its graph, and borders
    count_nodes           nodes per graph
    edges_of              any adjacency that PyG accepts -> edge_index

Letters: n nodes, B graphs, K permutations, E edges.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
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


def pack_nodes(
    scores: Sequence[Tensor],
    ties: Tensor,
    batch: Tensor,
    borders: Tensor,
    buckets: tuple[Tensor, int] | None = None,
    limits: Sequence[int | None] | None = None,
) -> Sequences:
    """Sort nodes by graph, then by every score in turn, then by tie number.

    Args:
        scores: Each (n,) or (K, n), any real dtype; the first decides first.
        ties: Decides between equal scores, (K, n) int64 in [0, 2^32).
        batch: Graph of every node, (n,) int64 in [0, B), in any order.
        borders: First place of each graph and the end, (B + 1,) int32.
        buckets: Part of its graph that every node is in, (K, n) int64 in [0, P), and P: a sequence
            for every part instead of one a graph.
        limits: For each of `scores` what it stays below, int64 of at least 0 then, or None.
            Known ranges share a sort where 63 bits hold them; nothing else depends on this.

    Returns:
        The K * B sequences; sequence k * B + b is graph b in order k. With parts K * B * P, those
        of a graph behind each other.
    """
    perms, size = ties.shape
    graphs = borders.numel() - 1
    keys = [*zip(scores, limits or [None] * len(scores), strict=True), (ties, 1 << 32)]
    if buckets is not None or perms * graphs > 1:
        group, groups = batch, perms * graphs
        if perms > 1:
            group = batch + torch.arange(perms, device=batch.device).unsqueeze(1) * graphs
            borders = _behind_each_other(borders.diff().repeat(perms))
        if buckets is not None:
            part, parts = buckets
            group, groups = group * parts + part, groups * parts
            borders = _behind_each_other(count_nodes(group.reshape(-1), groups))
        keys.insert(0, (group, groups))
    index = lexsort(*(key.expand(perms, size).reshape(-1) for key in _joined(keys)))
    # sorting runs over all K copies of the nodes; copy k of node v has number k * n + v
    nodes = index if perms == 1 else index % size
    return Sequences(nodes, rank_of(index).view(perms, size), borders)


def _joined(keys: Sequence[tuple[Tensor, int | None]]) -> list[Tensor]:
    """Fewer keys of the same order: neighbours of known range become one, if 63 bits hold it.

    A sort is a dozen launches on a GPU, and most of what sequences cost on a CPU.
    """
    joined: list[Tensor] = []
    range_of_last: int | None = None
    for key, limit in keys:
        if limit is None or range_of_last is None or range_of_last * limit > 1 << 63:
            joined.append(key)
            range_of_last = limit
        else:
            joined[-1] = torch.add(key, joined[-1], alpha=limit)
            range_of_last *= limit
    return joined


def _behind_each_other(lengths: Tensor) -> Tensor:
    """Borders of sequences of these lengths, (S + 1,) int32."""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def split_sequences(sequences: Sequences, layers: int) -> list[Sequences]:
    """Cut sequences over L * K orders into L times K of them, for as many layers."""
    if layers == 1:
        return [sequences]
    nodes, places, borders = sequences
    rows, size = places.shape
    perms = rows // layers
    offset = torch.arange(layers, device=places.device).mul_(perms * size).view(-1, 1, 1)
    own = places.view(layers, perms, size) - offset
    count = (borders.numel() - 1) // layers
    return [
        Sequences(
            part, own[i], borders[i * count : (i + 1) * count + 1] - (i * perms * size if i else 0)
        )
        for i, part in enumerate(nodes.view(layers, -1).unbind())
    ]


class _ToSequences(torch.autograd.Function):
    """y = x[nodes]. The gradient sums over the K places of a node: no scattered additions."""

    @staticmethod
    def forward(x: Tensor, nodes: Tensor, places: Tensor) -> Tensor:
        return x.index_select(0, nodes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _ToNodes.apply(grad, *ctx.saved_tensors), None, None  # type: ignore[return-value]


class _ToNodes(torch.autograd.Function):
    """x[v] = sum of y over the K places of v, whose gradient is a gather by `nodes`."""

    @staticmethod
    def forward(y: Tensor, nodes: Tensor, places: Tensor) -> Tensor:
        if places.size(0) == 1:
            return y.index_select(0, places[0])
        return y.index_select(0, places.reshape(-1)).view(*places.shape, y.size(1)).sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _ToSequences.apply(grad, *ctx.saved_tensors), None, None  # type: ignore[return-value]


def to_sequences(x: Tensor, sequences: Sequences) -> Tensor:
    """Lay the nodes out as sequences, (n, D) to (K * n, D)."""
    return cast(Tensor, _ToSequences.apply(x, sequences.nodes, sequences.places))


def to_nodes(y: Tensor, sequences: Sequences) -> Tensor:
    """Average what the K orders have for each node, (K * n, D) to (n, D)."""
    out = cast(Tensor, _ToNodes.apply(y, sequences.nodes, sequences.places))
    perms = sequences.places.size(0)
    return out if perms == 1 else out / perms


def reverse_sequences(sequences: Sequences) -> Sequences:
    """Read every sequence from its end to its start; borders stay where they are."""
    nodes, places, borders = sequences
    mirror = mirrored(nodes.numel(), borders, nodes.device)
    return Sequences(nodes[mirror], mirror[places], borders)


def mirrored(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Places of every sequence from its end to its start, (length,) int64; its own inverse."""
    if cu_seqlens is None:
        return length - 1 - torch.arange(length, device=device)
    # place p is written p + 1: then the first end that is not below it ends its sequence
    number = torch.arange(1, length + 1, dtype=cu_seqlens.dtype, device=device)
    of = torch.searchsorted(cu_seqlens[1:], number)
    return ((cu_seqlens[:-1] + cu_seqlens[1:])[of] - number).long()


def places_in_graphs(batch: Tensor, num_graphs: int) -> tuple[Tensor, Tensor]:
    """Place of each node among the stored nodes of its graph, for any order of `batch`.

    No number is read back from the device.

    Args:
        batch: Graph of every node, (n,) int64 in [0, B).
        num_graphs: Number of graphs B.

    Returns:
        The places, (n,) int64, and the first place of each graph and the end, (B + 1,) int32.
    """
    nodes, device = batch.numel(), batch.device
    if num_graphs == 1:
        ends = torch.arange(2, dtype=torch.int32, device=device) * nodes
        return torch.arange(nodes, device=device), ends
    ordered, by_graph = torch.sort(batch, stable=True)
    graphs = torch.arange(num_graphs + 1, device=device)
    borders = torch.searchsorted(ordered, graphs, out_int32=True)
    return rank_of(by_graph) - borders[:-1][batch], borders


def count_nodes(batch: Tensor, num_graphs: int) -> Tensor:
    """Nodes per graph, (num_graphs,) int64, without reading a number back from the device."""
    return batch.new_zeros(num_graphs).index_add_(0, batch, torch.ones_like(batch))


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
