"""Eigenvectors of graph Laplacians, and the node order by the second of them.

    fiedler_order       nodes along the slowest vibration of their component: neighbours stay close
    laplacian           dense or sparse Laplacian of one graph
    smallest_vectors    its lowest eigenvectors, with fixed signs

All of it runs on the CPU in float64: LAPACK gives the same vectors for the same matrix, whatever
the device of the model. Best computed once per graph, by `AddNodeOrder` and `AddLapPE`.

Letters: n nodes, E directed edges, k eigenvectors.
"""

from typing import Literal

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import Tensor

from .ordering import least_reachable, lexsort, rank_of

# above this a dense eigensolver takes seconds and an n x n matrix 32 MB
_DENSE = 2000

Normalization = Literal["sym", "none"]


def laplacian(
    edge_index: Tensor, num_nodes: int, normalization: Normalization = "none"
) -> sparse.csr_matrix:
    """D - A, or I - D^-1/2 A D^-1/2, of the simple undirected graph under the edges.

    Args:
        edge_index: Edges, (2, E) int64; directions, double edges and loops are dropped.
        num_nodes: Number n of nodes.
        normalization: `"none"` or `"sym"`; isolated nodes have a row of zeros in both.

    Raises:
        ValueError: no normalization has this name.
    """
    if normalization not in ("sym", "none"):
        raise ValueError(f"normalization must be 'sym' or 'none', got {normalization!r}")
    source, target = edge_index.cpu().numpy()
    apart = source != target
    source, target = source[apart], target[apart]
    ends = (np.concatenate([source, target]), np.concatenate([target, source]))
    adjacency = sparse.coo_matrix((np.ones(ends[0].size), ends), (num_nodes, num_nodes)).tocsr()
    adjacency.data[:] = 1.0
    degree = np.asarray(adjacency.sum(1)).ravel()
    if normalization == "none":
        return sparse.csr_matrix(sparse.diags(degree) - adjacency)
    root = np.sqrt(np.divide(1.0, degree, out=np.zeros_like(degree), where=degree > 0))
    scale = sparse.diags(root)
    return sparse.csr_matrix(sparse.diags((degree > 0).astype(float)) - scale @ adjacency @ scale)


def smallest_vectors(matrix: sparse.csr_matrix, count: int) -> tuple[Tensor, Tensor]:
    """Lowest eigenvalues and unit eigenvectors, signs by `fix_signs`, the same in every call.

    Args:
        matrix: Symmetric and positive semidefinite, (n, n).
        count: How many; all n if there are fewer.

    Returns:
        Values (k,) rising, vectors (n, k), float64 on the CPU; k = min(count, n).
    """
    nodes = int(matrix.indptr.size) - 1
    count = min(count, nodes)
    if nodes <= _DENSE or count >= nodes - 1:
        dense = torch.from_numpy(matrix.toarray())
        values, vectors = torch.linalg.eigh(dense) if nodes else (dense.diagonal(), dense)
        values, vectors = values[:count], vectors[:, :count]
    else:
        # shifted below zero the matrix has an inverse; a fixed start makes calls repeat
        start = np.random.default_rng(0).standard_normal(nodes)
        found, basis = eigsh(matrix, count, sigma=-1e-3, which="LM", v0=start)
        order = np.argsort(found, kind="stable")
        values, vectors = torch.from_numpy(found[order]), torch.from_numpy(basis[:, order])
    return values, fix_signs(vectors)


def fix_signs(vectors: Tensor) -> Tensor:
    """Turn every column so that its first entry of greatest size is positive, (n, k) to (n, k)."""
    if not vectors.numel():
        return vectors
    size = vectors.abs()
    # entries that are equal but for rounding must not compete: the first of them decides
    first = (size >= size.amax(0) * (1 - 1e-6)).to(torch.uint8).argmax(0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, first) < 0, -1.0, 1.0)


def fiedler_order(edge_index: Tensor, batch: Tensor, ties: Tensor | None = None) -> Tensor:
    """Score = rank by the second eigenvector of the component's Laplacian, small components first.

    Sorting by it nearly minimises the squared distances between neighbours in the sequence. Its
    sign is free: the node of greatest size, of several the first by `ties`, is at the end. Where
    the second eigenvalue is multiple (rings, complete graphs) the vector is one of many, and
    relabelling the nodes may choose another.

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64; its length alone matters here.
        ties: Decides between equals, (K, n) or (n,); position in memory when absent.

    Returns:
        Scores, (K, n) or (n,) like `ties`, int64.

    Source: Fiedler 1973; Barnard, Pothen & Simon 1995 for the order.
    """
    nodes = batch.numel()
    if not nodes:
        return batch.clone() if ties is None else ties.clone()
    places = torch.arange(nodes)
    rows = (places if ties is None else ties.cpu()).reshape(-1, nodes)
    edges = edge_index.cpu()
    source, target = torch.cat([edges[0], edges[1]]), torch.cat([edges[1], edges[0]])
    component = least_reachable(source, target, places)
    value = torch.zeros(nodes, dtype=torch.float64)
    by_component = torch.argsort(component, stable=True)
    counts = torch.bincount(component, minlength=nodes)
    counts = counts[counts > 0]
    inside = edges[:, torch.argsort(component[edges[0]], stable=True)]
    edge_counts = torch.bincount(component[edges[0]], minlength=nodes)[component.unique()]
    local = torch.empty_like(places)
    parts = zip(
        by_component.split(counts.tolist()),
        inside.split(edge_counts.tolist(), 1),
        strict=True,
    )
    for own, own_edges in parts:
        size = own.numel()
        local[own] = torch.arange(size)
        if size > 2:
            value[own] = smallest_vectors(laplacian(local[own_edges], size), 2)[1][:, 1]
        elif size == 2:
            value[own] = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    # rounded in absolute terms: zeros of a symmetric vector are noise of either sign
    value = value.mul(1e9).round()
    size = torch.zeros(nodes, dtype=torch.int64)
    size.index_add_(0, component, torch.ones_like(component))
    out = torch.stack([_rank(value, component, size, row) for row in rows])
    return out.view(batch.shape if ties is None else ties.shape).to(batch.device)


def _rank(value: Tensor, component: Tensor, size: Tensor, ties: Tensor) -> Tensor:
    """Rank by (size of the component, its least tie, signed value, tie)."""
    big = torch.iinfo(torch.int64).max
    least = torch.full_like(ties, big).scatter_reduce_(0, component, ties, "amin")
    most = torch.zeros_like(value).scatter_reduce_(0, component, value.abs(), "amax")
    # equal but for rounding, as above
    extreme = value.abs() >= most[component] * (1 - 1e-6)
    tie = torch.where(extreme, ties, big)
    first = torch.full_like(ties, big).scatter_reduce_(0, component, tie, "amin")
    decides = extreme & (ties == first[component])
    sign = torch.ones_like(value)
    sign[component[decides]] = torch.where(value[decides] < 0, -1.0, 1.0).to(value.dtype)
    signed = value * sign[component]
    return rank_of(lexsort(size[component], least[component], signed, ties))
