"""The selective scan against its definition in float64: every output, every gradient."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import (
    LAYOUTS,
    OPTIONAL,
    assert_all_near,
    assert_equal,
    bidirectional_ref,
    compare,
    each,
    evaluate,
    pack,
    pair_inputs,
    scan_inputs,
)
from torch import Tensor

from scanweave.core import bidirectional_selective_scan, selective_scan
from scanweave.core.ops.selective import compiled, portable, selective_scan_ref

pytestmark = pytest.mark.poison
Check = Callable[..., None]
# B, L, D, N, groups: one, odd, aligned, ragged
SHAPES = [(1, 1, 1, 1, None), (2, 63, 5, 3, 5), (2, 128, 64, 16, 1), (3, 100, 130, 3, 2)]
# float16 and bfloat16 activations come with float32 weights, as in a Mamba block under autocast
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]
PATHS = pytest.mark.parametrize("path", ["compiled", "portable"], indirect=True)
RAGGED = (0, 5, 1, 0, 12, 1, 3, 0)
ALL: dict[str, Any] = {"return_final_state": True}


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs float32 and 16 bits on a CPU; without a compiler both are the portable path."""
    if request.param == "portable":
        monkeypatch.setattr(compiled, "takes", lambda _: False)
    return request.param


@PATHS
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "weights"), DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(
    assert_near: Check,
    shape: tuple,
    dtype: torch.dtype,
    weights: torch.dtype,
    reverse: bool,
    path: str,
):
    *sizes, groups = shape
    inputs = scan_inputs(*sizes, groups=groups, dtype=dtype, weights=weights)
    compare(assert_near, selective_scan, selective_scan_ref, inputs, reverse=reverse, **ALL)


@PATHS
@pytest.mark.parametrize(("dtype", "weights"), DTYPES, ids=lambda d: str(d)[6:])
def test_equals_definition_packed(
    assert_near: Check, dtype: torch.dtype, weights: torch.dtype, path: str
):
    inputs = scan_inputs(
        1, sum(RAGGED), 10, 3, groups=2, sequences=len(RAGGED), dtype=dtype, weights=weights
    )
    cu = pack(RAGGED)
    for reverse in (False, True):
        compare(
            assert_near,
            selective_scan,
            selective_scan_ref,
            inputs,
            reverse=reverse,
            cu_seqlens=cu,
            **ALL,
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("count", range(len(OPTIONAL) + 1))
def test_every_set_of_options(assert_near: Check, count: int, softplus: bool, packed: bool):
    lengths = (3, 0, 6, 1) if packed else None
    for without in itertools.combinations(OPTIONAL, count):
        inputs = scan_inputs(
            1 if packed else 2, 10, 4, 3, without=without, sequences=4 if packed else None
        )
        compare(
            assert_near,
            selective_scan,
            selective_scan_ref,
            inputs,
            dt_softplus=softplus,
            reverse=bool(count % 2),
            cu_seqlens=pack(lengths) if lengths else None,
            **ALL,
        )


@pytest.mark.parametrize("groups", [None, 1, 2, 3, 6])
@pytest.mark.parametrize("state", [1, 3, 16])
def test_groups_and_states(assert_near: Check, groups: int | None, state: int):
    inputs = scan_inputs(2, 9, 6, state, groups=groups)
    compare(assert_near, selective_scan, selective_scan_ref, inputs, **ALL)


def test_gradient_of_one_output_only(assert_near: Check):
    inputs = scan_inputs(2, 9, 6, 3)
    compare(assert_near, selective_scan, selective_scan_ref, inputs)
    without_out = {k: v for k, v in inputs.items() if k not in ("C", "D", "z")}

    def final(op: Callable[..., Any]) -> Callable[..., Tensor]:
        C = torch.zeros_like(inputs["B"])
        return lambda **kw: op(**kw, C=C, return_final_state=True)[1]

    compare(assert_near, final(selective_scan), final(selective_scan_ref), without_out)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", *OPTIONAL])
def test_gradient_of_one_input_only(name: str):
    inputs = scan_inputs(2, 9, 6, 3)
    every = evaluate(selective_scan, inputs, **ALL)
    rest = {k: v.detach() for k, v in inputs.items() if k != name}
    alone = evaluate(lambda **kw: selective_scan(**rest, **kw), {name: inputs[name]}, **ALL)
    assert_equal(alone, {k: every[k] for k in alone})


@PATHS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "weights"), DTYPES, ids=lambda d: str(d)[6:])
def test_bidirectional_equals_definition(
    assert_near: Check, dtype: torch.dtype, weights: torch.dtype, packed: bool, path: str
):
    inputs = pair_inputs(
        1 if packed else 3,
        sum(RAGGED),
        10,
        3,
        groups=2,
        sequences=len(RAGGED) if packed else None,
        dtype=dtype,
        weights=weights,
    )
    compare(
        assert_near,
        bidirectional_selective_scan,
        bidirectional_ref,
        inputs,
        cu_seqlens=pack(RAGGED) if packed else None,
        **ALL,
    )


