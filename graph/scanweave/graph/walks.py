"""Random walks and the subgraphs on them, in plain torch, on a CPU and on a GPU.

A token of a root node v is a set of random walks from v, and the subgraph on the nodes that they
visit (Behrouz & Hashemi 2024, arXiv 2402.08678, section 4). Chances come from a hash of (seed,
token, walk, step, place of v in its graph): equal seeds give equal walks on every device, and a
graph gets the same walks whatever else is in the batch.

    Neighbours         the edges, sorted by source, for walking and for looking edges up
    random_walks       the walks of every root, (n, L, M, m + 1)
    walked_places      which places of `random_walks` were walked to
    token_lengths      steps of the walks of each token: m, ..., m, ..., 1, ..., 1, 0
    Subgraphs          the node sets of all tokens behind each other
    token_subgraphs    walks -> Subgraphs
    token_weights      walks -> visited nodes with weights that count each once
    induced_edges      edges of the graph between nodes of one token
    walked_edges       those edges that a walk of the token took, both ways

Letters: n roots, m steps of the longest walk, M walks a token, s tokens a length, L = s m + 1
tokens a root, S nodes of all subgraphs, E edges.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .ordering import hash_bits

_MASK = 0xFFFFFFFF


class Neighbours:
    """Directed edges sorted by (source, target).

    Args:
        edges: Edges, (2, E) int64.
        num_nodes: Number N of nodes.

    Attributes:
        start: First place of every node's edges, (N,) int64.
        degree: Number of every node's edges, (N,) int64.
        target: Where each edge ends, (E,) int64.
        number: Column of each edge in `edges`, (E,) int64.
        num_nodes: N.
    """

    def __init__(self, edges: Tensor, num_nodes: int):
        self.num_nodes = num_nodes
        keys = edges[0] * num_nodes + edges[1]
        # stable: of double edges the first is found, on every device
        self._keys, self.number = torch.sort(keys, stable=True)
        self.target = edges[1][self.number]
        ends = torch.ones_like(self.target)
        self.degree = edges.new_zeros(num_nodes).index_add_(0, edges[0], ends)
        self.start = self.degree.cumsum(0) - self.degree

    def find(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Look edges up.

        Args:
            source: Node ids, any shape.
            target: Node ids, same shape.

        Returns:
            Whether the edge exists, bool, and its column in `edges` (0 if it does not, which is
            out of range if there are no edges at all), both of that shape.
        """
        if not self._keys.numel():
            return torch.zeros_like(source, dtype=torch.bool), torch.zeros_like(source)
        keys = source * self.num_nodes + target
        place = torch.searchsorted(self._keys, keys).clamp_(max=self._keys.numel() - 1)
        found = self._keys[place] == keys
        return found, torch.where(found, self.number[place], 0)


