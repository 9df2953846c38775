"""The matrix-state scan on a GPU at sizes of real models, against float64 there.

Several seeds each, and widths below those of models: kernels with chained matrix products have
been wrong on single architectures for single shapes.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import gated_inputs, gated_pairs
from tests.core.op_cases import assert_all_near, assert_equal, each, evaluate, pack
from torch import Tensor

from scanweave.core import (
    bidirectional_gated_linear_scan,
    gated_linear_scan,
    rms_norm_gated,
)

pytestmark = [pytest.mark.gpu, pytest.mark.poison, pytest.mark.timeout(600)]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
# of one test, so that it compiles its kernels once
SEEDS = range(4)
LENGTHS = (0, 1, 64, 65, 200, 63, 0, 7, 300, 128)


def check(
    assert_near: Check, op: Callable[..., Any], inputs: dict[str, Any], tag: object, **options: Any
) -> None:
    """Outputs and gradients against the same op on float64 inputs; `tag` tells which failed."""
    actual = evaluate(op, inputs, **options)
    dtypes = [v.dtype for name, v in actual.items() if name.startswith("output")]
    exact = evaluate(op, each(inputs, Tensor.double), rounded_to=dtypes, **options)
    assert all(v.dtype == torch.float64 for v in exact.values())
    # products of 16-bit operands: their float32 results are no better than those
    half = {v.dtype for v in inputs.values() if isinstance(v, Tensor)} - {torch.float32}
    for name, v in actual.items():
        gradient = name.startswith("gradient")
        dtype = next(iter(half)) if half else v.dtype
        assert_near(v, exact[name], dtype=dtype, gradient=gradient, name=f"{name} ({tag})")


def drawn(dtype: torch.dtype, seed: int, **options: Any) -> dict[str, Any]:
    return {"dtype": dtype, "weights": torch.float32, "device": "cuda", "seed": seed, **options}


@DTYPES
@pytest.mark.parametrize(
    ("shape", "groups", "kind", "reverse", "exclusive"),
    [
        ((2, 300, 8, 128, 64), 1, "tokens", False, False),
        ((3, 197, 6, 64, 32), 2, "tokens", True, False),
        ((2, 60, 8, 32, 64), 1, "tokens", False, True),
        ((1, 130, 2, 256, 16), 2, "heads", True, True),
        ((1, 129, 2, 16, 256), 1, "none", False, False),
        ((2, 191, 3, 80, 48), 3, "tokens", False, True),
    ],
    ids=str,
)
def test_one_direction(
    assert_near: Check,
    shape: tuple,
    groups: int,
    kind: str,
    reverse: bool,
    exclusive: bool,
    dtype: torch.dtype,
):
    options = {"reverse": reverse, "exclusive": exclusive, **ALL}
    for seed in SEEDS:
        inputs = gated_inputs(*shape, groups=groups, kind=kind, decay=0.05, **drawn(dtype, seed))
        check(assert_near, gated_linear_scan, inputs, f"seed {seed}", **options)


@DTYPES
@pytest.mark.parametrize(
    ("form", "length"),
    [
        ("add", 64),
        ("add", 700),
        ("exclusive", 700),
        ("quasi_separable", 49),
        ("quasi_separable", 197),
        ("quasi_separable", 512),
        ("quasi_separable", 700),
    ],
)
def test_both_directions(assert_near: Check, form: str, length: int, dtype: torch.dtype):
    without = ("initial_state",) if form == "quasi_separable" else ()
    options: dict[str, Any] = {"form": form, **({} if without else ALL)}
    for seed in SEEDS:
        inputs = gated_pairs(
            2, length, 6, 64, 64, groups=1, decay=0.05, without=without, **drawn(dtype, seed)
        )
        check(assert_near, bidirectional_gated_linear_scan, inputs, f"seed {seed}", **options)


@DTYPES
@pytest.mark.parametrize("form", ["one", "add", "quasi_separable"])
def test_packed(assert_near: Check, form: str, dtype: torch.dtype):
    shape, cu = (1, sum(LENGTHS), 4, 64, 32), pack(LENGTHS, "cuda")
    without = ("initial_state",) if form == "quasi_separable" else ()
    options: dict[str, Any] = {"cu_seqlens": cu, **({} if without else ALL)}
    for seed in SEEDS[:2]:
        sizes = drawn(dtype, seed, sequences=len(LENGTHS), groups=2, decay=0.05)
        if form == "one":
            inputs = gated_inputs(*shape, **sizes)
            check(assert_near, gated_linear_scan, inputs, f"seed {seed}", **options)
        else:
            inputs = gated_pairs(*shape, without=without, **sizes)
            op = bidirectional_gated_linear_scan
            check(assert_near, op, inputs, f"seed {seed}", form=form, **options)


def test_size_of_mamba2(assert_near: Check):
    for seed in SEEDS:
        sizes = drawn(torch.bfloat16, seed, groups=1, decay=0.02)
        inputs = gated_inputs(1, 2048, 32, 128, 64, **sizes)
        check(assert_near, gated_linear_scan, inputs, f"seed {seed}", **ALL)


def test_size_of_hydra(assert_near: Check):
    for seed in SEEDS:
        sizes = drawn(torch.bfloat16, seed, groups=1, decay=0.02, without=("initial_state",))
        inputs = gated_pairs(16, 197, 24, 64, 64, **sizes)
        op = bidirectional_gated_linear_scan
        check(assert_near, op, inputs, f"seed {seed}", form="quasi_separable")


@DTYPES
def test_extreme_decays(assert_near: Check, dtype: torch.dtype):
    for decay in (0.0, 1e-6, 10.0, 1e4):
        inputs = gated_inputs(1, 1000, 4, 32, 32, **drawn(dtype, 0))
        inputs["g"] = (decay * (inputs["g"].detach() - 0.5)).requires_grad_()
        check(assert_near, gated_linear_scan, inputs, f"decay {decay}", **ALL)


def test_runs_repeat_bit_by_bit():
    inputs = gated_pairs(1, sum(LENGTHS), 8, 64, 64, groups=1, without=("initial_state",))
    inputs = each(inputs, lambda v: v.cuda().bfloat16())
    options = {"cu_seqlens": pack(LENGTHS, "cuda"), "form": "quasi_separable"}
    first = evaluate(bidirectional_gated_linear_scan, inputs, **options)
    for _ in range(5):
        assert_equal(evaluate(bidirectional_gated_linear_scan, inputs, **options), first)


def test_bad_values_stay_in_their_sequence():
    inputs = gated_inputs(1, 300, 4, 32, 32, sequences=3, **drawn(torch.float32, 0))
    cu = pack((100, 100, 100), "cuda")
    clean = evaluate(gated_linear_scan, inputs, cu_seqlens=cu, **ALL)
    for bad in (math.nan, math.inf):
        v = inputs["v"].detach().clone()
        v[0, 150] = bad
        spoiled = inputs | {"v": v.requires_grad_()}
        actual = evaluate(gated_linear_scan, spoiled, cu_seqlens=cu, **ALL)
        for key in ("output 0", *(f"gradient of {n}" for n in ("q", "k", "v", "g", "write"))):
            for rows in (slice(0, 100), slice(200, 300)):
                assert torch.equal(actual[key][:, rows], clean[key][:, rows]), key


def test_graphs_replay(assert_near: Check):
    inputs = gated_pairs(2, 197, 4, 64, 64, groups=1, without=("initial_state",))
    inputs = each(inputs, lambda v: v.cuda().bfloat16())
    expected = evaluate(bidirectional_gated_linear_scan, inputs, form="quasi_separable")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = bidirectional_gated_linear_scan(**inputs, form="quasi_separable")
    graph.replay()
    assert torch.equal(y, expected["output 0"])


@DTYPES
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("shape", "size"), [((8, 197, 1536), None), ((3, 50, 768), 96)], ids=str)
def test_gated_norm(
    assert_near: Check,
    shape: tuple[int, ...],
    size: int | None,
    norm_first: bool,
    dtype: torch.dtype,
):
    options = {"group_size": size, "norm_before_gate": norm_first}
    for seed in SEEDS:
        rng = torch.Generator("cuda").manual_seed(seed)
        x, z = (torch.randn(*shape, generator=rng, device="cuda").to(dtype) for _ in range(2))
        weight = torch.randn(shape[-1], generator=rng, device="cuda")
        inputs = each({"x": x, "weight": weight, "z": z}, lambda v: v)
        actual = evaluate(rms_norm_gated, inputs, **options)
        doubled = each(inputs, Tensor.double)
        exact = evaluate(rms_norm_gated, doubled, rounded_to=[x.dtype], **options)
        assert_all_near(assert_near, actual, exact)
