"""The layer norm that adds a branch and rounds computes what sum, norm and cast in sequence do."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scanweave.core.ops.norm import cast_kernels
from scanweave.core.ops.norm.layer import add_layer_norm_cast, layer_norm_cast

Check = Callable[..., None]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# one row, odd widths, several rows a program and several tiles, a power of two, wide rows
SHAPES = [(1, 48), (2, 5, 33), (3, 7, 10, 96), (5, 1), (40, 64), (3, 768)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def parameters(dim: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> list[Tensor]:
    return [drawn(dim, dtype=dtype, device=device) for _ in range(2)]


def exact(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x.double() if branch is None else x.double() + branch.double()
    return total, F.layer_norm(total, x.shape[-1:], weight.double(), bias.double(), 1e-5)


def off(actual: Tensor, expected: Tensor) -> float:
    """Distance relative to the length of what is expected."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch):
    """Several tiles a program, and several programs."""
    monkeypatch.setattr(cast_kernels, "TILE", 256)
    monkeypatch.setattr(cast_kernels, "BACKWARD_TILE", 256)
    monkeypatch.setattr(cast_kernels, "EACH", 2)


@pytest.mark.interpret
@pytest.mark.poison
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape: tuple[int, ...], assert_near: Check):
    x, (weight, bias) = drawn(*shape), parameters(shape[-1])
    y = layer_norm_cast(x, weight, bias, 1e-5, torch.float32)
    assert "AddNormCast" in type(y.grad_fn).__name__
    wanted = F.layer_norm(x, shape[-1:], weight, bias, 1e-5)
    assert_near(y, wanted)
    g, inputs = torch.randn_like(y), (x, weight, bias)
    expected = torch.autograd.grad(wanted, inputs, g)
    for found, one in zip(torch.autograd.grad(y, inputs, g), expected, strict=True):
        # of a single channel the gradient is 0, times scales of 300
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-4 if shape[-1] == 1 else 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer_norm_cast(x, weight, bias, 1e-5, x.dtype), y)


@pytest.mark.interpret
@pytest.mark.poison
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reads", ["both", "total", "norm"])
def test_sum_and_norm(shape: tuple[int, ...], reads: str):
    """Gradients of the stream and the branch, each in its own dtype."""
    x, branch = drawn(*shape), drawn(*shape, dtype=torch.bfloat16)
    weight, bias = parameters(shape[-1])
    total, y = add_layer_norm_cast(x, branch, weight, bias, 1e-5, torch.bfloat16)
    assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    sums, norm = exact(x, branch, weight, bias)
    assert off(total, sums) < 1e-6
    assert off(y, norm) < 6e-3
    inputs = (x, branch, weight, bias) if reads != "total" else (x, branch)
    g, h = torch.randn_like(total), torch.randn_like(y)
    found, wanted = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    if reads != "norm":
        found, wanted = found + (total * g).sum(), wanted + (sums * g).sum()
    if reads != "total":
        found, wanted = found + (y.float() * h.float()).sum(), wanted + (norm * h.double()).sum()
    grads = torch.autograd.grad(found, inputs)
    expected = torch.autograd.grad(wanted, inputs)
    for actual, one, of in zip(grads, expected, inputs, strict=True):
        assert actual.dtype == of.dtype
        # of a single channel what remains of the norm's gradient is rounding
        if shape[-1] > 1:
            assert off(actual, one) < (6e-3 if of.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.interpret
def test_half_streams():
    """A stream of 16 bits is rounded before it is normalised, as PyTorch's sum is."""
    x, branch = (drawn(6, 40, dtype=torch.bfloat16) for _ in range(2))
    weight, bias = parameters(40, torch.bfloat16)
    total, y = add_layer_norm_cast(x, branch, weight, bias, 1e-5, torch.bfloat16)
    assert total.dtype == y.dtype == torch.bfloat16
    assert off(total, x.double() + branch.double()) < 6e-3
    assert off(y, exact(total, None, weight, bias)[1]) < 6e-3
    grads = torch.autograd.grad((total * y).float().sum(), (x, branch, weight, bias))
    torch.testing.assert_close(grads[0], grads[1])
    assert all(g.dtype == torch.bfloat16 for g in grads)


@pytest.mark.interpret
def test_gradients_of_leaves_share_no_memory():
    x, branch, (weight, bias) = drawn(4, 48), drawn(4, 48), parameters(48)
    total, y = add_layer_norm_cast(x, branch, weight, bias, 1e-5, torch.float32)
    torch.autograd.backward([total, y], [torch.randn_like(total), torch.randn_like(y)])
    assert x.grad is not None
    assert branch.grad is not None
    assert torch.equal(x.grad, branch.grad)
    assert x.grad.data_ptr() != branch.grad.data_ptr()


@pytest.mark.interpret
@torch.no_grad()
def test_a_profiler_sees_an_operator():
    x, (weight, bias) = drawn(4, 48), parameters(48)
    with torch.profiler.profile(acc_events=True) as profiler:
        layer_norm_cast(x, weight, bias, 1e-5, torch.float32)
    assert "_AddNormCast" in {event.name for event in profiler.events() or []}


@pytest.mark.interpret
def test_large_mean():
    """A variance of 1 beside a mean of 1000: differences of squares would have no digit left."""
    x, (weight, bias) = drawn(9, 96), parameters(96)
    far = (x.detach() + 1000).requires_grad_()
    y = layer_norm_cast(far, weight, bias, 1e-5, torch.float32)
    wanted = exact(far, None, weight, bias)[1]
    assert off(y, wanted) < 1e-4
    g = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, far, g)
    (expected,) = torch.autograd.grad(wanted, far, g.double())
    assert off(found, expected) < 1e-4


