"""The scan's Triton kernels against float64: interpreted (TRITON_INTERPRET=1) or on a GPU.

Interpreting is slow, so shapes are tiny: lengths around CHUNK and WINDOW, channels and states
around powers of two, and every flag of every kernel on and off.
"""

import itertools
import os
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
    flat,
    pack,
    pair_inputs,
    scan_inputs,
)
from torch import Tensor

from scanweave.core import (
    bidirectional_selective_scan,
    selective_scan,
)
from scanweave.core.ops.selective import compiled, kernels, portable, selective_scan_ref
from scanweave.core.ops.selective.kernels import CHUNK, LONG_CHUNK

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
# the interpreter computes with NumPy, which warns where a GPU does not
OVERFLOWS = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
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

    for name in ("scan_forward", "scan_backward"):
        monkeypatch.setattr(portable, name, refused)
    for name in ("forward", "backward"):
        monkeypatch.setattr(compiled, name, refused)


@pytest.fixture
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are wide on a GPU that has enough programs, and narrow on one that starves."""
    few = {"wide": 0, "narrow": 10**6}[request.param]
    monkeypatch.setattr(kernels, "processors", lambda _: few)


PLANS = pytest.mark.parametrize("plan", ["narrow", "wide"], indirect=True)


# B, L, D, N, groups, reverse
SIZES = [
    (1, 1, 1, 1, None, False),
    (2, 2, 3, 3, None, True),
    (1, 3, 70, 16, None, True),  # several blocks of channels, the last one ragged
    (1, 2, 64, 16, 1, False),  # whole blocks
    (1, 5, 3, 17, None, False),
    (2, 6, 6, 4, 3, True),
    (1, 7, 4, 1, 4, False),  # up to two states have windows of their own
]
LONG_SIZES = [
    (1, CHUNK - 1, 3, 4, None, True),
    (1, CHUNK, 2, 3, 2, False),
    (1, CHUNK + 1, 2, 3, None, True),
    (1, LONG_CHUNK + 1, 2, 1, None, False),
    (1, 2 * CHUNK + 1, 3, 3, None, False),
]


@PLANS
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scan(assert_near: Check, device: str, sizes: tuple, plan: None):
    *shape, groups, reverse = sizes
    inputs = scan_inputs(*shape, groups=groups, dtype=torch.float32, device=device)
    compare(assert_near, selective_scan, selective_scan_ref, inputs, reverse=reverse, **ALL)


@pytest.mark.parametrize("sizes", LONG_SIZES, ids=str)
def test_scan_over_chunks(assert_near: Check, device: str, sizes: tuple):
    *shape, groups, reverse = sizes
    inputs = scan_inputs(*shape, groups=groups, dtype=torch.float32, device=device)
    compare(assert_near, selective_scan, selective_scan_ref, inputs, reverse=reverse, **ALL)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("count", range(len(OPTIONAL) + 1))
def test_scan_options(assert_near: Check, device: str, count: int, softplus: bool):
    for without in itertools.combinations(OPTIONAL, count):
        inputs = scan_inputs(1, 3, 3, 2, without=without, dtype=torch.float32, device=device)
        options = {"dt_softplus": softplus, "reverse": bool(count % 2)}
        # the state's gradient is absent where nobody reads the state
        final = ALL if count % 3 else {}
        compare(assert_near, selective_scan, selective_scan_ref, inputs, **options, **final)


@pytest.mark.parametrize(
    ("lengths", "reverse", "dtype"),
    [
        ((0, 3, 1, 0, 0, 2, 0), False, torch.int32),
        ((0, 3, 1, 0, 0, 2, 0), True, torch.int64),
        ((CHUNK, 1, CHUNK + 1), False, torch.int32),
        ((0, CHUNK + 3, CHUNK - 1), True, torch.int32),
    ],
    ids=str,
)
def test_scan_packed(
    assert_near: Check, device: str, lengths: tuple[int, ...], reverse: bool, dtype: torch.dtype
):
    inputs = scan_inputs(
        1, sum(lengths), 3, 3, sequences=len(lengths), dtype=torch.float32, device=device
    )
    options = {"reverse": reverse, "cu_seqlens": pack(lengths, device).to(dtype), **ALL}
    compare(assert_near, selective_scan, selective_scan_ref, inputs, **options)


@HALVES
def test_scan_half(assert_near: Check, device: str, half: torch.dtype):
    for weights in (torch.float32, half):
        inputs = scan_inputs(1, 5, 5, 3, groups=1, dtype=half, weights=weights, device=device)
        compare(assert_near, selective_scan, selective_scan_ref, inputs, **ALL)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("without", [(), ("z",), OPTIONAL], ids=str)
def test_bidirectional(assert_near: Check, device: str, without: tuple[str, ...], packed: bool):
    lengths = (0, 2, 1, 4)
    inputs = pair_inputs(
        1 if packed else 2,
        sum(lengths),
        3,
        3,
        sequences=len(lengths) if packed else None,
        without=without,
        dtype=torch.float32,
        device=device,
    )
    cu = pack(lengths, device) if packed else None
    compare(
        assert_near, bidirectional_selective_scan, bidirectional_ref, inputs, cu_seqlens=cu, **ALL
    )


@HALVES
def test_bidirectional_half(assert_near: Check, device: str, half: torch.dtype):
    for without in ((), ("z",)):
        inputs = pair_inputs(
            1, 5, 3, 3, without=without, dtype=half, weights=torch.float32, device=device
        )
        compare(assert_near, bidirectional_selective_scan, bidirectional_ref, inputs, **ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_keeps_nothing_and_agrees(assert_near: Check, device: str, dtype: torch.dtype):
    """Without gradients the kernel keeps no states and directions add up in the output."""
    for length in (1, 4):
        inputs = pair_inputs(1, length, 3, 3, dtype=dtype, weights=torch.float32, device=device)
        exact = bidirectional_ref(**each(inputs, Tensor.double))
        with torch.no_grad():
            assert_near(bidirectional_selective_scan(**inputs), exact)
    inputs = scan_inputs(1, 5, 3, 3, dtype=dtype, weights=torch.float32, device=device)
    with torch.no_grad():
        out, state = selective_scan(**inputs, return_final_state=True)
    expected = selective_scan_ref(**each(inputs, Tensor.double), return_final_state=True)
    assert_near(out, expected[0])
    assert_near(state, expected[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scan_layouts(assert_near: Check, device: str, layout: str):
    inputs = scan_inputs(2, 3, 4, 3, groups=2, dtype=torch.float32, device=device)
    strided = each(inputs, LAYOUTS[layout])
    reverse = layout in ("stepped", "batch_last")
    expected = evaluate(selective_scan, inputs, reverse=reverse, **ALL)
    actual = evaluate(selective_scan, strided, reverse=reverse, **ALL)
    assert_all_near(assert_near, actual, expected)


def test_scan_packed_layouts(assert_near: Check, device: str):
    lengths = (2, 0, 3)
    inputs = scan_inputs(1, 5, 4, 3, sequences=3, dtype=torch.float32, device=device)
    cu = pack(lengths, device)
    strided = torch.stack([cu, cu + 99], 1).flatten()[::2]
    expected = evaluate(selective_scan, inputs, cu_seqlens=cu, **ALL)
    assert_all_near(
        assert_near, evaluate(selective_scan, inputs, cu_seqlens=strided, **ALL), expected
    )


def test_strides_of_output_gradients_change_nothing(assert_near: Check, device: str):
    inputs = scan_inputs(2, 4, 4, 3, dtype=torch.float32, device=device)
    leaves = list(inputs.values())
    out = selective_scan(**inputs)
    g = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, g, retain_graph=True)
    for change in LAYOUTS.values():
        grads = torch.autograd.grad(out, leaves, change(g), retain_graph=True)
        for a, b in zip(grads, expected, strict=True):
            assert_near(a, b)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True):  # stride 0
        assert_near(a, b)


def test_runs_repeat_bit_by_bit(device: str):
    pairs = pair_inputs(1, 8, 5, 3, sequences=3, dtype=torch.float32, device=device)
    options = {"cu_seqlens": pack((3, 0, 5), device), "return_final_state": True}
    first = evaluate(bidirectional_selective_scan, pairs, **options)
    assert_equal(evaluate(bidirectional_selective_scan, pairs, **options), first)


def test_batch_row_does_not_depend_on_its_batch(device: str):
    inputs = scan_inputs(3, 4, 3, 2, dtype=torch.float32, device=device)
    together = selective_scan(**inputs)
    for i in range(3):
        rows = {
            k: v[i : i + 1] if k in ("x", "dt", "B", "C", "z", "initial_state") else v
            for k, v in inputs.items()
        }
        assert torch.equal(selective_scan(**rows)[0], together[i])


@OVERFLOWS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "initial_state"])
def test_bad_values_stay_in_their_sequence(device: str, name: str, bad: float):
    inputs = scan_inputs(1, 6, 3, 3, sequences=4, dtype=torch.float32, device=device)
    spoiled = inputs[name].detach().clone()
    spoiled[(2,) if name == "initial_state" else (0, slice(3, 5))] = bad
    options = {"cu_seqlens": pack((2, 1, 2, 1), device), "return_final_state": True}
    clean = evaluate(selective_scan, inputs, **options)
    actual = evaluate(selective_scan, inputs | {name: spoiled.requires_grad_()}, **options)
    for key, v in actual.items():
        if key == "output 1" or key.endswith("initial_state"):
            assert torch.equal(v[[0, 1, 3]], clean[key][[0, 1, 3]]), key
        elif key == "output 0" or key[-2:] in (" x", "dt", " B", " C", " z"):
            assert torch.equal(v[:, [0, 1, 2, 5]], clean[key][:, [0, 1, 2, 5]]), key


@OVERFLOWS
@pytest.mark.parametrize("rate", [0.0, -1.0, -1e4, 0.05])
def test_extreme_steps_and_rates(device: str, rate: float):
    for dt in (-100.0, -20.0, 19.9, 20.1, 100.0) if rate <= 0 else (-20.0, 20.1):
        inputs = scan_inputs(1, 4, 2, 2, without=("dt_bias",), dtype=torch.float32, device=device)
        for name, value in (("dt", dt), ("A", rate)):
            inputs[name] = torch.full_like(inputs[name], value).requires_grad_()
        actual = evaluate(selective_scan, inputs, **ALL)
        doubled = each(inputs, Tensor.double)
        exact = evaluate(selective_scan_ref, doubled, rounded_to=[torch.float32] * 2, **ALL)
        for key, v in actual.items():
            assert torch.isfinite(v).all(), key
            # below the smallest normal float32 number, digits are lost and may be
            limit = 2e-5 * exact[key].abs().max() + 1e-36
            assert (v - exact[key]).abs().max() <= limit, key


@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0), (0, 0, 0)], ids=str)
def test_empty(device: str, sizes: tuple[int, int, int]):
    inputs = scan_inputs(*sizes, state=3, dtype=torch.float32, device=device)
    values = evaluate(selective_scan, inputs, **ALL)
    assert values["output 0"].shape == sizes
    for name, v in flat(inputs).items():
        gradient = values[f"gradient of {name}"]
        assert gradient.shape == v.shape, name
        if name != "initial_state":
            assert not gradient.any(), name
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], inputs["initial_state"])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_empty_pack(device: str, lengths: tuple[int, ...]):
    count = len(lengths)
    options = {"cu_seqlens": pack(lengths, device), "return_final_state": True}
    inputs = scan_inputs(1, 0, 3, 2, sequences=count, dtype=torch.float32, device=device)
    values = evaluate(selective_scan, inputs, **options)
    assert torch.equal(values["output 1"], inputs["initial_state"])
    assert not values["gradient of A"].any()
