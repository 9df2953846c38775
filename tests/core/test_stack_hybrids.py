"""Hybrids of research code against its stored results, by the published parameters' names.

`make_hybrids.py` tells the commits, what of the code ran, and what stood in for CUDA packages.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from tests.core.hybrid_cases import RENAMED, STACKS
from tests.core.published_code import D_MODEL, DATA, inputs, weights
from torch import Tensor

from scanweave.core import Mixer, create_stack
from scanweave.core.stack import PRESETS, parse_pattern

Check = Callable[..., None]


@cache
def stored(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Published parameters, and results: y, dx, and perhaps dx_training."""
    with np.load(DATA / f"hybrid_{name}.npz") as file:
        lines = [line.split() for line in file["parameters"].tolist()]
        found = {key: torch.from_numpy(file[key]) for key in file.files if key != "parameters"}
    return weights({key: [int(n) for n in shape] for key, *shape in lines}), found


def built(name: str, dtype: torch.dtype) -> Mixer:
    """Our stack of the published weights, all of which it takes."""
    stack = create_stack(name, D_MODEL, dtype=dtype, **STACKS[name]).eval()
    stack.load_state_dict(RENAMED[name](stored(name)[0]), strict=True)
    return stack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", STACKS)
def test_equals_the_published_code(assert_near: Check, name: str, dtype: torch.dtype):
    stack, (_, expected) = built(name, dtype), stored(name)
    x, g = (v.detach().to(dtype) for v in inputs())
    y = stack(x.requires_grad_())
    assert_near(y, expected["y"], dtype=dtype)
    assert_near(torch.autograd.grad(y, x, g)[0], expected["dx"], dtype=dtype, gradient=True)


@pytest.mark.parametrize("name", STACKS)
def test_steps_equal_the_published_code(assert_near: Check, name: str):
    stack, (_, expected) = built(name, torch.float64), stored(name)
    x, parts = inputs()[0].detach(), []
    with torch.no_grad():
        state = stack.init_state(2)
        for t in range(x.shape[1]):
            out, state = stack.step(x[:, t], state)
            parts.append(out)
    assert_near(torch.stack(parts, 1), expected["y"])


def test_trains_experts_as_moe_mamba(assert_near: Check):
    """With places for all tokens; the balancing loss acts on the gradient."""
    stack, (_, expected) = built("moe_mamba", torch.float64).train(), stored("moe_mamba")
    x, g = inputs()
    y = stack(x)
    assert_near(y, expected["y"])
    assert_near(torch.autograd.grad(y, x, g)[0], expected["dx_training"], gradient=True)
    assert (expected["dx_training"] - expected["dx"]).abs().max() > 1e-4


# layers of each kind in the sizes whose code or weights are public: examples/mamba/train.sh of
# Megatron-LM (8B), train/configs/experiment/reference/based-360m.yaml, H3's README (355M, 1.3B)
MEGATRON = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
ORDERS: dict[str, tuple[int, dict[str, list[int]]]] = {
    "based": (27, {"l": [1, 6, 11, 16, 21], "w": [2, 7, 12, 17, 22]}),
    "h3_hybrid": (24, {"a": [8, 16]}),
    "mamba2_hybrid": (
        len(MEGATRON),
        {ours: [i for i, v in enumerate(MEGATRON) if v == kind] for ours, kind in ("a*", "p-")},
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_are_the_published_ones(name: str):
    count, kinds = ORDERS[name]
    layers = [layer[0].names[0] for layer in parse_pattern(PRESETS[name].pattern, set("acfhlnpw"))]
    assert len(layers) == count
    for letter, places in kinds.items():
        assert [i for i, v in enumerate(layers) if v == letter] == places
    assert len(set(layers)) == len(kinds) + 1
