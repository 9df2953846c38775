"""Norms that add a branch and round compute what sum, norm and cast in sequence do."""

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scanweave.core.ops.norm import cast_kernels
from scanweave.core.ops.norm.cast import add_rms_norm_cast, rms_norm_cast, runs_kernels
from scanweave.core.ops.norm.layer import add_layer_norm_cast, layer_norm_cast

Check = Callable[..., None]
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class Norm(NamedTuple):
    """Both public functions of a norm, PyTorch's, and what parameters it has."""

    cast: Callable[..., Tensor]
    add: Callable[..., tuple[Tensor, Tensor]]
    of_pytorch: Callable[..., Tensor]
    count: int
    # of a single channel the gradient is 0, times the scale of a value near 0: 300 and more
    single: float

    def parameters(
        self, dim: int, dtype: torch.dtype = torch.float32, device: str = DEVICE
    ) -> list[Tensor]:
        return [drawn(dim, dtype=dtype, device=device) for _ in range(self.count)]

    def exact(
        self, x: Tensor, branch: Tensor | None, parameters: list[Tensor], eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]:
        total = x.double() if branch is None else x.double() + branch.double()
        wide = (v.double() for v in parameters)
        return total, self.of_pytorch(total, x.shape[-1:], *wide, eps)


NORMS = {
    "rms_norm": Norm(rms_norm_cast, add_rms_norm_cast, F.rms_norm, 1, 1e-3),
    "layer_norm": Norm(layer_norm_cast, add_layer_norm_cast, F.layer_norm, 2, 1e-4),
}


# one row, odd widths, several rows a program and several tiles, a power of two, wide rows
SHAPES = {
    "rms_norm": [(1, 1, 8), (2, 5, 33), (3, 70, 130), (5, 1), (40, 64), (3, 768)],
    "layer_norm": [(1, 48), (2, 5, 33), (3, 7, 10, 96), (5, 1), (40, 64), (3, 768)],
}
CASES = [
    pytest.param(NORMS[name], shape, id=f"{name}-{shape}")
    for name, shapes in SHAPES.items()
    for shape in shapes
]


