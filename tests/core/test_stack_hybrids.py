"""Hybrids of research code against its stored results, by the published parameters' names.

`make_hybrids.py` tells the commits, what of the code ran, and what stood in for CUDA packages.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from tests.core.hybrid_cases import RENAMED, STACKS
from tests.core.make_hybrids import D_MODEL, DATA, inputs, weights
from torch import Tensor

from scanweave.core import Mixer, create_stack

Check = Callable[..., None]


@cache
def stored(name: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Published parameters, y and dx."""
    with np.load(DATA / f"hybrid_{name}.npz") as file:
        lines = [line.split() for line in file["parameters"].tolist()]
        y, dx = (torch.from_numpy(file[key]) for key in ("y", "dx"))
    return weights({key: [int(n) for n in shape] for key, *shape in lines}), y, dx


def built(name: str, dtype: torch.dtype) -> Mixer:
    """Our stack of the published weights, all of which it takes."""
    stack = create_stack(name, D_MODEL, dtype=dtype, **STACKS[name]).eval()
    stack.load_state_dict(RENAMED[name](stored(name)[0]), strict=True)
    return stack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", STACKS)
def test_equals_the_published_code(assert_near: Check, name: str, dtype: torch.dtype):
    stack, (_, y, dx) = built(name, dtype), stored(name)
    x, g = (v.detach().to(dtype) for v in inputs())
    actual = stack(x.requires_grad_())
    assert_near(actual, y.to(dtype), dtype=dtype)
    (found,) = torch.autograd.grad(actual, x, g)
    assert_near(found, dx.to(dtype), dtype=dtype, gradient=True)


@pytest.mark.parametrize("name", STACKS)
def test_steps_equal_the_published_code(assert_near: Check, name: str):
    stack, (_, y, _) = built(name, torch.float64), stored(name)
    x, parts = inputs()[0].detach(), []
    with torch.no_grad():
        state = stack.init_state(2)
        for t in range(x.shape[1]):
            out, state = stack.step(x[:, t], state)
            parts.append(out)
    assert_near(torch.stack(parts, 1), y)
