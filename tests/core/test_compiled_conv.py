"""The compiled short convolution on a CPU: outputs and gradients, and when it runs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
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

from scanweave.core import causal_conv1d, symmetric_conv1d
from scanweave.core.ops.conv import compiled

pytestmark = pytest.mark.poison
Check = Callable[..., None]
# around a piece of 256 tokens, a window of 32 and a panel of 4 vectors, which are 16 to 64 channels
SHAPES = [(1, 1, 1), (2, 31, 5), (3, 33, 64), (2, 128, 130), (1, 255, 16), (3, 300, 65)]
# several in a piece, and one in several
RAGGED = (0, 5, 1, 0, 250, 64, 2, 300, 0)
ALL: dict[str, Any] = {"return_final_state": True, "activation": "silu"}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs the compiled functions, both; skips where there is no compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not compiled.native.types:
        pytest.skip(f"no compiled convolution ({compiled.native.status()})")
    calls = []
    run = compiled.native.run

    def spy(name: str, arguments: list[int]) -> None:
        calls.append(name)
        run(name, arguments)

    monkeypatch.setattr(compiled.native, "run", spy)
    yield
    assert set(calls) == {"scanweave_conv_forward", "scanweave_conv_backward"}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test; any work is worth a thread."""
    monkeypatch.setattr(compiled, "WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def symmetric_ref(*args: Any, **kwargs: Any) -> Any:
    return conv_ref(*args, **kwargs, symmetric=True)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(assert_near: Check, shape: tuple, reverse: bool):
    inputs = conv_inputs(*shape, width=4, dtype=torch.float32)
    compare(assert_near, causal_conv1d, conv_ref, inputs, reverse=reverse, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 weights", "all 16 bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half_precision_equals_definition(
    assert_near: Check, dtype: torch.dtype, weights: torch.dtype | None
):
    if dtype not in compiled.native.types:
        pytest.skip("the compiler knows no float16")
    for shape in ((2, 45, 33), (1, 300, 70), (1, 1, 1)):
        inputs = conv_inputs(*shape, width=4, dtype=dtype, weights=weights)
        for reverse in (False, True):
            compare(assert_near, causal_conv1d, conv_ref, inputs, reverse=reverse, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", range(1, 17))
def test_every_width_and_option(assert_near: Check, width: int, packed: bool):
    lengths = (0, 5, 1, 0, 33, 2, 3, 0)
    batch, sequences = (1, len(lengths)) if packed else (2, None)
    cu = pack(lengths) if packed else None
    for without in ((), ("bias",), ("initial_state",), ("bias", "initial_state")):
        inputs = conv_inputs(
            batch, sum(lengths), 3, width, sequences=sequences, without=without, dtype=torch.float32
        )
        for reverse, activation in ((False, None), (False, "silu"), (True, None), (True, "silu")):
            options = {"activation": activation, "reverse": reverse, "cu_seqlens": cu}
            compare(assert_near, causal_conv1d, conv_ref, inputs, **options)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [1, 3, 5, 7, 15])
def test_symmetric_equals_definition(assert_near: Check, width: int, packed: bool):
    cu = pack(RAGGED) if packed else None
    for without in (("initial_state",), ("bias", "initial_state")):
        batch = 1 if packed else 2
        inputs = conv_inputs(batch, sum(RAGGED), 5, width, without=without, dtype=torch.float32)
        for activation in (None, "silu"):
            options = {"activation": activation, "cu_seqlens": cu}
            compare(assert_near, symmetric_conv1d, symmetric_ref, inputs, **options)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("width", [4, 9])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_fewer_tokens_than_taps(assert_near: Check, length: int, width: int):
    inputs = conv_inputs(2, length, 3, width, dtype=torch.float32)
    for reverse in (False, True):
        compare(assert_near, causal_conv1d, conv_ref, inputs, reverse=reverse, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_equals_definition(assert_near: Check, dtype: torch.dtype, reverse: bool):
    inputs = conv_inputs(1, sum(RAGGED), 70, 4, sequences=len(RAGGED), dtype=torch.float32)
    cu = pack(RAGGED).to(dtype)
    compare(assert_near, causal_conv1d, conv_ref, inputs, cu_seqlens=cu, reverse=reverse, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_portable_path(
    assert_near: Check, monkeypatch: pytest.MonkeyPatch, packed: bool, dtype: torch.dtype
):
    sequences = len(RAGGED) if packed else None
    batch = 1 if packed else 2
    inputs = conv_inputs(batch, sum(RAGGED), 33, 4, sequences=sequences, dtype=dtype)
    options = {"cu_seqlens": pack(RAGGED) if packed else None, **ALL}
    actual = evaluate(causal_conv1d, inputs, **options)
    monkeypatch.setattr(compiled, "takes", lambda _: False)
    assert_all_near(assert_near, actual, evaluate(causal_conv1d, inputs, **options))


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = conv_inputs(2, 40, 18, 4, dtype=dtype)
        strided = each(inputs, LAYOUTS[layout])
        assert any(not v.is_contiguous() for v in strided.values())
        for reverse in (False, True):
            expected = evaluate(causal_conv1d, inputs, reverse=reverse, **ALL)
            assert_equal(evaluate(causal_conv1d, strided, reverse=reverse, **ALL), expected)


@pytest.mark.usefixtures("used")
def test_strides_of_output_gradients_change_nothing():
    inputs = conv_inputs(2, 40, 18, 4, dtype=torch.float32)
    leaves = list(inputs.values())
    y = causal_conv1d(**inputs, activation="silu")
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, g, retain_graph=True)
    for change in LAYOUTS.values():
        grads = torch.autograd.grad(y, leaves, change(g), retain_graph=True)
        for a, b in zip(grads, expected, strict=True):
            assert torch.equal(a, b)
    ones = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), ones, strict=True):  # stride 0
        assert torch.equal(a, b)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
def test_threads_change_nothing(threads: Callable[[int], None], packed: bool):
    sequences = len(RAGGED) if packed else None
    batch = 1 if packed else 3
    inputs = conv_inputs(batch, sum(RAGGED), 130, 4, sequences=sequences, dtype=torch.float32)
    options = {"cu_seqlens": pack(RAGGED) if packed else None, **ALL}
    threads(1)
    alone = evaluate(causal_conv1d, inputs, **options)
    for count in (2, 7):
        threads(count)
        assert_equal(evaluate(causal_conv1d, inputs, **options), alone)


def test_small_work_starts_no_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for shape, expected in (((2, 9, 6), 1), ((2, 512, 256), 4)):
            x = torch.zeros(shape)
            weight = torch.zeros(shape[2], 4)
            call = compiled._Call(x, weight, None, None, None, 3, False, True)
            assert call.arguments[0] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("used")
def test_batch_row_does_not_depend_on_its_batch():
    inputs = conv_inputs(4, 100, 20, 4, dtype=torch.float32)
    together = evaluate(causal_conv1d, inputs, **ALL)
    for i in range(4):
        rows = {k: inputs[k][i : i + 1] for k in ("x", "initial_state")}
        y, state = causal_conv1d(**inputs | rows, **ALL)
        assert torch.equal(y[0], together["output 0"][i])
        assert torch.equal(state[0], together["output 1"][i])


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["x", "initial_state"])
def test_bad_values_stay_in_their_sequence(name: str, bad: float, reverse: bool):
    lengths, owner = (40, 0, 1, 300, 3), 3
    inputs = conv_inputs(1, sum(lengths), 18, 4, sequences=5, dtype=torch.float32)
    spoiled = inputs[name].detach().clone()
    spoiled[(owner,) if name == "initial_state" else (0, slice(41, 341))] = bad
    options = {"reverse": reverse, "cu_seqlens": pack(lengths), **ALL}
    clean = evaluate(causal_conv1d, inputs, **options)
    actual = evaluate(causal_conv1d, inputs | {name: spoiled.requires_grad_()}, **options)
    tokens, rows = [*range(41), 341, 342, 343], [0, 1, 2, 4]
    for key in ("output 0", "gradient of x"):
        assert torch.equal(actual[key][:, tokens], clean[key][:, tokens]), key
    for key in ("output 1", "gradient of initial_state"):
        assert torch.equal(actual[key][rows], clean[key][rows]), key


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("size", [-1e4, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4])
def test_extreme_inputs(assert_near: Check, size: float):
    inputs = conv_inputs(1, 12, 3, 1, without=("initial_state", "bias"), dtype=torch.float32)
    inputs["x"] = torch.full_like(inputs["x"], size).requires_grad_()
    inputs["weight"] = torch.ones_like(inputs["weight"]).requires_grad_()
    actual = evaluate(causal_conv1d, inputs, activation="silu")
    exact = evaluate(conv_ref, each(inputs, torch.Tensor.double), activation="silu")
    for key, v in actual.items():
        # a sigmoid below the normal numbers may be zero, before it is multiplied
        limit = 1e-5 * exact[key].abs().max() + 1e6 * torch.finfo(torch.float32).tiny
        assert ((v - exact[key]).abs() <= limit).all(), key


