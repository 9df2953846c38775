"""Transforms that compute once per graph what a layer would compute in every forward pass.

AddNodeOrder    store a node order as `data.node_order`
AddWalkTokens   store the random walks of subgraph tokens as `data.walk_index`
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from .hilbert import hilbert_scores
from .ordering import Order, tie_noise
from .orders import order_name, resolve_order
from .packing import edges_of, pack_nodes, places_in_graphs
from .walks import Neighbours, random_walks


def edges_of_data(data: Data) -> Tensor:
    """Edges (2, E) int64 of a graph that has `edge_index` or `adj_t`; `ValueError` without."""
    adj = data.edge_index if data.edge_index is not None else data.get("adj_t")
    if adj is None:
        raise ValueError("data must hold edge_index or adj_t, got neither")
    return edges_of(adj)


class AddNodeOrder(BaseTransform):
    """Store the place of every node in the given order as `data.node_order`, (n,) int64.

    It is a node-level attribute, so PyG batches and slices it correctly; hand it to a layer as
    `node_order=batch.node_order`. Orders that walk the graph (`bfs`, `rcm`) are best computed
    here, once, instead of in every forward pass of every layer.

    Args:
        order: A name in `ORDERS`, a function, or several of those (the first decides first).
            Here also `"hilbert"`, along a Hilbert curve through `data.pos`, and `"data.x"`, the
            numbers (n,) in the attribute `x` of the graph, for any attribute.
        seed: Seed of the numbers that decide between nodes of equal score.
        attr_name: Name of the attribute.
    """

    def __init__(
        self,
        order: str | Order | Sequence[str | Order] = "rcm",
        seed: int = 0,
        attr_name: str = "node_order",
    ):
        items = [order] if isinstance(order, str) or callable(order) else order
        # names that need more of the graph than its edges stay names
        self.orders = [
            item
            if isinstance(item, str) and (item == "hilbert" or item.startswith("data."))
            else resolve_order(item)[0]
            for item in items
        ]
        if not self.orders:
            raise ValueError("order must hold at least one name or function, got an empty sequence")
        self.seed = seed
        self.attr_name = attr_name

    def forward(self, data: Data) -> Data:
        """Add the attribute; `data` is a shallow copy made by PyG.

        Raises:
            ValueError: `data` has no edges in a form that PyG knows, or lacks what an order needs.
        """
        edge_index, nodes = edges_of_data(data), int(data.num_nodes or 0)
        batch = edge_index.new_zeros(nodes)
        position, borders = places_in_graphs(batch, 1)
        ties = tie_noise(position, 1, self.seed)
        scores = [
            _stored(data, order, nodes)
            if isinstance(order, str)
            else order(edge_index, batch, ties)
            for order in self.orders
        ]
        sequences = pack_nodes(scores, ties, batch, borders)
        data[self.attr_name] = sequences.places[0]
        return data

    def __repr__(self) -> str:
        names = (order if isinstance(order, str) else order_name([order]) for order in self.orders)
        return f"{self.__class__.__name__}({'+'.join(names)})"


def _stored(data: Data, order: str, nodes: int) -> Tensor:
    """Scores (n,) from what the graph itself holds."""
    name = "pos" if order == "hilbert" else order.removeprefix("data.")
    value = data.get(name)
    if value is None:
        raise ValueError(f"data must hold {name} for the order {order!r}, got none")
    score = hilbert_scores(value) if order == "hilbert" else value
    if score.shape != (nodes,):
        raise ValueError(f"{order} must give one score per node: got {tuple(score.shape)}")
    return score


class AddWalkTokens(BaseTransform):
    """Store random walks from every node as `data.walk_index`, (L, M, m + 1, n) int64.

    The name and the nodes at the end make PyG batch it correctly: hand it to a `GMNConv` of the
    same sizes as `walk_index=batch.walk_index`. They are the walks that the layer draws itself in
    evaluation, in training too: the same ones in every epoch, and no work for the device.

    Args:
        walk_length: Steps m of the longest walks.
        num_walks: Walks M of a token.
        num_repeats: Tokens s of one length; L = s m + 1.
        seed: Seed of the walks.
        share_prefix: Let the walks of one repeat be the beginnings of its longest ones.
    """

    def __init__(
        self,
        walk_length: int = 4,
        num_walks: int = 4,
        num_repeats: int = 2,
        seed: int = 0,
        share_prefix: bool = False,
    ):
        self.walk_length, self.num_walks, self.num_repeats = walk_length, num_walks, num_repeats
        self.seed, self.share_prefix = seed, share_prefix

    def forward(self, data: Data) -> Data:
        """Add the attribute; `data` is a shallow copy made by PyG.

        Raises:
            ValueError: `data` has no edges in a form that PyG knows, or a size is out of range.
        """
        edges, nodes = edges_of_data(data), int(data.num_nodes or 0)
        roots = torch.arange(nodes, device=edges.device)
        walks = random_walks(
            Neighbours(edges, nodes),
            roots,
            roots,
            self.walk_length,
            self.num_walks,
            self.num_repeats,
            seed=self.seed,
            share_prefix=self.share_prefix,
        )
        data.walk_index = walks.permute(1, 2, 3, 0).contiguous()
        return data

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}(walk_length={self.walk_length}, "
            f"num_walks={self.num_walks}, num_repeats={self.num_repeats})"
        )