def walked_places(walks: Tensor) -> Tensor:
    """True where a walk has not ended yet, (1, L, 1, m + 1) bool: places 0 to its length."""
    steps = walks.size(3) - 1
    lengths = token_lengths(steps, (walks.size(1) - 1) // max(steps, 1), walks.device)
    return (torch.arange(steps + 1, device=walks.device) <= lengths[:, None])[None, :, None]


def token_lengths(walk_length: int, num_repeats: int, device: torch.device | str) -> Tensor:
    """Steps of the walks of each token, (L,) int64: long walks first, the node alone last."""
    steps = torch.arange(walk_length, 0, -1, device=device).repeat_interleave(num_repeats)
    return torch.cat([steps, steps.new_zeros(1)])


@torch.no_grad()
def random_walks(
    neighbours: Neighbours,
    roots: Tensor,
    position: Tensor,
    walk_length: int,
    num_walks: int = 1,
    num_repeats: int = 1,
    *,
    seed: int | Tensor = 0,
    share_prefix: bool = False,
) -> Tensor:
    """Walk from every root, all walks at once, along the direction of the edges.

    Every edge of the node where a walk stands is as likely as any other; a walk stays where there
    is none. Walks of length 1, ..., m are independent of each other, as the paper has it.

    Args:
        neighbours: The edges.
        roots: Nodes to start from, (n,) int64.
        position: Place of each root inside its graph, (n,) int64, below 2^32.
        walk_length: Steps m of the longest walks, at least 0.
        num_walks: Walks M of one token.
        num_repeats: Tokens s of one length.
        seed: A whole number, or an int64 tensor () on the device of `roots`.
        share_prefix: Let walks of one repeat share their first steps: fewer chances to draw.

    Returns:
        Visited nodes, (n, L, M, m + 1) int64: token l walks `token_lengths(m, s)[l]` steps; places
        after its last step hold the root, which is in the set anyway.

    Raises:
        ValueError: a number is out of range.
    """
    for name, value, least in (
        ("walk_length", walk_length, 0),
        ("num_walks", num_walks, 1),
        ("num_repeats", num_repeats, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    tokens = walk_length * num_repeats
    device = roots.device
    token = torch.arange(tokens, device=device)
    stream = token % num_repeats if share_prefix else token
    stream = stream.unsqueeze(1) * num_walks + torch.arange(num_walks, device=device)
    start = hash_bits(seed & _MASK)
    # one number a walk, then one a walk and root; the walks with most steps are at the front
    chance = hash_bits(hash_bits(stream ^ start) ^ position[:, None, None])
    shape = (roots.numel(), tokens + 1, num_walks, walk_length + 1)
    walks = roots[:, None, None, None].expand(shape).contiguous()
    here = walks[:, :tokens, :, 0]
    for step in range(1, walk_length + 1):
        walking = num_repeats * (walk_length - step + 1)
        here, chance = here[:, :walking], chance[:, :walking]
        degree = neighbours.degree[here]
        # the product is below 2^63 and its upper half below the degree: no rounding to clamp
        pick = neighbours.start[here] + (hash_bits(chance ^ step) * degree >> 32)
        if neighbours.target.numel():
            there = neighbours.target[pick.clamp(max=neighbours.target.numel() - 1)]
            here = torch.where(degree > 0, there, here)
        walks[:, :walking, :, step] = here
    return walks


class Subgraphs(NamedTuple):
    """The node sets of T tokens behind each other.

    Attributes:
        nodes: Node at each place, (S,) int64, rising inside a token.
        token: Token of each place, (S,) int64, rising.
        ptr: First place of each token and the end, (T + 1,) int64.
        root: Place of each token's root, (T,) int64.
    """

    nodes: Tensor
    token: Tensor
    ptr: Tensor
    root: Tensor


@torch.no_grad()
def token_subgraphs(walks: Tensor) -> Subgraphs:
    """The set of nodes that the walks of each token visit; token number = root * L + token.

    Args:
        walks: What `random_walks` returns, (n, L, M, m + 1) int64.
    """
    visited = walks.flatten(0, 1).flatten(1)
    ordered, first = _first_visits(visited)
    counts = first.sum(1)
    ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    token = torch.arange(counts.numel(), device=walks.device).unsqueeze(1).expand_as(first)[first]
    before = first & (ordered < visited[:, :1])
    return Subgraphs(ordered[first], token, ptr, ptr[:-1] + before.sum(1))


@torch.no_grad()
def token_weights(walks: Tensor) -> tuple[Tensor, Tensor]:
    """The visited nodes of each token with repeats, and weights for the mean over different ones.

    Args:
        walks: What `random_walks` returns, (n, L, M, m + 1) int64.

    Returns:
        Nodes (n L, M (m + 1)) int64 and weights of the same shape: 1 / (number of different nodes)
        where a node is first, 0 where it comes again.
    """
    ordered, first = _first_visits(walks.flatten(0, 1).flatten(1))
    return ordered, first / first.sum(1, keepdim=True)


def _first_visits(visited: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted, and whether an entry differs from the one before it."""
    ordered = visited.sort(1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return ordered, first


@torch.no_grad()
def induced_edges(subgraphs: Subgraphs, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
    """All edges of the graph between nodes of the same token.

    Looks at every edge of every node of every token: work is their number, so hubs are dear.

    Args:
        subgraphs: The tokens.
        neighbours: The edges.

    Returns:
        Edges between places of `subgraphs.nodes`, (2, E') int64, and their columns in the graph's
        edges, (E',) int64.
    """
    nodes, token, _, _ = subgraphs
    fan = neighbours.degree[nodes]
    source = torch.arange(nodes.numel(), device=nodes.device).repeat_interleave(fan)
    step = torch.arange(source.numel(), device=nodes.device) - (fan.cumsum(0) - fan)[source]
    edge = neighbours.start[nodes[source]] + step
    place, inside = _places(subgraphs, neighbours, token[source], neighbours.target[edge])
    return torch.stack([source, place])[:, inside], neighbours.number[edge[inside]]


@torch.no_grad()
def walked_edges(
    walks: Tensor, subgraphs: Subgraphs, neighbours: Neighbours
) -> tuple[Tensor, Tensor]:
    """The edges that walks of each token took, once each, and the edges back where there are any.

    Args:
        walks: What `random_walks` returns.
        subgraphs: The tokens of these walks.
        neighbours: The edges.

    Returns:
        As `induced_edges`; of double edges, the first.
    """
    nodes, size = subgraphs.nodes, subgraphs.nodes.numel()
    steps = walks.flatten(0, 1)
    of = torch.arange(steps.size(0), device=walks.device)[:, None, None].expand_as(steps)
    place = _places(subgraphs, neighbours, of.flatten(), steps.flatten())[0].view_as(walks)
    walked = walked_places(walks)[..., 1:].expand_as(walks[..., 1:])
    one, other = place[..., :-1][walked], place[..., 1:][walked]
    pairs = torch.cat([one * size + other, other * size + one]).unique()
    source, target = pairs // max(size, 1), pairs % max(size, 1)
    # a walk that stays where it is makes a pair without an edge
    found, number = neighbours.find(nodes[source], nodes[target])
    return torch.stack([source, target])[:, found], number[found]


def _places(
    subgraphs: Subgraphs, neighbours: Neighbours, token: Tensor, node: Tensor
) -> tuple[Tensor, Tensor]:
    """Place of each (token, node), and whether there is one."""
    keys = subgraphs.token * neighbours.num_nodes + subgraphs.nodes
    wanted = token * neighbours.num_nodes + node
    place = torch.searchsorted(keys, wanted)
    if keys.numel():
        place = place.clamp_(max=keys.numel() - 1)
        return place, keys[place] == wanted
    return place, torch.zeros_like(place, dtype=torch.bool)
