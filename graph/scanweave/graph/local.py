"""Local encoders: from the random-walk tokens of a node to one vector a token.

Each is a module `encoder(x, walks, neighbours, edge_attr=None)` that maps node features (N, F) and
walks (n, L, M, m + 1) to vectors (n, L, D), and has `in_channels` and `out_channels`. They know a
node only by its features and its edges, so they do not depend on how nodes are numbered.

    MeanEncoder   linear layer, mean over the token's nodes: no edges, by far the cheapest
    GINEncoder    GIN on every token's subgraph, then its mean or its root
    RWFEncoder    features along the walks, with bits for nodes met again (CRaWl)
    ENCODERS      name -> class
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GINConv, GINEConv

from .walks import (
    Neighbours,
    induced_edges,
    token_subgraphs,
    token_weights,
    walked_edges,
    walked_places,
)


class MeanEncoder(nn.Module):
    """t = mean over the token's nodes u of W x_u + b. Knows no edges and no distances.

    Args:
        in_channels: Size F of the node features.
        out_channels: Size D of the token vectors.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.lin = nn.Linear(in_channels, out_channels)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.lin.reset_parameters()

    def forward(
        self, x: Tensor, walks: Tensor, neighbours: Neighbours, edge_attr: Tensor | None = None
    ) -> Tensor:
        """Token vectors (n, L, D) from node features (N, F) and walks (n, L, M, m + 1)."""
        values = self.lin(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # gradients of repeated nodes cost more than leaving them out
            sets = token_subgraphs(walks)
            out = _means(values, sets.nodes, sets.ptr)
        else:
            # no size depends on values: nothing waits for the device, nothing breaks a graph
            nodes, weight = token_weights(walks)
            weight = weight.to(values.dtype)
            out = F.embedding_bag(nodes, values, per_sample_weights=weight, mode="sum")
        return out.view(*walks.shape[:2], self.out_channels)


class GINEncoder(nn.Module):
    """GIN on the subgraph of every token, all tokens side by side, then one vector of each.

    Args:
        in_channels: Size F of the node features.
        out_channels: Size D of the token vectors.
        num_layers: Number of GIN layers.
        edge_dim: Size of the edge features; GINE layers, which add them, when given.
        edges: `"induced"`, all edges between nodes of a token, as the paper has it, or
            `"walked"`, those that its walks took: far fewer around hubs.
        pool: `"mean"` over the token's nodes, or `"root"`, the vector of the node it belongs to.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 2,
        edge_dim: int | None = None,
        edges: Literal["induced", "walked"] = "induced",
        pool: Literal["mean", "root"] = "mean",
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if edges not in ("induced", "walked"):
            raise ValueError(f"edges must be 'induced' or 'walked', got {edges!r}")
        if pool not in ("mean", "root"):
            raise ValueError(f"pool must be 'mean' or 'root', got {pool!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.edge_dim, self.edges, self.pool = edge_dim, edges, pool
        self.lin = nn.Linear(in_channels, out_channels)
        convs = []
        for _ in range(num_layers):
            mlp = nn.Sequential(
                nn.Linear(out_channels, out_channels),
                nn.ReLU(),
                nn.Linear(out_channels, out_channels),
            )
            convs.append(GINConv(mlp) if edge_dim is None else GINEConv(mlp, edge_dim=edge_dim))
        self.convs = nn.ModuleList(convs)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.lin.reset_parameters()
        for conv in self.convs:
            conv.reset_parameters()  # type: ignore[operator]

    def forward(
        self, x: Tensor, walks: Tensor, neighbours: Neighbours, edge_attr: Tensor | None = None
    ) -> Tensor:
        """Token vectors (n, L, D) from node features (N, F) and walks (n, L, M, m + 1).

        Raises:
            ValueError: `edge_dim` asks for edge features and there are none.
        """
        _check_edge_attr(edge_attr, self.edge_dim)
        sets = token_subgraphs(walks)
        if self.edges == "induced":
            local, number = induced_edges(sets, neighbours)
        else:
            local, number = walked_edges(walks, sets, neighbours)
        h = self.lin(x)[sets.nodes]
        for conv in self.convs:
            if self.edge_dim is None or edge_attr is None:
                h = h + F.relu(conv(h, local))
            else:
                h = h + F.relu(conv(h, local, edge_attr[number]))
        if self.pool == "root":
            h = h[sets.root]
        else:
            h = _means(h, torch.arange(h.size(0), device=h.device), sets.ptr)
        return h.view(*walks.shape[:2], self.out_channels)


class RWFEncoder(nn.Module):
    """Random walk features: rows along each walk, a 1-D convolution, mean over places and walks.

    Row i of a walk w is [x of w_i; features of the edge from w_{i-1}; W bits: is w_i = w_{i-j},
    j = 1 to W; W - 1 bits: do w_i and w_{i-j} share an edge, j = 2 to W]. The bits tell cycles
    that no message passing sees, which the paper's statement on expressiveness rests on.

    Args:
        in_channels: Size F of the node features.
        out_channels: Size D of the token vectors.
        window: How far back W the bits look.
        kernel_size: Places that the convolution reads, odd; 1 is a linear layer.
        edge_dim: Size of the edge features, none when absent.

    Source: Tönshoff et al. 2021, arXiv 2102.08786, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        window: int = 8,
        kernel_size: int = 1,
        edge_dim: int | None = None,
    ):
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.window, self.edge_dim = window, edge_dim
        # one linear layer of the whole row, in parts: that of x runs once a node
        self.lin = nn.Linear(in_channels, out_channels)
        self.lin_bits = nn.Linear(2 * window - 1, out_channels, bias=False)
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, out_channels, bias=False)
        self.conv = None
        if kernel_size > 1:
            self.conv = nn.Conv1d(out_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for layer in (self.lin, self.lin_bits, self.lin_edge, self.conv):
            if layer is not None:
                layer.reset_parameters()

    def forward(
        self, x: Tensor, walks: Tensor, neighbours: Neighbours, edge_attr: Tensor | None = None
    ) -> Tensor:
        """Token vectors (n, L, D) from node features (N, F) and walks (n, L, M, m + 1).

        Raises:
            ValueError: `edge_dim` asks for edge features and there are none.
        """
        _check_edge_attr(edge_attr, self.edge_dim)
        roots, tokens, width, steps = walks.shape
        h = self.lin(x)[walks] + self.lin_bits(self.bits(walks, neighbours).to(x.dtype))
        if self.lin_edge is not None and edge_attr is not None and edge_attr.size(0):
            found, number = neighbours.find(walks[..., :-1], walks[..., 1:])
            step = self.lin_edge(edge_attr)[number] * found.unsqueeze(-1)
            h = h + F.pad(step, (0, 0, 1, 0))
        walked = walked_places(walks).unsqueeze(-1)
        h = F.relu(h) * walked
        if self.conv is not None:
            rows = h.reshape(roots * tokens * width, steps, self.out_channels).transpose(1, 2)
            # an empty batch has no place in a convolution
            rows = self.conv(rows) if rows.size(0) else rows
            h = F.relu(rows.transpose(1, 2).reshape(h.shape)) * walked
        places = walked.sum((2, 3)) * width
        return h.sum((2, 3)) / places

    @torch.no_grad()
    def bits(self, walks: Tensor, neighbours: Neighbours) -> Tensor:
        """Identity and adjacency bits of every place, (n, L, M, m + 1, 2 W - 1) bool."""
        same = torch.zeros(*walks.shape, self.window, dtype=torch.bool, device=walks.device)
        near = torch.zeros_like(same)
        for back in range(1, min(self.window, walks.size(3) - 1) + 1):
            here, there = walks[..., back:], walks[..., :-back]
            same[..., back:, back - 1] = here == there
            if back > 1:
                forth, again = neighbours.find(here, there)[0], neighbours.find(there, here)[0]
                near[..., back:, back - 1] = forth | again
        return torch.cat([same, near[..., 1:]], -1)


ENCODERS: dict[str, type[nn.Module]] = {
    "gin": GINEncoder,
    "mean": MeanEncoder,
    "rwf": RWFEncoder,
}


def _means(values: Tensor, index: Tensor, ptr: Tensor) -> Tensor:
    """Means of `values[index[ptr[t]:ptr[t + 1]]]`, without storing the gathered rows."""
    if ptr.numel() == 1:
        return values.new_zeros(0, values.size(1))
    return F.embedding_bag(index, values, ptr, mode="mean", include_last_offset=True)


def _check_edge_attr(edge_attr: Tensor | None, edge_dim: int | None) -> None:
    if edge_dim is not None and (edge_attr is None or edge_attr.size(-1) != edge_dim):
        got = None if edge_attr is None else tuple(edge_attr.shape)
        raise ValueError(f"edge_attr must be (E, {edge_dim}) for this encoder, got {got}")
