"""Transforms that compute once per graph what a layer would compute in every forward pass.

AddNodeOrder   store a node order as `data.node_order`
"""

from collections.abc import Sequence

import torch
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from .ordering import Order, order_name, resolve_order, tie_noise
from .packing import edges_of, pack_nodes


class AddNodeOrder(BaseTransform):
    """Store the place of every node in the given order as `data.node_order`, (n,) int64.

    It is a node-level attribute, so PyG batches and slices it correctly; hand it to a layer as
    `node_order=batch.node_order`. Orders that walk the graph (`bfs`, `rcm`) are best computed
    here, once, instead of in every forward pass of every layer.

    Args:
        order: A name in `ORDERS`, a function, or several of those (the first decides first).
        seed: Seed of the numbers that decide between nodes of equal score.
        attr_name: Name of the attribute.
    """

    def __init__(
        self,
        order: str | Order | Sequence[str | Order] = "rcm",
        seed: int = 0,
        attr_name: str = "node_order",
    ):
        self.orders = resolve_order(order)
        self.seed = seed
        self.attr_name = attr_name

    def forward(self, data: Data) -> Data:
        """Add the attribute; `data` is a shallow copy made by PyG.

        Raises:
            ValueError: `data` has no edges in a form that PyG knows.
        """
        adj = data.edge_index if data.edge_index is not None else data.get("adj_t")
        if adj is None:
            raise ValueError("data must hold edge_index or adj_t, got neither")
        edge_index, nodes = edges_of(adj), int(data.num_nodes or 0)
        batch = edge_index.new_zeros(nodes)
        ties = tie_noise(torch.arange(nodes, device=batch.device), 1, self.seed)
        scores = [order(edge_index, batch, ties) for order in self.orders]
        sequences = pack_nodes(scores, ties, batch, batch.new_full((1,), nodes))
        data[self.attr_name] = sequences.places[0]
        return data

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({order_name(self.orders)})"
