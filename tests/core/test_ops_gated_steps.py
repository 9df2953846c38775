"""Time steps and log decays of heads: one launch each way against PyTorch's operators."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scanweave.core.ops.checks import runs_now
from scanweave.core.ops.gated import head_steps, named, time_steps, time_steps_kernel

pytestmark = pytest.mark.poison
LIMITS = ((0.0, math.inf), (0.05, 0.6))


def _inputs(sets: int, heads: int, device: str, shape: tuple[int, ...] = (2, 37)) -> list[Tensor]:
    """Time steps as columns of a wider matrix, A_log or -A, a bias."""
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(*shape, sets * heads + 5, generator=rng).to(device)
    rates, bias = (torch.randn(heads, generator=rng).to(device) for _ in range(2))
    return [wide[..., 3 : 3 + sets * heads], rates, bias]


def _run(inputs: list[Tensor], has_bias: bool, weights: Tensor, **options: object) -> list[Tensor]:
    """Every output, and every gradient of a weighted sum of them."""
    dt, rates, bias = (v.detach().requires_grad_() for v in inputs)
    outputs = [
        *itertools.chain(*head_steps(dt, rates, bias if has_bias else None, **options))  # pyright: ignore[reportArgumentType]
    ]
    total = sum((w * v).sum() for w, v in zip(weights.to(dt.dtype), outputs, strict=True))
    given = [dt, rates, *([bias] if has_bias else [])]
    assert isinstance(total, Tensor)
    return [*outputs, *torch.autograd.grad(total, given)]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.interpret
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("sets", [1, 2])
def test_steps_and_their_gradients(
    sets: int, limit: tuple[float, float], monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object) -> None:
        raise AssertionError("the steps left their kernels")

    weights = torch.randn(2 * sets, generator=torch.Generator().manual_seed(1)).to(_device())
    for heads, has_bias, softplus, log in ((3, True, True, True), (8, False, False, False)):
        inputs = _inputs(sets, heads, _device())
        options = {"dt_softplus": softplus, "dt_limit": limit, "sets": sets, "log": log}
        expected = _run([v.double() for v in inputs], has_bias, weights, **options)
        with monkeypatch.context() as only:
            only.setattr(named, "_composed_steps", refused)
            found = _run(inputs, has_bias, weights, **options)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=5e-6, atol=1e-5)


@pytest.mark.interpret
def test_sums_of_several_programs_and_blocks(monkeypatch: pytest.MonkeyPatch):
    weights = torch.ones(2, device=_device())
    inputs = _inputs(1, 5, _device(), (3, 131))
    expected = _run([v.double() for v in inputs], True, weights, log=True)
    monkeypatch.setattr(time_steps_kernel, "TILE", 64)
    monkeypatch.setattr(time_steps_kernel, "processors", lambda device: 4)
    found = _run(inputs, True, weights, log=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=5e-6, atol=2e-5)


@pytest.mark.interpret
def test_half_precision_keeps_float32_and_its_gradient():
    dt, rates, bias = _inputs(1, 4, _device())
    half = dt.to(torch.bfloat16).requires_grad_()
    (delta,), (g,) = head_steps(half, rates, bias)
    torch.testing.assert_close(delta, torch.nn.functional.softplus(half.float() + bias))
    assert g.dtype == torch.float32
    (slope,) = torch.autograd.grad(delta.sum(), half)
    assert slope.dtype == torch.bfloat16
    expected = torch.sigmoid(half.detach().float() + bias)
    torch.testing.assert_close(slope.float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.interpret
def test_no_token_has_steps_and_zero_gradients():
    dt, rates, bias = _inputs(1, 4, _device(), (2, 0))
    rates.requires_grad_()
    (delta,), (g,) = head_steps(dt, rates, bias, log=True)
    assert delta.shape == g.shape == (2, 0, 4)
    assert torch.autograd.grad(g.sum(), rates)[0].count_nonzero() == 0


def test_sets_are_steps_of_each():
    dt, rates, bias = _inputs(2, 4, "cpu")
    steps, decays = head_steps(dt, rates, bias, sets=2, log=True)
    for r in range(2):
        delta, g = time_steps(dt[..., 4 * r : 4 * r + 4], -rates.exp(), bias)
        torch.testing.assert_close(steps[r], delta)
        torch.testing.assert_close(decays[r], g)


def test_rates_may_be_of_every_token():
    dt, rates, bias = _inputs(1, 4, "cpu")
    delta, g = time_steps(dt, rates.expand(37, 4), bias)
    torch.testing.assert_close(g, delta * rates)


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_who_watches_operators_sees_them():
    x = torch.zeros(2)
    assert runs_now(x)
    assert runs_now(torch.nn.Parameter(x))
    assert not runs_now(x.to("meta"))
    with _Watching():
        assert not runs_now(x)
    with torch.profiler.profile():
        assert not runs_now(x)
    seen = []
    torch.jit.trace(lambda v: seen.append(runs_now(v)) or v + 1, x, check_trace=False)
    assert seen
    assert not any(seen)
