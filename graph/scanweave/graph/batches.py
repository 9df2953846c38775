"""Batches of graphs without collating them one by one.

PackedGraphs      all graphs of a set behind each other on one device; a batch is a few gathers
PartitionLoader   a large graph in pieces of neighbouring nodes, some of them at a time
cut_by_order      piece of every node: equal stretches of a node order

PyG's `Batch.from_data_list` takes some 10 ms for 128 graphs of 150 nodes, more than a small model
needs on a GPU; the gathers here take less than one, and nothing is copied from the host but the
numbers of the graphs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch_geometric.data import Batch, Data

from .ordering import Order, rank_of
from .packing import edges_of


class PackedGraphs(Dataset[Batch]):
    """Graphs behind each other on one device, and batches of any of them.

    Use it as `DataLoader(packed, batch_size, shuffle=True, collate_fn=first)`, or index it with a
    list of numbers. Batches equal those of `Batch.from_data_list`, slices aside.

    Args:
        graphs: Graphs with the same attributes: tensors with a row per node, per edge, or per
            graph, and `edge_index`.
        device: Where to keep them.

    Raises:
        ValueError: there are no graphs, they differ in their attributes, or an attribute holds
            node numbers other than `edge_index`, or is no tensor.
    """

    def __init__(self, graphs: Sequence[Data], device: torch.device | str = "cpu"):
        if not graphs:
            raise ValueError("graphs must hold at least one graph, got none")
        self.device = torch.device(device)
        self._counts = {
            "node": torch.tensor([int(graph.num_nodes or 0) for graph in graphs]),
            "edge": torch.tensor([graph.num_edges for graph in graphs]),
            "graph": torch.ones(len(graphs), dtype=torch.int64),
        }
        keys = set(graphs[0].keys())
        for graph in graphs:
            if set(graph.keys()) != keys:
                raise ValueError(f"graphs must all hold {sorted(keys)}, got {sorted(graph.keys())}")
        self._rows = {}
        for key in graphs[0].keys():  # noqa: SIM118 (a Data is no mapping)
            self._rows[key] = self._level(key, [graph[key] for graph in graphs])
        self._starts = {}
        for level, counts in self._counts.items():
            self._starts[level] = (counts.cumsum(0) - counts).to(self.device)
        self._on_device = {level: counts.to(self.device) for level, counts in self._counts.items()}
        self._tensors = {
            key: torch.cat([graph[key] for graph in graphs], int(key == "edge_index")).to(
                self.device
            )
            for key in self._rows
        }

    def _level(self, key: str, values: list[Any]) -> str:
        """What an attribute has a row for, by the numbers of rows in all graphs."""
        tensors = all(isinstance(value, Tensor) and value.dim() for value in values)
        if key == "edge_index":
            return "edge"
        if tensors and "index" not in key:
            rows = torch.tensor([value.size(0) for value in values])
            # numbers may agree by chance: then the name decides, as PyG has it
            first = {"edge": "edge", "y": "graph"}.get(key.partition("_")[0], "node")
            for level in (first, "node", "edge", "graph"):
                if rows.equal(self._counts[level]):
                    return level
        raise ValueError(
            "graphs must hold edge_index and tensors with a row per node, edge or graph, without "
            f"node numbers: got {key!r}, {type(values[0]).__name__}"
        )

    def __len__(self) -> int:
        return self._counts["graph"].numel()

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The graphs of these numbers as one batch; called by torch's DataLoader."""
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        # sums on the host, where the counts are known: nothing waits for the device
        totals = {level: int(counts[chosen].sum()) for level, counts in self._counts.items()}
        chosen = chosen.to(self.device, non_blocking=True)
        owner, source, starts = {}, {}, {}
        for level, total in totals.items():
            counts = self._on_device[level][chosen]
            number = torch.arange(len(indices), device=self.device)
            owner[level] = torch.repeat_interleave(number, counts, output_size=total)
            starts[level] = counts.cumsum(0) - counts
            shift = self._starts[level][chosen] - starts[level]
            source[level] = torch.arange(total, device=self.device) + shift[owner[level]]
        values = {
            key: self._tensors[key][:, source[level]]
            if key == "edge_index"
            else self._tensors[key][source[level]]
            for key, level in self._rows.items()
        }
        values["edge_index"] = values["edge_index"] + starts["node"][owner["edge"]]
        ends = torch.full((1,), totals["node"], device=self.device)
        batch = Batch(batch=owner["node"], ptr=torch.cat([starts["node"], ends]), **values)
        batch._num_graphs = len(indices)
        return batch

    def batches(self, batch_size: int) -> list[Batch]:
        """All graphs in their order, `batch_size` at a time."""
        numbers = range(len(self))
        return [
            self.__getitems__(numbers[start : start + batch_size])
            for start in range(0, len(self), batch_size)
        ]


def first(batch: Any) -> Any:
    """The collate function for data sets that make whole batches themselves."""
    return batch


def cut_by_order(data: Data, num_parts: int, order: Order) -> Tensor:
    """Piece of every node, (n,) int64 in [0, num_parts): equal stretches of a node order.

    With `rcm_order` or `bfs_order` the pieces hold neighbours, so that few edges are cut.

    Args:
        data: A graph.
        num_parts: Number of pieces.
        order: The node order.

    Raises:
        ValueError: there are fewer nodes than pieces, or no pieces.
    """
    nodes = int(data.num_nodes or 0)
    if not 1 <= num_parts <= nodes:
        raise ValueError(f"num_parts must be in [1, {nodes}], got {num_parts}")
    edges = edges_of(data.edge_index)
    ties = torch.arange(nodes, device=edges.device)
    scores = order(edges, torch.zeros_like(ties), ties)
    return rank_of(torch.argsort(scores, stable=True)) * num_parts // nodes


class PartitionLoader(DataLoader[Data]):
    """A large graph, some of its pieces at a time, with all edges between nodes that are there.

    Each batch holds `parts_per_batch` random pieces, so that over epochs every edge is seen
    (Cluster-GCN, with a node order instead of METIS, which is not needed then). Nodes keep their
    place in memory; `data.node_id` says which they are.

    Args:
        data: A graph.
        part: Piece of every node, (n,), as `cut_by_order` makes it.
        parts_per_batch: Pieces in a batch.
        shuffle: Draw the pieces at random.

    Raises:
        ValueError: `part` is not one number per node, or a batch has no piece.

    Source: Chiang et al. 2019, arXiv 1905.07953.
    """

    def __init__(self, data: Data, part: Tensor, parts_per_batch: int = 1, shuffle: bool = True):
        if part.shape != (data.num_nodes,):
            raise ValueError(
                f"part must be one number per node: got {tuple(part.shape)} "
                f"for {data.num_nodes} nodes"
            )
        if parts_per_batch < 1:
            raise ValueError(f"parts_per_batch must be at least 1, got {parts_per_batch}")
        super().__init__(
            _Parts(data, part), batch_size=parts_per_batch, shuffle=shuffle, collate_fn=first
        )


class _Parts(Dataset[Data]):
    def __init__(self, data: Data, part: Tensor):
        self.data = data.clone()
        self.data.node_id = torch.arange(part.numel(), device=part.device)
        self.part = part
        self.count = int(part.max()) + 1

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> Data:
        chosen = torch.zeros(self.count, dtype=torch.bool, device=self.part.device)
        chosen[torch.as_tensor(list(indices), device=self.part.device)] = True
        return self.data.subgraph(chosen[self.part])
