"""The norm that rounds as it writes computes what norm and cast in sequence do."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from scanweave.core.ops.norm.cast import rms_norm_cast

SHAPES = [(1, 1, 8), (2, 5, 33), (3, 70, 130)]


@pytest.mark.interpret
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape: tuple[int, ...], assert_near: Callable[..., None]):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[-1], device=device, requires_grad=True)
    y = rms_norm_cast(x, weight, 1e-5, torch.float32)
    assert "RmsNormCast" in type(y.grad_fn).__name__
    wanted = F.rms_norm(x, shape[-1:], weight, 1e-5)
    assert_near(y, wanted)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), g)
    for actual, expected in zip(found, torch.autograd.grad(wanted, (x, weight), g), strict=True):
        assert_near(actual, expected)
    half = rms_norm_cast(x, weight, 1e-5, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half.float() - wanted).norm() <= 5e-3 * wanted.norm()
    (dx,) = torch.autograd.grad(half.float().sum(), x)
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_parts(dtype: torch.dtype):
    x, weight = torch.randn(2, 5, 7, dtype=dtype), torch.randn(7)
    wide = torch.promote_types(dtype, torch.float32)
    wanted = F.rms_norm(x.to(wide), (7,), weight.to(wide), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = rms_norm_cast(x, weight, 1e-5, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    # rounded, or under the interpreter cut off
    assert (found.double() - wanted.double()).norm() <= 6e-3 * wanted.double().norm()
