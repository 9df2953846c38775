"""Node orders by importance beyond degree and PageRank, in the form that `ordering.py` describes.

    ppr_order            personalised PageRank from the nodes of most edges, or from given ones
    eigenvector_order    eigenvector centrality, component by component
    kcore_order          core numbers

Letters: n nodes, E directed edges.
"""

import torch
from torch import Tensor

from .ordering import degree_order, least_reachable


def ppr_order(
    edge_index: Tensor,
    batch: Tensor,
    ties: Tensor | None = None,
    *,
    roots: Tensor | None = None,
    damping: float = 0.85,
    steps: int = 50,
) -> Tensor:
    """Score = PageRank of walkers that start anew at roots only: nodes near them come last.

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64.
        ties: Not used.
        roots: True at roots, (n,) bool; in every graph the nodes of most edge ends when absent.
        damping: Probability of following an edge instead of starting anew.
        steps: Power iterations; nodes farther away than that share the score 0.

    Returns:
        Scores, (n,) float64, to nine digits, so that nodes that a symmetry swaps stay tied.

    Raises:
        ValueError: `roots` is not (n,) bool.

    Source: Page et al. 1999, "The PageRank citation ranking", section 6.
    """
    if roots is None:
        degree = degree_order(edge_index, batch)
        # graph ids may have gaps; below 2^31 nodes there are no more than n of them
        number = torch.unique(batch, return_inverse=True)[1]
        most = torch.zeros_like(degree).scatter_reduce_(0, number, degree, "amax")
        roots = degree == most[number]
    elif roots.shape != batch.shape or roots.dtype != torch.bool:
        raise ValueError(
            f"roots must be ({batch.numel()},) bool, got {tuple(roots.shape)} {roots.dtype}"
        )
    source, target = edge_index[0], edge_index[1]
    start = roots.double()
    out_degree = torch.zeros_like(start).index_add_(
        0, source, torch.ones_like(source, dtype=start.dtype)
    )
    weight = damping / out_degree.clamp(min=1)
    score = start
    for _ in range(steps):
        score = ((1 - damping) * start).index_add(0, target, (score * weight)[source])
    return round_digits(score)


def eigenvector_order(
    edge_index: Tensor, batch: Tensor, ties: Tensor | None = None, *, steps: int = 50
) -> Tensor:
    """Score = eigenvector centrality within the component, its greatest node at 1.

    Power iteration with A + I, which has the eigenvectors of A and does not swing on bipartite
    graphs. Edges count both ways. On long paths `steps` steps are short of the limit; what they
    give is a function of the graph all the same.

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64; its length alone matters here.
        ties: Not used.
        steps: Power iterations.

    Returns:
        Scores, (n,) float64, to nine digits.

    Source: Bonacich 1972, "Factoring and weighting approaches to status scores".
    """
    source = torch.cat([edge_index[0], edge_index[1]])
    target = torch.cat([edge_index[1], edge_index[0]])
    component = least_reachable(source, target, torch.arange(batch.numel(), device=batch.device))
    score = torch.ones(batch.numel(), dtype=torch.float64, device=batch.device)
    for _ in range(steps):
        score = score.index_add(0, target, score[source])
        most = torch.zeros_like(score).scatter_reduce_(0, component, score, "amax")
        score = score / most[component]
    return round_digits(score)


def kcore_order(edge_index: Tensor, batch: Tensor, ties: Tensor | None = None) -> Tensor:
    """Score = core number: the largest k such that the node is in a subgraph of degrees >= k.

    Peels the graph on the host, one round per layer of nodes. Edges count both ways and once;
    loops do not count.

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64; its length alone matters here.
        ties: Not used.

    Returns:
        Scores, (n,) int64.

    Source: Seidman 1983; Matula & Beck 1983.
    """
    nodes = batch.numel()
    low, high = edge_index.min(0).values, edge_index.max(0).values
    pairs = (low * nodes + high)[low != high].unique()
    one, other = pairs // max(nodes, 1), pairs % max(nodes, 1)
    source, target = torch.cat([one, other]), torch.cat([other, one])
    degree = batch.new_zeros(nodes).index_add_(0, target, torch.ones_like(target))
    core = torch.zeros_like(degree)
    left = torch.ones_like(degree, dtype=torch.bool)
    k = 0
    while bool(left.any()):
        k = max(k, int(degree[left].min()))
        peeled = left & (degree <= k)
        core[peeled] = k
        left &= ~peeled
        lost = peeled[source]
        degree = degree.index_add(0, target[lost], -torch.ones_like(target[lost]))
    return core


def round_digits(score: Tensor) -> Tensor:
    """Keep 30 bits, nine digits, of each float64: sums in another order then give the same.

    By Veltkamp's splitting, whose three operations are exact or rounded alike on every device;
    powers of two are not (`torch.ldexp` on a GPU is off in the last digit).
    """
    scaled = score * (2**23 + 1)
    return scaled - (scaled - score)
