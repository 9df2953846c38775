"""What layers with a mixer over node sequences share: the mixer, its orders, and argument checks.

NodeMixing          base class: mixer, orders, ties; makes and runs the packed sequences
stacked_sequences   the sequences of several such layers by one sort
shared_sequences    the same from a model's arguments, where its layers allow it
make_mixer          name or module -> mixer of the right width
make_partner        the second mixer of a causal one, for the other direction
number_of_graphs    checks `batch` and `batch_size`
check_devices       every tensor is where x is
checked_edges       edges in one form, node ids in range
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch_geometric.typing import Adj, OptTensor

from scanweave.core import Mixer, create_mixer
from scanweave.core.ops.checks import trust_cu_seqlens

from .ordering import Order, hash_bits, score_limit, tie_noise
from .orders import order_name, resolve_order
from .packing import (
    Sequences,
    edges_of,
    pack_nodes,
    places_in_graphs,
    reverse_sequences,
    split_sequences,
    to_nodes,
    to_sequences,
)
from .separate import SeparateBiMamba

Ties = Literal["noise", "fresh", "index"]

# the inner width of both Graph Mamba papers' layers; the mixers' own default is twice that
_MIXER_DEFAULTS: dict[str, dict[str, Any]] = {
    "bimamba": {"expand": 1},
    "bimamba_separate": {"expand": 1},
    "mamba": {"expand": 1},
}


class NodeMixing(nn.Module):
    """A sequence mixer over the nodes of every graph, in K orders: what the layers share.

    A causal mixer gets a second one, `mixer_backward`, that reads every graph backwards.
    Parameters and arguments are those of the layers; see `GraphMambaConv`.
    """

    def __init__(
        self,
        channels: int,
        mixer: str | Mixer | None,
        *,
        order: str | Order | Sequence[str | Order],
        bidirectional: bool,
        num_perms: int,
        eval_perms: int | None,
        ties: Ties,
        seed: int,
        mixer_kwargs: Mapping[str, Any] | None,
        buckets: int = 1,
    ):
        super().__init__()
        if ties not in ("noise", "fresh", "index"):
            raise ValueError(f"ties must be 'noise', 'fresh' or 'index', got {ties!r}")
        sizes = (("num_perms", num_perms), ("eval_perms", eval_perms), ("buckets", buckets))
        for name, number in sizes:
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.orders = resolve_order(order)
        self.num_perms = num_perms
        self.eval_perms = num_perms if eval_perms is None else eval_perms
        self.ties = ties
        self.seed = seed
        self.buckets = buckets
        self.bidirectional = bidirectional
        self.mixer = make_mixer(channels, mixer, mixer_kwargs)
        self.mixer_backward = make_partner(self.mixer, bidirectional)

    def sequences(
        self,
        edges: Tensor,
        batch: Tensor,
        num_graphs: int,
        node_order: OptTensor = None,
    ) -> Sequences:
        """The packed node sequences of one forward pass, in the current mode.

        Args:
            edges: Edges, (2, E) int64, as `edges_of` makes them.
            batch: Graph of every node, (n,) int64.
            num_graphs: Number of graphs.
            node_order: Score of every node, (n,), to use instead of `order`.

        Raises:
            ValueError: `node_order`, or what an order function returned, is not one number per
                node.
        """
        return stacked_sequences([self], edges, batch, num_graphs, node_order)[0]

    @property
    def perms(self) -> int:
        """Node orders K of the current mode."""
        return self.num_perms if self.training else self.eval_perms

    def _mix(self, x: Tensor, sequences: Sequences) -> Tensor:
        assert self.mixer is not None
        out = _run(self.mixer, x, sequences)
        if self.mixer_backward is not None:
            out = out + _run(self.mixer_backward, x, reverse_sequences(sequences))
        return out


@torch.no_grad()
def stacked_sequences(
    layers: Sequence[NodeMixing],
    edges: Tensor,
    batch: Tensor,
    num_graphs: int,
    node_order: OptTensor = None,
) -> list[Sequences]:
    """The sequences of every layer: scores once, and one sort for all of them.

    The layers' orders differ in their seeds alone. Sorting is dozens of small kernels however few
    the nodes are, so doing it once instead of in every layer is what counts on a GPU.

    Args:
        layers: Layers that agree in orders, number of permutations and treatment of ties.
        edges: Edges, (2, E) int64, as `edges_of` makes them.
        batch: Graph of every node, (n,) int64.
        num_graphs: Number of graphs.
        node_order: Score of every node, (n,), to use instead of the layers' `order`.

    Raises:
        ValueError: `node_order`, or what an order function returned, is not one number per node.
    """
    first, nodes = layers[0], batch.numel()
    perms = first.perms
    position, borders = places_in_graphs(batch, num_graphs)
    seeds: Tensor | list[int] = [layer.seed & 0xFFFFFFFF for layer in layers]
    if first.ties == "fresh" and first.training:
        seeds = torch.randint(2**32, (len(layers), 1, 1), device=batch.device)
    if first.ties == "index":
        ties = position.expand(len(layers) * perms, nodes)
    else:
        ties = tie_noise(position, perms, seeds)
    buckets = None
    if first.buckets > 1:
        # numbers of their own: those of the ties would put the same nodes at the same places
        if isinstance(seeds, Tensor):
            others = hash_bits(seeds) + 1
        else:
            others = [hash_bits(seed) + 1 for seed in seeds]
        buckets = tie_noise(position, perms, others) * first.buckets >> 32, first.buckets
    if node_order is None:
        scores = [order(edges, batch, ties) for order in first.orders]
        limits = [score_limit(order, edges, nodes) for order in first.orders]
    else:
        scores, limits = [node_order], [None]
    for score in scores:
        if score.shape != (nodes,) and (node_order is not None or score.shape != ties.shape):
            name = order_name(first.orders) if node_order is None else "node_order"
            raise ValueError(
                f"{name} must give one score per node: got {tuple(score.shape)} for {nodes} nodes"
            )
    made = split_sequences(pack_nodes(scores, ties, batch, borders, buckets, limits), len(layers))
    if not torch.compiler.is_compiling():
        for sequences in made:
            # sums of lengths are what they should be: no op has to wait for the device to see that
            trust_cu_seqlens(sequences.cu_seqlens, perms * nodes)
    return made


def shared_sequences(
    convs: nn.ModuleList,
    x: Tensor,
    adj: Adj,
    batch: OptTensor,
    batch_size: int | None,
    node_order: OptTensor,
) -> list[Sequences] | list[None]:
    """`stacked_sequences` for the layers of a model, from its arguments, which are checked.

    None for every layer, which then sorts by itself, if they have no mixer or differ in what they
    sort by, as after a layer was changed by hand.
    """
    layers = [cast(NodeMixing, conv) for conv in convs]
    if layers[0].mixer is None or any(_sorting(layer) != _sorting(layers[0]) for layer in layers):
        return [None] * len(layers)
    edges = checked_edges(adj, x)
    check_devices(x, batch=batch, node_order=node_order)
    num_graphs = number_of_graphs(x, batch, batch_size)
    if batch is None:
        batch = torch.zeros(x.size(0), dtype=torch.int64, device=x.device)
    return stacked_sequences(layers, edges, batch, num_graphs, node_order)


def _sorting(layer: NodeMixing) -> tuple[Any, ...]:
    rest = (layer.ties, layer.buckets, layer.training, layer.mixer is None)
    return layer.orders, layer.perms, *rest


def make_mixer(
    channels: int, mixer: str | Mixer | None, config: Mapping[str, Any] | None
) -> Mixer | None:
    """The mixer of a layer, by name or as it is; `ValueError` if it does not fit."""
    if isinstance(mixer, str):
        config = {**_MIXER_DEFAULTS.get(mixer, {}), **(config or {})}
        if mixer == SeparateBiMamba.info.name:
            return SeparateBiMamba(channels, **config)
        return create_mixer(mixer, channels, **config)
    if config:
        raise ValueError(f"mixer_kwargs must be None unless mixer is a name, got {dict(config)}")
    if mixer is None:
        return None
    if not isinstance(mixer, Mixer):
        raise ValueError(f"mixer must be a name, a Mixer or None, got {type(mixer).__name__}")
    if mixer.d_model != channels:
        raise ValueError(f"mixer must have d_model = channels = {channels}, got {mixer.d_model}")
    return mixer


def make_partner(mixer: Mixer | None, bidirectional: bool) -> Mixer | None:
    """A second mixer, with weights of its own, for the other direction of a causal one."""
    if mixer is not None and not bidirectional and not mixer.causal:
        raise ValueError(
            "bidirectional must be True for a mixer that is not causal, got False for "
            f"{mixer.info.name}; mixer='mamba' reads one way"
        )
    if mixer is None or not bidirectional or not mixer.causal:
        return None
    partner = copy.deepcopy(mixer)
    partner.reset_parameters()
    return partner


def _run(mixer: Mixer, x: Tensor, sequences: Sequences) -> Tensor:
    """Gather the nodes into sequences, mix, scatter back, average over the K orders."""
    out = mixer(to_sequences(x, sequences).unsqueeze(0), cu_seqlens=sequences.cu_seqlens)
    return to_nodes(out.squeeze(0), sequences)


def number_of_graphs(x: Tensor, batch: Tensor | None, batch_size: int | None) -> int:
    """Number of graphs; ids are read back where that costs nothing or cannot be avoided."""
    if batch is None:
        if batch_size not in (None, 1):
            raise ValueError(f"batch_size must be 1 when batch is None, got {batch_size}")
        return 1
    if batch.shape != x.shape[:1] or batch.dtype != torch.int64:
        raise ValueError(
            f"batch must be ({x.size(0)},) int64 like x: got {tuple(batch.shape)} {batch.dtype}"
        )
    if batch_size is not None and batch_size < 0:
        raise ValueError(f"batch_size must be at least 0, got {batch_size}")
    # reading numbers back stops a compiled graph and waits for a GPU
    silent = torch.compiler.is_compiling() or batch.device.type != "cpu"
    if batch_size is not None and (silent or batch.numel() == 0):
        return batch_size
    if batch.numel() == 0:
        return 1
    least, most = (int(bound) for bound in torch.stack(batch.aminmax()))
    if least < 0:
        raise ValueError(f"batch must hold graph ids of at least 0, got {least}")
    if batch_size is None:
        return most + 1
    if most >= batch_size:
        raise ValueError(
            f"batch_size must be at least batch.max() + 1 = {most + 1}, got {batch_size}"
        )
    return batch_size


def check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    """Refuse tensors that are not on the device of x."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")


def checked_edges(adj: Adj, x: Tensor) -> Tensor:
    """Edges (2, E) of any adjacency; node ids are checked on a CPU, outside compiled graphs."""
    edges, nodes = edges_of(adj), x.size(0)
    check_devices(x, edge_index=edges)
    if torch.compiler.is_compiling() or edges.device.type != "cpu" or edges.numel() == 0:
        return edges
    least, most = (int(bound) for bound in edges.aminmax())
    if least < 0 or most >= nodes:
        raise ValueError(f"edge_index must hold node ids in [0, {nodes}), got {least} to {most}")
    return edges
