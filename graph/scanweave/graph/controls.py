"""PyG's own GPS layer in the frame of `GraphMamba`: what a mixer is compared with.

GPS   linear layer, a stack of `torch_geometric.nn.GPSConv`, optional pooling, linear layer
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn
from torch_geometric.nn import GPSConv, Linear
from torch_geometric.typing import Adj, OptTensor

from .model import MakeConv, gin_conv


class GPS(nn.Module):
    """A stack of PyG's `GPSConv`, with attention among all nodes of a graph.

    Takes what :class:`GraphMamba` takes, as far as it applies: there is no node order, and graphs
    are padded to the largest one of the batch.

    Args:
        in_channels: Size of each input sample, or -1 to take it from the first input.
        hidden_channels: Size of each hidden sample.
        num_layers: Number of layers.
        out_channels: Size of each output sample; no last linear layer when absent.
        dropout: Dropout probability, of attention weights as well.
        attn_type: `"multihead"`, softmax attention, or `"performer"`, linear attention.
        heads: Attention heads.
        norm: Normalization of the layers.
        conv: Makes the local convolution of a layer from its width; none when None.
        pool: Pooling `pool(x, batch, size)`; the output then has a row per graph.

    Shapes:
        - **input:** node features (n, F_in), edge indices (2, E), edge features (E, D) *(optional)*
        - **output:** (n, F_out), or (B, F_out) with `pool`

    Source: Rampášek et al. 2022, arXiv 2205.12454.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        *,
        attn_type: Literal["multihead", "performer"] = "multihead",
        heads: int = 4,
        norm: str | None = "batch_norm",
        conv: MakeConv | None = gin_conv,
        pool: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if attn_type not in ("multihead", "performer"):
            raise ValueError(f"attn_type must be 'multihead' or 'performer', got {attn_type!r}")
        if heads < 1 or hidden_channels % heads:
            raise ValueError(f"heads must divide hidden_channels = {hidden_channels}, got {heads}")
        self.in_channels, self.hidden_channels = in_channels, hidden_channels
        self.out_channels = hidden_channels if out_channels is None else out_channels
        self.pool = pool
        self.lin_in = Linear(in_channels, hidden_channels)
        # dropout of a Performer's chances is not known to it
        options: dict[str, Any] = {"dropout": dropout} if attn_type == "multihead" else {}
        layers = [
            GPSConv(
                hidden_channels,
                None if conv is None else conv(hidden_channels),  # type: ignore[arg-type]
                heads=heads,
                dropout=dropout,
                norm=norm,
                attn_type=attn_type,
                attn_kwargs=options,
            )
            for _ in range(num_layers)
        ]
        self.convs = nn.ModuleList(layers)
        self.lin_out = None if out_channels is None else Linear(hidden_channels, out_channels)
        local = layers[0].conv
        takes = {} if local is None else inspect.signature(local.forward).parameters
        self.supports_edge_attr = "edge_attr" in takes

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.lin_in.reset_parameters()
        for conv in self.convs:
            conv.reset_parameters()  # type: ignore[operator]
        if self.lin_out is not None:
            self.lin_out.reset_parameters()

    def forward(
        self,
        x: Tensor,
        edge_index: Adj,
        edge_attr: OptTensor = None,
        batch: OptTensor = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Run the model; arguments as those of :class:`GraphMamba`.

        Raises:
            ValueError: edge features are given to convolutions that take none.
        """
        local: dict[str, Tensor] = {}
        if edge_attr is not None:
            if not self.supports_edge_attr:
                raise ValueError("edge_attr must be None: the convolutions of this model take none")
            local["edge_attr"] = edge_attr
        h = self.lin_in(x)
        for conv in self.convs:
            h = conv(h, edge_index, batch, **local)
        if self.pool is not None:
            h = self.pool(h, batch, batch_size)
        return h if self.lin_out is None else self.lin_out(h)

    def __repr__(self) -> str:
        return f"{self.__class__.__name__}({self.in_channels}, {self.out_channels}, {self.convs})"
