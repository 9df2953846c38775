"""A stack of `GraphMambaConv` layers for node-level and graph-level tasks.

GraphMamba           the model, with the arguments of PyG's `BasicGNN` models
gin_conv, gcn_conv   what makes the local convolution of a layer, given its width
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch_geometric.nn import GCNConv, GINConv, GINEConv, JumpingKnowledge, Linear
from torch_geometric.nn.inits import reset
from torch_geometric.typing import Adj, OptTensor

from .conv import GraphMambaConv
from .mixing import Ties, shared_sequences
from .ordering import Order

MakeConv = Callable[[int], nn.Module]


def gin_conv(channels: int, edge_dim: int | None = None) -> nn.Module:
    """GIN with a two-layer MLP; GINE, which adds edge features, when `edge_dim` is given."""
    mlp = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))
    return GINConv(mlp) if edge_dim is None else GINEConv(mlp, edge_dim=edge_dim)


def gcn_conv(channels: int) -> nn.Module:
    """GCN; takes edge weights."""
    return GCNConv(channels, channels)


def make_jk(jk: str | None, channels: int, num_layers: int) -> JumpingKnowledge | None:
    """PyG's jumping knowledge over layers; None for the last layer alone."""
    if jk not in (None, "last", "cat", "max", "lstm"):
        raise ValueError(f"jk must be None, 'last', 'cat', 'max' or 'lstm', got {jk!r}")
    return None if jk is None or jk == "last" else JumpingKnowledge(jk, channels, num_layers)


class GraphMamba(nn.Module):
    r"""Linear layer, a stack of :class:`GraphMambaConv`, optional pooling, linear layer.

    Has the arguments and attributes of PyG's :class:`torch_geometric.nn.models.BasicGNN`, but
    passes `batch` on to every layer. Layer number :math:`i` breaks ties with seed
    :math:`\mathrm{seed} + i`, so that the layers see nodes of equal score in different orders.

    Args:
        in_channels: Size of each input sample, or -1 to take it from the first input.
        hidden_channels: Size of each hidden sample.
        num_layers: Number of layers.
        out_channels: Size of each output sample; no last linear layer when absent.
        dropout: Dropout probability.
        act: Activation of the layers' MLPs.
        act_kwargs: Arguments of the activation.
        norm: Normalization of the layers.
        norm_kwargs: Arguments of the normalization.
        jk: Jumping knowledge: None, `"last"`, `"cat"`, `"max"` or `"lstm"`.
        conv: Makes the local convolution of a layer from its width, such as `gin_conv` or
            `functools.partial(gin_conv, edge_dim=4)`; no convolution when None.
        mixer: Name of a registered mixer, or None for the same model without mixers.
        pool: Pooling `pool(x, batch, size)`, such as `torch_geometric.nn.global_mean_pool`; the
            output then has a row per graph instead of a row per node.
        order: Node order of the layers.
        bidirectional: As in :class:`GraphMambaConv`.
        num_perms: As in :class:`GraphMambaConv`.
        eval_perms: As in :class:`GraphMambaConv`.
        ties: As in :class:`GraphMambaConv`.
        seed: Seed of the noise that breaks ties.
        buckets: As in :class:`GraphMambaConv`.
        mixer_kwargs: Arguments of the mixers.

    Shapes:
        - **input:** node features :math:`(|\mathcal{V}|, F_{in})`, edge indices
          :math:`(2, |\mathcal{E}|)`, edge features :math:`(|\mathcal{E}|, D)` *(optional)*
        - **output:** :math:`(|\mathcal{V}|, F_{out})`, or :math:`(B, F_{out})` with `pool`
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        act: str | Callable | None = "relu",
        act_kwargs: Mapping[str, Any] | None = None,
        norm: str | Callable | None = "batch_norm",
        norm_kwargs: Mapping[str, Any] | None = None,
        jk: str | None = None,
        *,
        conv: MakeConv | None = gin_conv,
        mixer: str | None = "bimamba",
        pool: Callable[..., Tensor] | None = None,
        order: str | Order | Sequence[str | Order] = "degree",
        bidirectional: bool = True,
        num_perms: int = 1,
        eval_perms: int | None = None,
        ties: Ties = "noise",
        seed: int = 0,
        mixer_kwargs: Mapping[str, Any] | None = None,
        buckets: int = 1,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.out_channels = hidden_channels if out_channels is None else out_channels
        self.pool = pool

        self.lin_in = Linear(in_channels, hidden_channels)
        layers = [
            GraphMambaConv(
                hidden_channels,
                None if conv is None else conv(hidden_channels),
                mixer,
                order=order,
                bidirectional=bidirectional,
                num_perms=num_perms,
                eval_perms=eval_perms,
                ties=ties,
                seed=seed + layer,
                dropout=dropout,
                act=act,
                act_kwargs=act_kwargs,
                norm=norm,
                norm_kwargs=norm_kwargs,
                mixer_kwargs=mixer_kwargs,
                buckets=buckets,
            )
            for layer in range(num_layers)
        ]
        self.convs = nn.ModuleList(layers)
        self.jk = make_jk(jk, hidden_channels, num_layers)
        width = hidden_channels * num_layers if jk == "cat" else hidden_channels
        project = out_channels is not None or jk == "cat"
        self.lin_out = Linear(width, self.out_channels) if project else None

        local = layers[0].conv
        takes = {} if local is None else inspect.signature(local.forward).parameters
        self.supports_edge_weight = "edge_weight" in takes
        self.supports_edge_attr = "edge_attr" in takes

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in self.children():
            reset(module)

    def forward(
        self,
        x: Tensor,
        edge_index: Adj,
        edge_weight: OptTensor = None,
        edge_attr: OptTensor = None,
        batch: OptTensor = None,
        batch_size: int | None = None,
        *,
        node_order: OptTensor = None,
    ) -> Tensor:
        """Run the model.

        Args:
            x: Node features, (n, in_channels).
            edge_index: Edges (2, E), an `EdgeIndex`, or the transposed sparse adjacency matrix.
            edge_weight: Edge weights, (E,), for convolutions that take them.
            edge_attr: Edge features, (E, D), for convolutions that take them.
            batch: Graph of every node, (n,) int64; one graph when absent.
            batch_size: Number of graphs.
            node_order: Score of every node, (n,), to use instead of `order`.

        Returns:
            (n, out_channels), or (number of graphs, out_channels) with `pool`.

        Raises:
            ValueError: edge weights or features are given to convolutions that take none, or a
                layer refuses its arguments.
        """
        local: dict[str, Tensor] = {}
        for name, value in (("edge_weight", edge_weight), ("edge_attr", edge_attr)):
            if value is None:
                continue
            if not getattr(self, f"supports_{name}"):
                raise ValueError(f"{name} must be None: the convolutions of this model take none")
            local[name] = value

        h = self.lin_in(x)
        layers = []
        sequences = shared_sequences(self.convs, h, edge_index, batch, batch_size, node_order)
        for conv, own in zip(self.convs, sequences, strict=True):
            h = conv(
                h,
                edge_index,
                batch,
                batch_size=batch_size,
                node_order=node_order,
                sequences=own,
                **local,
            )
            if isinstance(h, tuple):
                h, local["edge_attr"] = h
            layers.append(h)
        if self.jk is not None:
            h = self.jk(layers)
        if self.pool is not None:
            h = self.pool(h, batch, batch_size)
        return h if self.lin_out is None else self.lin_out(h)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.in_channels}, {self.out_channels}, "
            f"num_layers={self.num_layers}, layer={self.convs[0]!r})"
        )
