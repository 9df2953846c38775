"""What the graph benchmark measures: our layers packed and padded, and PyG's GPS layer.

    LAYERS        name -> what makes the layer for a batch
    operations    how many operators a call runs

All of them have the same width and the same local convolution. Each is a module that maps node
features (n, D) of a batch to (n, D).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scanweave.graph import GMNConv, GraphMambaConv, gin_conv, rcm_order

from .graph_batches import GraphBatch

CHANNELS, STATE = 96, 16
# attention of larger graphs does not fit, or takes minutes
ATTENTION_NODES = {"cuda": 100_000, "cpu": 10_000}
# of subgraph tokens: nodes whose tokens are encoded at once
CHUNK = 65_536


class Padded(nn.Module):
    """A mixer on packed sequences that pads them first, as layers without packing do.

    Args:
        mixer: The mixer it feeds.
        masked: Tell the mixer which places are real. Without that, both-way mixers read the
            padding before the last node of a graph, and are wrong.
    """

    def __init__(self, mixer: nn.Module, masked: bool):
        super().__init__()
        self.mixer, self.masked = mixer, masked

    def forward(self, x: Tensor, *, cu_seqlens: Tensor) -> Tensor:
        """Packed (1, n, D) to packed (1, n, D)."""
        # imported late, as below: PyG warns unless scanweave.graph was imported first
        from torch_geometric.utils import to_dense_batch

        lengths = cu_seqlens.diff()
        number = torch.arange(lengths.numel(), device=x.device)
        of = number.repeat_interleave(lengths, output_size=x.size(1))
        dense, mask = to_dense_batch(x.squeeze(0), of, batch_size=lengths.numel())
        out = self.mixer(dense, mask=mask) if self.masked else self.mixer(dense)
        return out[mask].unsqueeze(0)


class OnBatch(nn.Module):
    """A layer together with the batch that it runs on."""

    def __init__(
        self,
        layer: nn.Module,
        batch: GraphBatch,
        sized: bool = True,
        node_order: Tensor | None = None,
    ):
        super().__init__()
        self.layer = layer
        # buffers would turn to float64 with the layer; edges are whole numbers and do not
        self.register_buffer("edges", batch.edge_index, persistent=False)
        self.register_buffer("graphs", batch.batch, persistent=False)
        self.further: dict[str, object] = {"batch_size": batch.num_graphs} if sized else {}
        if node_order is not None:
            self.further["node_order"] = node_order

    def forward(self, x: Tensor) -> Tensor:
        """Node features to node features."""
        return self.layer(x, self.edges, self.graphs, **self.further)


def packed(mixer: str, batch: GraphBatch) -> nn.Module:
    """Our layer."""
    return OnBatch(_graph_mamba(mixer), batch)


def padded(mixer: str, batch: GraphBatch) -> nn.Module:
    """Our layer with its sequences padded to the longest."""
    layer = _graph_mamba(mixer)
    # a causal mixer never reads the padding, which is behind the nodes
    layer.mixer = Padded(layer.mixer, masked=mixer != "mamba")  # type: ignore[assignment]
    return OnBatch(layer, batch)


def _graph_mamba(mixer: str) -> GraphMambaConv:
    both = mixer != "mamba"
    return GraphMambaConv(CHANNELS, gin_conv(CHANNELS), mixer, bidirectional=both)


def gps(kind: str, batch: GraphBatch) -> nn.Module:
    """PyG's layer with four heads."""
    from torch_geometric.nn import GPSConv

    layer = GPSConv(CHANNELS, gin_conv(CHANNELS), heads=4, attn_type=kind)  # pyright: ignore
    return OnBatch(layer, batch, sized=False)


def tokens(batch: GraphBatch) -> nn.Module:
    """Our layer with subgraph tokens: walks of four steps, four a token, two tokens a length."""
    layer = GMNConv(
        *(CHANNELS, CHANNELS, 4, 4, 2, "mean", gin_conv(CHANNELS)),
        # walks are drawn in every call all the same, but equal ones, so that calls compare
        resample=False,
        token_chunk_size=CHUNK,
    )
    return OnBatch(layer, batch)


def in_order(stored: bool, batch: GraphBatch) -> nn.Module:
    """Our layer with the order `rcm`, which walks the graph: in every call, or once before."""
    layer = GraphMambaConv(CHANNELS, gin_conv(CHANNELS), order="rcm")
    if not stored:
        return OnBatch(layer, batch)
    none = torch.arange(batch.nodes, device=batch.batch.device)
    return OnBatch(layer, batch, node_order=rcm_order(batch.edge_index, batch.batch, none))


# name -> what makes it; "one way" is the layer that padding does not make wrong
LAYERS: dict[str, Callable[[GraphBatch], nn.Module]] = {
    "packed": partial(packed, "bimamba"),
    "GPSConv multihead": partial(gps, "multihead"),
    "GPSConv performer": partial(gps, "performer"),
    "padded": partial(padded, "bimamba"),
    "GMNConv": tokens,
    "packed, one way": partial(packed, "mamba"),
    "padded, one way": partial(padded, "mamba"),
    "packed, rcm": partial(in_order, False),
    "packed, stored rcm": partial(in_order, True),
}
GROWING = ("packed", "GPSConv multihead", "GPSConv performer", "GMNConv")


def too_large(name: str, batch: GraphBatch, device: torch.device) -> bool:
    """Whether an implementation is not tried on this batch: attention of one huge graph."""
    most = ATTENTION_NODES[device.type]
    return name == "GPSConv multihead" and batch.nodes / batch.num_graphs > most


# they fill no memory; the first reads a number back
_IDLE = ("_local_scalar_dense", "_unsafe_view", "empty", "new_empty")


class _Counting(TorchDispatchMode):
    """Counts operators, those that make a view or an unfilled tensor left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        aliases = (out.alias_info for out in func._schema.returns)
        views = any(alias is not None and not alias.is_write for alias in aliases)
        name = func.overloadpacket.__name__.removesuffix("_like").removesuffix("_strided")
        self.count += not views and name not in _IDLE
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], object]) -> int:
    """How many operators that do some work a call runs: the least number of launches on a GPU.

    Sorts and the core's own operators are several launches each, reads of a number are none.
    """
    with _Counting() as counting:
        call()
    return counting.count
