"""The short convolution against its definition in float64, and what holds whatever its code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.op_cases import (
    LAYOUTS,
    assert_all_near,
    assert_equal,
    compare,
    conv_inputs,
    conv_ref,
    each,
    evaluate,
    pack,
)
from torch import Tensor

from scanweave.core import causal_conv1d, causal_conv1d_step, symmetric_conv1d

pytestmark = pytest.mark.poison
Check = Callable[..., None]
SHAPES = [(1, 1, 1), (2, 63, 5), (2, 128, 64), (3, 100, 130)]
# float16 and bfloat16 activations come with float32 weights, as in a block under autocast
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
]
RAGGED = (0, 5, 1, 0, 12, 2, 3, 0)
ALL: dict[str, Any] = {"return_final_state": True}


def symmetric_ref(*args: Any, **kwargs: Any) -> Any:
    return conv_ref(*args, **kwargs, symmetric=True)


def run(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return causal_conv1d(*args, **kwargs, return_final_state=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "weights"), DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(
    assert_near: Check, shape: tuple, dtype: torch.dtype, weights: torch.dtype, reverse: bool
):
    inputs = conv_inputs(*shape, width=4, dtype=dtype, weights=weights)
    compare(assert_near, causal_conv1d, conv_ref, inputs, activation="silu", reverse=reverse, **ALL)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 9, 16, 33])
def test_every_width_and_option(assert_near: Check, width: int, packed: bool):
    batch, sequences = (1, len(RAGGED)) if packed else (2, None)
    cu = pack(RAGGED) if packed else None
    for without in ((), ("bias",), ("initial_state",), ("bias", "initial_state")):
        inputs = conv_inputs(batch, sum(RAGGED), 3, width, sequences=sequences, without=without)
        for reverse, activation in ((False, None), (False, "silu"), (True, None), (True, "silu")):
            compare(
                assert_near,
                causal_conv1d,
                conv_ref,
                inputs,
                activation=activation,
                reverse=reverse,
                cu_seqlens=cu,
                **ALL,
            )


@pytest.mark.parametrize("width", [4, 9])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_fewer_tokens_than_taps(assert_near: Check, length: int, width: int):
    for without in ((), ("initial_state",)):
        inputs = conv_inputs(2, length, 3, width, without=without)
        for reverse in (False, True):
            compare(assert_near, causal_conv1d, conv_ref, inputs, reverse=reverse, **ALL)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [1, 3, 7, 15])
def test_symmetric_equals_definition(assert_near: Check, width: int, packed: bool):
    cu = pack(RAGGED) if packed else None
    for without in (("initial_state",), ("bias", "initial_state")):
        inputs = conv_inputs(1 if packed else 2, sum(RAGGED), 3, width, without=without)
        for activation in (None, "silu"):
            compare(
                assert_near,
                symmetric_conv1d,
                symmetric_ref,
                inputs,
                activation=activation,
                cu_seqlens=cu,
            )


@pytest.mark.parametrize(("dtype", "weights"), DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_symmetric_dtypes(
    assert_near: Check, shape: tuple, dtype: torch.dtype, weights: torch.dtype
):
    inputs = conv_inputs(*shape, width=7, dtype=dtype, weights=weights, without=("initial_state",))
    compare(assert_near, symmetric_conv1d, symmetric_ref, inputs, activation="silu")


def test_equals_the_frameworks_convolution(assert_near: Check):
    given = conv_inputs(2, 20, 6, 4, without=("initial_state",))
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3, dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(given["weight"].unsqueeze(1))
        assert conv.bias is not None
        conv.bias.copy_(given["bias"])
    expected = F.silu(conv(given["x"].transpose(1, 2))[..., :20]).transpose(1, 2)
    assert_near(causal_conv1d(**given, activation="silu"), expected)


def test_one_tap_per_lag():
    """Tap j of four hears the input of 3 - j steps ago; mirrored, of 3 - j steps ahead."""
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 6, 1)
    for j in range(4):
        weight = torch.zeros(1, 4, dtype=torch.float64)
        weight[0, j] = 1.0
        past = F.pad(x, (0, 0, 3 - j, 0))[:, :6]
        assert torch.equal(causal_conv1d(x, weight), past)
        future = F.pad(x, (0, 0, 0, 3 - j))[:, 3 - j :]
        assert torch.equal(causal_conv1d(x, weight, reverse=True), future)
    weight = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(symmetric_conv1d(x, weight), F.pad(x, (0, 0, 1, 0))[:, :6])


def test_gradient_of_one_output_only(assert_near: Check):
    inputs = conv_inputs(2, 9, 3, 4)
    compare(assert_near, causal_conv1d, conv_ref, inputs, activation="silu")
    states = {k: inputs[k] for k in ("x", "initial_state")}
    weight = inputs["weight"].detach()

    def final(**kw: Any) -> Tensor:
        return run(**kw, weight=weight.to(kw["x"].dtype))[1]

    def final_ref(**kw: Any) -> Tensor:
        return conv_ref(**kw, weight=weight.to(kw["x"].dtype), return_final_state=True)[1]

    compare(assert_near, final, final_ref, states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_in_half_precision(assert_near: Check, dtype: torch.dtype):
    inputs = conv_inputs(2, 33, 6, 4, dtype=dtype)
    values = compare(assert_near, causal_conv1d, conv_ref, inputs, activation="silu")
    assert values["output 0"].dtype == dtype


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(assert_near: Check, layout: str, packed: bool):
    inputs = conv_inputs(1 if packed else 2, 10, 6, 4, sequences=3 if packed else None)
    cu = pack((4, 0, 6)) if packed else None
    strided = each(inputs, LAYOUTS[layout])
    assert any(not v.is_contiguous() for v in strided.values())
    for reverse in (False, True):
        options = {"reverse": reverse, "cu_seqlens": cu, "activation": "silu", **ALL}
        expected = evaluate(causal_conv1d, inputs, **options)
        assert_all_near(assert_near, evaluate(causal_conv1d, strided, **options), expected)


def test_strides_of_output_gradients_change_nothing(assert_near: Check):
    inputs = conv_inputs(2, 10, 6, 4)
    leaves = list(inputs.values())
    y = causal_conv1d(**inputs, activation="silu")
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, g, retain_graph=True)
    for change in LAYOUTS.values():
        grads = torch.autograd.grad(y, leaves, change(g), retain_graph=True)
        for a, b in zip(grads, expected, strict=True):
            assert_near(a, b)
    ones = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), ones, strict=True):  # stride 0
        assert_near(a, b)


def test_reverse_is_flip_convolve_flip(assert_near: Check):
    inputs = conv_inputs(2, 13, 3, 4)

    def flipped(x: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        y, state = run(x.flip(1), **kw)
        return y.flip(1), state

    actual = evaluate(causal_conv1d, inputs, reverse=True, **ALL)
    assert_all_near(assert_near, actual, evaluate(flipped, inputs))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cuts", [(1,), (5,), (0, 2, 3, 4), (12, 13)])
def test_pieces_with_states_are_the_whole(assert_near: Check, cuts: tuple[int, ...], reverse: bool):
    inputs = conv_inputs(2, 13, 3, 4)

    def in_pieces(x: Tensor, initial_state: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        parts = list(x.tensor_split(cuts, 1))
        out = []
        for part in parts[::-1] if reverse else parts:
            y, initial_state = run(part, initial_state=initial_state, reverse=reverse, **kw)
            out.append(y)
        return torch.cat(out[::-1] if reverse else out, 1), initial_state

    actual = evaluate(in_pieces, inputs)
    assert_all_near(assert_near, actual, evaluate(causal_conv1d, inputs, reverse=reverse, **ALL))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(assert_near: Check, reverse: bool, dtype: torch.dtype):
    inputs = conv_inputs(1, sum(RAGGED), 3, 4, sequences=len(RAGGED))
    cu = pack(RAGGED).to(dtype)

    def separately(x: Tensor, initial_state: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        parts = zip(x.split(RAGGED, 1), initial_state.split(1), strict=True)
        results = [run(v, initial_state=h, reverse=reverse, **kw) for v, h in parts]
        return torch.cat([y for y, _ in results], 1), torch.cat([h for _, h in results])

    actual = evaluate(causal_conv1d, inputs, reverse=reverse, cu_seqlens=cu, **ALL)
    assert_all_near(assert_near, actual, evaluate(separately, inputs))


def test_batch_row_does_not_depend_on_its_batch():
    inputs = conv_inputs(5, 20, 3, 4)
    together = run(**inputs)
    for i in range(5):
        rows = {k: inputs[k][i : i + 1] for k in ("x", "initial_state")}
        for v, all_rows in zip(run(**inputs | rows), together, strict=True):
            assert torch.equal(v[0], all_rows[i])


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_steps_are_the_convolution(
    assert_near: Check, dtype: torch.dtype, width: int, activation: str | None
):
    inputs = conv_inputs(2, 7, 3, width, dtype=dtype)
    exact = run(**each(inputs, Tensor.double), activation=activation)
    state = inputs.pop("initial_state").detach().clone()
    x, kept = inputs.pop("x"), state
    out = [causal_conv1d_step(x[:, t], state, **inputs, activation=activation) for t in range(7)]
    assert out[0].dtype == dtype
    assert not out[0].requires_grad
    assert_near(torch.stack(out, 1), exact[0])
    assert state is kept
    assert torch.equal(state, exact[1].to(dtype))


def test_step_keeps_a_float32_state_for_half_inputs(assert_near: Check):
    inputs = conv_inputs(2, 7, 3, 4, dtype=torch.bfloat16, without=("initial_state",))
    state = torch.zeros(2, 3, 3)
    x = inputs.pop("x")
    out = [causal_conv1d_step(x[:, t], state, **inputs) for t in range(7)]
    assert_near(torch.stack(out, 1), causal_conv1d(x.double(), **each(inputs, Tensor.double)))
    assert torch.equal(state, x[:, -3:].float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["x", "initial_state"])
def test_bad_values_stay_in_their_sequence(name: str, bad: float, reverse: bool):
    lengths, owner = (3, 0, 1, 6, 1), 3
    inputs = conv_inputs(1, 11, 3, 4, sequences=5)
    spoiled = inputs[name].detach().clone()
    spoiled[(owner,) if name == "initial_state" else (0, slice(4, 10))] = bad
    options = {"reverse": reverse, "cu_seqlens": pack(lengths), "activation": "silu", **ALL}
    clean = evaluate(causal_conv1d, inputs, **options)
    actual = evaluate(causal_conv1d, inputs | {name: spoiled.requires_grad_()}, **options)
    tokens, rows = [0, 1, 2, 3, 10], [0, 1, 2, 4]
    for key in ("output 0", "gradient of x"):
        assert torch.equal(actual[key][:, tokens], clean[key][:, tokens]), key
    for key in ("output 1", "gradient of initial_state"):
        assert torch.equal(actual[key][rows], clean[key][rows]), key


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_reach_the_window_only(bad: float):
    inputs = {k: v.detach() for k, v in conv_inputs(2, 12, 3, 4).items()}
    spoiled = inputs | {"x": inputs["x"].clone()}
    spoiled["x"][1, 5, 2] = bad
    for reverse, window in ((False, slice(5, 9)), (True, slice(2, 6))):
        clean, y = run(**inputs, reverse=reverse)[0], run(**spoiled, reverse=reverse)[0]
        same = torch.ones_like(y, dtype=torch.bool)
        same[1, window, 2] = False
        assert torch.equal(y[same], clean[same])
        assert not torch.isfinite(y[~same]).any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_by_finite_differences(activation: str | None, packed: bool):
    inputs = conv_inputs(1 if packed else 2, 5, 3, 4, sequences=3 if packed else None)
    cu = pack((2, 0, 3)) if packed else None

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, bias, state = tensors
        return run(x, weight, bias, activation, reverse=packed, initial_state=state, cu_seqlens=cu)

    assert torch.autograd.gradcheck(f, list(inputs.values()))


def test_symmetric_gradients_by_finite_differences():
    inputs = conv_inputs(2, 5, 3, 3, without=("initial_state",))
    assert torch.autograd.gradcheck(
        lambda x, w, b: symmetric_conv1d(x, w, b, "silu"), list(inputs.values())
    )


def test_leaves_inputs_alone_and_results_own_their_memory():
    for width in (1, 4):
        inputs = conv_inputs(2, 9, 3, width)
        before = {name: v.detach().clone() for name, v in inputs.items()}
        y, state = run(**inputs)
        assert y.is_contiguous()
        pointers = {
            v.data_ptr() for v in (y, state, inputs["x"], inputs["initial_state"]) if v.numel()
        }
        assert len(pointers) == (4 if width > 1 else 2)
        for name, v in inputs.items():
            assert torch.equal(v, before[name]), name
    assert_equal({"y": y.detach()}, {"y": causal_conv1d(**inputs).detach()})


@pytest.mark.parametrize("length", [2, 3, 9])
def test_final_state_is_a_copy(length: int):
    """It is kept while its inputs are overwritten, as in a loop over one buffer."""
    x, weight = torch.randn(2, length, 3), torch.randn(3, 4)
    _, state = causal_conv1d(x, weight, return_final_state=True)
    before = state.clone()
    x.zero_()
    assert torch.equal(state, before)
