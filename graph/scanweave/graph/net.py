"""The whole Graph Mamba Network for node-level and graph-level tasks.

GraphMambaNet   linear layer, one GMNConv with subgraph tokens, more over nodes, pooling, linear
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.nn import Linear
from torch_geometric.nn.inits import reset
from torch_geometric.typing import Adj, OptTensor

from .gmn import GMNConv
from .mixing import Ties, shared_sequences
from .model import MakeConv, gin_conv, make_jk
from .ordering import Order


class GraphMambaNet(nn.Module):
    r"""GMN: encodings beside the features, tokens once, then `num_layers` layers over the nodes.

    The first layer is a :class:`GMNConv` with subgraph tokens; the others have ``walk_length=0``,
    because tokens cost far more than the scan. A LayerNorm stands before pooling. Layer number
    :math:`i` breaks ties with seed :math:`\mathrm{seed} + i`.

    Args:
        in_channels: Size of each input sample, or -1 to take it from the first input.
        hidden_channels: Size of each hidden sample.
        num_layers: Layers over nodes, the first one included.
        out_channels: Size of each output sample; no last linear layer when absent.
        pe_channels: Size of the positional or structural encoding of a node, 0 for none.
        dropout: Dropout probability.
        walk_length: As in :class:`GMNConv`; 0 is the model without subgraph tokens.
        num_walks: As in :class:`GMNConv`.
        num_repeats: As in :class:`GMNConv`.
        encoder: As in :class:`GMNConv`; a name.
        num_token_layers: As in :class:`GMNConv`.
        share_prefix: As in :class:`GMNConv`.
        jk: Jumping knowledge over the layers: None, `"last"`, `"cat"`, `"max"` or `"lstm"`.
        conv: Makes the convolution of a layer from its width; none when None.
        mixer: Name of a registered mixer.
        pool: Pooling `pool(x, batch, size)`; the output then has a row per graph.
        order: Node order of the layers.
        bidirectional: As in :class:`GMNConv`.
        num_perms: As in :class:`GMNConv`.
        eval_perms: As in :class:`GMNConv`.
        ties: As in :class:`GMNConv`.
        seed: Seed of the noise among ties and of the walks.
        resample: As in :class:`GMNConv`.
        token_chunk_size: As in :class:`GMNConv`.
        encoder_kwargs: Arguments of the encoder.
        mixer_kwargs: Arguments of the mixers.

    Shapes:
        - **input:** node features :math:`(|\mathcal{V}|, F_{in})`, edge indices
          :math:`(2, |\mathcal{E}|)`, encodings :math:`(|\mathcal{V}|, P)` *(optional)*
        - **output:** :math:`(|\mathcal{V}|, F_{out})`, or :math:`(B, F_{out})` with `pool`
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int,
        out_channels: int | None = None,
        pe_channels: int = 0,
        dropout: float = 0.0,
        *,
        walk_length: int = 4,
        num_walks: int = 4,
        num_repeats: int = 2,
        encoder: str = "mean",
        num_token_layers: int = 1,
        share_prefix: bool = False,
        jk: Literal["last", "cat", "max", "lstm"] | None = None,
        conv: MakeConv | None = gin_conv,
        mixer: str = "bimamba",
        pool: Callable[..., Tensor] | None = None,
        order: str | Order | Sequence[str | Order] = "degree",
        bidirectional: bool = True,
        num_perms: int = 1,
        eval_perms: int | None = None,
        ties: Ties = "noise",
        seed: int = 0,
        resample: bool = True,
        token_chunk_size: int | None = None,
        encoder_kwargs: Mapping[str, Any] | None = None,
        mixer_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        for name, value, least in (("num_layers", num_layers, 1), ("pe_channels", pe_channels, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.out_channels = hidden_channels if out_channels is None else out_channels
        self.pe_channels = pe_channels
        self.pool = pool

        width = -1 if in_channels == -1 else in_channels + pe_channels
        self.lin_in = Linear(width, hidden_channels)
        layers = [
            GMNConv(
                hidden_channels,
                hidden_channels,
                0 if layer else walk_length,
                num_walks,
                num_repeats,
                encoder,
                None if conv is None else conv(hidden_channels),
                mixer,
                order=order,
                num_token_layers=num_token_layers,
                bidirectional=bidirectional,
                num_perms=num_perms,
                eval_perms=eval_perms,
                ties=ties,
                seed=seed + layer,
                resample=resample,
                share_prefix=share_prefix,
                token_chunk_size=token_chunk_size,
                dropout=dropout,
                encoder_kwargs=encoder_kwargs,
                mixer_kwargs=mixer_kwargs,
            )
            for layer in range(num_layers)
        ]
        self.convs = nn.ModuleList(layers)
        width = hidden_channels * num_layers if jk == "cat" else hidden_channels
        self.norm = nn.LayerNorm(width)
        self.jk = make_jk(jk, hidden_channels, num_layers)
        project = out_channels is not None or jk == "cat"
        self.lin_out = Linear(width, self.out_channels) if project else None

        local = layers[0].conv
        takes = {} if local is None else inspect.signature(local.forward).parameters
        in_encoder = getattr(layers[0].encoder, "edge_dim", None) is not None
        self._convs_take_edge_attr = "edge_attr" in takes
        self.supports_edge_attr = self._convs_take_edge_attr or in_encoder
        self.supports_edge_weight = "edge_weight" in takes

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
        pe: OptTensor = None,
        node_order: OptTensor = None,
        walk_index: OptTensor = None,
    ) -> Tensor:
        """Run the model.

        Args:
            x: Node features, (n, in_channels).
            edge_index: Edges (2, E), an `EdgeIndex`, or the transposed sparse adjacency matrix.
            edge_weight: Edge weights, (E,), for convolutions that take them.
            edge_attr: Edge features, (E, ...), for convolutions and encoders that take them.
            batch: Graph of every node, (n,) int64; one graph when absent.
            batch_size: Number of graphs.
            pe: Encodings, (n, pe_channels), put behind the features.
            node_order: Score of every node, (n,), to use instead of `order`.
            walk_index: Walks to use instead of drawn ones, as `AddWalkTokens` stores them.

        Returns:
            (n, out_channels), or (number of graphs, out_channels) with `pool`.

        Raises:
            ValueError: `pe` does not fit, edge weights or features are given to a model that takes
                none, or a layer refuses its arguments.
        """
        got = 0 if pe is None else pe.size(-1)
        if got != self.pe_channels:
            raise ValueError(f"pe must have pe_channels = {self.pe_channels} columns, got {got}")
        for name, value in (("edge_weight", edge_weight), ("edge_attr", edge_attr)):
            if value is not None and not getattr(self, f"supports_{name}"):
                raise ValueError(f"{name} must be None: no layer of this model takes it")
        local = {"edge_weight": edge_weight} if edge_weight is not None else {}

        h = self.lin_in(x if pe is None else torch.cat([x, pe.to(x.dtype)], 1))
        sequences = shared_sequences(self.convs, h, edge_index, batch, batch_size, node_order)
        layers = []
        for number, (conv, own) in enumerate(zip(self.convs, sequences, strict=True)):
            h = conv(
                h,
                edge_index,
                batch,
                # the encoder, which may be what takes them, is in the first layer
                edge_attr=edge_attr if number == 0 or self._convs_take_edge_attr else None,
                batch_size=batch_size,
                node_order=node_order,
                walk_index=walk_index if number == 0 else None,
                sequences=own,
                **local,
            )
            layers.append(h)
        h = self.norm(h if self.jk is None else self.jk(layers))
        if self.pool is not None:
            h = self.pool(h, batch, batch_size)
        return h if self.lin_out is None else self.lin_out(h)

    def __repr__(self) -> str:
        return (
            f"{self.__class__.__name__}({self.in_channels}, {self.out_channels}, "
            f"num_layers={self.num_layers}, layer={self.convs[0]!r})"
        )
