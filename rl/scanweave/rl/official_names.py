"""Names and layouts of published weights, there and back.

    KINDS           a key that only one kind of model has -> kind
    from_official   published weights -> sizes and weights of a model here
    to_official     a model here -> published weights

Published attention keeps its products input-major (gym, a Conv1D of GPT-2) or as three Linears
(Atari); here one Linear gives query, key and value. Tables that the published models hold and
never read (`wte`, `tok_emb`) are dropped on the way in, and zeros on the way out.
"""

import re
from typing import Any

import torch
from torch import Tensor

from .atari import AtariDecisionMamba
from .model import DecisionMamba

KINDS = {
    "transformer.h.0.mamba.A_log": "gym mamba",
    "blocks.0.mamba.A_log": "atari mamba",
    "transformer.h.0.attn.c_attn.weight": "gym attention",
    "encoder.h.0.attn.c_attn.weight": "gym attention",
    "blocks.0.attn.key.weight": "atari attention",
}
Weights = dict[str, Tensor]
_BLOCK = "transformer.h."


def from_official(
    kind: str, weights: Weights, num_heads: int | None
) -> tuple[dict[str, Any], Weights]:
    """Constructor arguments that the shapes tell, and the weights under our names."""
    renamed = _atari_in(weights) if kind.startswith("atari") else dict(weights)
    if kind == "gym attention":
        renamed = _gpt2_in(renamed)
    inner, hidden_size = renamed[f"{_BLOCK}0.mlp_channels.0.weight"].shape
    layers = {name.split(".")[2] for name in renamed if name.startswith(_BLOCK)}
    sizes: dict[str, Any] = {"hidden_size": hidden_size, "n_layer": len(layers)}
    if kind.endswith("mamba"):
        sizes |= _mamba_sizes(renamed, hidden_size)
    else:
        heads = num_heads or (8 if kind.startswith("atari") else 1)
        sizes |= {"mixer": "attention", "mixer_kwargs": {"num_heads": heads}}
    if kind.startswith("atari"):
        sizes |= {
            "act_dim": renamed["head.weight"].shape[0],
            "state_dim": _image_shape(renamed),
            "max_length": (renamed["pos_emb"].shape[1] - 1) // 3,
            "max_ep_len": renamed["global_pos_emb"].shape[1] - 1,
        }
    else:
        sizes |= {
            "state_dim": renamed["embed_state.weight"].shape[1],
            "act_dim": renamed["embed_action.weight"].shape[1],
            "max_ep_len": renamed["embed_timestep.weight"].shape[0],
            "n_inner": inner,
            "activation": "relu" if kind == "gym attention" else "gelu",
            "auxiliary_heads": "predict_state.weight" in renamed,
        }
    return sizes, renamed


def to_official(model: DecisionMamba | AtariDecisionMamba) -> Weights:
    """See `export_official`."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    mixer, atari = model.config["mixer"], isinstance(model, AtariDecisionMamba)
    if mixer not in ("mamba", "attention"):
        raise ValueError(f"mixer must be 'mamba' or 'attention' as published, got {mixer!r}")
    if atari:
        return _atari_out(weights, 3 * model.max_length + 1, mixer == "attention")
    return _gpt2_out(weights) if mixer == "attention" else weights


def _mamba_sizes(weights: Weights, hidden_size: int) -> dict[str, Any]:
    inner, d_state = weights[f"{_BLOCK}0.mamba.A_log"].shape
    return {
        "norm": "layer" if f"{_BLOCK}0.norm_mamba.bias" in weights else "rms",
        "mixer_kwargs": {
            "d_state": d_state,
            "d_conv": weights[f"{_BLOCK}0.mamba.conv1d.weight"].shape[2],
            "expand": inner // hidden_size,
            "dt_rank": weights[f"{_BLOCK}0.mamba.dt_proj.weight"].shape[1],
        },
    }


def _image_shape(weights: Weights) -> tuple[int, int, int]:
    """Square images: the encoder's Linear tells how many places the convolutions leave."""
    places = weights["state_encoder.7.weight"].shape[1] // 64
    side = round(places**0.5)
    # the smallest side that leaves so many; 84 where published
    pixels = ((side + 2 - 1) * 2 + 4 - 1) * 4 + 8
    return weights["state_encoder.0.weight"].shape[1], pixels, pixels


