"""Node orders: where each node stands in the sequence of its graph.

An order is a function `order(edge_index, batch, ties)` of the edges (2, E), the graph of every
node (n,) and one whole number per node and permutation, `ties` (K, n). It returns a score per
node, (n,), or one per permutation, (K, n). Nodes are sorted by ascending score inside their
graph; nodes of equal score are sorted by `ties`. The last node has seen the most when its turn
comes in a forward scan, hence "important = high score". Scores of different graphs are never
compared, and must not depend on which other graphs are in the batch.

    degree_order     few neighbours first (both Graph Mamba papers)
    pagerank_order   low PageRank first
    bfs_order        breadth first from a node of least degree: neighbours stay close
    rcm_order        reverse Cuthill-McKee: breadth first from the rim, small bandwidth
    index_order      as stored
    random_order     ties alone decide
    tie_noise        whole numbers that make ties random and yet reproducible
    score_limit      what an order's scores stay below, where that is known beforehand

Letters: n nodes, E directed edges, K permutations.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

Order = Callable[[Tensor, Tensor, Tensor], Tensor]

_MASK = 0xFFFFFFFF


def degree_order(edge_index: Tensor, batch: Tensor, ties: Tensor | None = None) -> Tensor:
    """Score = number of edge ends at the node (in-degree plus out-degree; a loop counts twice).

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64; its length alone matters here.
        ties: Not used.

    Returns:
        Scores, (n,) int64.

    Example:
        >>> degree_order(torch.tensor([[0, 1], [1, 2]]), torch.zeros(3).long()).tolist()
        [1, 2, 1]
    """
    ends = edge_index.reshape(-1)
    return batch.new_zeros(batch.numel()).index_add_(0, ends, torch.ones_like(ends))


def pagerank_order(
    edge_index: Tensor,
    batch: Tensor,
    ties: Tensor | None = None,
    *,
    damping: float = 0.85,
    steps: int = 50,
) -> Tensor:
    """Score = PageRank by power iteration, in units of one per node, rounded to eight decimals.

    Walkers that leave a node without out-edges are dropped: inside one graph that scales all
    scores alike, so the order is the usual one and needs no sum over the graph. Rounding keeps
    nodes that a symmetry maps onto each other tied, whatever the order of the additions.

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64; its length alone matters here.
        ties: Not used.
        damping: Probability of following an edge instead of starting anew.
        steps: Power iterations.

    Returns:
        Scores, (n,) float64.

    Source: Page et al. 1999, "The PageRank citation ranking".
    """
    source, target = edge_index[0], edge_index[1]
    score = torch.ones(batch.numel(), dtype=torch.float64, device=batch.device)
    out_degree = torch.zeros_like(score).index_add_(
        0, source, torch.ones_like(source, dtype=score.dtype)
    )
    weight = damping / out_degree.clamp(min=1)
    for _ in range(steps):
        flow = (score * weight)[source]
        score = torch.full_like(score, 1 - damping).index_add_(0, target, flow)
    return score.mul(1e8).round()


def bfs_order(edge_index: Tensor, batch: Tensor, ties: Tensor | None = None) -> Tensor:
    """Score = rank in a breadth-first walk, component after component.

    A component starts at its node of least degree; components follow each other by the degree
    of their start; children of one parent stand in the order of `ties`. Edges count both ways.

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64.
        ties: Decides between equals, (K, n) or (n,); position in memory when absent.

    Returns:
        Scores, (K, n) or (n,) like `ties`, int64.
    """
    return _ranks(edge_index, batch, ties, sort_children=False)


def rcm_order(edge_index: Tensor, batch: Tensor, ties: Tensor | None = None) -> Tensor:
    """Score = rank in the reverse Cuthill-McKee order: neighbours end up few places apart.

    Breadth first from the node where a first breadth-first walk ended (an end of the longest
    path, nearly), children by ascending degree, the whole order reversed. Edges count both ways.

    Args:
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64.
        ties: Decides between equals, (K, n) or (n,); position in memory when absent.

    Returns:
        Scores, (K, n) or (n,) like `ties`, int64.

    Source: Cuthill & McKee 1969; George 1971.
    """
    return -_ranks(edge_index, batch, ties, sort_children=True)


def index_order(edge_index: Tensor, batch: Tensor, ties: Tensor | None = None) -> Tensor:
    """Score = place in memory. Not a function of the graph: relabelling nodes changes it.

    Args:
        edge_index: Not used.
        batch: Graph of every node, (n,) int64; its length alone matters here.
        ties: Not used.

    Returns:
        Scores, (n,) int64.
    """
    return torch.arange(batch.numel(), device=batch.device)


def random_order(edge_index: Tensor, batch: Tensor, ties: Tensor | None = None) -> Tensor:
    """Score = 0 for all, so that the noise among ties makes the order.

    Args:
        edge_index: Not used.
        batch: Graph of every node, (n,) int64; its length alone matters here.
        ties: Not used.

    Returns:
        Scores, (n,) int64.
    """
    return batch.new_zeros(batch.numel())


def score_limit(order: Order, edge_index: Tensor, nodes: int) -> int | None:
    """What the scores of an order stay below; they are whole numbers of at least 0 then.

    Such scores share one sort with the graph and the tie number; see `pack_nodes`.

    Args:
        order: Any order.
        edge_index: Edges, (2, E) int64.
        nodes: Number of nodes n.

    Returns:
        The limit, or None where it would take a look at the scores.
    """
    if order is degree_order:
        return edge_index.numel() + 1
    if order is index_order:
        return nodes
    return 1 if order is random_order else None


def tie_noise(position: Tensor, num_perms: int, seed: int | Sequence[int] | Tensor) -> Tensor:
    """Give every node of a graph a different whole number, random to the eye.

    A hash of (seed, permutation, position of the node inside its graph). For a fixed seed and
    permutation it is one-to-one in the position, so no tie is left, and a graph gets the same
    numbers whatever else is in the batch.

    Args:
        position: Place of each node inside its graph, (n,) int64, below 2^32.
        num_perms: Number K of permutations.
        seed: A whole number, or several, L; or an int64 tensor () or (L, 1, 1) on the device of
            `position`, which is not read back.

    Returns:
        Noise, (L * K, n) int64 in [0, 2^32), with L = 1 unless there are several seeds.
    """
    # numbers are hashed on the host, where that costs no kernel
    keys = [hash_bits(one & _MASK) for one in (seed if isinstance(seed, Sequence) else [seed])]
    if num_perms == 1:
        keys = [hash_bits(key) for key in keys]
    key = keys[0]
    if len(keys) > 1:
        # filled on the device: a copied list would wait for it
        key = torch.cat([position.new_full((1, 1, 1), int(number)) for number in keys])
    if num_perms > 1:
        perm = torch.arange(num_perms, device=position.device).unsqueeze(1)
        key = hash_bits(perm ^ key)
    return torch.atleast_2d(hash_bits(position ^ key)).flatten(0, -2)


@overload
def hash_bits(x: int) -> int: ...
@overload
def hash_bits(x: Tensor) -> Tensor: ...
def hash_bits(x: Any) -> Any:
    """Mix 32 bits held in int64 or in a Python number, one-to-one.

    Both multipliers are below 2^31: products of 32-bit numbers then stay inside int64.
    Source: the two-round multiply-xorshift family of Ellis, "hash-prospector" (constants found
    by search for low bias).
    """
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & _MASK
    x = (x ^ (x >> 12)) * 0x297A2D39 & _MASK
    return x ^ (x >> 15)


def lexsort(*keys: Tensor) -> Tensor:
    """Indices that sort by the first key, then by the second, and so on; equal rows keep place.

    Args:
        keys: One or more tensors (n,), the one that decides first at the front.

    Returns:
        Permutation, (n,) int64.
    """
    index = torch.argsort(keys[-1], stable=True)
    for key in reversed(keys[:-1]):
        index = index[torch.argsort(key[index], stable=True)]
    return index


def rank_of(index: Tensor) -> Tensor:
    """The inverse of a permutation (n,): `rank_of(index)[index] == arange(n)`."""
    return torch.empty_like(index).scatter_(
        0, index, torch.arange(index.numel(), device=index.device)
    )


def _ranks(
    edge_index: Tensor, batch: Tensor, ties: Tensor | None, *, sort_children: bool
) -> Tensor:
    """Walk K disjoint copies of the graph, one for every row of `ties`."""
    nodes = batch.numel()
    if ties is None:
        ties = torch.arange(nodes, device=batch.device)
    copies = ties.numel() // max(nodes, 1)
    offset = torch.arange(copies, device=batch.device).mul_(nodes)
    edges = edge_index.repeat(1, copies) + offset.repeat_interleave(edge_index.size(1))
    return _breadth_first(edges, ties.reshape(-1), sort_children=sort_children).view_as(ties)


def _breadth_first(edge_index: Tensor, ties: Tensor, *, sort_children: bool) -> Tensor:
    """Rank of every node in a breadth-first walk of all components side by side.

    With `sort_children`, children go by (degree, tie) instead of tie alone, and the walk is
    repeated from the node where the first one ended.
    """
    nodes = ties.numel()
    # both directions, sorted by source: row i of the CSR form is neighbours[start[i]:start[i + 1]]
    source = torch.cat([edge_index[0], edge_index[1]])
    target = torch.cat([edge_index[1], edge_index[0]])
    degree = torch.zeros_like(ties).index_add_(0, source, torch.ones_like(source))
    by_degree = rank_of(lexsort(degree, ties))
    neighbours = target[torch.argsort(source, stable=True)]
    start = degree.cumsum(0) - degree

    component = least_reachable(source, target, by_degree)
    child_key = by_degree if sort_children else rank_of(lexsort(ties))
    roots = (component == by_degree).nonzero().squeeze(1)
    place = _walk(roots, start, degree, neighbours, child_key)
    if sort_children:
        last = torch.zeros_like(place).scatter_reduce_(0, component, place, "amax")
        roots = (place == last[component]).nonzero().squeeze(1)
        place = _walk(roots, start, degree, neighbours, child_key)
    return rank_of(lexsort(component, place)) if nodes else place


def least_reachable(source: Tensor, target: Tensor, rank: Tensor) -> Tensor:
    """The least `rank` (a permutation) in the component of each node."""
    node_of = rank_of(rank)
    least = rank
    while True:
        lower = least.scatter_reduce(0, target, least[source], "amin")
        # jump to what the best known node already knows: few rounds even on long paths
        lower = torch.minimum(lower, lower[node_of[lower]])
        if torch.equal(lower, least):
            return least
        least = lower


def _walk(
    roots: Tensor, start: Tensor, degree: Tensor, neighbours: Tensor, child_key: Tensor
) -> Tensor:
    """Number the nodes level by level; inside a level by (number of the parent, child_key)."""
    nodes = degree.numel()
    place = torch.full_like(degree, -1)
    parent = torch.full_like(degree, nodes)
    frontier, count = roots, 0
    while frontier.numel():
        place[frontier] = torch.arange(count, count + frontier.numel(), device=degree.device)
        count += frontier.numel()
        fan = degree[frontier]
        offset = torch.arange(int(fan.sum()), device=degree.device)
        offset -= (fan.cumsum(0) - fan).repeat_interleave(fan)
        children = neighbours[start[frontier].repeat_interleave(fan) + offset]
        parent.scatter_reduce_(0, children, place[frontier].repeat_interleave(fan), "amin")
        children = children[place[children] < 0].unique()
        frontier = children[torch.argsort(parent[children] * nodes + child_key[children])]
    return place
