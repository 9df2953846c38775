"""Graph Mamba Networks: subgraph tokens of every node, then the nodes of every graph.

GMNConv   random-walk tokens -> local encoder -> mixer over tokens -> mixer over nodes, beside a
          convolution
"""

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn.inits import reset
from torch_geometric.typing import Adj, OptTensor

from scanweave.core import Mixer

from .local import ENCODERS
from .mixing import (
    NodeMixing,
    Ties,
    check_devices,
    checked_edges,
    make_mixer,
    make_partner,
    number_of_graphs,
)
from .ordering import Order
from .orders import order_name
from .packing import Sequences, places_in_graphs
from .walks import Neighbours, random_walks


class TokenMixing(nn.Module):
    """H' = H + Mix(LayerNorm(H)) along the tokens of every node, (n, L, D) to (n, L, D).

    Args:
        channels: Size D of a token.
        mixer: Name of a registered mixer.
        bidirectional: Give a causal mixer a second one that reads from the node outwards.
        mixer_kwargs: Arguments of the mixer.
    """

    def __init__(
        self,
        channels: int,
        mixer: str = "bimamba",
        bidirectional: bool = True,
        mixer_kwargs: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        made = make_mixer(channels, mixer, mixer_kwargs)
        assert made is not None
        self.mixer = made
        self.mixer_backward = make_partner(made, bidirectional)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in self.children():
            reset(module)

    def forward(self, h: Tensor) -> Tensor:
        """Mix tokens; sequences of equal length need no packing."""
        if not h.size(0):
            return h
        z = self.norm(h)
        out = h + self.mixer(z)
        if self.mixer_backward is not None:
            out = out + self.mixer_backward(z.flip(1)).flip(1)
        return out


class GMNConv(NodeMixing):
    r"""The layer of `"Graph Mamba Networks" <https://arxiv.org/abs/2402.08678>`_, tokens included.

    .. math::
        \mathbf{t}_{v,l} &= \phi(G[T_l(v)]), \quad l = 1 \dots L, \quad L = s m + 1 \\
        \mathbf{z}_v &= \mathrm{Tokens}(\mathbf{t}_{v,1}, \dots, \mathbf{t}_{v,L})_L \\
        \mathbf{X}' &= \mathbf{Z} + \tfrac{1}{K} \sum_{k=1}^{K} \mathbf{P}_k^{\top}
            \mathrm{Mix}(\mathbf{P}_k \mathrm{LayerNorm}(\mathbf{Z}))
            + \mathrm{Conv}(\mathbf{X}, \mathbf{A})

    :math:`T_l(v)` is what :math:`M` random walks from :math:`v` visit: :math:`s` tokens of
    :math:`m` steps, :math:`s` of :math:`m - 1` and so on, at last :math:`v` alone. Tokens of one
    length are drawn alike, so shuffling them would change nothing. The place kept is where the
    backward scan starts: in the last token layer that direction sees :math:`v` alone.
    ``walk_length=0`` leaves the tokens out: :math:`\mathbf{Z} = \mathbf{X}`, or linear in it if
    the width changes.

    Args:
        in_channels: Size of each input sample.
        out_channels: Size of each output sample.
        walk_length: Steps :math:`m` of the longest walks.
        num_walks: Walks :math:`M` of a token: how wide it is.
        num_repeats: Tokens :math:`s` of one length.
        encoder: :math:`\phi`: `"mean"`, `"gin"`, `"rwf"`, or a module as in `local.py`.
        conv: Layer beside the mixer, from `in_channels` to `out_channels`; none when absent.
        mixer: Name of a registered mixer, for tokens and for nodes.
        order: Node order, as in :class:`GraphMambaConv`.
        num_token_layers: Layers over the tokens.
        bidirectional: As in :class:`GraphMambaConv`, for tokens and for nodes.
        num_perms: As in :class:`GraphMambaConv`.
        eval_perms: As in :class:`GraphMambaConv`.
        ties: As in :class:`GraphMambaConv`.
        seed: Seed of the noise among ties and of the walks.
        resample: Draw new walks in every training call; evaluation always has those of `seed`.
        share_prefix: Let the walks of one repeat be the beginnings of its longest ones.
        token_chunk_size: Nodes whose tokens are encoded at once; training then encodes them a
            second time in the backward pass. All nodes when absent.
        dropout: Dropout probability of the mixer's and of the convolution's output.
        encoder_kwargs: Arguments of the encoder.
        mixer_kwargs: Arguments of the mixers (`mamba` and `bimamba` have ``expand=1`` here).

    Shapes:
        - **input:** node features :math:`(|\mathcal{V}|, F_{in})`, edge indices
          :math:`(2, |\mathcal{E}|)`, batch vector :math:`(|\mathcal{V}|)` *(optional)*
        - **output:** node features :math:`(|\mathcal{V}|, F_{out})`
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        walk_length: int = 4,
        num_walks: int = 4,
        num_repeats: int = 2,
        encoder: str | nn.Module = "mean",
        conv: nn.Module | None = None,
        mixer: str = "bimamba",
        order: str | Order | Sequence[str | Order] = "degree",
        num_token_layers: int = 1,
        bidirectional: bool = True,
        num_perms: int = 1,
        eval_perms: int | None = None,
        ties: Ties = "noise",
        seed: int = 0,
        resample: bool = True,
        share_prefix: bool = False,
        token_chunk_size: int | None = None,
        dropout: float = 0.0,
        encoder_kwargs: Mapping[str, Any] | None = None,
        mixer_kwargs: Mapping[str, Any] | None = None,
    ):
        if not isinstance(mixer, str):
            raise ValueError(f"mixer must be a name, got {type(mixer).__name__}")
        super().__init__(
            out_channels,
            mixer,
            order=order,
            bidirectional=bidirectional,
            num_perms=num_perms,
            eval_perms=eval_perms,
            ties=ties,
            seed=seed,
            mixer_kwargs=mixer_kwargs,
        )
        for name, value, least in (
            ("walk_length", walk_length, 0),
            ("num_walks", num_walks, 1),
            ("num_repeats", num_repeats, 1),
            ("num_token_layers", num_token_layers, 1),
            ("token_chunk_size", token_chunk_size or 1, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.walk_length, self.num_walks, self.num_repeats = walk_length, num_walks, num_repeats
        self.resample, self.share_prefix = resample, share_prefix
        self.token_chunk_size = token_chunk_size
        self.dropout = dropout
        self.conv = conv
        self.encoder: nn.Module | None = None
        self.token_layers = nn.ModuleList()
        if walk_length:
            self.encoder = _make_encoder(encoder, in_channels, out_channels, encoder_kwargs)
            self.token_layers.extend(
                TokenMixing(out_channels, mixer, bidirectional, mixer_kwargs)
                for _ in range(num_token_layers)
            )
        elif in_channels != out_channels:
            self.encoder = nn.Linear(in_channels, out_channels)
        self.norm = nn.LayerNorm(out_channels)
        # edge features may be for the encoder alone; if for neither, conv says so itself
        takes = {} if conv is None else inspect.signature(conv.forward).parameters
        self._conv_takes_edges = "edge_attr" in takes
        self._encoder_takes_edges = getattr(self.encoder, "edge_dim", None) is not None

    def reset_parameters(self) -> None:
        """Draw every parameter anew, those of `conv` included."""
        for module in self.children():
            reset(module)

    def forward(
        self,
        x: Tensor,
        edge_index: Adj,
        batch: OptTensor = None,
        *,
        edge_attr: OptTensor = None,
        batch_size: int | None = None,
        node_order: OptTensor = None,
        walk_index: OptTensor = None,
        sequences: Sequences | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: Node features, (n, in_channels).
            edge_index: Edges (2, E), an `EdgeIndex`, or the transposed sparse adjacency matrix.
            batch: Graph of every node, (n,) int64, sorted or not; one graph when absent.
            edge_attr: Edge features (E, ...), handed to `conv`, and to an encoder with `edge_dim`;
                in the order of an edge index (2, E).
            batch_size: Number of graphs, at least `batch.max() + 1`.
            node_order: Score of every node, (n,), to use instead of `order`; ascending.
            walk_index: Walks to use instead of drawn ones, (L, M, m + 1, n) int64, as
                `AddWalkTokens` stores them.
            sequences: As in :class:`GraphMambaConv`.
            kwargs: Further arguments of `conv`.

        Returns:
            Node features (n, out_channels), dtype of `x`.

        Raises:
            ValueError: an argument does not fit the others.
        """
        if not isinstance(x, Tensor) or x.dim() != 2 or x.size(1) != self.in_channels:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be (n, {self.in_channels}), got {got}")
        edges = checked_edges(edge_index, x)
        check_devices(x, batch=batch, node_order=node_order, walk_index=walk_index)
        num_graphs = number_of_graphs(x, batch, batch_size)
        if batch is None:
            batch = edges.new_zeros(x.size(0))

        h = self._encode(x, edges, edge_attr, batch, num_graphs, walk_index)
        if sequences is None:
            sequences = self.sequences(edges, batch, num_graphs, node_order)
        out = h + F.dropout(self._mix(self.norm(h), sequences), self.dropout, self.training)
        if edge_attr is not None and (self._conv_takes_edges or not self._encoder_takes_edges):
            kwargs["edge_attr"] = edge_attr
        if self.conv is None:
            if given := [name for name, value in kwargs.items() if value is not None]:
                raise ValueError(f"conv must be a layer to take {', '.join(given)}, got None")
            return out
        local = self.conv(x, edge_index, **kwargs)
        if not isinstance(local, Tensor) or local.shape != out.shape:
            got = tuple(local.shape) if isinstance(local, Tensor) else type(local).__name__
            raise ValueError(f"conv must return {tuple(out.shape)}, got {got}")
        return out + F.dropout(local, self.dropout, self.training)

    def _encode(
        self,
        x: Tensor,
        edges: Tensor,
        edge_attr: OptTensor,
        batch: Tensor,
        num_graphs: int,
        walk_index: OptTensor,
    ) -> Tensor:
        """What the node layer starts from, (n, out_channels)."""
        if not self.walk_length:
            return x if self.encoder is None else self.encoder(x)
        nodes = x.size(0)
        neighbours = Neighbours(edges, nodes)
        roots = torch.arange(nodes, device=x.device)
        position, _ = places_in_graphs(batch, num_graphs)
        # drawn once, so that the pieces and their second encoding see the same walks
        seed: int | Tensor = self.seed
        if self.training and self.resample and walk_index is None:
            seed = torch.randint(2**32, (), device=x.device)
        expected = (self.tokens_per_node, self.num_walks, self.walk_length + 1, nodes)
        given = None if walk_index is None else (tuple(walk_index.shape), walk_index.dtype)
        if given not in (None, (expected, torch.int64)):
            raise ValueError(f"walk_index must be {expected} int64, got {given[0]} {given[1]}")

        def encode(features: Tensor, part: Tensor) -> Tensor:
            assert self.encoder is not None
            if walk_index is not None:
                walks = walk_index[..., part].permute(3, 0, 1, 2)
            else:
                walks = random_walks(
                    neighbours,
                    part,
                    position[part],
                    self.walk_length,
                    self.num_walks,
                    self.num_repeats,
                    seed=seed,
                    share_prefix=self.share_prefix,
                )
            h = self.encoder(features, walks, neighbours, edge_attr)
            for layer in self.token_layers:
                h = layer(h)
            return h[:, -1]

        size = self.token_chunk_size or max(nodes, 1)
        if size >= nodes:
            return encode(x, roots)
        run = functools.partial(checkpoint, encode, use_reentrant=False)
        run = run if torch.is_grad_enabled() else encode
        return torch.cat([run(x, part) for part in roots.split(size)])

    @property
    def tokens_per_node(self) -> int:
        """Tokens L of a node, itself included."""
        return self.num_repeats * self.walk_length + 1

    def __repr__(self) -> str:
        assert isinstance(self.mixer, Mixer)
        conv = " ".join(repr(self.conv).split())
        return (
            f"{self.__class__.__name__}({self.in_channels}, {self.out_channels}, "
            f"walk_length={self.walk_length}, num_walks={self.num_walks}, "
            f"num_repeats={self.num_repeats}, encoder={type(self.encoder).__name__}, conv={conv}, "
            f"mixer={self.mixer.info.name}, order={order_name(self.orders)})"
        )


def _make_encoder(
    encoder: str | nn.Module, in_channels: int, out_channels: int, config: Mapping[str, Any] | None
) -> nn.Module:
    if isinstance(encoder, str):
        if encoder not in ENCODERS:
            names = ", ".join(ENCODERS)
            raise ValueError(f"encoder must be a module or one of {names}, got {encoder!r}")
        return ENCODERS[encoder](in_channels, out_channels, **(config or {}))
    if config:
        raise ValueError(
            f"encoder_kwargs must be None unless encoder is a name, got {dict(config)}"
        )
    return encoder
