"""Parameters of a Mamba block rounded in one launch: the same values and gradients as in parts."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from scanweave.core import create_mixer
from scanweave.core.mixers import mamba
from scanweave.core.ops.mamba import weights as code
from scanweave.core.ops.mamba.weights import Weights, fits, prepared

Check = Callable[..., None]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parameters(directions: int = 2, large: bool = False, **options: Any) -> Weights:
    # more than a tile, and less
    dim, inner, state, rank = (48, 70, 20, 5) if large else (3, 7, 2, 1)

    def made(*shape: int) -> Tensor:
        v = torch.randn(*shape, **{"device": device(), **options})
        return v.requires_grad_()

    def each(*shape: int) -> list[Tensor]:
        return [made(*shape) for _ in range(directions)]

    shapes = each(rank + 2 * state, inner), each(inner, rank)
    return Weights(made(2 * inner, dim), *shapes, made(dim, inner), each(inner, state))


def flat(weights: Weights) -> list[Tensor]:
    return code._flat(weights, True)


def in_parts(weights: Weights, scale: float, dtype: torch.dtype | None) -> Weights:
    rates = [-v.exp() for v in weights.A]
    if dtype is None:
        return weights._replace(outer=scale * weights.outer, A=rates)
    return Weights(
        weights.inner.to(dtype),
        [v.to(dtype) for v in weights.x],
        [v.to(dtype) for v in weights.dt],
        (scale * weights.outer).to(dtype),
        rates,
    )


@pytest.mark.interpret
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, None])
def test_kernel(
    directions: int, large: bool, dtype: torch.dtype | None, assert_near: Check
) -> None:
    weights = parameters(directions, large)
    assert fits(weights, dtype)
    inputs = flat(weights)
    found = flat(prepared(weights, 0.5, dtype))
    wanted = flat(in_parts(weights, 0.5, dtype))
    assert [v.dtype for v in found] == [v.dtype for v in wanted]
    grads = [torch.randn_like(v) for v in wanted]
    with torch.no_grad():
        alone = flat(prepared(weights, 0.5, dtype))
    for one, actual, expected in zip(alone, found, wanted, strict=True):
        assert torch.equal(one, actual)
        # float16 is rounded to nearest everywhere; rates differ by their exponential
        assert_near(actual.float(), expected.float())
    found_grads = torch.autograd.grad(found, inputs, grads)
    for actual, expected in zip(
        found_grads, torch.autograd.grad(wanted, inputs, grads), strict=True
    ):
        assert actual.dtype == torch.float32
        assert_near(actual, expected)


@pytest.mark.interpret
def test_frozen_weights() -> None:
    weights = parameters()
    weights.inner.requires_grad_(False)
    weights.A[1].requires_grad_(False)
    found = prepared(weights, 1.0, torch.bfloat16)
    sum(v.float().sum() for v in flat(found)).backward()  # type: ignore[union-attr]
    assert weights.inner.grad is None
    assert weights.A[1].grad is None
    assert torch.equal(weights.outer.grad, torch.ones_like(weights.outer))  # type: ignore[arg-type]
    torch.testing.assert_close(weights.A[0].grad, -weights.A[0].exp())


@pytest.mark.interpret
def test_model_of_16_bits() -> None:
    """Only `outer` and the rates change, the latter kept in float32."""
    weights = parameters(dtype=torch.bfloat16)
    weights = weights._replace(A=parameters().A)
    found = prepared(weights, 0.5, None)
    assert found.inner is weights.inner
    assert torch.equal(found.outer, 0.5 * weights.outer)
    assert found.A[1].dtype == torch.float32
    (found.outer.sum() + found.A[0].sum()).backward()
    grad = weights.outer.grad
    assert grad is not None
    assert torch.equal(grad, torch.full_like(weights.outer, 0.5))


@pytest.mark.interpret
def test_what_is_left_to_pytorch() -> None:
    weights = parameters()
    assert not fits(weights, torch.float32)
    assert not fits(parameters(dtype=torch.float64), None)
    assert not fits(parameters(dtype=torch.bfloat16), torch.bfloat16)
    assert not fits(parameters(directions=3), torch.bfloat16)
    assert not fits(parameters(dtype=torch.bfloat16), None)
    turned = torch.randn(3, 14, device=device()).t()
    assert not fits(weights._replace(inner=turned), torch.bfloat16)
    compiled = torch.compile(lambda: fits(weights, torch.bfloat16), backend="eager")
    assert not compiled()


def test_not_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not fits(parameters(device="cpu"), torch.bfloat16)


@pytest.mark.interpret
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_block_uses_it(average: bool, half: bool) -> None:
    """One launch forward, one backward, and the numbers of PyTorch's operators."""
    mixer = create_mixer("bimamba", 16, d_state=3, average=average).to(device())
    x = torch.randn(2, 9, 16, device=device(), requires_grad=True)

    def run() -> list[Tensor]:
        with torch.autocast(device(), torch.bfloat16, enabled=half):
            y = mixer(x)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *mixer.parameters()])
        return [y.detach().float(), *grads]

    with mock.patch.object(mamba, "fits", return_value=False):
        wanted = run()
    with mock.patch.object(code, "_launch", wraps=code._launch) as launched:
        found = run()
    assert launched.call_count == 2
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        # the interpreter cuts bfloat16 off instead of rounding
        assert (actual - expected).norm() <= 5e-2 * expected.norm()