@pytest.fixture(params=NORMS)
def norm(request: pytest.FixtureRequest) -> Norm:
    return NORMS[request.param]


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device).requires_grad_()


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
@pytest.mark.parametrize(("norm", "shape"), CASES)
def test_norm(norm: Norm, shape: tuple[int, ...], assert_near: Check):
    x, parameters = drawn(*shape), norm.parameters(shape[-1])
    y = norm.cast(x, *parameters, 1e-5, torch.float32)
    assert "AddNormCast" in type(y.grad_fn).__name__
    wanted = norm.of_pytorch(x, shape[-1:], *parameters, 1e-5)
    assert_near(y, wanted)
    g, inputs = torch.randn_like(y), (x, *parameters)
    expected = torch.autograd.grad(wanted, inputs, g)
    for found, one in zip(torch.autograd.grad(y, inputs, g), expected, strict=True):
        atol = norm.single if shape[-1] == 1 else 1e-5
        torch.testing.assert_close(found, one, rtol=1e-4, atol=atol)
    with torch.no_grad():
        torch.testing.assert_close(norm.cast(x, *parameters, 1e-5, x.dtype), y)
    half = norm.cast(x, *parameters, 1e-5, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert off(half, wanted) <= 6e-3
    (dx,) = torch.autograd.grad(half.float().sum(), x)
    assert dx.dtype == torch.float32


@pytest.mark.interpret
@pytest.mark.poison
@pytest.mark.parametrize(("norm", "shape"), CASES)
@pytest.mark.parametrize("reads", ["both", "total", "norm"])
def test_sum_and_norm(norm: Norm, shape: tuple[int, ...], reads: str):
    """Gradients of the stream and the branch, each in its own dtype."""
    x, branch = drawn(*shape), drawn(*shape, dtype=torch.bfloat16)
    parameters = norm.parameters(shape[-1])
    total, y = norm.add(x, branch, *parameters, 1e-5, torch.bfloat16)
    assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    sums, normed = norm.exact(x, branch, parameters)
    assert off(total, sums) < 1e-6
    assert off(y, normed) < 6e-3
    inputs = (x, branch, *parameters) if reads != "total" else (x, branch)
    g, h = torch.randn_like(total), torch.randn_like(y)
    found, wanted = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
    if reads != "norm":
        found, wanted = found + (total * g).sum(), wanted + (sums * g).sum()
    if reads != "total":
        found, wanted = found + (y.float() * h.float()).sum(), wanted + (normed * h.double()).sum()
    grads = torch.autograd.grad(found, inputs)
    expected = torch.autograd.grad(wanted, inputs)
    for actual, one, of in zip(grads, expected, inputs, strict=True):
        assert actual.dtype == of.dtype
        # of a single channel what remains of the norm's gradient is rounding
        if shape[-1] > 1:
            assert off(actual, one) < (6e-3 if of.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.interpret
def test_half_streams(norm: Norm):
    """A stream of 16 bits is rounded before it is normalised, as PyTorch's sum is."""
    x, branch = (drawn(6, 40, dtype=torch.bfloat16) for _ in range(2))
    parameters = norm.parameters(40, torch.bfloat16)
    total, y = norm.add(x, branch, *parameters, 1e-5, torch.bfloat16)
    assert total.dtype == y.dtype == torch.bfloat16
    assert off(total, x.double() + branch.double()) < 6e-3
    assert off(y, norm.exact(total, None, parameters)[1]) < 6e-3
    grads = torch.autograd.grad((total * y).float().sum(), (x, branch, *parameters))
    torch.testing.assert_close(grads[0], grads[1])
    assert all(g.dtype == torch.bfloat16 for g in grads)


@pytest.mark.interpret
def test_gradients_of_leaves_share_no_memory(norm: Norm):
    x, branch, parameters = drawn(4, 48), drawn(4, 48), norm.parameters(48)
    total, y = norm.add(x, branch, *parameters, 1e-5, torch.float32)
    torch.autograd.backward([total, y], [torch.randn_like(total), torch.randn_like(y)])
    assert x.grad is not None
    assert branch.grad is not None
    assert torch.equal(x.grad, branch.grad)
    assert x.grad.data_ptr() != branch.grad.data_ptr()


@pytest.mark.interpret
@torch.no_grad()
def test_a_profiler_sees_an_operator(norm: Norm):
    x, parameters = drawn(4, 48), norm.parameters(48)
    with torch.profiler.profile(acc_events=True) as profiler:
        norm.cast(x, *parameters, 1e-5, torch.float32)
    assert "_AddNormCast" in {event.name for event in profiler.events() or []}


# the interpreter's numpy warns where a GPU does not
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
@pytest.mark.interpret
def test_weights_see_no_row_that_is_not_there(norm: Norm):
    """With eps = 0, the scale of an absent row is infinite; 7 rows fill no tile."""
    x, parameters = drawn(7, 33), norm.parameters(33)
    y = norm.cast(x, *parameters, 0.0, torch.float32)
    wanted = norm.exact(x, None, parameters, 0.0)[1]
    g, inputs = torch.randn_like(y), (x, parameters[0])
    found = torch.autograd.grad(y, inputs, g)
    for actual, one in zip(found, torch.autograd.grad(wanted, inputs, g.double()), strict=True):
        assert off(actual, one) < 1e-5


@pytest.mark.interpret
def test_large_mean():
    """A variance of 1 beside a mean of 1000: differences of squares would have no digit left."""
    norm = NORMS["layer_norm"]
    x, parameters = drawn(9, 96), norm.parameters(96)
    far = (x.detach() + 1000).requires_grad_()
    y = norm.cast(far, *parameters, 1e-5, torch.float32)
    wanted = norm.exact(far, None, parameters)[1]
    assert off(y, wanted) < 1e-4
    g = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, far, g)
    (expected,) = torch.autograd.grad(wanted, far, g.double())
    assert off(found, expected) < 1e-4


@pytest.mark.interpret
def test_rows_anywhere(norm: Norm, assert_near: Check):
    """Chunks, transposed grids and expanded gradients; nothing but adjacent channels is asked."""
    parameters, wide = norm.parameters(24), drawn(3, 5, 48)
    inputs = (wide, *parameters)
    for x in (wide[..., :24], wide[:, ::2, 24:], wide.reshape(3, 24, 10).transpose(1, 2)):
        y = norm.cast(x, *parameters, 1e-5, torch.float32)
        wanted = norm.of_pytorch(x, (24,), *parameters, 1e-5)
        assert_near(y, wanted)
        for loss in (torch.sum, lambda v: v.mean(1).square().sum()):
            grads = torch.autograd.grad(loss(y), inputs, retain_graph=True)
            expected = torch.autograd.grad(loss(wanted), inputs, retain_graph=True)
            for found, one in zip(grads, expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_no_rows(norm: Norm):
    x, parameters = drawn(0, 4, 24), norm.parameters(24)
    total, y = norm.add(x, x.detach(), *parameters, 1e-5, torch.bfloat16)
    assert total.shape == y.shape == (0, 4, 24)
    grads = torch.autograd.grad(total.sum() + y.sum(), (x, *parameters))
    assert grads[0].shape == x.shape
    assert not any(g.any() for g in grads[1:])


@pytest.mark.interpret
def test_branches_that_broadcast_are_added_by_pytorch(norm: Norm, assert_near: Check):
    x, parameters, branch = drawn(3, 4, 24), norm.parameters(24), drawn(3, 1, 24)
    total, y = norm.add(x, branch, *parameters, 1e-5, torch.float32)
    assert_near(total, x + branch)
    assert_near(y, norm.of_pytorch(x + branch, (24,), *parameters, 1e-5))


@pytest.mark.interpret
def test_what_has_no_values_is_not_launched(norm: Norm):
    """Tensors of the meta device, tracers' stand-ins, and rows that no program holds."""
    x, parameters = drawn(2, 8), norm.parameters(8)
    assert runs_kernels(x, *parameters)
    meta = x.to("meta")
    assert not runs_kernels(meta)
    given = (meta, meta, *(v.to("meta") for v in parameters))
    assert all(v.is_meta for v in norm.add(*given, 1e-5, torch.bfloat16))
    stand_in = torch.fx.Proxy(torch.fx.Graph().placeholder("x"))
    assert not runs_kernels(stand_in)  # type: ignore[arg-type]
    assert not runs_kernels(x.double(), *parameters)
    assert not runs_kernels(x.new_zeros(1, 8193))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_parts(norm: Norm, dtype: torch.dtype):
    x, branch = (drawn(2, 5, 7, dtype=dtype, device="cpu") for _ in range(2))
    parameters = norm.parameters(7, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        found = norm.cast(x, *parameters, 1e-5, torch.bfloat16)
        total, y = norm.add(x, branch, *parameters, 1e-5, torch.bfloat16)
    assert found.dtype == y.dtype == torch.bfloat16
    assert total.dtype == dtype
    # rounded, or under the interpreter cut off
    assert off(found, norm.exact(x, None, parameters)[1]) <= 6e-3
    assert off(y, norm.exact(total, None, parameters)[1]) <= 6e-3


def test_gradients_by_finite_differences(norm: Norm):
    x, branch = (drawn(2, 3, 4, dtype=torch.float64, device="cpu") for _ in range(2))
    parameters = norm.parameters(4, torch.float64, "cpu")

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return norm.add(*tensors, 1e-3, torch.float64)

    assert torch.autograd.gradcheck(both, (x, branch, *parameters))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NORMS)
def test_compilers_see_operators(name: str):
    """In one graph, and in a trace."""
    norm = NORMS[name]
    torch._dynamo.reset()
    x, branch = (drawn(2, 3, 8, device="cpu") for _ in range(2))
    parameters = norm.parameters(8, device="cpu")
    args = (x, branch, *parameters, 1e-5, torch.bfloat16)
    compiled = torch.compile(norm.add, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*args), norm.add(*args), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)

    def narrow(*tensors: Tensor) -> Tensor:
        return norm.cast(*tensors, 1e-5, torch.float32)

    traced = torch.jit.trace(narrow, tuple(v.detach() for v in (x, *parameters)))
    assert f"aten::{name}" in str(traced.graph)  # type: ignore[attr-defined]
