"""The RMS norm that adds a branch and rounds computes what sum, norm and cast in sequence do."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scanweave.core.ops.norm import cast_kernels
from scanweave.core.ops.norm.cast import add_rms_norm_cast, rms_norm_cast, runs_kernels
from scanweave.core.ops.norm.layer import layer_norm_cast

Check = Callable[..., None]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# one row, odd widths, several rows a program and several tiles, a power of two, wide rows
SHAPES = [(1, 1, 8), (2, 5, 33), (3, 70, 130), (5, 1), (40, 64), (3, 768)]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


def exact(x: Tensor, branch: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x.double() if branch is None else x.double() + branch.double()
    return total, F.rms_norm(total, x.shape[-1:], weight.double(), 1e-5)


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
    x, weight = drawn(*shape), drawn(shape[-1])
    y = rms_norm_cast(x, weight, 1e-5, torch.float32)
    assert "AddNormCast" in type(y.grad_fn).__name__
    wanted = F.rms_norm(x, shape[-1:], weight, 1e-5)
    assert_near(y, wanted)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), g)
    for actual, expected in zip(found, torch.autograd.grad(wanted, (x, weight), g), strict=True):
        # of a single channel the gradient is 0, times the scale of a value near 0
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-3 if shape[-1] == 1 else 1e-5
        )
    with torch.no_grad():
        torch.testing.assert_close(rms_norm_cast(x, weight, 1e-5, x.dtype), y)
    half = rms_norm_cast(x, weight, 1e-5, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert off(half, wanted) <= 6e-3
    (dx,) = torch.autograd.grad(half.float().sum(), x)
    assert dx.dtype == torch.float32


@pytest.mark.interpret
@pytest.mark.poison
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reads", ["both", "total", "norm"])
def test_sum_and_norm(shape: tuple[int, ...], reads: str):
    """Gradients of the stream and the branch, each in its own dtype."""
    x, branch, weight = drawn(*shape), drawn(*shape, dtype=torch.bfloat16), drawn(shape[-1])
    total, y = add_rms_norm_cast(x, branch, weight, 1e-5, torch.bfloat16)
    assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    sums, norm = exact(x, branch, weight)
    assert off(total, sums) < 1e-6
    assert off(y, norm) < 6e-3
    inputs = (x, branch, weight) if reads != "total" else (x, branch)
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
    weight = drawn(40, dtype=torch.bfloat16)
    total, y = add_rms_norm_cast(x, branch, weight, 1e-5, torch.bfloat16)
    assert total.dtype == y.dtype == torch.bfloat16
    assert off(total, x.double() + branch.double()) < 6e-3
    assert off(y, exact(total, None, weight)[1]) < 6e-3
    grads = torch.autograd.grad((total * y).float().sum(), (x, branch, weight))
    torch.testing.assert_close(grads[0], grads[1])
    assert all(g.dtype == torch.bfloat16 for g in grads)


@pytest.mark.interpret
def test_gradients_of_leaves_share_no_memory():
    x, branch, weight = drawn(4, 48), drawn(4, 48), drawn(48)
    total, y = add_rms_norm_cast(x, branch, weight, 1e-5, torch.float32)
    torch.autograd.backward([total, y], [torch.randn_like(total), torch.randn_like(y)])
    assert x.grad is not None
    assert branch.grad is not None
    assert torch.equal(x.grad, branch.grad)
    assert x.grad.data_ptr() != branch.grad.data_ptr()


@pytest.mark.interpret
@torch.no_grad()
def test_a_profiler_sees_an_operator():
    x, weight = drawn(4, 48), drawn(48)
    with torch.profiler.profile(acc_events=True) as profiler:
        rms_norm_cast(x, weight, 1e-5, torch.float32)
    assert "_AddNormCast" in {event.name for event in profiler.events() or []}


# the interpreter's numpy warns where a GPU does not
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
@pytest.mark.interpret
@pytest.mark.parametrize("has_bias", [False, True])
def test_weights_see_no_row_that_is_not_there(has_bias: bool):
    """With eps = 0, the scale of an absent row is infinite; 7 rows fill no tile."""
    x, weight = drawn(7, 33), drawn(33)
    bias = drawn(33) if has_bias else None
    if bias is None:
        y = rms_norm_cast(x, weight, 0.0, torch.float32)
        wanted = F.rms_norm(x.double(), (33,), weight.double(), 0.0)
    else:
        y = layer_norm_cast(x, weight, bias, 0.0, torch.float32)
        wanted = F.layer_norm(x.double(), (33,), weight.double(), bias.double(), 0.0)
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), g)
    for actual, one in zip(
        found, torch.autograd.grad(wanted, (x, weight), g.double()), strict=True
    ):
        assert off(actual, one) < 1e-5


@pytest.mark.interpret
def test_rows_anywhere(assert_near: Check):
    """Chunks, transposed grids and expanded gradients; nothing but adjacent channels is asked."""
    weight, wide = drawn(24), drawn(3, 5, 48)
    for x in (wide[..., :24], wide[:, ::2, 24:], wide.reshape(3, 24, 10).transpose(1, 2)):
        y = rms_norm_cast(x, weight, 1e-5, torch.float32)
        wanted = F.rms_norm(x, (24,), weight, 1e-5)
        assert_near(y, wanted)
        for loss in (torch.sum, lambda v: v.mean(1).square().sum()):
            grads = torch.autograd.grad(loss(y), (wide, weight), retain_graph=True)
            expected = torch.autograd.grad(loss(wanted), (wide, weight), retain_graph=True)
            for found, one in zip(grads, expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_no_rows():
    x, weight = drawn(0, 4, 24), drawn(24)
    total, y = add_rms_norm_cast(x, x.detach(), weight, 1e-5, torch.bfloat16)
    assert total.shape == y.shape == (0, 4, 24)
    grads = torch.autograd.grad(total.sum() + y.sum(), (x, weight))
    assert grads[0].shape == x.shape
    assert not grads[1].any()


@pytest.mark.interpret
def test_branches_that_broadcast_are_added_by_pytorch(assert_near: Check):
    x, weight, branch = drawn(3, 4, 24), drawn(24), drawn(3, 1, 24)
    total, y = add_rms_norm_cast(x, branch, weight, 1e-5, torch.float32)
    assert_near(total, x + branch)
    assert_near(y, F.rms_norm(x + branch, (24,), weight, 1e-5))


@pytest.mark.interpret
def test_what_has_no_values_is_not_launched():
    """Tensors of the meta device, tracers' stand-ins, and rows that no program holds."""
    x, weight = drawn(2, 8), drawn(8)
    assert runs_kernels(x, weight)
    meta = (x.to("meta"), x.to("meta"), weight.to("meta"))
    assert not runs_kernels(meta[0])
    assert all(v.is_meta for v in add_rms_norm_cast(*meta, 1e-5, torch.bfloat16))
    stand_in = torch.fx.Proxy(torch.fx.Graph().placeholder("x"))
    assert not runs_kernels(stand_in)  # type: ignore[arg-type]
    assert not runs_kernels(x.double(), weight)
    assert not runs_kernels(x.new_zeros(1, 8193))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_parts(dtype: torch.dtype):
    x, branch = (drawn(2, 5, 7, dtype=dtype, device="cpu") for _ in range(2))
    weight = drawn(7, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = rms_norm_cast(x, weight, 1e-5, torch.bfloat16)
        total, y = add_rms_norm_cast(x, branch, weight, 1e-5, torch.bfloat16)
    assert found.dtype == y.dtype == torch.bfloat16
    assert total.dtype == dtype
    # rounded, or under the interpreter cut off
    assert off(found, exact(x, None, weight)[1]) <= 6e-3
    assert off(y, exact(total, None, weight)[1]) <= 6e-3


def test_gradients_by_finite_differences():
    x, branch = (drawn(2, 3, 4, dtype=torch.float64, device="cpu") for _ in range(2))
    weight = drawn(4, dtype=torch.float64, device="cpu")

    def both(x: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm_cast(x, branch, weight, 1e-3, torch.float64)

    assert torch.autograd.gradcheck(both, (x, branch, weight))


@pytest.mark.filterwarnings("default")
def test_compilers_see_operators():
    """In one graph, and in a trace."""
    torch._dynamo.reset()
    x, branch = (drawn(2, 3, 8, device="cpu") for _ in range(2))
    args = (x, branch, drawn(8, device="cpu"), 1e-5, torch.bfloat16)
    compiled = torch.compile(add_rms_norm_cast, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*args), add_rms_norm_cast(*args), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)

    def narrow(v: Tensor, w: Tensor) -> Tensor:
        return rms_norm_cast(v, w, 1e-5, torch.float32)

    traced = torch.jit.trace(narrow, (x.detach(), args[2].detach()))
    assert "aten::rms_norm" in str(traced.graph)  # type: ignore[attr-defined]