@pytest.mark.parametrize("without", [("z",), ("D", "dt_bias"), ("initial_state",), OPTIONAL])
def test_bidirectional_without_options(assert_near: Check, without: tuple[str, ...]):
    inputs = pair_inputs(2, 11, 4, 3, without=without)
    for softplus in (False, True):
        compare(
            assert_near,
            bidirectional_selective_scan,
            bidirectional_ref,
            inputs,
            dt_softplus=softplus,
            **ALL,
        )


def test_bidirectional_directions_may_group_differently(assert_near: Check):
    inputs = pair_inputs(2, 7, 6, 3, groups=2)
    other = pair_inputs(2, 7, 6, 3, groups=3, seed=5)
    for name in ("B", "C"):
        inputs[name] = (inputs[name][0], other[name][1])
    compare(assert_near, bidirectional_selective_scan, bidirectional_ref, inputs, **ALL)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_in_half_precision(assert_near: Check, dtype: torch.dtype, path: str):
    inputs = scan_inputs(2, 33, 6, 3, dtype=dtype)
    values = compare(assert_near, selective_scan, selective_scan_ref, inputs, **ALL)
    assert values["output 0"].dtype == dtype
    assert values["output 1"].dtype == torch.float32  # the state


def test_one_double_input_makes_all_sums_double(assert_near: Check):
    inputs = scan_inputs(2, 33, 6, 3, dtype=torch.float32)
    inputs["A"] = inputs["A"].detach().double().requires_grad_()
    state = selective_scan(**inputs, **ALL)[1]
    assert state.dtype == torch.float64
    exact = selective_scan_ref(**each(inputs, Tensor.double), **ALL)[1]
    assert_near(state, exact)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(assert_near: Check, layout: str, packed: bool):
    inputs = scan_inputs(1 if packed else 2, 10, 6, 3, groups=2, sequences=3 if packed else None)
    cu = pack((4, 0, 6)) if packed else None
    strided = each(inputs, LAYOUTS[layout])
    assert any(not v.is_contiguous() for v in strided.values())
    for reverse in (False, True):
        options = {"reverse": reverse, "cu_seqlens": cu, **ALL}
        expected = evaluate(selective_scan, inputs, **options)
        assert_all_near(assert_near, evaluate(selective_scan, strided, **options), expected)


def test_chunks_of_projections_and_expanded_inputs(assert_near: Check):
    rng = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 9, 12, generator=rng, dtype=torch.float64, requires_grad=True)
    small = torch.randn(2, 9, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    A = -torch.rand(6, 3, generator=rng, dtype=torch.float64).requires_grad_()

    def through(op: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(projected: Tensor, small: Tensor, A: Tensor) -> Tensor:
            x, z = projected.chunk(2, -1)
            dt, B, C = small.split([1, 3, 3], -1)
            return op(x, dt.expand(-1, -1, 6), A, B, C, None, z)

        return run

    inputs = {"projected": projected, "small": small, "A": A}
    compare(assert_near, through(selective_scan), through(selective_scan_ref), inputs)


def test_strides_of_output_gradients_change_nothing(assert_near: Check):
    inputs = scan_inputs(2, 10, 6, 3)
    leaves = list(inputs.values())
    out, state = selective_scan(**inputs, **ALL)
    g, gs = torch.randn_like(out), torch.randn_like(state)
    expected = torch.autograd.grad([out, state], leaves, [g, gs], retain_graph=True)
    for change in LAYOUTS.values():
        grads = torch.autograd.grad(
            [out, state], leaves, [change(g), change(gs)], retain_graph=True
        )
        for a, b in zip(grads, expected, strict=True):
            assert_near(a, b)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True):  # stride 0
        assert_near(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("elements", "steps"), [(1, 1), (40, 2), (100, 7), (10**9, 1)])
def test_chunk_size_changes_nothing(
    assert_near: Check, monkeypatch: pytest.MonkeyPatch, elements: int, steps: int, packed: bool
):
    inputs = pair_inputs(1 if packed else 2, 22, 4, 3, sequences=8 if packed else None)
    cu = pack(RAGGED) if packed else None
    expected = evaluate(bidirectional_selective_scan, inputs, cu_seqlens=cu, **ALL)
    monkeypatch.setattr(portable, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(portable, "MIN_CHUNK_STEPS", steps)
    actual = evaluate(bidirectional_selective_scan, inputs, cu_seqlens=cu, **ALL)
    assert_all_near(assert_near, actual, expected)


def test_leaves_inputs_alone():
    inputs = scan_inputs(2, 9, 6, 3)
    before = {name: v.detach().clone() for name, v in inputs.items()}
    evaluate(selective_scan, inputs, **ALL)
    for name, v in inputs.items():
        assert torch.equal(v, before[name]), name


def test_results_own_their_memory():
    inputs = scan_inputs(2, 9, 6, 3, without=("D", "z"))
    out, state = selective_scan(**inputs, **ALL)
    assert out.is_contiguous()
    assert out.storage_offset() == 0
    pointers = {v.untyped_storage().data_ptr() for v in (out, state, *inputs.values())}
    assert len(pointers) == 2 + len(inputs)
