"""Graph Mamba as one PyTorch Geometric layer.

GraphMambaConv   local convolution + sequence mixer over the ordered nodes of each graph + MLP
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn.inits import reset
from torch_geometric.nn.resolver import activation_resolver, normalization_resolver
from torch_geometric.typing import Adj, OptTensor

from scanweave.core import Mixer

from .mixing import NodeMixing, Ties, check_devices, checked_edges, number_of_graphs
from .ordering import Order
from .orders import order_name
from .packing import Sequences


class GraphMambaConv(NodeMixing):
    r"""A GPS layer whose global part is a sequence mixer over the ordered nodes of each graph.

    .. math::
        \mathbf{H}_L &= \mathrm{Norm}_1(\mathbf{X} + \mathrm{Conv}(\mathbf{X}, \mathbf{A})) \\
        \mathbf{H}_G &= \mathrm{Norm}_2(\mathbf{X} + \tfrac{1}{K} \sum_{k=1}^{K}
            \mathbf{P}_k^{\top} \mathrm{Mix}(\mathbf{P}_k \mathbf{X})) \\
        \mathbf{X}' &= \mathrm{Norm}_3(\mathbf{Z} + \mathrm{MLP}(\mathbf{Z})), \quad
        \mathbf{Z} = \mathbf{H}_L + \mathbf{H}_G

    where :math:`\mathbf{P}_k` sorts the nodes of every graph by a score such as their degree.
    A drop-in for :class:`torch_geometric.nn.GPSConv`. All graphs and all :math:`K` orders run as
    packed sequences in one call of the mixer: nothing is padded, and a graph's output does not
    depend on the graphs beside it (as far as `norm` keeps to that; batch norm in training does
    not). With ``mixer="mamba", bidirectional=False, eval_perms=5`` it is the block of
    `"Graph-Mamba" <https://arxiv.org/abs/2402.00789>`_; the default, both directions, is the
    node-token layer of `"Graph Mamba Networks" <https://arxiv.org/abs/2402.08678>`_.

    Args:
        channels: Size of each input and output sample.
        conv: Local layer, called as `conv(x, edge_index, **kwargs)`; none when absent. If it
            returns a pair `(x, edge_attr)`, this layer returns such a pair too.
        mixer: Name of a registered mixer, a :class:`scanweave.core.Mixer`, or :obj:`None` for
            the same layer without the global part.
        order: Node order: a function of `ordering.py`'s kind, its name, or several of those.
        bidirectional: Give a causal mixer a second one, with weights of its own, that reads
            backwards; both are added. A mixer that is not causal already reads both ways.
        num_perms: Number :math:`K` of node orders to average; they differ in how ties break.
        eval_perms: The same in evaluation mode; `num_perms` when absent.
        ties: How nodes of equal score are ordered: `"noise"`, a hash of seed and position, the
            same in every call; `"fresh"`, new noise in every training call; `"index"`, as stored.
        seed: Seed of that noise.
        buckets: Sequences a graph: with more than one, every node is put into one of so many by
            chance (by `seed` and its place, anew in every training call with ``ties="fresh"``).
        dropout: Dropout probability of intermediate embeddings.
        act: Activation of the MLP: a name, a module or a function; none when None.
        act_kwargs: Arguments of the activation.
        norm: Normalization, a name or a module class; none when absent.
        norm_kwargs: Arguments of the normalization.
        mixer_kwargs: Arguments of the mixer (`mamba` and `bimamba` have ``expand=1`` here).

    Shapes:
        - **input:** node features :math:`(|\mathcal{V}|, F)`, edge indices
          :math:`(2, |\mathcal{E}|)`, batch vector :math:`(|\mathcal{V}|)` *(optional)*
        - **output:** node features :math:`(|\mathcal{V}|, F)`
    """

    def __init__(
        self,
        channels: int,
        conv: nn.Module | None = None,
        mixer: str | Mixer | None = "bimamba",
        order: str | Order | Sequence[str | Order] = "degree",
        bidirectional: bool = True,
        num_perms: int = 1,
        eval_perms: int | None = None,
        ties: Ties = "noise",
        seed: int = 0,
        dropout: float = 0.0,
        act: str | Callable | None = "relu",
        act_kwargs: Mapping[str, Any] | None = None,
        norm: str | Callable | None = "batch_norm",
        norm_kwargs: Mapping[str, Any] | None = None,
        mixer_kwargs: Mapping[str, Any] | None = None,
        buckets: int = 1,
    ):
        super().__init__(
            channels,
            mixer,
            order=order,
            bidirectional=bidirectional,
            num_perms=num_perms,
            eval_perms=eval_perms,
            ties=ties,
            seed=seed,
            mixer_kwargs=mixer_kwargs,
            buckets=buckets,
        )
        if conv is None and mixer is None:
            raise ValueError("conv must be a layer when mixer is None, got None for both")
        self.channels = channels
        self.conv = conv
        self.dropout = dropout

        self.mlp = nn.Sequential(
            nn.Linear(channels, channels * 2),
            _activation(act, act_kwargs),
            nn.Dropout(dropout),
            nn.Linear(channels * 2, channels),
            nn.Dropout(dropout),
        )
        norms = [
            normalization_resolver(norm, channels, **(norm_kwargs or {})) if used else None
            for used in (conv is not None, mixer is not None, True)
        ]
        self.norm1, self.norm2, self.norm3 = norms
        takes = () if norms[2] is None else inspect.signature(norms[2].forward).parameters
        self.norm_with_batch = "batch" in takes
        self.norm_with_batch_size = "batch_size" in takes

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
        batch_size: int | None = None,
        node_order: OptTensor = None,
        sequences: Sequences | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the layer.

        Args:
            x: Node features, (n, channels).
            edge_index: Edges (2, E), an `EdgeIndex`, or the transposed sparse adjacency matrix.
            batch: Graph of every node, (n,) int64, sorted or not; one graph when absent.
            batch_size: Number of graphs, at least `batch.max() + 1`. Saves reading it from the
                device, and makes the layer compile without graph breaks.
            node_order: Score of every node, (n,), to use instead of `order`; ascending.
            sequences: What `self.sequences(...)` or `stacked_sequences` made of this batch, to use
                instead of sorting the nodes here; edges are then not checked either.
            kwargs: Further arguments of `conv`, such as `edge_attr`.

        Returns:
            Node features (n, channels), dtype of `x`; a pair with the edge features if `conv`
            returned a pair.

        Raises:
            ValueError: an argument does not fit the others. With `batch_size` given, graph ids
                are checked on the CPU only: elsewhere that would wait for the device.
        """
        self._check_features(x)
        check_devices(x, batch=batch, node_order=node_order)
        num_graphs = number_of_graphs(x, batch, batch_size)
        if batch is None:
            batch = torch.zeros(x.size(0), dtype=torch.int64, device=x.device)
        if sequences is None:
            edges = checked_edges(edge_index, x)
            if self.mixer is not None:
                sequences = self.sequences(edges, batch, num_graphs, node_order)
        norm_kwargs: dict[str, Any] = {"batch": batch} if self.norm_with_batch else {}
        if self.norm_with_batch_size:
            norm_kwargs["batch_size"] = num_graphs

        edge_attr: Tensor | None = None
        parts = []
        if self.conv is not None:
            h, edge_attr = _split(self.conv(x, edge_index, **kwargs))
            if h.shape != x.shape:
                raise ValueError(
                    f"conv must keep the shape of x: got {tuple(h.shape)}, x is {tuple(x.shape)}"
                )
            h = F.dropout(h, p=self.dropout, training=self.training)
            parts.append(_normed(self.norm1, h + x, norm_kwargs))
        elif given := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"conv must be a layer to take {', '.join(given)}, got None")

        if self.mixer is not None:
            assert sequences is not None
            h = self._mix(x, sequences)
            h = F.dropout(h, p=self.dropout, training=self.training)
            parts.append(_normed(self.norm2, h + x, norm_kwargs))

        out = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        out = _normed(self.norm3, out + self.mlp(out), norm_kwargs)
        return out if edge_attr is None else (out, edge_attr)

    def _check_features(self, x: Tensor) -> None:
        if isinstance(x, (tuple, list)):
            raise ValueError(
                f"x must be one tensor, got a {type(x).__name__} of {len(x)}: the mixer needs one "
                "sequence of nodes, so bipartite edges have to stay in conv layers"
            )
        if x.dim() != 2 or x.size(1) != self.channels:
            raise ValueError(f"x must be (n, {self.channels}), got {tuple(x.shape)}")

    def __repr__(self) -> str:
        mixer = None if self.mixer is None else self.mixer.info.name
        # the repr of a conv with an MLP inside spans lines
        conv = " ".join(repr(self.conv).split())
        return (
            f"{self.__class__.__name__}({self.channels}, conv={conv}, mixer={mixer}, "
            f"order={order_name(self.orders)}, bidirectional={self.bidirectional})"
        )


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _activation(act: str | Callable | None, kwargs: Mapping[str, Any] | None) -> nn.Module:
    found = nn.Identity() if act is None else activation_resolver(act, **(kwargs or {}))
    return found if isinstance(found, nn.Module) else _Function(found)


def _normed(norm: nn.Module | None, h: Tensor, kwargs: dict[str, Any]) -> Tensor:
    return h if norm is None else norm(h, **kwargs)


def _split(out: Any) -> tuple[Tensor, Tensor | None]:
    """Node features and, from convs that also update them, edge features."""
    if isinstance(out, Tensor):
        return out, None
    if isinstance(out, tuple) and len(out) == 2 and all(isinstance(item, Tensor) for item in out):
        return out
    kinds = [type(item).__name__ for item in out] if isinstance(out, tuple) else type(out).__name__
    raise ValueError(f"conv must return x or (x, edge_attr), got {kinds}")
