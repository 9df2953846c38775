"""The Triton kernels of the linear scan and of the weighted average: interpreted or on a GPU.

Interpreting is slow, so shapes are tiny: lengths around chunks, windows and segments, and every
flag of every kernel on and off.
"""

import os
from typing import Any

import pytest
import torch
from tests.core.linear_cases import (
    Check,
    compare,
    linear_inputs,
    near,
    scaled_state,
    widened,
    wkv_inputs,
)
from tests.core.op_cases import LAYOUTS, assert_equal, each, evaluate, pack

from scanweave.core.ops.linear import compiled, kernels, linear_scan, linear_scan_ref, portable
from scanweave.core.ops.wkv import kernels as wkv_kernels
from scanweave.core.ops.wkv import portable as wkv_portable
from scanweave.core.ops.wkv import wkv, wkv_ref

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.poison,
    # the interpreter computes with NumPy, which warns where a GPU does not
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]
ALL: dict[str, Any] = {"return_final_state": True}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    """The interpreter reads and writes memory of the CPU."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another path would give right results as well, so it must not run."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the op left the Triton kernels")

    for module, names in (
        (portable, ("scan_forward", "scan_backward")),
        (compiled, ("forward", "backward")),
        (wkv_portable, ("forward", "backward")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refused)


@pytest.fixture
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are cut only where a GPU would starve, which tiny ones never do."""
    plan = kernels.plan_of
    count = request.param
    monkeypatch.setattr(kernels, "plan_of", lambda *args: plan(*args)._replace(segments=count))


def cut(count: int) -> Any:
    return pytest.mark.parametrize("segments", [count], indirect=True)


KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)


# B, L, D, constant, reverse: lengths around a chunk of 8 or 16 steps and a window of 16
@cut(1)
@KINDS
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, False, False),
        (2, 3, 35, True, True),
        (1, 16, 2, False, True),
        (1, 33, 3, False, False),
        (1, 24, 3, True, False),
    ],
    ids=str,
)
def test_scan(assert_near: Check, device: str, sizes: tuple, dtype: torch.dtype, segments: None):
    *shape, constant, reverse = sizes
    inputs = linear_inputs(*shape, constant=constant, dtype=dtype, device=device)
    compare(assert_near, linear_scan, linear_scan_ref, inputs, reverse=reverse, **ALL)


# the last segments of the shorter ones are empty
@KINDS
@pytest.mark.parametrize(
    ("segments", "length", "constant", "reverse"),
    [(2, 33, False, False), (2, 40, True, True), (4, 17, False, True), (4, 50, True, False)],
    indirect=["segments"],
)
def test_scan_in_segments(
    assert_near: Check,
    device: str,
    segments: None,
    length: int,
    constant: bool,
    reverse: bool,
    dtype: torch.dtype,
):
    inputs = linear_inputs(1, length, 3, constant=constant, dtype=dtype, device=device)
    compare(assert_near, linear_scan, linear_scan_ref, inputs, reverse=reverse, **ALL)


@KINDS
@pytest.mark.parametrize(
    ("segments", "lengths", "constant", "reverse"),
    [
        (1, (0, 3, 1, 0, 17), False, True),
        (1, (0, 3, 1, 0, 17), True, False),
        (2, (20, 0, 1, 33), False, False),
        (2, (20, 0, 1, 33), True, True),
    ],
    indirect=["segments"],
)
def test_scan_packed(
    assert_near: Check,
    device: str,
    segments: None,
    lengths: tuple[int, ...],
    constant: bool,
    reverse: bool,
    dtype: torch.dtype,
):
    inputs = linear_inputs(
        1, sum(lengths), 2, constant=constant, dtype=dtype, sequences=len(lengths), device=device
    )
    options = {"reverse": reverse, "cu_seqlens": pack(lengths, device), **ALL}
    compare(assert_near, linear_scan, linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("constant", [False, True])
@cut(2)
def test_scan_half(
    assert_near: Check, device: str, constant: bool, half: torch.dtype, segments: None
):
    decays = torch.float32 if constant else half
    inputs = linear_inputs(1, 20, 3, constant=constant, dtype=half, decays=decays, device=device)
    compare(assert_near, linear_scan, linear_scan_ref, inputs, **ALL)


@cut(2)
def test_scan_without_states_or_gradients(assert_near: Check, device: str, segments: None):
    inputs = linear_inputs(1, 20, 3, dtype=torch.float32, without=("initial_state",), device=device)
    compare(assert_near, linear_scan, linear_scan_ref, inputs)
    with torch.no_grad():
        assert_near(linear_scan(**inputs), linear_scan_ref(**widened(inputs)))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [*((name, torch.float32) for name in LAYOUTS), ("transposed", torch.complex64)],
    ids=str,
)
@cut(1)
def test_scan_layouts(
    assert_near: Check, device: str, layout: str, dtype: torch.dtype, segments: None
):
    inputs = linear_inputs(2, 5, 3, dtype=dtype, device=device)
    reverse = layout in ("stepped", "batch_last")
    expected = evaluate(linear_scan, inputs, reverse=reverse, **ALL)
    strided = evaluate(linear_scan, each(inputs, LAYOUTS[layout]), reverse=reverse, **ALL)
    near(assert_near, strided, expected)


