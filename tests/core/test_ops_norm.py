"""Gated RMS norm: against its definition, on every path, and under torch's machinery."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import Inputs, assert_all_near, compare, each, evaluate, widened
from torch import Tensor

from scanweave.core import rms_norm_gated
from scanweave.core.ops.norm import kernels, rms_norm_gated_ref
from scanweave.core.ops.norm import op as norm_op

pytestmark = pytest.mark.poison
Check = Callable[..., None]
NORM_FIRST = pytest.mark.parametrize("norm_before_gate", [False, True])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def norm_inputs(
    *shape: int,
    gate: bool = True,
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    device: str = "cpu",
) -> Inputs:
    rng = torch.Generator().manual_seed(0)
    names = ("x", "weight", "z") if gate else ("x", "weight")
    drawn = {
        name: torch.randn(
            *((shape[-1],) if name == "weight" else shape), generator=rng, dtype=torch.float64
        )
        for name in names
    }
    return {
        name: v.to(device, (weights or dtype) if name == "weight" else dtype).requires_grad_()
        for name, v in drawn.items()
    }


@NORM_FIRST
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((3, 5, 12), 4), ((7, 6), None), ((2, 1, 3, 4), 2)])
def test_equals_the_definition(
    assert_near: Check, shape: tuple[int, ...], size: int | None, gate: bool, norm_before_gate: bool
):
    options: dict[str, Any] = {"group_size": size, "norm_before_gate": norm_before_gate}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = norm_inputs(*shape, gate=gate, dtype=dtype)
        compare(assert_near, rms_norm_gated, rms_norm_gated_ref, inputs, **options)
    # a chunk of a projection is read where it is
    inputs = each(norm_inputs(*shape, gate=gate), widened)
    compare(assert_near, rms_norm_gated, rms_norm_gated_ref, inputs, eps=0.1, **options)


def test_official_formulas(assert_near: Check):
    x, z, weight = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6)
    silu = torch.nn.functional.silu(z)
    both = torch.nn.functional.rms_norm(x, (6,), weight, 1e-5) * silu
    assert_near(rms_norm_gated(x, weight, z, norm_before_gate=True), both)
    halves = (x * silu).unflatten(-1, (2, 3))
    halves = torch.nn.functional.rms_norm(halves, (3,), None, 1e-5).flatten(-2) * weight
    assert_near(rms_norm_gated(x, weight, z, group_size=3), halves)


@NORM_FIRST
def test_gradients_by_finite_differences(norm_before_gate: bool):
    inputs = norm_inputs(2, 3, 4)

    def f(x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
        return rms_norm_gated(x, weight, z, group_size=2, norm_before_gate=norm_before_gate)

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))


@pytest.mark.interpret
@NORM_FIRST
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((1, 2), 2), ((3, 30), 5), ((20, 40), 40)])
def test_kernels(
    assert_near: Check,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    size: int,
    gate: bool,
    norm_before_gate: bool,
):
    def refused(*_: object) -> None:
        raise AssertionError("the op left the Triton kernels")

    monkeypatch.setattr(norm_op, "computing_dtype", refused)
    # several tiles a program
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    options: dict[str, Any] = {"group_size": size, "norm_before_gate": norm_before_gate}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        device = "cpu" if INTERPRETED else "cuda"
        inputs = norm_inputs(*shape, gate=gate, dtype=dtype, weights=torch.float32, device=device)
        compare(assert_near, rms_norm_gated, rms_norm_gated_ref, inputs, **options)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_registered(assert_near: Check):
    op = torch.ops.scanweave.rms_norm_gated.default
    for gate in (False, True):
        x, weight, *z = (v.detach() for v in norm_inputs(2, 3, 8, gate=gate).values())
        args = (x, weight, z[0] if gate else None, 1e-5, 4, True)
        torch.library.opcheck(op, args)
        torch.library.opcheck(op, (x.clone().requires_grad_(), *args[1:]))
        backward = torch.ops.scanweave.rms_norm_gated_backward.default
        torch.library.opcheck(backward, (torch.randn_like(x), *args))
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm_gated, fullgraph=True, backend="aot_eager")
    inputs = norm_inputs(2, 3, 8)
    assert_all_near(assert_near, evaluate(compiled, inputs), evaluate(rms_norm_gated, inputs))


def test_empty():
    inputs = norm_inputs(0, 5)
    values = evaluate(rms_norm_gated, inputs)
    assert values["output 0"].shape == (0, 5)
    assert not values["gradient of weight"].any()


def test_errors():
    x, w = torch.randn(2, 6), torch.ones(6)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., D\), got list"):
        rms_norm_gated([1.0], w)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x must be floating point"):
        rms_norm_gated(x.int(), w)
    with pytest.raises(ValueError, match=r"weight must be \(D,\) = \(6,\)"):
        rms_norm_gated(x, w[:5])
    with pytest.raises(ValueError, match=r"z must be \(\.\.\., D\)"):
        rms_norm_gated(x, w, x[:1])
    for size in (0, 4):
        with pytest.raises(ValueError, match=f"group_size must divide the 6 channels, got {size}"):
            rms_norm_gated(x, w, group_size=size)
