"""Weights of the published gym model of Decision Mamba.

    load_official       checkpoint or state dict -> DecisionMamba, every size inferred
    read_state_dict     open a checkpoint without running its pickle code

The published checkpoint holds no normalisers, scale, context length or target: those belong to
its data set and go into `Agent`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .model import DecisionMamba

_MARK = "transformer.h.0.mamba.A_log"
_OTHERS = {
    "blocks.0.mamba.A_log": "an Atari Decision Mamba",
    "transformer.h.0.attn.c_attn.weight": "a gym Decision Transformer",
    "blocks.0.attn.key.weight": "an Atari Decision Transformer",
}


def load_official(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    max_length: int = 20,
    dropout: float = 0.1,
    remove_act_embs: bool = False,
    action_tanh: bool = True,
) -> DecisionMamba:
    """Build the model that a published gym checkpoint belongs to, and load it strictly.

    Args:
        source: A state dict, a checkpoint dict with the key `state_dict`, or the path of
            either (`torch.save` or safetensors). A `module.` prefix is removed.
        max_length: Context K, which the weights do not tell; 20 in the published runs.
        dropout: See `DecisionMamba`.
        remove_act_embs: Trained without action tokens; the weights do not tell.
        action_tanh: Trained with tanh at the end; the weights do not tell.

    Returns:
        The model, on the CPU, in evaluation mode.

    Raises:
        ValueError: the weights are of another model.
    """
    weights = read_state_dict(source)
    model = DecisionMamba(
        **_sizes(weights),
        max_length=max_length,
        dropout=dropout,
        remove_act_embs=remove_act_embs,
        action_tanh=action_tanh,
        init="official",
    )
    model.load_state_dict(weights)
    return model.eval()


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name from a path or a dict; nothing in a file is executed.

    Raises:
        ValueError: the file or dict holds no state dict.
    """
    content: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"source must hold a state dict of tensors, got {type(content).__name__}")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _sizes(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments that the shapes tell."""
    if _MARK not in weights:
        kind = next((kind for key, kind in _OTHERS.items() if key in weights), "unknown weights")
        raise ValueError(f"source must be a gym Decision Mamba (key {_MARK!r}), got {kind}")
    if "transformer.h.0.norm_mamba.bias" not in weights:
        raise ValueError("source must have LayerNorms, got the 'dmamba-min' variant with RMSNorm")
    hidden_size, state_dim = weights["embed_state.weight"].shape
    inner, d_state = weights[_MARK].shape
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    return {
        "state_dim": state_dim,
        "act_dim": weights["embed_action.weight"].shape[1],
        "hidden_size": hidden_size,
        "n_layer": len(layers),
        "max_ep_len": weights["embed_timestep.weight"].shape[0],
        "n_inner": weights["transformer.h.0.mlp_channels.0.weight"].shape[0],
        "mixer_kwargs": {
            "d_state": d_state,
            "d_conv": weights["transformer.h.0.mamba.conv1d.weight"].shape[2],
            "expand": inner // hidden_size,
            "dt_rank": weights["transformer.h.0.mamba.dt_proj.weight"].shape[1],
        },
    }
