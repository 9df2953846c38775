"""Names and layouts of published hybrids' weights, as those of our stacks."""

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def from_jamba(theirs: Weights) -> Weights:
    """Weights of transformers' JambaMambaMixer as those of `mamba_heads` with one head."""
    names = {"dt_layernorm": "dt_norm", "b_layernorm": "b_norm", "c_layernorm": "c_norm"}
    ours = {}
    for name, v in theirs.items():
        first, _, rest = name.partition(".")
        if name in ("x_proj.weight", "dt_proj.weight"):
            v = v.unsqueeze(0)
        ours[f"{names.get(first, first)}.{rest}" if rest else name] = v
    return ours


def from_zamba(theirs: Weights) -> Weights:
    """Weights of transformers' ZambaMambaMixer as those of `mamba_heads`."""
    ours = {}
    for name, v in theirs.items():
        if name == "in_proj.weight":
            # rows alternate between u and z
            v = torch.cat([v[::2], v[1::2]])
        elif name in ("A_log", "D"):
            v = v.flatten(0, 1)
        elif name in ("x_proj_weight", "dt_proj_weight"):
            name = name.replace("_weight", ".weight")
        elif name == "dt_proj_bias":
            name, v = "dt_proj.bias", v.flatten()
        ours[name] = v
    return ours
