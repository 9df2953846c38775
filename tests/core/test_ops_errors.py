"""Bad input of the ops: a ValueError that names the argument, the rule and what was given."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import (
    conv_inputs,
    pair_inputs,
    scan_inputs,
)
from torch import Tensor

from scanweave.core import (
    bidirectional_selective_scan,
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
    symmetric_conv1d,
)

pytestmark = pytest.mark.poison
BATCH, LENGTH, DIM, STATE, WIDTH = 2, 5, 4, 3, 4


def scan(**changes: Any) -> dict[str, Any]:
    packed = "cu_seqlens" in changes
    return (
        scan_inputs(1 if packed else BATCH, LENGTH, DIM, STATE, without=("initial_state",))
        | changes
    )


def step(**changes: Any) -> dict[str, Any]:
    tokens = {"x", "dt", "B", "C", "z"}
    given = {k: v.detach() for k, v in scan_inputs(BATCH, 1, DIM, STATE).items()}
    given["state"] = given.pop("initial_state")
    return {k: v[:, 0] if k in tokens else v for k, v in given.items()} | changes


def conv(**changes: Any) -> dict[str, Any]:
    packed = "cu_seqlens" in changes
    return (
        conv_inputs(1 if packed else BATCH, LENGTH, DIM, WIDTH, without=("initial_state",))
        | changes
    )


def conv_step(**changes: Any) -> dict[str, Any]:
    given = {k: v.detach() for k, v in conv_inputs(BATCH, 1, DIM, WIDTH).items()}
    given["state"], given["x"] = given.pop("initial_state"), given["x"][:, 0]
    return given | changes


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


COMPLEX = zeros(DIM, STATE, dtype=torch.complex128)
SCAN = [
    ({"x": zeros(2, 5)}, "x must be (B, L, D), got (2, 5)"),
    ({"x": None}, "x must be (B, L, D), got NoneType"),
    ({"x": zeros(2, 5, 4, dtype=torch.int64)}, "x must be floating point, got torch.int64"),
    ({"dt": zeros(2, 6, 4)}, "dt must be (B, L, D) = (2, 5, 4), got (2, 6, 4)"),
    ({"dt": None}, "dt must be a tensor (B, L, D), got NoneType"),
    ({"dt": zeros(2, 5, 4, device="meta")}, "dt must be on cpu as x is, got meta"),
    ({"dt": zeros(2, 5, 4, dtype=torch.bool)}, "dt must be floating point, got torch.bool"),
    ({"A": zeros(4)}, "A must be (D, N), got (4,)"),
    ({"A": zeros(5, 3)}, "A must be (D, N) = (4, 3), got (5, 3)"),
    ({"A": None}, "A must be (D, N), got NoneType"),
    ({"A": COMPLEX}, "A must be real, got torch.complex128"),
    ({"A": zeros(4, 0)}, "A must have at least one state, got (4, 0)"),
    ({"A": zeros(4, 3, device="meta")}, "A must be on cpu as x is, got meta"),
    ({"B": zeros(2, 3)}, "B must be (B, L, N) or (B, L, G, N), got (2, 3)"),
    ({"B": None}, "B must be (B, L, N) or (B, L, G, N), got NoneType"),
    ({"B": zeros(2, 5, 2)}, "B must be (B, L, N) = (2, 5, 3), got (2, 5, 2)"),
    ({"C": zeros(2, 4, 3)}, "C must be (B, L, N) = (2, 5, 3), got (2, 4, 3)"),
    ({"C": zeros(2, 5, 1, 3)}, "C must be (B, L, N) = (2, 5, 3), got (2, 5, 1, 3)"),
    (
        {"B": zeros(2, 5, 2, 3), "C": zeros(2, 5, 4, 3)},
        "C must be (B, L, G, N) = (2, 5, 2, 3), got (2, 5, 4, 3)",
    ),
    (
        {"B": zeros(2, 5, 3, 3), "C": zeros(2, 5, 3, 3)},
        "B must have groups that divide the 4 channels, got 3",
    ),
    (
        {"B": zeros(2, 5, 0, 3), "C": zeros(2, 5, 0, 3)},
        "B must have groups that divide the 4 channels, got 0",
    ),
    ({"D": zeros(5)}, "D must be (D,) = (4,), got (5,)"),
    ({"D": zeros(4, dtype=torch.int32)}, "D must be floating point, got torch.int32"),
    ({"dt_bias": zeros(1, 4)}, "dt_bias must be (D,) = (4,), got (1, 4)"),
    ({"dt_bias": 1.0}, "dt_bias must be a tensor (D,), got float"),
    ({"z": zeros(2, 5, 1)}, "z must be (B, L, D) = (2, 5, 4), got (2, 5, 1)"),
    ({"z": zeros(2, 5, 4, device="meta")}, "z must be on cpu as x is, got meta"),
    (
        {"initial_state": zeros(2, 3, 4)},
        "initial_state must be (B, D, N) = (2, 4, 3), got (2, 3, 4)",
    ),
]
PACKED = [
    (ints(0, 3, 4), "cu_seqlens must start at 0 and end at the length 5, got 0 and 4"),
    (ints(0, 3, 6), "cu_seqlens must start at 0 and end at the length 5, got 0 and 6"),
    (ints(1, 3, 5), "cu_seqlens must start at 0 and end at the length 5, got 1 and 5"),
    (ints(0), "cu_seqlens must start at 0 and end at the length 5, got 0 and 0"),
    (ints(0, 4, 2, 5), "cu_seqlens must not fall, got 4 then 2 at positions 1, 2"),
    (ints(0, -1, 5), "cu_seqlens must not fall, got 0 then -1 at positions 0, 1"),
    (ints(0, 7, 5), "cu_seqlens must not fall, got 7 then 5 at positions 1, 2"),
    (ints(0, 5).view(1, 2), "cu_seqlens must be a tensor (S + 1,), got (1, 2)"),
    (ints(), "cu_seqlens must be a tensor (S + 1,), got (0,)"),
    ([0, 5], "cu_seqlens must be a tensor (S + 1,), got <class 'list'>"),
    (zeros(2), "cu_seqlens must be int32 or int64, got torch.float64"),
    (ints(0, 5, dtype=torch.int16), "cu_seqlens must be int32 or int64, got torch.int16"),
    (zeros(2, dtype=torch.int32, device="meta"), "cu_seqlens must be on cpu as x is, got meta"),
]
CONV = [
    ({"x": zeros(2, 5)}, "x must be (B, L, D), got (2, 5)"),
    ({"x": "x"}, "x must be (B, L, D), got str"),
    ({"x": zeros(2, 5, 4, dtype=torch.int64)}, "x must be floating point, got torch.int64"),
    ({"weight": zeros(4, 1, 4)}, "weight must be (D, W), got (4, 1, 4)"),
    ({"weight": None}, "weight must be (D, W), got NoneType"),
    ({"weight": zeros(3, 4)}, "weight must be (D, W) = (4, 4), got (3, 4)"),
    ({"weight": zeros(4, 3, device="meta")}, "weight must be on cpu as x is, got meta"),
    ({"weight": zeros(4, 0)}, "weight must have 1 to 256 taps, got 0"),
    ({"weight": zeros(4, 257)}, "weight must have 1 to 256 taps, got 257"),
    ({"bias": zeros(5)}, "bias must be (D,) = (4,), got (5,)"),
    ({"bias": zeros(4, dtype=torch.complex64)}, "bias must be floating point, got torch.complex64"),
    ({"activation": "relu"}, "activation must be None or 'silu', got 'relu'"),
]
CONV_STATE = [
    ({"initial_state": zeros(2, 4, 4)}, "initial_state must be (B, W - 1, D) = (2, 3, 4)"),
    ({"initial_state": zeros(2, 3, 4, device="meta")}, "initial_state must be on cpu as x is"),
]
STEP = [
    ({"x": zeros(2, 1, 4)}, "x must be (B, D), got (2, 1, 4)"),
    ({"x": 3}, "x must be (B, D), got int"),
    ({"state": zeros(3, 4, 3)}, "state must be (B, D, N) = (2, 4, 3), got (3, 4, 3)"),
    ({"state": None}, "state must be a tensor (B, D, N), got NoneType"),
    ({"dt": zeros(4)}, "dt must be (B, D) = (2, 4), got (4,)"),
    ({"A": zeros(4)}, "A must be (D, N), got (4,)"),
    ({"A": None}, "A must be (D, N), got NoneType"),
    ({"A": COMPLEX}, "A must be floating point, got torch.complex128"),
    ({"B": zeros(3)}, "B must be (B, N) or (B, G, N), got (3,)"),
    ({"B": None}, "B must be (B, N) or (B, G, N), got NoneType"),
    ({"C": zeros(2, 2)}, "C must be (B, N) = (2, 3), got (2, 2)"),
    (
        {"B": zeros(2, 3, 3), "C": zeros(2, 3, 3)},
        "B must have groups that divide the 4 channels, got 3",
    ),
    ({"D": zeros(1)}, "D must be (D,) = (4,), got (1,)"),
    ({"dt_bias": zeros(2, 4)}, "dt_bias must be (D,) = (4,), got (2, 4)"),
    ({"z": zeros(2, 3)}, "z must be (B, D) = (2, 4), got (2, 3)"),
    ({"z": zeros(2, 4, device="meta")}, "z must be on cpu as x is, got meta"),
]
CONV_STEP = [
    ({"x": zeros(2, 1, 4)}, "x must be (B, D), got (2, 1, 4)"),
    ({"x": None}, "x must be (B, D), got NoneType"),
    ({"state": zeros(2, 2, 4)}, "state must be (B, W - 1, D) = (2, 3, 4), got (2, 2, 4)"),
    ({"state": None}, "state must be a tensor (B, W - 1, D), got NoneType"),
    ({"weight": zeros(3, 4)}, "weight must be (D, W) = (4, 4), got (3, 4)"),
    ({"activation": "gelu"}, "activation must be None or 'silu', got 'gelu'"),
]


def texts(cases: list[tuple[Any, str]]) -> list[str]:
    return [message for _, message in cases]


@pytest.mark.parametrize(("changes", "message"), SCAN, ids=texts(SCAN))
def test_scan_names_the_bad_argument(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        selective_scan(**scan(**changes))


@pytest.mark.parametrize(("changes", "message"), SCAN, ids=texts(SCAN))
@pytest.mark.parametrize("direction", [0, 1])
def test_bidirectional_names_the_bad_direction(
    changes: dict[str, Any], message: str, direction: int
):
    good: dict[str, Any] = pair_inputs(BATCH, LENGTH, DIM, STATE, without=("initial_state",))
    if direction == 0 and "x" not in changes and "initial_state" not in changes:
        good = {k: v if k == "z" else (v[0], v[0]) for k, v in good.items()}
    for name, bad in changes.items():
        if name == "z":
            good[name] = bad
        elif name == "initial_state":
            state = zeros(BATCH, DIM, STATE)
            good[name] = (bad, state) if direction == 0 else (state, bad)
        else:
            good[name] = (bad, good[name][1]) if direction == 0 else (good[name][0], bad)
    name, _, rest = message.partition(" ")
    expected = message if name == "z" else f"{name}[{direction}] {rest}"
    with pytest.raises(ValueError, match="^" + re.escape(expected)):
        bidirectional_selective_scan(**good)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state"])
def test_bidirectional_takes_pairs(name: str):
    good: dict[str, Any] = pair_inputs(BATCH, LENGTH, DIM, STATE)
    for bad, got in ((good[name][0], "a tensor"), ((*good[name], None), "3 items")):
        changed: dict[str, Any] = good | {name: bad}
        rule = f"{name} must be a pair (forward, reverse), got {got}"
        with pytest.raises(ValueError, match=re.escape(rule)):
            bidirectional_selective_scan(**changed)


def test_bidirectional_directions_fit_each_other():
    good: dict[str, Any] = pair_inputs(BATCH, LENGTH, DIM, STATE, without=("z", "initial_state"))
    rule = "x and A must have one shape in both directions"
    for sizes in ((BATCH, LENGTH, DIM, 2), (BATCH, 6, DIM, STATE), (3, LENGTH, DIM, STATE)):
        other = pair_inputs(*sizes, without=("z", "initial_state"))
        mixed: dict[str, Any] = {k: (good[k][0], other[k][1]) for k in good}
        with pytest.raises(ValueError, match=rule):
            bidirectional_selective_scan(**mixed)


@pytest.mark.parametrize(("cu", "message"), PACKED, ids=texts(PACKED))
def test_bad_cu_seqlens(cu: Any, message: str):
    pairs = pair_inputs(1, LENGTH, DIM, STATE, without=("initial_state",))
    calls: list[Callable[[], object]] = [
        lambda: selective_scan(**scan(cu_seqlens=cu)),
        lambda: bidirectional_selective_scan(**pairs, cu_seqlens=cu),
        lambda: causal_conv1d(**conv(cu_seqlens=cu)),
        lambda: symmetric_conv1d(zeros(1, 5, 4), zeros(4, 3), cu_seqlens=cu),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            call()


def test_packed_needs_batch_one():
    for op, inputs in ((selective_scan, scan()), (causal_conv1d, conv())):
        with pytest.raises(
            ValueError, match=r"x must have batch 1 with cu_seqlens, got \(2, 5, 4\)"
        ):
            op(**inputs, cu_seqlens=ints(0, 5))


@pytest.mark.parametrize(
    ("x", "got"), [(None, "NoneType"), (torch.tensor(1.0), "()"), (zeros(5, 4), "(5, 4)")]
)
def test_packed_needs_a_batch(x: Any, got: str):
    rule = re.escape(f"x must be (B, L, D), got {got}")
    cu = ints(0, 5)
    with pytest.raises(ValueError, match=rule):
        selective_scan(**scan(x=x), cu_seqlens=cu)
    with pytest.raises(ValueError, match=rule):
        causal_conv1d(**conv(x=x), cu_seqlens=cu)
    pairs: dict[str, Any] = pair_inputs(1, LENGTH, DIM, STATE)
    pairs["x"] = (x, x)
    with pytest.raises(ValueError, match=rule):
        bidirectional_selective_scan(**pairs, cu_seqlens=cu)


def test_packed_states_have_a_row_per_sequence():
    cu, wrong = ints(0, 2, 5), zeros(1, DIM, STATE)
    rule = "initial_state must be (S, D, N) = (2, 4, 3), got (1, 4, 3)"
    with pytest.raises(ValueError, match=re.escape(rule)):
        selective_scan(**scan(cu_seqlens=cu, initial_state=wrong))
    rule = "initial_state must be (S, W - 1, D) = (2, 3, 4), got (1, 4, 3)"
    with pytest.raises(ValueError, match=re.escape(rule)):
        causal_conv1d(**conv(cu_seqlens=cu, initial_state=wrong))


def test_cu_seqlens_changed_in_place_is_checked_again():
    cu = ints(0, 2, 5)
    selective_scan(**scan(cu_seqlens=cu))
    cu[1] = 9
    for op, inputs in ((selective_scan, scan), (causal_conv1d, conv)):
        with pytest.raises(ValueError, match="cu_seqlens must not fall"):
            op(**inputs(cu_seqlens=cu))


def test_cu_seqlens_of_another_length_is_checked_again():
    cu = ints(0, 2, 5)
    selective_scan(**scan(cu_seqlens=cu))
    longer = scan_inputs(1, 6, DIM, STATE, without=("initial_state",))
    with pytest.raises(ValueError, match="end at the length 6, got 0 and 5"):
        selective_scan(**longer, cu_seqlens=cu)


@pytest.mark.parametrize(("changes", "message"), CONV + CONV_STATE, ids=texts(CONV + CONV_STATE))
def test_convolution_names_the_bad_argument(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        causal_conv1d(**conv(**changes))


@pytest.mark.parametrize(("changes", "message"), CONV, ids=texts(CONV))
def test_symmetric_convolution_names_the_bad_argument(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        symmetric_conv1d(**conv() | changes)


@pytest.mark.parametrize("width", [2, 4, 16])
def test_symmetric_convolution_has_a_centre(width: int):
    with pytest.raises(ValueError, match=f"weight must have an odd number of taps, got {width}"):
        symmetric_conv1d(zeros(2, 5, 4), zeros(4, width))


@pytest.mark.parametrize(("changes", "message"), STEP, ids=texts(STEP))
def test_step_names_the_bad_argument(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        selective_scan_step(**step(**changes))


@pytest.mark.parametrize(("changes", "message"), CONV_STEP, ids=texts(CONV_STEP))
def test_convolution_step_names_the_bad_argument(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        causal_conv1d_step(**conv_step(**changes))


@pytest.mark.parametrize("op", [selective_scan, causal_conv1d])
def test_no_second_derivatives(op: Callable[..., Tensor]):
    inputs = scan() if op is selective_scan else conv()
    (dx,) = torch.autograd.grad(op(**inputs).square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("op", [selective_scan, causal_conv1d])
def test_no_forward_mode_gradient(op: Callable[..., Tensor]):
    given = {k: v.detach() for k, v in (scan() if op is selective_scan else conv()).items()}
    x = given.pop("x")
    with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
        torch.func.jvp(lambda v: op(v, **given), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("op", [selective_scan, causal_conv1d])
def test_no_vmap(op: Callable[..., Tensor]):
    given = {k: v.detach() for k, v in (scan() if op is selective_scan else conv()).items()}
    x = given.pop("x")
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda v: op(v, **given))(x.expand(3, -1, -1, -1))
