"""The linear scan on a CPU: all paths against the definition, and what holds whatever the path."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.linear_cases import compare, linear_inputs, near
from tests.core.op_cases import LAYOUTS, assert_equal, each, evaluate, pack
from torch import Tensor

from scanweave.core.ops.linear import compiled, linear_scan, linear_scan_ref, linear_scan_step
from scanweave.core.ops.linear import op as linear_op

pytestmark = pytest.mark.poison
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
LENGTHS = (3, 0, 1, 6, 1)
CONSTANT = pytest.mark.parametrize("constant", [False, True])
REVERSE = pytest.mark.parametrize("reverse", [False, True])
KINDS = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
BOTH = pytest.mark.parametrize("op", [linear_scan, linear_scan_ref])


@BOTH
def test_equals_its_token_to_token_matrix(assert_near: Check, op: Callable[..., Tensor]):
    given = linear_inputs(2, 14, 3, without=("initial_state",))
    x, log_a = (v.detach() for v in given.values())
    total = log_a.cumsum(1)
    M = torch.exp(total.unsqueeze(2) - total.unsqueeze(1)).permute(0, 3, 1, 2).tril()
    assert_near(op(x, log_a), (M @ x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2))


@BOTH
def test_constant_decay_is_a_geometric_series(assert_near: Check, op: Callable[..., Any]):
    rate = torch.tensor([-0.7, 0.0], dtype=torch.float64)
    h, final = op(torch.ones(1, 40, 2, dtype=torch.float64), rate, return_final_state=True)
    t = torch.arange(1, 41, dtype=torch.float64)
    expected = torch.stack([(1 - torch.exp(-0.7 * t)) / (1 - torch.exp(rate[0])), t], 1)
    assert_near(h[0], expected)
    assert_near(final[0], expected[-1])


@BOTH
def test_imaginary_decay_rotates(assert_near: Check, op: Callable[..., Tensor]):
    x = torch.zeros(1, 9, 1, dtype=torch.complex128)
    x[0, 0] = 2.0
    h = op(x, torch.tensor([0.5j * torch.pi], dtype=torch.complex128))
    expected = torch.tensor([2, 2j, -2, -2j] * 2 + [2], dtype=torch.complex128)
    assert_near(torch.view_as_real(h.flatten()), torch.view_as_real(expected))
    # an imaginary part of pi is a negative decay: alternating signs
    h = op(x, torch.tensor([1j * torch.pi], dtype=torch.complex128))
    assert_near(h.real.flatten(), torch.tensor([2.0, -2.0] * 4 + [2.0], dtype=torch.float64))


@BOTH
def test_infinite_log_forgets(op: Callable[..., Any]):
    x = torch.randn(1, 4, 2)
    log_a = torch.full((1, 4, 2), float("-inf"))
    assert torch.equal(op(x, log_a, initial_state=torch.ones(1, 2)), x)


# lengths around where the steps are cut, channels around a panel of the compiled scan
@KINDS
@CONSTANT
@REVERSE
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 3), (3, 70, 5), (1, 131, 2)], ids=str)
def test_portable(
    assert_near: Check, sizes: tuple, reverse: bool, constant: bool, dtype: torch.dtype
):
    inputs = linear_inputs(*sizes, constant=constant, dtype=dtype)
    compare(assert_near, linear_scan, linear_scan_ref, inputs, reverse=reverse, **ALL)


@CONSTANT
@REVERSE
@pytest.mark.parametrize("path", ["compiled", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_paths(
    assert_near: Check,
    packed: bool,
    dtype: torch.dtype,
    path: str,
    reverse: bool,
    constant: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    if path == "portable":
        monkeypatch.setattr(compiled, "takes", lambda _: False)
    elif dtype not in compiled.native.types:
        pytest.skip("no compiler that knows this dtype")
    lengths = (33, 0, 1, 64, 31)
    inputs = linear_inputs(
        1 if packed else 2,
        sum(lengths) if packed else 65,
        67,
        constant=constant,
        dtype=dtype,
        decays=torch.float32 if constant else dtype,
        sequences=len(lengths) if packed else None,
    )
    cu = pack(lengths) if packed else None
    compare(
        assert_near, linear_scan, linear_scan_ref, inputs, reverse=reverse, cu_seqlens=cu, **ALL
    )


def test_compiled_is_used(monkeypatch: pytest.MonkeyPatch):
    if not compiled.native.types:
        pytest.skip("no compiler")
    monkeypatch.setattr(linear_op.portable, "scan_forward", None)
    monkeypatch.setattr(linear_op.portable, "scan_backward", None)
    evaluate(linear_scan, linear_inputs(2, 5, 3, dtype=torch.float32), **ALL)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=str)
@pytest.mark.parametrize("without", [(), ("initial_state",)], ids=str)
def test_mixed_kinds(assert_near: Check, dtype: torch.dtype, without: tuple[str, ...]):
    """A real input with complex decays, and the other way round."""
    other = torch.float32 if dtype.is_complex else torch.complex64
    inputs = linear_inputs(2, 7, 3, constant=True, dtype=dtype, decays=other, without=without)
    actual = compare(assert_near, linear_scan, linear_scan_ref, inputs, **ALL)
    assert actual["output 0"].dtype == actual["output 1"].dtype == torch.complex64


@CONSTANT
def test_any_number_of_channel_axes(assert_near: Check, constant: bool):
    inputs = linear_inputs(2, 6, 3, 4, constant=constant)
    actual = compare(assert_near, linear_scan, linear_scan_ref, inputs, **ALL)
    assert actual["output 0"].shape == (2, 6, 3, 4)
    assert actual["output 1"].shape == (2, 3, 4)
    flat = {k: v.detach().flatten(-2).requires_grad_() for k, v in inputs.items()}
    same = evaluate(linear_scan, flat)["output 0"]
    assert torch.equal(same, actual["output 0"].flatten(2))


@KINDS
def test_reverse_is_flip_scan_flip(assert_near: Check, dtype: torch.dtype):
    inputs = linear_inputs(2, 37, 3, dtype=dtype)

    def flipped(**kw: Any) -> tuple[Tensor, Tensor]:
        turned = {k: v if k == "initial_state" else v.flip(1) for k, v in kw.items()}
        h, state = linear_scan(**turned, **ALL)
        return h.flip(1), state

    near(assert_near, evaluate(linear_scan, inputs, reverse=True, **ALL), evaluate(flipped, inputs))


@KINDS
@REVERSE
@pytest.mark.parametrize("cuts", [(10,), (1, 1, 20), (0, 5), (36, 37)])
def test_pieces_with_states_are_the_whole(
    assert_near: Check, cuts: tuple[int, ...], reverse: bool, dtype: torch.dtype
):
    inputs = linear_inputs(2, 37, 3, dtype=dtype)

    def in_pieces(x: Tensor, log_a: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        spans = [slice(*v) for v in itertools.pairwise([0, *cuts, 37])]
        state, out = initial_state, []
        for span in reversed(spans) if reverse else spans:
            options = {"initial_state": state, "reverse": reverse, **ALL}
            h, state = linear_scan(x[:, span], log_a[:, span], **options)
            out.append(h)
        return torch.cat(out[::-1] if reverse else out, 1), state

    whole = evaluate(linear_scan, inputs, reverse=reverse, **ALL)
    near(assert_near, evaluate(in_pieces, inputs), whole)


@KINDS
@CONSTANT
@REVERSE
def test_packed_is_separate(assert_near: Check, reverse: bool, constant: bool, dtype: torch.dtype):
    total = sum(LENGTHS)
    inputs = linear_inputs(1, total, 3, constant=constant, dtype=dtype, sequences=len(LENGTHS))
    cu = pack(LENGTHS)

    def separate(x: Tensor, log_a: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        out, states = [], []
        for i, span in enumerate(itertools.pairwise(cu.tolist())):
            rows = slice(*span)
            decays = log_a if constant else log_a[:, rows]
            options = {"initial_state": initial_state[i : i + 1], "reverse": reverse, **ALL}
            h, state = linear_scan(x[:, rows], decays, **options)
            out.append(h)
            states.append(state)
        return torch.cat(out, 1), torch.cat(states)

    packed = evaluate(linear_scan, inputs, cu_seqlens=cu, reverse=reverse, **ALL)
    near(assert_near, packed, evaluate(separate, inputs))
    compare(
        assert_near, linear_scan, linear_scan_ref, inputs, cu_seqlens=cu, reverse=reverse, **ALL
    )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64], ids=str
)
@CONSTANT
def test_steps_are_the_scan(assert_near: Check, constant: bool, dtype: torch.dtype):
    given = linear_inputs(2, 9, 3, 2, constant=constant, dtype=dtype)
    x, log_a, state = (v.detach() for v in given.values())
    h, final = linear_scan(x, log_a, initial_state=state, **ALL)
    state = state.clone()
    steps = [linear_scan_step(state, x[:, t], log_a if constant else log_a[:, t]) for t in range(9)]
    assert all(v.data_ptr() != state.data_ptr() for v in steps)
    near(
        assert_near,
        {"output 0": torch.stack(steps, 1), "output 1": state},
        {"output 0": h, "output 1": final},
    )


@KINDS
@pytest.mark.parametrize("packed", [False, True])
@CONSTANT
def test_gradcheck(constant: bool, packed: bool, dtype: torch.dtype):
    lengths = (2, 0, 3)
    inputs = linear_inputs(
        1 if packed else 2,
        5,
        2,
        constant=constant,
        dtype=dtype,
        sequences=3 if packed else None,
    )
    cu = pack(lengths) if packed else None

    def f(x: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return linear_scan(x, log_a, initial_state=state, cu_seqlens=cu, **ALL)

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("rate", [0.0, -1e-6, -30.0, -1e4, float("-inf")])
def test_extreme_decays(assert_near: Check, rate: float, dtype: torch.dtype):
    """No overflow, and nothing is lost over 5000 steps without decay."""
    x = torch.randn(1, 5000, 2, dtype=dtype)
    log_a = torch.full((1, 5000, 2), rate, dtype=torch.float32)
    inputs = {"x": x.requires_grad_(), "log_a": log_a.requires_grad_()}
    # exp(-1e-6) in float32 is off by up to 3e-8, the same way at each of 5000 steps
    factor = 30.0 if rate == -1e-6 else 1.0
    compare(assert_near, linear_scan, linear_scan_ref, inputs, factor=factor, **ALL)


@pytest.mark.parametrize("path", ["compiled", "portable"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "log_a", "initial_state"])
def test_bad_values_stay_in_their_sequence(
    name: str, bad: float, path: str, monkeypatch: pytest.MonkeyPatch
):
    if path == "portable":
        monkeypatch.setattr(compiled, "takes", lambda _: False)
    inputs = linear_inputs(1, 6, 3, sequences=4, dtype=torch.float32)
    spoiled = inputs[name].detach().clone()
    spoiled[(2,) if name == "initial_state" else (0, slice(3, 5))] = bad
    options = {"cu_seqlens": pack((2, 1, 2, 1)), **ALL}
    clean = evaluate(linear_scan, inputs, **options)
    actual = evaluate(linear_scan, inputs | {name: spoiled.requires_grad_()}, **options)
    for key, v in actual.items():
        index = [0, 1, 3] if key == "output 1" or key.endswith("state") else [0, 1, 2, 5]
        axis = 0 if len(index) == 3 else 1
        assert torch.equal(
            v.index_select(axis, torch.tensor(index)),
            clean[key].index_select(axis, torch.tensor(index)),
        ), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0), (0, 0, 0)], ids=str)
@CONSTANT
def test_empty(sizes: tuple[int, int, int], constant: bool, dtype: torch.dtype):
    inputs = linear_inputs(*sizes, constant=constant, dtype=dtype)
    values = evaluate(linear_scan, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert not values["gradient of log_a"].any()
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], inputs["initial_state"])
    lengths = (0, 0)
    inputs = linear_inputs(1, 0, 4, constant=constant, dtype=dtype, sequences=2)
    values = evaluate(linear_scan, inputs, cu_seqlens=pack(lengths), **ALL)
    assert torch.equal(values["output 1"], inputs["initial_state"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
def test_layouts(assert_near: Check, dtype: torch.dtype, layout: str):
    inputs = linear_inputs(2, 5, 4, dtype=dtype)
    expected = evaluate(linear_scan, inputs, **ALL)
    near(assert_near, evaluate(linear_scan, each(inputs, LAYOUTS[layout]), **ALL), expected)


def test_threads_change_nothing():
    inputs = linear_inputs(3, 700, 130, dtype=torch.float32, constant=True)
    first = evaluate(linear_scan, inputs, **ALL)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_equal(evaluate(linear_scan, inputs, **ALL), first)
    finally:
        torch.set_num_threads(before)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


SCAN_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": 3}, r"x must be \(B, L, D\) or have more axes of channels, got int"),
    ({"x": zeros(2, 4)}, r"x must be .* got \(2, 4\)"),
    ({"x": zeros(2, 5, 4, dtype=torch.int32)}, "x must be floating point or complex"),
    ({"log_a": 1.0}, "log_a must be a tensor, got float"),
    ({"log_a": zeros(5)}, r"log_a must be \(4,\) for constant decays or \(2, 5, 4\)"),
    ({"log_a": zeros(4, dtype=torch.int64)}, "log_a must be floating point or complex"),
    ({"log_a": zeros(4, device="meta")}, "log_a must be on cpu as x is, got meta"),
    ({"initial_state": zeros(2, 3)}, r"initial_state must be \(B, D\) = \(2, 4\), got \(2, 3\)"),
    ({"initial_state": 0}, "initial_state must be a tensor"),
    ({"cu_seqlens": pack((5,))}, "x must have batch 1 with cu_seqlens"),
    ({"x": zeros(1, 5, 4), "cu_seqlens": pack((2, 2))}, "cu_seqlens must start at 0 and end at"),
]


@pytest.mark.parametrize(("changes", "message"), SCAN_ERRORS, ids=[v[1] for v in SCAN_ERRORS])
def test_scan_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        linear_scan(**{"x": zeros(2, 5, 4), "log_a": zeros(4)} | changes)


STEP_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": zeros(2)}, r"x must be \(B, D\) or have more axes of channels, got \(2,\)"),
    ({"log_a": zeros(3)}, r"log_a must be \(4,\) for constant decays or \(2, 4\)"),
    ({"state": zeros(2, 3)}, r"state must be \(B, D\) = \(2, 4\)"),
    ({"state": zeros(2, 4, dtype=torch.bfloat16)}, "state must be torch.float32 for these inputs"),
    ({"log_a": zeros(4, dtype=torch.complex64)}, "state must be torch.complex64 for these inputs"),
]


@pytest.mark.parametrize(("changes", "message"), STEP_ERRORS, ids=[v[1] for v in STEP_ERRORS])
def test_step_refuses(changes: dict[str, Any], message: str):
    given = {"state": zeros(2, 4), "x": zeros(2, 4), "log_a": zeros(4)}
    with pytest.raises(ValueError, match=message):
        linear_scan_step(**given | changes)
