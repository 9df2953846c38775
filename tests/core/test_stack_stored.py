"""Samba's, Hymba's and BlackMamba's stacks against their published code (stored values)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.core.wave_cases import waves
from torch import Tensor

from scanweave.core import Mixer, create_stack
from scanweave.core.stack.moe import sinkhorn

Check = Callable[..., None]
# outputs y and inputs' gradients dx in float64 of the blocks of microsoft/Samba (commit ed3ed542,
# lit_gpt/model.py), NVlabs/hymba (df5b2a95, barebones_hymba) and Zyphra/BlackMamba (5c8cdddd). What
# they call of CUDA packages (selective scan, convolution, windowed attention, RMS norm, SwiGLU and
# rotations) was answered by its equations in float64; tables of rotations are float64 where Samba's
# are bfloat16, biases that Hymba's checkpoints lack are 0, BlackMamba's experts have the paper's
# SiLU. `plan` is BlackMamba's assignment of `plan_logits` to experts in training. Parameters, input
# and cotangent of `waves`
STORED = Path(__file__).parent / "data" / "stacks.npz"
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "bias": False, "expand": 2}
STACKS: dict[str, dict[str, Any]] = {
    "samba": {
        "depth": 4,
        "letters": {
            "w": [
                "local_attention",
                {"num_heads": 2, "num_kv_heads": 1, "window": 3, "bias": False},
            ]
        },
    },
    "hymba": {
        "depth": 2,
        "meta_tokens": 2,
        "final_norm": False,
        "letters": {
            "m": ["mamba_heads", {"d_state": 3, "dt_rank": 2, "d_conv": 3}],
            "a": ["attention", {**HEADS, "rope_fraction": 1.0}],
            "w": ["local_attention", {**HEADS, "window": 3, "prefix": 2}],
        },
    },
    "blackmamba": {
        "depth": 2,
        "final_norm": False,
        "letters": {
            "m": ["mamba", {"d_state": 3}],
            "e": [
                "moe",
                {"num_experts": 4, "router": "sinkhorn", "router_bias": True, "expand": 1.5},
            ],
        },
    },
}


def with_waves(name: str, dtype: torch.dtype) -> Mixer:
    stack = create_stack(name, 8, dtype=dtype, **STACKS[name]).eval()
    shapes = {key: p.shape for key, p in sorted(stack.named_parameters())}
    weights = {key: 0.5 * waves(*s, speed=i + 1.5) for i, (key, s) in enumerate(shapes.items())}
    for key, v in weights.items():
        if "norm" in key and key.endswith("weight"):
            v += 1
    stack.load_state_dict(weights, strict=True)
    return stack


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    with np.load(STORED) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", STACKS)
def test_equals_the_published_code(
    assert_near: Check, stored: dict[str, Tensor], name: str, dtype: torch.dtype
):
    stack, x = with_waves(name, dtype), waves(2, 9, 8, speed=0.7).to(dtype).requires_grad_()
    y = stack(x)
    assert_near(y, stored[f"{name}_y"].to(dtype), dtype=dtype)
    (dx,) = torch.autograd.grad(y, x, waves(2, 9, 8, speed=0.3).to(dtype))
    assert_near(dx, stored[f"{name}_dx"].to(dtype), dtype=dtype, gradient=True)


@pytest.mark.parametrize("name", STACKS)
def test_steps_equal_the_published_code(assert_near: Check, stored: dict[str, Tensor], name: str):
    stack, x = with_waves(name, torch.float64), waves(2, 9, 8, speed=0.7)
    with torch.no_grad():
        state, parts = stack.init_state(2), []
        for t in range(9):
            y, state = stack.step(x[:, t], state)
            parts.append(y)
    assert_near(torch.stack(parts, 1), stored[f"{name}_y"])


def test_assigns_as_blackmamba(stored: dict[str, Tensor]):
    """Their rounds end earlier than ours, at an expert's share; the choices are the same."""
    plan = sinkhorn(stored["plan_logits"]).exp() / len(stored["plan"])
    assert torch.equal(plan.argmax(1), stored["plan"].argmax(1))
    assert (plan - stored["plan"]).abs().max() < 5e-3