def _atari_in(weights: Weights) -> Weights:
    found: Weights = {}
    for name, value in weights.items():
        if name == "tok_emb.weight" or name.endswith("attn.mask"):
            continue
        name = re.sub(r"^blocks\.", _BLOCK, name)
        name = re.sub(r"^ln_f\.", "transformer.ln_f.", name)
        # kzl's Decision Transformer says mlp, Ota's mlp_channels
        name = name.replace(".ln2.", ".ln_2.").replace(".mlp.", ".mlp_channels.")
        name = name.replace(".ln1.", ".norm_mamba.").replace(".attn.proj.", ".mamba.out_proj.")
        found[name] = value
    for name in [name for name in found if ".attn.query." in name]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace(".attn.query.", ".mamba.in_proj.")] = torch.cat(parts)
    return found


def _atari_out(weights: Weights, tokens: int, attention: bool) -> Weights:
    found: Weights = {"tok_emb.weight": torch.zeros_like(weights["head.weight"])}
    mask = torch.ones(tokens, tokens).tril().view(1, 1, tokens, tokens)
    for name, value in weights.items():
        name = name.replace(".ln_2.", ".ln2.").replace("transformer.ln_f.", "ln_f.")
        name = name.replace(_BLOCK, "blocks.")
        if not attention:
            found[name] = value
            continue
        name = name.replace(".norm_mamba.", ".ln1.").replace(".mamba.out_proj.", ".attn.proj.")
        if ".mamba.in_proj." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                found[name.replace(".mamba.in_proj.", f".attn.{part}.")] = piece.clone()
            found[name.split(".mamba.")[0] + ".attn.mask"] = mask.clone()
        else:
            found[name] = value
    return found


_GPT2 = {
    ".ln_1.": ".norm_mamba.",
    ".attn.c_attn.": ".mamba.in_proj.",
    ".attn.c_proj.": ".mamba.out_proj.",
    ".mlp.c_fc.": ".mlp_channels.0.",
    ".mlp.c_proj.": ".mlp_channels.2.",
}


def _gpt2_in(weights: Weights) -> Weights:
    found: Weights = {}
    for name, value in weights.items():
        name = re.sub(r"^encoder\.", "transformer.", name)
        if name.endswith((".attn.bias", ".attn.masked_bias", "transformer.wte.weight")):
            continue
        for theirs, ours in _GPT2.items():
            if theirs in name and name.startswith(_BLOCK):
                name = name.replace(theirs, ours)
                value = value.T.contiguous() if value.ndim == 2 and theirs != ".ln_1." else value
                break
        found[name] = value
    position = found.pop("transformer.wpe.weight", None)
    if position is not None:
        # transformers adds row 0 of this table to every token, behind the norm
        found["embed_ln.bias"] = found["embed_ln.bias"] + position[0]
    return found


def _gpt2_out(weights: Weights) -> Weights:
    hidden_size = weights["embed_ln.bias"].shape[0]
    found: Weights = {"transformer.wte.weight": torch.zeros(1, hidden_size)}
    tokens = 1024
    for name, value in weights.items():
        for theirs, ours in _GPT2.items():
            if ours in name and name.startswith(_BLOCK):
                name = name.replace(ours, theirs)
                value = value.T.contiguous() if value.ndim == 2 and theirs != ".ln_1." else value
                break
        if name.endswith(".attn.c_attn.weight"):
            block = name.removesuffix("c_attn.weight")
            found[f"{block}bias"] = torch.ones(tokens, tokens).tril().view(1, 1, tokens, tokens)
            found[f"{block}masked_bias"] = torch.tensor(-1e4)
        found[name] = value
    return found
