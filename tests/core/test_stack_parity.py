"""Whole stacks against transformers' hybrids on the same weights, and their orders of layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core import stack_cases
from torch import Tensor, nn

from scanweave.core import create_stack
from scanweave.core.stack import PRESETS, parse_pattern

transformers = pytest.importorskip("transformers", exc_type=ImportError)

Check = Callable[..., None]
SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
}
MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 3}
# Mamba-2 as transformers configures it, and as we do
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
}
OURS2 = ["mamba2", {"d_state": 4, "headdim": 8, "ngroups": 2}]
KINDS = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "linear_attention"]

# model and configuration of transformers, the function that renames weights, pattern and arguments
MODELS: dict[str, tuple[str, dict[str, Any], str, str, dict[str, Any]]] = {
    "griffin": (
        "RecurrentGemma",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 192,
            "attention_window_size": 6,
        },
        "griffin_weights",
        "griffin",
        {
            "depth": 4,
            "letters": {
                "g": ["rg_lru", {"headdim": 8}],
                "w": [
                    "local_attention",
                    {
                        "num_heads": 4,
                        "num_kv_heads": 1,
                        "window": 6,
                        "rope_fraction": 0.5,
                        "bias": False,
                        "out_bias": True,
                    },
                ],
            },
        },
    ),
    "jamba": (
        "Jamba",
        {"num_hidden_layers": 8, "num_key_value_heads": 2, "num_experts": 4, **MAMBA},
        "jamba_weights",
        "jamba",
        {
            "letters": {
                "h": ["mamba_heads", {"d_state": 4, "dt_rank": 3}],
                "a": ["attention", {"num_heads": 4, "num_kv_heads": 2, "bias": False}],
                "f": ["gated_mlp", {"expand": 1.25}],
                "e": ["moe", {"num_experts": 4, "top_k": 2, "expand": 1.25}],
            }
        },
    ),
    "zamba": (
        "Zamba",
        {"num_hidden_layers": 9, "num_key_value_heads": 4, **MAMBA},
        "zamba_weights",
        "zamba",
        {
            "depth": 9,
            "letters": {
                "m": [
                    "mamba_heads",
                    {"n_heads": 2, "bcdt_norm": False, "d_state": 4, "dt_rank": 3},
                ],
                "S": ["shared", {"num_heads": 4, "expand": 1.25}],
            },
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            "num_hidden_layers": 6,
            "layers_block_type": KINDS,
            "mamba_d_state": 4,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "num_mem_blocks": 2,
            "use_shared_attention_adapter": True,
            "adapter_rank": 3,
            "use_mem_rope": True,
            "chunk_size": 8,
        },
        "zamba2_weights",
        "m (S>m) m (S>m) (S>m) m",
        {
            "letters": {
                "m": OURS2,
                "S": [
                    "shared",
                    {
                        "num_heads": 4,
                        "expand": 1.25,
                        "lora_rank": 3,
                        "lora_attention": True,
                        "num_blocks": 2,
                        "rope_fraction": 1.0,
                    },
                ],
            }
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "hybrid_override_pattern": "M-M*-",
            "num_key_value_heads": 2,
            "head_dim": 8,
            "ssm_state_size": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
        "nemotron_weights",
        "n p n a p",
        {
            "letters": {
                "n": OURS2,
                "a": ["attention", {"num_heads": 4, "num_kv_heads": 2, "bias": False}],
                "p": ["mlp", {"expand": 1.25, "activation": "relu2", "bias": False}],
            }
        },
    ),
    "bamba": (
        "Bamba",
        {
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "num_key_value_heads": 2,
            **MAMBA2,
        },
        "bamba_weights",
        "(n f)(a f)(n f)",
        {
            "letters": {
                "n": OURS2,
                "a": [
                    "attention",
                    {"num_heads": 4, "num_kv_heads": 2, "rope_fraction": 0.5, "bias": False},
                ],
                "f": ["gated_mlp", {"expand": 1.25}],
            }
        },
    ),
    "granite": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_key_value_heads": 2,
            "num_local_experts": 0,
            "rms_norm_eps": 1e-5,
            "shared_intermediate_size": 40,
            **MAMBA2,
        },
        "bamba_weights",
        "(n f)(a f)(n f)",
        {
            "letters": {
                "n": OURS2,
                "a": [
                    "attention",
                    {"num_heads": 4, "num_kv_heads": 2, "scale": 1.0, "bias": False},
                ],
                "f": ["gated_mlp", {"expand": 1.25}],
            },
        },
    ),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Their model, our stack of the same weights, and what scales the inputs of ours."""
    family, size, rename, pattern, arguments = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **size})
    theirs = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if key.endswith("recurrent_param"):
                p.uniform_(-5, 0)
            else:
                p.add_(0.1 * torch.randn_like(p))
    ours = create_stack(pattern, 32, **arguments).eval()
    weights = getattr(stack_cases, rename)(theirs.state_dict(), config.layers_block_type)
    ours.load_state_dict(weights, strict=True)
    return theirs, ours, getattr(theirs, "normalizer", torch.ones(())).float()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(assert_near: Check, name: str):
    theirs, ours, scale = pair(name)
    x = torch.randn(2, 19, 32, requires_grad=True)
    expected = theirs(inputs_embeds=x, use_cache=False).last_hidden_state
    actual = ours(x * scale)
    exact = ours.double()(x.double() * scale)
    # the reference's chunks round more than our scan: both are near the float64 stack
    assert_near(actual, exact, factor=0.2)
    assert_near(expected, exact, factor=4)
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    (given,) = torch.autograd.grad(exact, x, g.double())
    assert_near(wanted, given, gradient=True, factor=4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_steps_equal_transformers(assert_near: Check, name: str):
    """Single steps from an empty state, in the place of their cache."""
    theirs, ours, scale = pair(name)
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        expected = theirs(inputs_embeds=x, use_cache=False).last_hidden_state
        state, parts = ours.init_state(2), []  # type: ignore[operator]
        for t in range(12):
            y, state = ours.step(x[:, t] * scale, state)  # type: ignore[operator]
            parts.append(y)
    assert_near(torch.stack(parts, 1), expected, factor=4)


def kinds(name: str) -> list[str]:
    """What mixes in every layer of a preset, in transformers' words."""
    words = {"a": "attention", "w": "attention", ">": "hybrid", "p": "mlp"}
    letters = set("acefghklmnprswS")
    layers = parse_pattern(PRESETS[name].pattern, letters)
    first = [layer[0] for layer in layers]
    return [words.get(part.joint or part.names[0], "mamba") for part in first]


def plain(theirs: list[str]) -> list[str]:
    names = {"full_attention": "attention", "sliding_attention": "attention"}
    found = [names.get(kind, kind) for kind in theirs]
    return ["mamba" if k in ("linear_attention", "recurrent") else k for k in found]


def cycled(layers: list[Any], depth: int) -> list[Any]:
    return [layers[i % len(layers)] for i in range(depth)]


@pytest.mark.parametrize(
    ("name", "family"),
    [("griffin", "RecurrentGemma"), ("jamba", "Jamba"), ("zamba", "Zamba"), ("zamba2", "Zamba2")],
)
def test_orders_are_the_published_ones(name: str, family: str):
    config = getattr(transformers, f"{family}Config")()
    theirs = plain(config.layers_block_type)
    assert cycled(kinds(name), len(theirs)) == theirs
    if name == "jamba":
        experts = [n > 1 for n in config.layers_num_experts]
        layers = parse_pattern(PRESETS[name].pattern, set("hfea"))
        assert cycled(["e" in layer[1].names for layer in layers], len(experts)) == experts
