"""Weights of the published models: Decision Mamba and Decision Transformer, gym and Atari.

    load_official       checkpoint or state dict -> model, its kind and sizes inferred
    export_official     model -> state dict under the published names, which the published
                        code loads strictly
    read_state_dict     open a checkpoint without running its pickle code

    kind                               told by                               becomes
    gym Decision Mamba, `dmamba-min`   transformer.h.0.mamba.A_log           DecisionMamba
    Atari Decision Mamba, `mamba-min`  blocks.0.mamba.A_log                  AtariDecisionMamba
    gym Decision Transformer (1)       transformer.h.0.attn.c_attn.weight    DecisionMamba (2)
    Atari Decision Transformer         blocks.0.attn.key.weight              AtariDecisionMamba (2)

(1) also the one of the transformers library, under `encoder.`; (2) with the mixer "attention".

A published checkpoint holds no normalisers, scale, context length or target: those belong to its
data set and go into `Agent`.

Sources: https://github.com/Toshihiro-Ota/decision-mamba/tree/35f99441975c47f8652f82e37b63998d360521e6
https://github.com/kzl/decision-transformer/tree/e2d82e6
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .atari import AtariDecisionMamba
from .model import DecisionMamba
from .official_names import KINDS, from_official, to_official

Model = DecisionMamba | AtariDecisionMamba


def load_official(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    max_length: int = 20,
    dropout: float = 0.1,
    remove_act_embs: bool = False,
    action_tanh: bool = True,
    num_heads: int | None = None,
) -> Model:
    """Build the model that a published checkpoint belongs to, and load it strictly.

    Args:
        source: A state dict, a checkpoint dict with the key `state_dict`, or the path of
            either (`torch.save` or safetensors). A `module.` prefix is removed.
        max_length: Context K of a gym model, which the weights do not tell; 20 in the published
            runs. An Atari model's is read from its positions.
        dropout: See `DecisionMamba`.
        remove_act_embs: Gym model trained without action tokens; the weights do not tell.
        action_tanh: Gym model trained with tanh at the end; the weights do not tell.
        num_heads: Heads of an attention model, which the weights do not tell; None takes the
            published 1 (gym) or 8 (Atari).

    Returns:
        The model, on the CPU, in evaluation mode.

    Raises:
        ValueError: the weights are of none of these models, or not whole.
    """
    weights = read_state_dict(source)
    kind = next((kind for key, kind in KINDS.items() if key in weights), None)
    if kind is None:
        raise ValueError(
            f"source must be a published model (one of the keys {', '.join(KINDS)}), "
            f"got unknown weights with {sorted(weights)[:3]}"
        )
    sizes, renamed = from_official(kind, weights, num_heads)
    if kind.startswith("atari"):
        model: Model = AtariDecisionMamba(
            **sizes, dropout=dropout, global_step="current", init="official"
        )
    else:
        model = DecisionMamba(
            **sizes,
            max_length=max_length,
            dropout=dropout,
            remove_act_embs=remove_act_embs,
            action_tanh=action_tanh,
            init="official",
        )
    try:
        model.load_state_dict(renamed)
    except RuntimeError as error:
        raise ValueError(f"source must be a whole {kind} checkpoint: {error}") from error
    return model.eval()


def export_official(model: Model) -> dict[str, Tensor]:
    """The weights under the published names, with the buffers that the published code expects.

    Raises:
        ValueError: no published model has this mixer.
    """
    return to_official(model)


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
