"""Registrations for PyG's GraphGym: import this module, then use the names in a configuration.

    cfg.graph_mamba          settings (see `Settings`)
    layer_type: graph_mamba  `GraphMambaConv`;  gmn, `GMNConv` with subgraph tokens
    model.type: graph_mamba  GraphGym's encoder, a `GraphMamba` stack, GraphGym's or our head
    head: graph_mamba_link   `LinkHead`; heads for nodes and graphs are GraphGym's own
    node_encoder_name        graph_mamba_lap_pe, graph_mamba_rwse: encodings beside the features

GraphGym reads its configuration with `yacs`; the classes here work without it.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import Linear

with warnings.catch_warnings():
    # without yacs it says so while it is imported; then there is no configuration to read
    warnings.filterwarnings("ignore", "Could not define global config object", UserWarning)
    # Lightning is optional too, and PyG scripts functions, which new torch versions warn about
    warnings.filterwarnings("ignore", "To use GraphGym, install 'pytorch_lightning'", UserWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    from torch_geometric.graphgym import register
    from torch_geometric.graphgym.config import cfg
    from torch_geometric.graphgym.init import init_weights
    from torch_geometric.graphgym.models.gnn import FeatureEncoder
    from torch_geometric.graphgym.models.layer import LayerConfig

from .conv import GraphMambaConv
from .encoders import LapPEEncoder, RWSEEncoder
from .gated_gcn import gated_gcn_conv
from .gmn import GMNConv, TokenMixing
from .heads import LinkHead
from .mixing import NodeMixing, Ties
from .model import GraphMamba, gcn_conv, gin_conv


@dataclass(frozen=True)
class Settings:
    """`cfg.graph_mamba`: what GraphGym's own settings do not say.

    Widths, numbers of layers, dropout and activations are those of `cfg.gnn`.
    """

    conv: str = "gin"
    """Local convolution: gin, gcn, gated_gcn (edge features of the layer's width) or none."""
    edge_features: bool = False
    """Whether batches have edge features, of width `cfg.dataset.edge_dim`."""
    mixer: str = "bimamba"
    """Name of a mixer."""
    order: str = "degree"
    """Node order; several names with + between are compared one after another."""
    bidirectional: bool = True
    """Give a causal mixer a partner that reads backwards."""
    num_perms: int = 1
    """Node orders to average, in training."""
    eval_perms: int = 0
    """The same in evaluation; 0 takes as many as in training."""
    ties: str = "noise"
    """How nodes of equal score are ordered: noise, fresh or index."""
    seed: int = 0
    """Seed of noise and walks."""
    norm: str = "batch_norm"
    """Normalization inside a layer; none for none."""
    walk_length: int = 4
    """Of `gmn`: steps of the longest walks."""
    num_walks: int = 4
    """Of `gmn`: walks of a token."""
    num_repeats: int = 2
    """Of `gmn`: tokens of one length."""
    encoder: str = "mean"
    """Of `gmn`: local encoder, mean, gin or rwf."""
    dim_pe: int = 16
    """Width of encodings, a part of `cfg.gnn.dim_inner`."""
    num_steps: int = 20
    """Return probabilities of `graph_mamba_rwse`."""
    link_score: str = "hadamard"
    """Of the link head: dot, hadamard or concat."""

    def shared(self, dropout: float) -> dict[str, Any]:
        """Arguments that all layers have."""
        return {
            "mixer": self.mixer,
            "order": self.order.split("+"),
            "bidirectional": self.bidirectional,
            "num_perms": self.num_perms,
            "eval_perms": self.eval_perms or None,
            "ties": cast(Ties, self.ties),
            "seed": self.seed,
            "dropout": dropout,
        }

    def make_conv(self, edge_dim: int | None) -> Callable[[int], nn.Module] | None:
        """What makes the local convolution from its width.

        Raises:
            ValueError: `conv` is not among the names.
        """
        makers: dict[str, Callable[[int], nn.Module] | None] = {
            "gin": functools.partial(gin_conv, edge_dim=edge_dim if self.edge_features else None),
            "gcn": gcn_conv,
            "gated_gcn": gated_gcn_conv,
            "none": None,
        }
        if self.conv not in makers:
            raise ValueError(f"conv must be one of {', '.join(makers)}, got {self.conv!r}")
        return makers[self.conv]


def current_settings() -> Settings:
    """`cfg.graph_mamba`, or the defaults where there is none."""
    node = getattr(cfg, "graph_mamba", None)
    if node is None:
        return Settings()
    return Settings(**{field.name: node[field.name] for field in fields(Settings)})


def add_settings(node: Any) -> None:
    """Add the defaults to a configuration; GraphGym's `set_cfg` calls it."""
    node.graph_mamba = type(node)(asdict(Settings()))


def _activation(name: str) -> Any:
    # without yacs GraphGym has no names of its own, and PyG's mean the same
    return register.act_dict[name]() if name in register.act_dict else name


class _Layer(nn.Module):
    """A layer on a batch object: `layer(x, edge_index, batch, ...)` read from and written to it."""

    layer: GraphMambaConv | GMNConv
    takes: tuple[str, ...]

    def forward(self, batch: Data) -> Data:
        """Replace `batch.x`, and `batch.edge_attr` where the convolution updates it."""
        further = {name: batch.get(name) for name in ("node_order", *self.takes)}
        further = {name: value for name, value in further.items() if value is not None}
        x = self.lin(batch.x)
        size = batch.num_graphs if batch.get("batch") is not None else None
        out = self.layer(x, batch.edge_index, batch.get("batch"), batch_size=size, **further)
        if isinstance(out, tuple):
            batch.x, batch.edge_attr = out
        else:
            batch.x = out
        return batch

    def __init__(self, dim_in: int, dim_out: int, conv: nn.Module | None, edges: bool):
        super().__init__()
        self.lin = nn.Identity() if dim_in == dim_out else Linear(dim_in, dim_out)
        self.takes = ("edge_attr",) if edges and conv is not None else ()

    def apply(self, fn: Callable[[nn.Module], Any]) -> "_Layer":
        """As in torch, but GraphGym's `init_weights` must not touch mixers.

        It sets every bias to zero, that of time steps as well: states would forget at once.
        """
        super().apply(fn)
        if fn is init_weights:
            for module in self.modules():
                if isinstance(module, (NodeMixing, TokenMixing)):
                    for part in (module.mixer, module.mixer_backward):
                        if part is not None:
                            part.reset_parameters()
        return self


class GraphMambaLayer(_Layer):
    """`GraphMambaConv` in GraphGym's form, behind a linear layer if the width changes.

    Args:
        layer_config: Widths, dropout and activation.
        settings: Everything else; `cfg.graph_mamba` when absent.
    """

    def __init__(self, layer_config: LayerConfig, settings: Settings | None = None):
        own = current_settings() if settings is None else settings
        width, make = layer_config.dim_out, own.make_conv(layer_config.edge_dim)
        conv = None if make is None else make(width)
        super().__init__(layer_config.dim_in, width, conv, own.edge_features)
        self.layer = GraphMambaConv(
            width,
            conv,
            act=_activation(layer_config.act),
            norm=None if own.norm == "none" else own.norm,
            **own.shared(layer_config.dropout),
        )


class GMNLayer(_Layer):
    """`GMNConv` in GraphGym's form.

    Args:
        layer_config: Widths and dropout.
        settings: Everything else; `cfg.graph_mamba` when absent.

    Raises:
        ValueError: `conv` is `gated_gcn`, whose edge features a `GMNConv` would drop.
    """

    def __init__(self, layer_config: LayerConfig, settings: Settings | None = None):
        own = current_settings() if settings is None else settings
        if own.conv == "gated_gcn":
            raise ValueError("conv must be gin, gcn or none for the layer gmn, got 'gated_gcn'")
        width, make = layer_config.dim_out, own.make_conv(layer_config.edge_dim)
        conv = None if make is None else make(width)
        super().__init__(layer_config.dim_in, width, conv, own.edge_features)
        self.takes = (*self.takes, "walk_index")
        self.layer = GMNConv(
            width,
            width,
            own.walk_length,
            own.num_walks,
            own.num_repeats,
            own.encoder,
            conv,
            **own.shared(layer_config.dropout),
        )


class GraphMambaNetwork(nn.Module):
    """GraphGym's feature encoder, `GraphMamba`, GraphGym's head: layers have their own norms.

    Args:
        dim_in: Size of the node features.
        dim_out: Size of a prediction.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        own = current_settings()
        if cfg is None:
            raise ImportError("scanweave.graph.graphgym needs yacs for networks: pip install yacs")
        self.encoder = FeatureEncoder(dim_in)
        shared = own.shared(cfg.gnn.dropout)
        self.edges = own.edge_features and own.conv != "none"
        self.mp = GraphMamba(
            self.encoder.dim_in,
            cfg.gnn.dim_inner,
            cfg.gnn.layers_mp,
            conv=own.make_conv(cfg.dataset.edge_dim),
            act=_activation(cfg.gnn.act),
            norm=None if own.norm == "none" else own.norm,
            **shared,
        )
        self.post_mp = register.head_dict[cfg.gnn.head](cfg.gnn.dim_inner, dim_out)

    def forward(self, batch: Data) -> tuple[Tensor, Tensor]:
        """Predictions and labels of a batch."""
        batch = self.encoder(batch)
        batch.x = self.mp(
            batch.x,
            batch.edge_index,
            edge_attr=batch.edge_attr if self.edges else None,
            batch=batch.batch,
            batch_size=batch.num_graphs,
            node_order=batch.get("node_order"),
        )
        return self.post_mp(batch)


class GraphMambaLinkHead(nn.Module):
    """`LinkHead` on the pairs of the current split.

    Args:
        dim_in: Size of a node vector.
        dim_out: Size of a prediction.
    """

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        score = cast(Any, current_settings().link_score)
        self.head = LinkHead(dim_in, dim_out, score)

    def forward(self, batch: Data) -> tuple[Tensor, Tensor]:
        """Predictions and labels: of `<split>_edge_index`, or of `edge_label_index`."""
        split = batch.get("split")
        pairs, label = "edge_label_index", "edge_label"
        if f"{split}_edge_index" in batch:
            pairs, label = f"{split}_edge_index", f"{split}_edge_label"
        return self.head(batch.x, batch[pairs]), batch[label]


class _Encoding(nn.Module):
    """Features by a linear layer, an encoding behind them, `dim_emb` wide in all."""

    def __init__(self, dim_emb: int, dim_pe: int):
        super().__init__()
        if not 0 < dim_pe < dim_emb:
            raise ValueError(f"dim_pe must be in (0, {dim_emb}), got {dim_pe}")
        self.lin = Linear(-1, dim_emb - dim_pe)

    def join(self, batch: Data, encoding: Tensor) -> Data:
        """Replace `batch.x`."""
        batch.x = torch.cat([self.lin(batch["x"].float()), encoding], 1)
        return batch


class LapPENodeEncoder(_Encoding):
    """`LapPEEncoder` beside the features; wants `AddLapPE(k, add_values=True)`.

    Args:
        dim_emb: Width of the result.
    """

    def __init__(self, dim_emb: int):
        width = current_settings().dim_pe
        super().__init__(dim_emb, width)
        self.encode = LapPEEncoder(width)

    def forward(self, batch: Data) -> Data:
        """Replace `batch.x`."""
        encoding = self.encode(batch.lap_pe, batch.lap_values, batch.batch, batch.num_graphs)
        return self.join(batch, encoding)


class RWSENodeEncoder(_Encoding):
    """`RWSEEncoder` beside the features; wants `AddRWSE(num_steps)`.

    Args:
        dim_emb: Width of the result.
    """

    def __init__(self, dim_emb: int):
        own = current_settings()
        super().__init__(dim_emb, own.dim_pe)
        self.encode = RWSEEncoder(own.num_steps, own.dim_pe)

    def forward(self, batch: Data) -> Data:
        """Replace `batch.x`."""
        return self.join(batch, self.encode(batch.rwse))


register.register_config("graph_mamba", add_settings)
register.register_layer("graph_mamba", GraphMambaLayer)
register.register_layer("gmn", GMNLayer)
register.register_network("graph_mamba", GraphMambaNetwork)
register.register_head("graph_mamba_link", GraphMambaLinkHead)
register.register_node_encoder("graph_mamba_lap_pe", LapPENodeEncoder)
register.register_node_encoder("graph_mamba_rwse", RWSENodeEncoder)
