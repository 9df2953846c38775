"""The compiled matrix-state scan on a CPU: outputs, gradients and steps, and when it runs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.core.gated_cases import (
    KINDS,
    bidirectional_gated_ref,
    gated_inputs,
    gated_pairs,
)
from tests.core.op_cases import (
    LAYOUTS,
    Inputs,
    assert_all_near,
    assert_equal,
    compare,
    each,
    evaluate,
    pack,
)
from torch import Tensor

from scanweave.core import (
    bidirectional_gated_linear_scan,
    gated_linear_scan,
    gated_linear_scan_step,
)
from scanweave.core.ops.gated import compiled, gated_linear_scan_ref, portable

pytestmark = pytest.mark.poison
Check = Callable[..., None]
# B, L, H, K, V, groups: around a chunk of 16 tokens, vectors of 4 to 16 keys and values
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 15, 4, 3, 5, 2),
    (1, 16, 2, 16, 32, 1),
    (2, 17, 3, 17, 33, 3),
    (1, 40, 2, 70, 20, 2),
]
RAGGED = (0, 5, 1, 0, 33, 16, 2, 0)
ALL: dict[str, Any] = {"return_final_state": True}
OPTIONAL = ("g", "write", "skip", "initial_state")
PORTABLE = {"forward": portable.forward, "backward": portable.backward}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The test runs compiled functions; skips where there is no compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not compiled.native.types:
        pytest.skip(f"no compiled scan ({compiled.native.status()})")
    calls: set[str] = set()
    run = compiled.native.run

    def spy(name: str, arguments: list[int]) -> None:
        calls.add(name)
        run(name, arguments)

    monkeypatch.setattr(compiled.native, "run", spy)
    monkeypatch.setattr(portable, "forward", None)
    monkeypatch.setattr(portable, "backward", None)
    yield calls
    assert "scanweave_gated_forward" in calls


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(assert_near: Check, shape: tuple, exclusive: bool, kind: str):
    *sizes, groups = shape
    inputs = gated_inputs(*sizes, groups=groups, kind=kind, dtype=torch.float32)
    if exclusive:
        inputs["bonus"] = torch.randn(sizes[2], sizes[3], requires_grad=True)
    for reverse in (False, True):
        options = {"exclusive": exclusive, "reverse": reverse, **ALL}
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("without", [OPTIONAL, ("write", "skip"), ("initial_state",)], ids=str)
def test_options(assert_near: Check, used: set[str], without: tuple[str, ...]):
    inputs = gated_inputs(2, 20, 2, 3, 4, without=without, dtype=torch.float32)
    for final in ({}, ALL):
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **final)
    assert "scanweave_gated_backward" in used


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 weights", "all 16 bit"])
def test_half_precision(assert_near: Check, weights: torch.dtype | None, dtype: torch.dtype):
    if dtype not in compiled.native.types:
        pytest.skip("the compiler knows no float16")
    for kind in ("heads", "tokens", "all"):
        inputs = gated_inputs(2, 35, 4, 18, 18, groups=2, kind=kind, dtype=dtype, weights=weights)
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_packed(assert_near: Check, kind: str, reverse: bool):
    inputs = gated_inputs(
        1,
        sum(RAGGED),
        4,
        5,
        18,
        groups=2,
        kind=kind,
        sequences=len(RAGGED),
        dtype=torch.float32,
    )
    for dtype in (torch.int32, torch.int64):
        options = {"cu_seqlens": pack(RAGGED).to(dtype), "reverse": reverse, **ALL}
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("form", ["add", "exclusive", "quasi_separable"])
@pytest.mark.parametrize("packed", [False, True])
def test_both_directions(assert_near: Check, packed: bool, form: str):
    without = ("initial_state",) if form == "quasi_separable" else ()
    inputs = gated_pairs(
        1 if packed else 2,
        sum(RAGGED),
        4,
        3,
        2,
        groups=2,
        sequences=len(RAGGED) if packed else None,
        without=without,
        dtype=torch.float32,
    )
    options: dict[str, Any] = {"form": form, "cu_seqlens": pack(RAGGED) if packed else None}
    options |= {} if without else ALL
    op = bidirectional_gated_linear_scan
    compare(assert_near, op, bidirectional_gated_ref, inputs, **options)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_equals_the_portable_path(assert_near: Check, monkeypatch: pytest.MonkeyPatch, kind: str):
    inputs = gated_inputs(2, 70, 4, 9, 20, groups=2, kind=kind, dtype=torch.float32)
    actual = evaluate(gated_linear_scan, inputs, **ALL)
    monkeypatch.setattr(compiled, "takes", lambda _: False)
    for name, function in PORTABLE.items():
        monkeypatch.setattr(portable, name, function)
    assert_all_near(assert_near, actual, evaluate(gated_linear_scan, inputs, **ALL))


@pytest.mark.usefixtures("used")
def test_long_sequences_keep_fewer_states(assert_near: Check):
    """64 x 64 values of 16,400 tokens: chunks of 32 tokens instead of 16."""
    inputs = gated_inputs(1, 16_400, 1, 64, 64, dtype=torch.float32, without=("skip",))
    short = {k: v if k == "initial_state" else v[:, -100:] for k, v in inputs.items()}
    with torch.no_grad():
        _, middle = gated_linear_scan(
            **{k: v if k == "initial_state" else v[:, :-100] for k, v in inputs.items()}, **ALL
        )
    whole = torch.autograd.grad(gated_linear_scan(**inputs)[:, -100:].sum(), inputs["g"])[0]
    short["initial_state"] = middle
    part = torch.autograd.grad(gated_linear_scan(**short)[:, -100:].sum(), inputs["g"])[0]
    assert_near(whole[:, -100:], part[:, -100:])
    assert part[:, :-100].eq(0).all()
    assert whole[:, -200:-100].ne(0).any()


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "write", "initial_state"])
def test_bad_values_stay_in_their_sequence(name: str, bad: float):
    lengths, owner = (20, 0, 1, 40, 3), 3
    for kind in ("tokens", "all"):
        inputs = gated_inputs(
            1, sum(lengths), 2, 5, 18, kind=kind, sequences=len(lengths), dtype=torch.float32
        )
        spoiled = inputs[name].detach().clone()
        spoiled[(owner,) if name == "initial_state" else (0, slice(21, 61))] = bad
        options: dict[str, Any] = {"cu_seqlens": pack(lengths), **ALL}
        clean = evaluate(gated_linear_scan, inputs, **options)
        changed = inputs | {name: spoiled.requires_grad_()}
        actual = evaluate(gated_linear_scan, changed, **options)
        tokens, rows = [*range(21), 61, 62, 63], [0, 1, 2, 4]
        for key, v in actual.items():
            if key == "output 1" or key.endswith("initial_state"):
                assert torch.equal(v[rows], clean[key][rows]), key
            else:
                assert torch.equal(v[:, tokens], clean[key][:, tokens]), key


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str):
    for kind in ("tokens", "all"):
        inputs = gated_inputs(2, 20, 4, 6, 8, groups=2, kind=kind, dtype=torch.float32)
        strided = each(inputs, LAYOUTS[layout])
        assert any(not v.is_contiguous() for v in strided.values())
        expected = evaluate(gated_linear_scan, inputs, **ALL)
        assert_equal(evaluate(gated_linear_scan, strided, **ALL), expected)


@pytest.mark.usefixtures("used")
def test_threads_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "WORK_PER_THREAD", 1)
    inputs = gated_inputs(3, 40, 4, 5, 40, groups=2, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(evaluate(gated_linear_scan, inputs, **ALL))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0])
    alone = gated_linear_scan(**{name: v[1:2] for name, v in inputs.items()})
    assert torch.equal(alone[0], results[0]["output 0"][1])


def step_inputs(**options: Any) -> tuple[Tensor, Inputs]:
    """A state, and the other arguments of `gated_linear_scan_step`."""
    inputs = gated_inputs(3, 1, 4, 6, 18, groups=2, **options)
    given = {k: v.detach() for k, v in inputs.items()}
    state = given.pop("initial_state").float()
    return state, {k: v if k == "g" and v.ndim < 3 else v[:, 0] for k, v in given.items()}


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_equals_definition(assert_near: Check, dtype: torch.dtype, exclusive: bool):
    for kind in ("none", "tokens", "all"):
        for without in ((), ("write",), ("skip",)):
            state, inputs = step_inputs(kind=kind, without=without, dtype=dtype)
            exact = {k: v.double().unsqueeze(1) for k, v in inputs.items()}
            expected, last = gated_linear_scan_ref(
                **exact, initial_state=state.double(), exclusive=exclusive, **ALL
            )
            y = gated_linear_scan_step(state, **inputs, exclusive=exclusive)
            assert y.dtype == dtype
            assert_near(y, expected[:, 0])
            assert_near(state, last)


def test_steps_that_c_does_not_know(monkeypatch: pytest.MonkeyPatch, assert_near: Check):
    monkeypatch.setattr(compiled, "step", None)
    state, inputs = step_inputs(dtype=torch.float32)
    wide = {k: v.double() for k, v in inputs.items()}
    double = state.double()
    expected = gated_linear_scan_step(double, **wide)
    strided = state.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert_near(gated_linear_scan_step(strided, **inputs), expected)
    assert_near(strided, double)


def test_opcheck_of_the_step():
    for kind in ("none", "tokens", "all"):
        state, inputs = step_inputs(kind=kind, dtype=torch.float32)
        given = [inputs.get(k) for k in ("q", "k", "v", "g", "write", "skip")]
        op = torch.ops.scanweave.gated_linear_scan_step.default
        torch.library.opcheck(op, (state, *given, False))


def test_doubles_stay_with_the_portable_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "forward", None)
    monkeypatch.setattr(compiled, "backward", None)
    evaluate(gated_linear_scan, gated_inputs(1, 5, 2, 3, 4))
    inputs = gated_inputs(1, 5, 2, 3, 4, dtype=torch.float32, weights=torch.float64)
    evaluate(gated_linear_scan, inputs)