@pytest.mark.interpret
def test_rows_anywhere(assert_near: Check):
    """Chunks, transposed grids and expanded gradients; nothing but adjacent channels is asked."""
    weight, bias = parameters(24)
    wide = drawn(3, 5, 48)
    for x in (wide[..., :24], wide[:, ::2, 24:], wide.reshape(3, 24, 10).transpose(1, 2)):
        y = layer_norm_cast(x, weight, bias, 1e-5, torch.float32)
        wanted = F.layer_norm(x, (24,), weight, bias, 1e-5)
        assert_near(y, wanted)
        inputs = (wide, weight, bias)
        for loss in (torch.sum, lambda v: v.mean(1).square().sum()):
            grads = torch.autograd.grad(loss(y), inputs, retain_graph=True)
            expected = torch.autograd.grad(loss(wanted), inputs, retain_graph=True)
            for found, one in zip(grads, expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_no_rows():
    x, (weight, bias) = drawn(0, 4, 24), parameters(24)
    total, y = add_layer_norm_cast(x, x.detach(), weight, bias, 1e-5, torch.bfloat16)
    assert total.shape == y.shape == (0, 4, 24)
    grads = torch.autograd.grad(total.sum() + y.sum(), (x, weight, bias))
    assert grads[0].shape == x.shape
    assert not grads[1].any()
    assert not grads[2].any()


@pytest.mark.interpret
def test_branches_that_broadcast_are_added_by_pytorch(assert_near: Check):
    x, (weight, bias) = drawn(3, 4, 24), parameters(24)
    branch = drawn(3, 1, 24)
    total, y = add_layer_norm_cast(x, branch, weight, bias, 1e-5, torch.float32)
    assert_near(total, x + branch)
    assert_near(y, F.layer_norm(x + branch, (24,), weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_parts(dtype: torch.dtype):
    x, branch = (drawn(2, 5, 7, dtype=dtype, device="cpu") for _ in range(2))
    weight, bias = parameters(7, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = layer_norm_cast(x, weight, bias, 1e-5, torch.bfloat16)
        total, y = add_layer_norm_cast(x, branch, weight, bias, 1e-5, torch.bfloat16)
    assert found.dtype == y.dtype == torch.bfloat16
    assert total.dtype == dtype
    assert off(found, exact(x, None, weight, bias)[1]) <= 6e-3
    assert off(y, exact(total, None, weight, bias)[1]) <= 6e-3


def test_gradients_by_finite_differences():
    x, branch = (drawn(2, 3, 4, dtype=torch.float64, device="cpu") for _ in range(2))
    weight, bias = parameters(4, torch.float64, "cpu")

    def both(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm_cast(x, branch, weight, bias, 1e-3, torch.float64)

    assert torch.autograd.gradcheck(both, (x, branch, weight, bias))


@pytest.mark.filterwarnings("default")
def test_compilers_see_operators():
    """In one graph, and in a trace."""
    torch._dynamo.reset()
    x, branch = (drawn(2, 3, 8, device="cpu") for _ in range(2))
    weight, bias = parameters(8, device="cpu")
    args = (x, branch, weight, bias, 1e-5, torch.bfloat16)
    compiled = torch.compile(add_layer_norm_cast, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*args), add_layer_norm_cast(*args), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)

    def narrow(v: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return layer_norm_cast(v, w, b, 1e-5, torch.float32)

    traced = torch.jit.trace(narrow, tuple(v.detach() for v in (x, weight, bias)))
    assert "aten::layer_norm" in str(traced.graph)  # type: ignore[attr-defined]
