"""From settings to a model.

build_model   settings and data -> GraphMamba, GraphMambaNet or GPS
"""

import functools
import inspect
from typing import Any

from torch import nn
from torch_geometric.nn import global_add_pool, global_max_pool, global_mean_pool

from scanweave.core import create_mixer
from scanweave.core.training import seed_everything

from .controls import GPS
from .datasets import GraphSplits
from .model import GraphMamba, MakeConv, gcn_conv, gin_conv
from .net import GraphMambaNet
from .settings import Config

_POOLS = {"mean": global_mean_pool, "add": global_add_pool, "max": global_max_pool}


def build_model(config: Config, splits: GraphSplits) -> nn.Module:
    """The model of these settings, with weights drawn from `config.train.seed`.

    Raises:
        ValueError: the settings name a mixer, order or normalization that does not exist, or do
            not fit the model.
    """
    seed_everything(config.train.seed)
    task = splits.target
    conv = _make_conv(config, splits)
    common: dict[str, Any] = {
        "in_channels": splits.in_channels,
        "hidden_channels": config.hidden_channels,
        "num_layers": config.num_layers,
        "out_channels": task.outputs,
        "dropout": config.dropout,
        "conv": conv,
        "pool": _POOLS[config.pool] if task.level == "graph" else None,
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
    if not config.d_state or config.mixer == "none":
        return None
    # on the meta device a mixer has neither memory nor random numbers
    mixer = create_mixer(config.mixer, config.hidden_channels, device="meta")
    takes = inspect.signature(type(mixer)).parameters
    return {"d_state": config.d_state} if "d_state" in takes else None