@cut(2)
@pytest.mark.parametrize("rate", [0.0, -1e-4, -1e4, float("-inf")])
def test_scan_extremes(assert_near: Check, device: str, rate: float, segments: None):
    inputs = linear_inputs(1, 20, 2, dtype=torch.float32, device=device)
    inputs["log_a"] = torch.full_like(inputs["log_a"], rate).requires_grad_()
    compare(assert_near, linear_scan, linear_scan_ref, inputs, **ALL)


@cut(2)
def test_runs_repeat_bit_by_bit(device: str, segments: None):
    inputs = linear_inputs(1, 24, 5, constant=True, sequences=3, dtype=torch.float32, device=device)
    options = {"cu_seqlens": pack((19, 0, 5), device), **ALL}
    first = evaluate(linear_scan, inputs, **options)
    assert_equal(evaluate(linear_scan, inputs, **options), first)


@cut(2)
@pytest.mark.parametrize(
    ("name", "bad"),
    [("x", float("nan")), ("log_a", float("inf")), ("initial_state", float("nan"))],
)
def test_bad_values_stay_in_their_sequence(device: str, name: str, bad: float, segments: None):
    inputs = linear_inputs(1, 6, 3, sequences=4, dtype=torch.float32, device=device)
    spoiled = inputs[name].detach().clone()
    spoiled[(2,) if name == "initial_state" else (0, slice(3, 5))] = bad
    options = {"cu_seqlens": pack((2, 1, 2, 1), device), **ALL}
    clean = evaluate(linear_scan, inputs, **options)
    actual = evaluate(linear_scan, inputs | {name: spoiled.requires_grad_()}, **options)
    for key, v in actual.items():
        if key == "output 1" or key.endswith("state"):
            assert torch.equal(v[[0, 1, 3]], clean[key][[0, 1, 3]]), key
        else:
            assert torch.equal(v[:, [0, 1, 2, 5]], clean[key][:, [0, 1, 2, 5]]), key


@KINDS
@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0)], ids=str)
def test_scan_empty(device: str, sizes: tuple[int, int, int], dtype: torch.dtype):
    inputs = linear_inputs(*sizes, constant=True, dtype=dtype, device=device)
    values = evaluate(linear_scan, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert not values["gradient of log_a"].any()
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], inputs["initial_state"])


# ---- the weighted average ----

WAYS = pytest.mark.parametrize(
    ("constant", "without", "reverse"),
    [
        (True, (), False),
        (False, (), True),
        (True, ("bonus",), True),
        (False, ("bonus", "initial_state"), False),
        (True, ("initial_state",), False),
    ],
    ids=str,
)


@WAYS
@pytest.mark.parametrize("length", [1, wkv_kernels.CHUNK, 2 * wkv_kernels.CHUNK + 1])
def test_average(
    assert_near: Check,
    device: str,
    length: int,
    constant: bool,
    without: tuple[str, ...],
    reverse: bool,
):
    inputs = wkv_inputs(
        2, length, 3, constant=constant, without=without, dtype=torch.float32, device=device
    )
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, reverse=reverse)


@WAYS
def test_average_packed(
    assert_near: Check, device: str, constant: bool, without: tuple[str, ...], reverse: bool
):
    lengths = (0, 3, 1, 0, 10)
    inputs = wkv_inputs(
        1,
        sum(lengths),
        2,
        constant=constant,
        without=without,
        sequences=len(lengths),
        dtype=torch.float32,
        device=device,
    )
    options = {"cu_seqlens": pack(lengths, device), "reverse": reverse}
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, **options)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
def test_average_half(assert_near: Check, device: str, without: tuple[str, ...], half: torch.dtype):
    inputs = wkv_inputs(1, 9, 35, without=without, dtype=half, weights=torch.float32, device=device)
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs)
    with torch.no_grad():
        assert_near(wkv(**inputs), wkv_ref(**widened(inputs)))


@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
def test_average_does_not_overflow(assert_near: Check, device: str, without: tuple[str, ...]):
    inputs = wkv_inputs(1, 12, 3, scale=200.0, without=without, dtype=torch.float32, device=device)
    # 200 in float32 is exact to 1e-5, and so are weights
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, factor=10)


@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0)], ids=str)
def test_average_empty(device: str, sizes: tuple[int, int, int]):
    inputs = wkv_inputs(*sizes, dtype=torch.float32, device=device)
    values = evaluate(wkv, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert not values["gradient of log_decay"].any()
    if sizes[1] == 0:
        # m goes to base 2 and back
        torch.testing.assert_close(values["output 1"], inputs["initial_state"].detach())
