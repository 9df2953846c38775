"""Hybrids of research code: their weights' names as ours, and our stacks of the stored sizes."""

from collections.abc import Callable
from typing import Any

import torch
from tests.core.stack_cases import Loader, Weights, under


def from_parts(theirs: Weights, **names: str) -> Weights:
    """Weights of submodules under other names: ours = "theirs"."""
    return {
        f"{ours}.{kind}": theirs[f"{part}.{kind}"]
        for ours, part in names.items()
        for kind in ("weight", "bias")
        if f"{part}.{kind}" in theirs
    }


def from_swapped(theirs: Weights) -> Weights:
    """Weights of a gated feed-forward whose gate is the second half, as those of `gated_mlp`."""
    up, gate = theirs["fc1.weight"].chunk(2)
    return {"gate_up.weight": torch.cat([gate, up]), "down.weight": theirs["fc2.weight"]}


def of_flash_blocks(
    theirs: Weights, layers: int, feed_forward: Callable[[Weights], Weights]
) -> Weights:
    """Blocks of a mixer and an MLP under the names of flash-attention's models."""
    loader = Loader(theirs)
    for i in range(layers):
        layer = f"layers.{i}"
        mixer = loader.get(f"{layer}.mixer")
        if "Wqkv.weight" in mixer:
            mixer = from_parts(mixer, in_proj="Wqkv", out_proj="out_proj")
        loader.put(f"{layer}.0.body", mixer)
        loader.put(f"{layer}.1.body", feed_forward(loader.get(f"{layer}.mlp")))
        for j in range(2):
            loader.put(f"{layer}.{j}.norm", loader.get(f"{layer}.norm{j + 1}"))
    loader.put("norm", loader.get("ln_f"))
    return loader.ours


def h3_weights(theirs: Weights) -> Weights:
    """SSMModel's, of HazyResearch/H3."""
    return of_flash_blocks(theirs, 9, lambda mlp: from_parts(mlp, up="fc1", down="fc2"))


def based_weights(theirs: Weights) -> Weights:
    """GPTModel's, of HazyResearch/based."""
    return of_flash_blocks(theirs, 3, from_swapped)


def moe_mamba_weights(theirs: Weights) -> Weights:
    """TransformerTower's, of llm-random."""
    loader = Loader(theirs)
    for i in range(2):
        block = f"blocks.block_{i}.block.residual"
        loader.put(f"layers.{i}.0.norm", loader.get(f"{block}_mamba.layer.pre_norm"))
        loader.put(f"layers.{i}.0.body", loader.get(f"{block}_mamba.layer.mamba"))
        loader.put(f"layers.{i}.1.norm", loader.get(f"{block}_feedforward.layer.pre_norm"))
        names = {
            "router.weight": "gating.gate",
            "up": "expert_inner_function.lin1_weight",
            "down": "expert_inner_function.lin2_weight",
        }
        feed = loader.get(f"{block}_feedforward.layer.feedforward")
        # maps are stored for vectors on their left
        loader.put(f"layers.{i}.1.body", {ours: feed[name].mT for ours, name in names.items()})
    return loader.ours


def mamba2_hybrid_weights(theirs: Weights) -> Weights:
    """HybridStack's, of Megatron-LM, of four heads of two channels in two groups."""
    loader = Loader(theirs)
    for i in range(12):
        layer = loader.get(f"stack.layers.{i}")
        if "mlp.linear_fc1.weight" in layer:
            first = "mlp.linear_fc1"
            body = from_parts(layer, up=first, down="mlp.linear_fc2")
        elif "mixer.D" in layer:
            first = "mixer.in_proj"
            body = {k.replace("conv1d_", "conv1d."): v for k, v in under(layer, "mixer").items()}
            del body["in_proj.layer_norm_weight"]
        else:
            first = "self_attention.linear_qkv"
            # a group's queries, then its keys and its values
            groups = layer[f"{first}.weight"].unflatten(0, (2, 4, 2))
            rows = [v.flatten(0, -2) for v in (groups[:, :2], groups[:, 2], groups[:, 3])]
            body = from_parts(layer, out_proj="self_attention.linear_proj")
            body["in_proj.weight"] = torch.cat(rows)
        loader.put(f"layers.{i}.0.body", body)
        loader.put(f"layers.{i}.0.norm.weight", layer[f"{first}.layer_norm_weight"])
    loader.put("norm", loader.get("stack.final_norm"))
    return loader.ours


def spade_weights(theirs: Weights) -> Weights:
    """Two decoder layers', of EfficientLongSequenceModeling."""
    loader = Loader(theirs)
    for i in range(2):
        layer = loader.get(f"layers.{i}")
        attention = {
            "in_proj.weight": torch.cat([layer[f"self_attn.{name}.weight"] for name in "qkv"]),
            "out_proj.weight": layer["self_attn.o.weight"],
        }
        body = f"layers.{i}.0.body"
        if i:
            loader.put(body, attention)
        else:
            loader.put(f"{body}.mixers.1", attention)
            s4 = under(layer, "s4_module.s4.kernel.kernel")
            names = {"inv_w_real": "A_real", "w_imag": "A_imag"}
            kernel = {names.get(name, name): v for name, v in s4.items()}
            kernel["B"] = kernel["B"].squeeze(0)
            loader.put(f"{body}.mixers.0.kernel", kernel)
            loader.put(f"{body}.mixers.0.D", layer["s4_module.s4.D"])
            for j, name in enumerate(("global", "local")):
                loader.put(f"{body}.norms.{j}", under(layer, f"norm_{name}"))
            loader.put(f"{body}.out_proj", under(layer, "aggregate"))
        loader.put(f"layers.{i}.0.norm", under(layer, "self_attn_layer_norm"))
        loader.put(f"layers.{i}.1.norm", under(layer, "final_layer_norm"))
        loader.put(f"layers.{i}.1.body", from_parts(layer, up="fc1", down="fc2"))
    return loader.ours


RENAMED = {
    "based": based_weights,
    "h3_hybrid": h3_weights,
    "mamba2_hybrid": mamba2_hybrid_weights,
    "moe_mamba": moe_mamba_weights,
    "spade": spade_weights,
}
STACKS: dict[str, dict[str, Any]] = {
    "based": {
        "letters": {
            "l": ["based", {"num_heads": 2, "feature_dim": 2}],
            "w": ["local_attention", {"num_heads": 2, "window": 3, "bias": False}],
            # their widths are multiples of 256
            "f": ["gated_mlp", {"expand": 32}],
        },
    },
    "h3_hybrid": {
        "letters": {"h": ["h3", {"d_state": 4}], "a": ["attention", {"num_heads": 2}]},
    },
    "mamba2_hybrid": {
        "letters": {
            "n": ["mamba2", {"d_state": 3, "headdim": 4, "ngroups": 2}],
            "a": ["attention", {"num_heads": 4, "num_kv_heads": 2, "bias": False}],
        },
    },
    "moe_mamba": {
        "depth": 2,
        "final_norm": False,
        "letters": {
            "m": ["mamba", {"d_state": 3, "dt_rank": 1}],
            "e": [
                "moe",
                {
                    "num_experts": 3,
                    "router": "switch",
                    "capacity": 3.0,
                    "expand": 1.5,
                    "activation": "relu",
                    "gated": False,
                },
            ],
        },
    },
    "spade": {
        "final_norm": False,
        "letters": {
            "s": ["s4", {"d_state": 4, "copies": 8, "gated": False}],
            "w": [
                "local_attention",
                {"num_heads": 2, "window": 3, "rope_fraction": 0.0, "bias": False},
            ],
        },
    },
}
