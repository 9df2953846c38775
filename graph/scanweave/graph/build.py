"""From settings to a model.

build_model   settings and data -> GraphMamba, GraphMambaNet or GPS, with a head
Headed        a model without a last layer, and a head behind it
"""

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import global_add_pool, global_max_pool, global_mean_pool

from scanweave.core.training import parse_pairs, seed_everything

from .controls import GPS
from .datasets import GraphSplits
from .heads import GraphHead, LinkHead, NodeHead
from .mixing import make_mixer
from .model import GraphMamba, MakeConv, gcn_conv, gin_conv
from .net import GraphMambaNet
from .settings import Config

_POOLS = {"mean": global_mean_pool, "add": global_add_pool, "max": global_max_pool}


class Headed(nn.Module):
    """`head(model(...))`; what else the head needs is handed to it.

    Args:
        model: Gives node vectors.
        head: A `NodeHead`, `GraphHead` or `LinkHead`.
    """

    def __init__(self, model: nn.Module, head: nn.Module):
        super().__init__()
        self.model, self.head = model, head
        self.out_channels = getattr(head, "out_channels", None)
        self.supports_edge_attr = bool(getattr(model, "supports_edge_attr", False))

    def forward(
        self,
        x: Tensor,
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
        edge_label_index: Tensor | None = None,
        node_order: Tensor | None = None,
    ) -> Tensor:
        """Scores of nodes, of graphs, or of the pairs `edge_label_index` (2, P)."""
        ordered = {} if node_order is None else {"node_order": node_order}
        h = self.model(
            x, edge_index, edge_attr=edge_attr, batch=batch, batch_size=batch_size, **ordered
        )
        if isinstance(self.head, LinkHead):
            return self.head(h, edge_label_index)
        return self.head(h, batch, batch_size) if isinstance(self.head, GraphHead) else self.head(h)


def build_model(config: Config, splits: GraphSplits) -> nn.Module:
    """The model of these settings, with weights drawn from `config.train.seed`.

    Raises:
        ValueError: the settings name a mixer, order or normalization that does not exist, or do
            not fit the model.
    """
    seed_everything(config.train.seed)
    task, width = splits.target, config.hidden_channels
    pool = _POOLS[config.pool]
    if task.level == "link":
        head: nn.Module = LinkHead(width, score=config.link_score, num_layers=config.head_layers)
        return Headed(_body(config, splits, None, None), head)
    if config.head_layers == 1:
        return _body(config, splits, task.outputs, pool if task.level == "graph" else None)
    if task.level == "graph":
        head = GraphHead(width, task.outputs, config.head_layers, pool, dropout=config.dropout)
    else:
        head = NodeHead(width, task.outputs, config.head_layers, dropout=config.dropout)
    return Headed(_body(config, splits, None, None), head)


def _body(config: Config, splits: GraphSplits, out_channels: int | None, pool: Any) -> nn.Module:
    common: dict[str, Any] = {
        "in_channels": splits.in_channels,
        "hidden_channels": config.hidden_channels,
        "num_layers": config.num_layers,
        "out_channels": out_channels,
        "dropout": config.dropout,
        "conv": _make_conv(config, splits),
        "pool": pool,
    }
    norm = None if config.norm == "none" else config.norm
    if config.model == "gps":
        return GPS(**common, norm=norm, attn_type=config.attn_type, heads=config.heads)
    common |= {
        "order": config.order,
        "bidirectional": config.bidirectional,
        "num_perms": config.num_perms,
        "eval_perms": config.eval_perms or None,
        "ties": config.ties,
        "mixer_kwargs": _mixer_kwargs(config),
    }
    if config.model == "graph_mamba":
        mixer = None if config.mixer == "none" else config.mixer
        return GraphMamba(**common, norm=norm, mixer=mixer)
    if config.mixer == "none":
        raise ValueError("mixer must be a name for the model gmn, got 'none'")
    return GraphMambaNet(
        **common,
        mixer=config.mixer,
        walk_length=config.walk_length,
        num_walks=config.num_walks,
        num_repeats=config.num_repeats,
        encoder=config.encoder,
        token_chunk_size=config.token_chunk_size or None,
    )


def _make_conv(config: Config, splits: GraphSplits) -> MakeConv | None:
    if config.conv == "gin":
        return functools.partial(gin_conv, edge_dim=splits.edge_dim)
    return gcn_conv if config.conv == "gcn" else None


def _mixer_kwargs(config: Config) -> dict[str, Any] | None:
    """`d_state` where it is set and the mixer has one, so that mixers compare in one command."""
    given = parse_pairs(config.mixer_args, "mixer_args")
    if given and config.mixer == "none":
        raise ValueError(f"mixer_args must be empty without a mixer, got {config.mixer_args}")
    if not config.d_state or config.mixer == "none":
        return given or None
    # on the meta device a mixer has neither memory nor random numbers
    with torch.device("meta"):
        mixer = make_mixer(config.hidden_channels, config.mixer, None)
    takes = inspect.signature(type(mixer)).parameters
    own = {"d_state": config.d_state} if "d_state" in takes else {}
    return {**own, **given} or None