@pytest.mark.parametrize("sizes", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_empty_inputs(sizes: tuple[int, int, int]):
    inputs = conv_inputs(*sizes, 4, dtype=torch.float32)
    values = evaluate(causal_conv1d, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert values["gradient of initial_state"].shape == (sizes[0], 3, sizes[2])
    assert not values["gradient of weight"].any()
    assert not values["gradient of bias"].any()


def test_no_sequences():
    inputs = conv_inputs(1, 0, 4, 4, sequences=0, dtype=torch.float32)
    values = evaluate(causal_conv1d, inputs, cu_seqlens=pack(()), **ALL)
    assert values["output 1"].shape == (0, 3, 4)
    assert not values["gradient of weight"].any()


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool):
    inputs = conv_inputs(1 if packed else 2, 11, 4, 4, sequences=3 if packed else None)
    tensors = [v.detach().float() for v in inputs.values()]
    cu = pack((3, 0, 8)) if packed else None
    for reverse in (False, True):
        given = (*tensors, cu, 3, reverse, True)
        torch.library.opcheck(torch.ops.scanweave.short_conv.default, given)
        dy = torch.randn_like(tensors[0])
        torch.library.opcheck(torch.ops.scanweave.short_conv_backward.default, (dy, *given))


def test_doubles_stay_with_the_portable_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "conv_forward", None)
    monkeypatch.setattr(compiled, "conv_backward", None)
    evaluate(causal_conv1d, conv_inputs(1, 5, 4, 4), **ALL)
    inputs = conv_inputs(1, 5, 4, 4, dtype=torch.float32, weights=torch.float64)
    evaluate(causal_conv1d, inputs, **ALL)
