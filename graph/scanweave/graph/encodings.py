"""Positional and structural encodings of nodes, as PyG transforms.

    AddLapPE          Laplacian eigenvectors: where a node is
    AddRWSE           return probabilities of a random walk: what is around it
    return_chances    those probabilities as a function

Both store float32 columns of the same number for every graph, however small, and the same numbers
in every call: a graph's encoding does not depend on chance or on the order of its edges.

Letters: n nodes, E directed edges, k columns.
"""

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import BaseTransform

from .spectral import Normalization, laplacian, smallest_vectors
from .transforms import edges_of_data

# nodes whose walks are followed at once: n x 256 numbers instead of n x n
_CHUNK = 256


class AddLapPE(BaseTransform):
    """Store the k lowest Laplacian eigenvectors as `data.lap_pe`, (n, k) float32.

    Graphs of fewer nodes get columns of zeros for those that do not exist. The first entry of
    greatest size is positive in every vector; that makes calls repeat, but the sign, and the basis
    where eigenvalues are equal, still depend on how nodes are numbered. Where a model is to be
    blind to signs, flip them at random in training.

    Args:
        k: Number of eigenvectors.
        normalization: `"sym"`, I - D^-1/2 A D^-1/2, or `"none"`, D - A.
        skip_first: Leave out the lowest one, which is constant on a connected graph, or in
            proportion to the root of the degree with `"sym"`.
        add_values: Also store their eigenvalues at every node, as `data.lap_values`, (n, k).
        attr_name: Name of the attribute.

    Raises:
        ValueError: `k` is below 1, or no normalization has this name.
    """

    def __init__(
        self,
        k: int = 10,
        normalization: Normalization = "sym",
        skip_first: bool = True,
        add_values: bool = False,
        attr_name: str = "lap_pe",
    ):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if normalization not in ("sym", "none"):
            raise ValueError(f"normalization must be 'sym' or 'none', got {normalization!r}")
        self.k, self.skip_first = k, skip_first
        self.normalization: Normalization = normalization
        self.add_values, self.attr_name = add_values, attr_name

    def forward(self, data: Data) -> Data:
        """Add the attribute; `data` is a shallow copy made by PyG.

        Raises:
            ValueError: `data` has no edges in a form that PyG knows.
        """
        edges, nodes = edges_of_data(data), int(data.num_nodes or 0)
        matrix = laplacian(edges, nodes, self.normalization)
        skip = int(self.skip_first)
        values, vectors = smallest_vectors(matrix, self.k + skip)
        values, vectors = values[skip:], vectors[:, skip:]
        pe = torch.zeros(nodes, self.k)
        pe[:, : vectors.size(1)] = vectors.float()
        data[self.attr_name] = pe.to(edges.device)
        if self.add_values:
            spread = torch.zeros(nodes, self.k)
            spread[:, : values.numel()] = values.float()
            data.lap_values = spread.to(edges.device)
        return data

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}(k={self.k}, normalization={self.normalization!r})"


class AddRWSE(BaseTransform):
    """Store the chances that a random walk is back after 1 to k steps as `data.rwse`, (n, k).

    A function of the graph: relabelling the nodes relabels the rows.

    Args:
        k: Number of steps.
        attr_name: Name of the attribute.

    Raises:
        ValueError: `k` is below 1.
    """

    def __init__(self, k: int = 20, attr_name: str = "rwse"):
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k, self.attr_name = k, attr_name

    def forward(self, data: Data) -> Data:
        """Add the attribute; `data` is a shallow copy made by PyG.

        Raises:
            ValueError: `data` has no edges in a form that PyG knows.
        """
        edges = edges_of_data(data)
        data[self.attr_name] = return_chances(edges, int(data.num_nodes or 0), self.k).float()
        return data

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}(k={self.k})"


def return_chances(edge_index: Tensor, num_nodes: int, steps: int) -> Tensor:
    """Diagonals of P, P^2, ..., P^k, P = D^-1 A: chances to be back where a walk started.

    Exact, with n x 256 numbers of memory and O(n E k) work; a walk that leaves a node without
    out-edges is lost, as in PyG's `AddRandomWalkPE`.

    Args:
        edge_index: Edges, (2, E) int64, walked from source to target; double edges count twice.
        num_nodes: Number n of nodes.
        steps: Number k of steps.

    Returns:
        Chances, (n, k) float64.

    Source: Dwivedi et al. 2022, arXiv 2110.07875, section 3.1.
    """
    # sorted, so that sums do not depend on the order of the edges
    source, target = edge_index[:, torch.argsort(edge_index[0] * num_nodes + edge_index[1])]
    degree = torch.bincount(source, minlength=num_nodes).double()
    chance = degree.reciprocal()[source].unsqueeze(1)
    out = degree.new_zeros(num_nodes, steps)
    for start in torch.arange(num_nodes, device=source.device).split(_CHUNK):
        column = torch.arange(start.numel(), device=source.device)
        # entry (v, c): the chance to be at v after so many steps from start[c]
        at = degree.new_zeros(num_nodes, start.numel())
        at[start, column] = 1
        for step in range(steps):
            at = torch.zeros_like(at).index_add_(0, target, at[source] * chance)
            out[start, step] = at[start, column]
    return out
