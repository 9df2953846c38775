"""From node vectors to predictions about nodes, graphs and pairs of nodes.

    NodeHead    an MLP on every node
    GraphHead   pooling, then an MLP on every graph
    LinkHead    a score for pairs of nodes

They stand behind a model without a last layer of its own, such as `GraphMamba(..., out_channels=
None)`. Letters: n nodes, B graphs, D channels, P pairs.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn import MLP, global_mean_pool
from torch_geometric.typing import OptTensor


def _mlp(width: int, out: int, layers: int, act: str | Callable, dropout: float) -> MLP:
    if layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {layers}")
    return MLP([width] * layers + [out], act=act, dropout=dropout, norm=None)


class NodeHead(nn.Module):
    """An MLP on every node vector.

    Args:
        in_channels: Size of a node vector.
        out_channels: Size of a prediction.
        num_layers: Linear layers.
        act: Activation between them.
        dropout: Dropout probability between them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        act: str | Callable = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.mlp = _mlp(in_channels, out_channels, num_layers, act, dropout)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.mlp.reset_parameters()

    def forward(self, h: Tensor) -> Tensor:
        """Predictions (n, out_channels) from node vectors (n, in_channels)."""
        return self.mlp(h)


class GraphHead(nn.Module):
    """Pooling, then an MLP on every graph vector.

    Args:
        in_channels: Size of a node vector.
        out_channels: Size of a prediction.
        num_layers: Linear layers.
        pool: Pooling `pool(h, batch, size)`.
        act: Activation between the layers.
        dropout: Dropout probability between them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int = 1,
        pool: Callable[..., Tensor] = global_mean_pool,
        act: str | Callable = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.pool = pool
        self.mlp = _mlp(in_channels, out_channels, num_layers, act, dropout)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.mlp.reset_parameters()

    def forward(self, h: Tensor, batch: OptTensor = None, batch_size: int | None = None) -> Tensor:
        """Predictions (B, out_channels) from node vectors (n, in_channels)."""
        return self.mlp(self.pool(h, batch, batch_size))


class LinkHead(nn.Module):
    """A score, or class scores, for pairs of nodes.

    Args:
        in_channels: Size of a node vector.
        out_channels: Size of a prediction; 1 for a score, which has no last axis.
        score: `"dot"`, <f(h_u), f(h_v)> with an MLP f; `"hadamard"`, f(h_u * h_v); both the same
            for (u, v) and (v, u). `"concat"`, f([h_u, h_v]), which tells directions apart.
        num_layers: Linear layers of f; 0 leaves f out of `"dot"`.
        act: Activation between the layers.
        dropout: Dropout probability between them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 1,
        score: Literal["dot", "hadamard", "concat"] = "hadamard",
        num_layers: int = 2,
        act: str | Callable = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        if score not in ("dot", "hadamard", "concat"):
            raise ValueError(f"score must be 'dot', 'hadamard' or 'concat', got {score!r}")
        if score == "dot" and out_channels != 1:
            raise ValueError(f"out_channels must be 1 for 'dot', got {out_channels}")
        self.score, self.out_channels = score, out_channels
        self.mlp: MLP | None = None
        if score == "concat":
            self.mlp = _mlp(2 * in_channels, out_channels, num_layers, act, dropout)
        elif score == "hadamard":
            self.mlp = _mlp(in_channels, out_channels, num_layers, act, dropout)
        elif num_layers:
            self.mlp = _mlp(in_channels, in_channels, num_layers, act, dropout)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        if self.mlp is not None:
            self.mlp.reset_parameters()

    def forward(self, h: Tensor, edge_label_index: Tensor) -> Tensor:
        """Score pairs.

        Args:
            h: Node vectors, (n, in_channels).
            edge_label_index: Pairs, (2, P) int64, as `RandomLinkSplit` stores them.

        Returns:
            (P,), or (P, out_channels) if that is over 1.

        Raises:
            ValueError: the pairs are not (2, P) int64.
        """
        pairs = edge_label_index
        if pairs.dim() != 2 or pairs.size(0) != 2 or pairs.dtype != torch.int64:
            raise ValueError(
                f"edge_label_index must be (2, P) int64, got {tuple(pairs.shape)} {pairs.dtype}"
            )
        if self.score == "dot":
            h = h if self.mlp is None else self.mlp(h)
            return (h[pairs[0]] * h[pairs[1]]).sum(1)
        one, other = h[pairs[0]], h[pairs[1]]
        assert self.mlp is not None
        out = self.mlp(torch.cat([one, other], 1) if self.score == "concat" else one * other)
        return out.squeeze(1) if self.out_channels == 1 else out
