"""What holds for the selective scan whatever its definition's code: closed forms and invariants."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.op_cases import (
    assert_all_near,
    bidirectional_ref,
    each,
    evaluate,
    flat,
    pack,
    pair_inputs,
    scan_inputs,
)
from torch import Tensor

from scanweave.core import bidirectional_selective_scan, selective_scan, selective_scan_step
from scanweave.core.ops.selective import selective_scan_ref

pytestmark = pytest.mark.poison
Check = Callable[..., None]
LENGTHS = (3, 0, 1, 6, 1)
BOTH = pytest.mark.parametrize("op", [selective_scan, selective_scan_ref])


def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return selective_scan(*args, **kwargs, return_final_state=True)


def slices(inputs: dict[str, Any], axis: int, part: slice | list[int]) -> dict[str, Any]:
    """The part of batch (0) or length (1) of what has these axes."""
    index = (part,) if axis == 0 else (slice(None), part)
    return {
        name: v[index] if name in ("x", "dt", "B", "C", "z") else v for name, v in inputs.items()
    }


@BOTH
def test_no_decay_is_a_cumulative_sum(assert_near: Check, op: Callable[..., Any]):
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    ones = torch.ones(2, 50, 1, dtype=torch.float64)
    A = torch.zeros(3, 1, dtype=torch.float64)
    y = op(x, torch.ones_like(x), A, ones, ones, dt_softplus=False)
    assert_near(y, x.cumsum(1))
    back = op(x, torch.ones_like(x), A, ones, ones, dt_softplus=False, reverse=True)
    assert_near(back, x.flip(1).cumsum(1).flip(1))


@BOTH
def test_constant_input_is_a_geometric_series(assert_near: Check, op: Callable[..., Any]):
    delta, rate, b, c, length = 0.3, -0.7, 1.5, -2.0, 40
    x = torch.ones(1, length, 1, dtype=torch.float64)
    y, h = op(
        x,
        delta * x,
        torch.full((1, 1), rate, dtype=torch.float64),
        b * x,
        c * x,
        dt_softplus=False,
        return_final_state=True,
    )
    a = torch.tensor(delta * rate, dtype=torch.float64).exp()
    t = torch.arange(1, length + 1, dtype=torch.float64)
    series = delta * b * (1 - a**t) / (1 - a)
    assert_near(y.flatten(), c * series)
    assert_near(h.flatten(), series[-1:])


@BOTH
def test_equals_its_token_to_token_matrix(assert_near: Check, op: Callable[..., Any]):
    """Y = M x, with M[t, s] = sum_n C[t, n] exp(A[n] sum delta over (s, t]) delta[s] B[s, n]."""
    given = scan_inputs(2, 14, 4, 3, groups=2, without=("initial_state",))
    values = [v.detach() for v in given.values()]
    y = op(*values)
    x, dt, A, B, C, D, z, bias = values
    delta = F.softplus(dt + bias)
    total = delta.cumsum(1)
    span = total.unsqueeze(2) - total.unsqueeze(1)  # (B, t, s, D)
    decay = torch.exp(span.unsqueeze(-1) * A)
    B, C = (v.repeat_interleave(2, 2) for v in (B, C))
    M = torch.einsum("btdn,btsdn,bsd,bsdn->bdts", C, decay, delta, B).tril()
    y = torch.einsum("bdts,bsd->btd", M, x) + D * x
    assert_near(
        op(x, dt, A, *(v.detach() for v in (given["B"], given["C"])), D, z, bias), y * F.silu(z)
    )


@BOTH
def test_impulse_response_is_the_decay(assert_near: Check, op: Callable[..., Any]):
    x = torch.zeros(1, 20, 1, dtype=torch.float64)
    x[0, 4] = 2.0
    ones = torch.ones_like(x)
    A = torch.tensor([[-0.5]], dtype=torch.float64)
    expected = torch.zeros(20, dtype=torch.float64)
    expected[4:] = 2.0 * torch.exp(-0.5 * torch.arange(16.0, dtype=torch.float64))
    y = op(x, ones, A, ones, ones, dt_softplus=False)
    assert_near(y.flatten(), expected)


def test_linear_in_input_and_state(assert_near: Check):
    given = scan_inputs(2, 9, 6, 3)
    other = scan_inputs(2, 9, 6, 3, seed=1)
    mixed = given | {k: 2 * given[k] - 3 * other[k] for k in ("x", "initial_state")}
    parts = [run(**given), run(**given | {k: other[k] for k in ("x", "initial_state")})]
    for i, v in enumerate(run(**mixed)):
        assert_near(v, 2 * parts[0][i] - 3 * parts[1][i])


def test_reverse_is_flip_scan_flip(assert_near: Check):
    inputs = scan_inputs(2, 37, 6, 3)

    def flipped(**kw: Any) -> tuple[Tensor, Tensor]:
        turned = {k: v.flip(1) if k in ("x", "dt", "B", "C", "z") else v for k, v in kw.items()}
        y, h = run(**turned)
        return y.flip(1), h

    actual = evaluate(selective_scan, inputs, reverse=True, return_final_state=True)
    assert_all_near(assert_near, actual, evaluate(flipped, inputs))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cuts", [(10,), (1, 1, 20), (0, 5), (36, 37)])
def test_pieces_with_states_are_the_whole(assert_near: Check, cuts: tuple[int, ...], reverse: bool):
    inputs = scan_inputs(2, 37, 6, 3)

    def in_pieces(**kw: Any) -> tuple[Tensor, Tensor]:
        state = kw.pop("initial_state")
        spans = list(itertools.pairwise([0, *cuts, 37]))
        out = []
        for start, stop in reversed(spans) if reverse else spans:
            part = slices(kw, 1, slice(start, stop))
            y, state = run(**part, initial_state=state, reverse=reverse)
            out.append(y)
        return torch.cat(out[::-1] if reverse else out, 1), state

    actual = evaluate(in_pieces, inputs)
    whole = evaluate(selective_scan, inputs, reverse=reverse, return_final_state=True)
    assert_all_near(assert_near, actual, whole)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(assert_near: Check, reverse: bool, dtype: torch.dtype):
    inputs = scan_inputs(1, sum(LENGTHS), 6, 3, groups=2, sequences=len(LENGTHS))
    cu = pack(LENGTHS).to(dtype)

    def separately(**kw: Any) -> tuple[Tensor, Tensor]:
        states = kw.pop("initial_state")
        results = []
        for i, (start, length) in enumerate(zip(cu.tolist(), LENGTHS, strict=False)):
            part = slices(kw, 1, slice(start, start + length))
            results.append(run(**part, initial_state=states[i : i + 1], reverse=reverse))
        return torch.cat([y for y, _ in results], 1), torch.cat([h for _, h in results])

    actual = evaluate(
        selective_scan, inputs, reverse=reverse, cu_seqlens=cu, return_final_state=True
    )
    assert_all_near(assert_near, actual, evaluate(separately, inputs))


def test_empty_sequence_passes_its_state_and_gradient_on():
    inputs = scan_inputs(1, 6, 4, 3, sequences=4)
    _, h = run(**inputs, cu_seqlens=pack((0, 6, 0, 0)))
    state = inputs["initial_state"]
    assert torch.equal(h[[0, 2, 3]], state[[0, 2, 3]])
    g = torch.randn_like(h)
    (dstate,) = torch.autograd.grad(h, state, g)
    assert torch.equal(dstate[[0, 2, 3]], g[[0, 2, 3]])


def test_batch_row_does_not_depend_on_its_batch():
    inputs = scan_inputs(5, 40, 6, 3)
    together = [v.detach() for v in run(**inputs)]
    for i in range(5):
        rows = slices(inputs, 0, slice(i, i + 1))
        rows["initial_state"] = inputs["initial_state"][i : i + 1]
        for v, all_rows in zip(run(**rows), together, strict=True):
            assert torch.equal(v[0], all_rows[i])


@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_is_the_sum_of_two_scans(assert_near: Check, packed: bool):
    inputs = pair_inputs(1 if packed else 2, 11, 6, 3, sequences=5 if packed else None)
    cu = pack(LENGTHS) if packed else None

    def summed(**kw: Any) -> tuple[Tensor, Tensor, Tensor]:
        z = kw.pop("z")
        (yf, hf), (yr, hr) = (
            run(**{k: v[i] for k, v in kw.items()}, reverse=i == 1, cu_seqlens=cu) for i in range(2)
        )
        return ((yf + yr) * F.silu(z), hf, hr)

    actual = evaluate(bidirectional_selective_scan, inputs, cu_seqlens=cu, return_final_state=True)
    assert_all_near(assert_near, actual, evaluate(summed, inputs))
    exact = evaluate(bidirectional_ref, inputs, cu_seqlens=cu, return_final_state=True)
    assert_all_near(assert_near, actual, exact)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize(
    "without", [(), ("D", "z", "dt_bias"), ("z",), ("D",), ("dt_bias",)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_the_scan(
    assert_near: Check, dtype: torch.dtype, without: tuple[str, ...], groups: int | None
):
    inputs = scan_inputs(2, 7, 6, 3, groups=groups, without=without, dtype=dtype)
    inputs["dt"] = inputs["dt"].detach().abs()  # states that grow would leave float16
    exact = run(**each(inputs, Tensor.double), dt_softplus=groups is None)
    wide = torch.promote_types(dtype, torch.float32)
    state = inputs.pop("initial_state").detach().to(wide, copy=True)
    kept = state
    out = []
    for t in range(7):
        step = {k: v[:, t] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        out.append(selective_scan_step(state, **step, dt_softplus=groups is None))
    assert out[0].dtype == dtype
    assert not out[0].requires_grad
    assert_near(torch.stack(out, 1), exact[0])
    assert state is kept
    assert_near(state, exact[1])


def test_step_leaves_inputs_alone():
    inputs = {k: v.detach() for k, v in scan_inputs(2, 1, 6, 3).items()}
    state = inputs.pop("initial_state")
    step = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
    before = {k: v.clone() for k, v in step.items()}
    selective_scan_step(state, **step)
    for name, v in step.items():
        assert torch.equal(v, before[name]), name


POISONS = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", POISONS)
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "initial_state"])
@pytest.mark.parametrize("reverse", [False, True])
def test_bad_values_stay_in_their_sequence(name: str, bad: float, reverse: bool):
    inputs = scan_inputs(1, 11, 4, 3, sequences=5)
    owner, tokens = 3, slice(4, 10)  # the sequence of length 6

    def spoil(v: Tensor) -> Tensor:
        v = v.clone()
        v[(owner,) if name == "initial_state" else (0, 6)] = bad
        return v

    spoiled = inputs | {name: spoil(inputs[name].detach()).requires_grad_()}
    options = {"reverse": reverse, "cu_seqlens": pack(LENGTHS), "return_final_state": True}
    clean = evaluate(selective_scan, inputs, **options)
    actual = evaluate(selective_scan, spoiled, **options)
    others = [i for i in range(11) if not tokens.start <= i < tokens.stop]
    for key, v in actual.items():
        if key == "output 1" or key.endswith("initial_state"):
            rest = [i for i in range(5) if i != owner]
            assert torch.equal(v[rest], clean[key][rest]), key
        elif key == "output 0" or key[-2:] in (" x", "dt", " B", " C", " z"):
            assert torch.equal(v[:, others], clean[key][:, others]), key


@pytest.mark.parametrize("bad", POISONS)
@pytest.mark.parametrize("name", ["x", "dt"])
def test_bad_values_reach_no_earlier_step_row_or_channel(name: str, bad: float):
    inputs = {k: v.detach() for k, v in scan_inputs(2, 9, 4, 3).items()}
    clean, _ = run(**inputs)
    inputs[name] = inputs[name].clone()
    inputs[name][1, 5, 2] = bad
    y, _ = run(**inputs)
    same = torch.ones_like(y, dtype=torch.bool)
    same[1, 5:, 2] = False
    assert torch.equal(y[same], clean[same])
    # negative infinity as a time step is a step of length zero: nothing goes wrong at all
    if not (name == "dt" and bad == float("-inf")):
        assert not torch.isfinite(y[1, 5, 2])


@pytest.mark.parametrize("dt", [-100.0, -20.0, 19.9, 20.1, 25.0, 100.0, 1e4])
@pytest.mark.parametrize("rate", [0.0, -1e-6, -1.0, -1e4])
def test_extreme_steps_and_rates(dt: float, rate: float):
    inputs = scan_inputs(1, 12, 3, 2, without=("dt_bias",), dtype=torch.float32)
    for name, value in (("dt", dt), ("A", rate)):
        inputs[name] = torch.full_like(inputs[name], value).requires_grad_()
    actual = evaluate(selective_scan, inputs, return_final_state=True)
    exact = evaluate(
        selective_scan_ref,
        each(inputs, Tensor.double),
        rounded_to=[torch.float32] * 2,
        return_final_state=True,
    )
    for key, v in actual.items():
        assert torch.isfinite(v).all(), key
        # below the smallest normal float32 number, digits are lost and may be
        limit = 1e-5 * exact[key].abs().max() + torch.finfo(torch.float32).tiny
        assert (v - exact[key]).abs().max() <= limit, key


def test_growing_states_that_stay_finite(assert_near: Check):
    inputs = scan_inputs(2, 50, 4, 3)
    inputs["A"] = (0.02 + 0.3 * torch.rand(4, 3, dtype=torch.float64)).requires_grad_()
    actual = evaluate(selective_scan, inputs, return_final_state=True)
    exact = evaluate(selective_scan_ref, inputs, return_final_state=True)
    assert_all_near(assert_near, actual, exact)


@pytest.mark.parametrize("remembers", [False, True])
def test_long_sequences(assert_near: Check, remembers: bool):
    inputs = scan_inputs(1, 4096, 4, 2, dtype=torch.float32)
    if remembers:  # a memory of about a thousand steps
        inputs["A"] = torch.full((4, 2), -3e-3).requires_grad_()
    actual = evaluate(selective_scan, inputs, return_final_state=True)
    exact = evaluate(
        selective_scan,
        each(inputs, Tensor.double),
        rounded_to=[torch.float32] * 2,
        return_final_state=True,
    )
    assert_all_near(assert_near, actual, exact)
    with torch.no_grad():
        readable = selective_scan_ref(**each(inputs, Tensor.double))
    assert_near(actual["output 0"], readable)  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
def test_gradients_by_finite_differences(packed: bool, softplus: bool):
    inputs = scan_inputs(1 if packed else 2, 5, 4, 2, groups=2, sequences=3 if packed else None)
    names, cu = list(inputs), pack((2, 0, 3)) if packed else None

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        return run(**given, dt_softplus=softplus, cu_seqlens=cu, reverse=packed)

    assert torch.autograd.gradcheck(f, list(inputs.values()), fast_mode=not softplus)


def test_bidirectional_gradients_by_finite_differences():
    inputs = pair_inputs(1, 4, 2, 2)
    leaves = flat(inputs)

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = dict(zip(leaves, tensors, strict=True))
        pairs = {
            k: v if isinstance(v, Tensor) else (given[f"{k}[0]"], given[f"{k}[1]"])
            for k, v in (inputs | {"z": given["z"]}).items()
        }
        out, states = bidirectional_selective_scan(**pairs, return_final_state=True)
        return (out, *states)

    assert torch.autograd.gradcheck(f, list(leaves.values()))
