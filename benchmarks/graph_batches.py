"""Batches of graphs to measure graph layers on: sizes of real data sets, edges drawn at random.

Sizes come from the data set's files if they are there, and are drawn from a lognormal distribution
with the set's mean, median and limit if not. What the layers do depends on sizes and on the number
of edges only, so edges need not be real: each node joins one of those just before it, and further
edges join neighbours of neighbours until their number is that of the set.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# of so many random batches, the one of median padding is measured
_BATCHES = 101


@dataclass(frozen=True)
class GraphSet:
    """What is known of a data set.

    Attributes:
        name: Of the set.
        graphs: How many there are.
        mean: Nodes of a graph.
        median: Nodes of a graph.
        most: Nodes of the largest graph.
        edges: Directed edges for each node.
    """

    name: str
    graphs: int
    mean: float
    median: float
    most: int
    edges: float

    def sizes(self, data_dir: Path | None) -> tuple[np.ndarray, str]:
        """Nodes of every graph, and where the numbers are from."""
        if data_dir is not None and (found := _stored_sizes(self.name, data_dir)) is not None:
            return found, f"sizes of {self.name}"
        rng = np.random.default_rng(0)
        # the mean of a lognormal is its median times the exponential of half its variance
        sigma = math.sqrt(2 * math.log(self.mean / self.median))
        drawn = np.exp(rng.normal(math.log(self.median), sigma, self.graphs)).round().astype(int)
        # what lies beyond the largest graph is drawn anew, evenly
        beyond = drawn > self.most
        drawn[beyond] = rng.integers(self.most // 2, self.most + 1, int(beyond.sum()))
        return drawn.clip(2), f"lognormal sizes like those of {self.name}"


SETS = {
    "peptides": GraphSet("peptides", 15_535, 150.9, 136, 444, 2.04),
    "proteins": GraphSet("proteins", 1_113, 39.1, 26, 620, 3.73),
}


def _stored_sizes(name: str, data_dir: Path) -> np.ndarray | None:
    if name == "peptides":
        path = data_dir / "peptides_func" / "peptides_func_graphs.npz"
        return np.load(path)["num_nodes"].astype(int) if path.is_file() else None
    path = data_dir / "tudataset" / "PROTEINS" / "raw" / "PROTEINS_graph_indicator.txt"
    return np.bincount(np.loadtxt(path, dtype=int))[1:] if path.is_file() else None


@dataclass(frozen=True)
class GraphBatch:
    """One batch, sorted by graph.

    Attributes:
        name: What the rows are called.
        edge_index: Edges, (2, E) int64.
        batch: Graph of every node, (n,) int64.
        num_graphs: Number of graphs.
        padding: Share of places that a padded batch fills with nothing.
        source: Where the sizes are from.
    """

    name: str
    edge_index: Tensor
    batch: Tensor
    num_graphs: int
    padding: float
    source: str

    @property
    def nodes(self) -> int:
        """Nodes of all graphs."""
        return self.batch.numel()

    def first(self, nodes: int) -> "GraphBatch":
        """As many of the first graphs as have no more than so many nodes in all."""
        ends = torch.bincount(self.batch, minlength=self.num_graphs).cumsum(0)
        graphs = int((ends <= nodes).sum())
        own = self.edge_index[:, self.batch[self.edge_index[0]] < graphs]
        batch = self.batch[self.batch < graphs]
        return GraphBatch(self.name, own, batch, graphs, self.padding, self.source)

    def to(self, device: torch.device) -> "GraphBatch":
        """The same batch elsewhere."""
        edges, batch = self.edge_index.to(device), self.batch.to(device)
        return GraphBatch(self.name, edges, batch, self.num_graphs, self.padding, self.source)


def padding_of(sizes: np.ndarray) -> float:
    """1 - sum of sizes / (number x largest)."""
    return 1 - float(sizes.sum()) / (sizes.size * int(sizes.max()))


def set_batch(graph_set: GraphSet, graphs: int, data_dir: Path | None = None) -> GraphBatch:
    """A random batch of `graphs` graphs: of many, the one of median padding."""
    sizes, source = graph_set.sizes(data_dir)
    rng = np.random.default_rng(1)
    draws = [rng.choice(sizes, graphs, replace=False) for _ in range(_BATCHES)]
    chosen = sorted(draws, key=padding_of)[_BATCHES // 2]
    return batch_of(f"{graph_set.name}_{graphs}", chosen, graph_set.edges, source)


def one_graph(nodes: int, edges: float = 8.0) -> GraphBatch:
    """A single graph; eight directed edges a node are a grid's with diagonals."""
    return batch_of(f"n{nodes}", np.array([nodes]), edges, "one graph")


def batch_of(name: str, sizes: np.ndarray, edges: float, source: str) -> GraphBatch:
    """Random graphs of these sizes with `edges` directed edges a node."""
    rng = np.random.default_rng(2)
    count = int(sizes.sum())
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    node = np.arange(count)
    place = node - start
    joins = place > 0
    parent = node - 1 - (rng.integers(0, 3, count) % np.maximum(place, 1))
    pairs = [np.stack([node[joins], parent[joins]])]
    missing = int(edges * count / 2) - int(joins.sum())
    if missing > 0:
        one = rng.integers(0, count, missing)
        other = start[one] + (place[one] + rng.integers(2, 33, missing)) % sizes.repeat(sizes)[one]
        pairs.append(np.stack([one, other]))
    both = np.concatenate(pairs, 1)
    edge_index = torch.from_numpy(np.concatenate([both, both[::-1]], 1)).long()
    batch = torch.arange(sizes.size).repeat_interleave(torch.from_numpy(sizes))
    return GraphBatch(name, edge_index, batch, int(sizes.size), padding_of(sizes), source)
