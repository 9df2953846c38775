"""The kernels of convolution and single step against float64: interpreted or on a GPU."""

import os
from collections.abc import Callable
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
    scan_inputs,
)
from torch import Tensor

from scanweave.core import causal_conv1d, selective_scan_step, symmetric_conv1d
from scanweave.core.ops.conv import kernels as conv_kernels
from scanweave.core.ops.conv import portable
from scanweave.core.ops.selective import selective_scan_ref, step

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
# the interpreter computes with NumPy, which warns where a GPU does not
OVERFLOWS = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
PACES = (conv_kernels.FORWARD, conv_kernels.BACKWARD)
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

    backward = portable.conv_backward

    def of_states(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
        """Only the first W - 1 steps, which meet an initial state."""
        if x.shape[1] >= weight.shape[1]:
            refused()
        return backward(dy, x, weight, *rest)

    monkeypatch.setattr(portable, "conv_forward", refused)
    monkeypatch.setattr(portable, "conv_backward", of_states)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 7, conv_kernels.MAX_WIDTH])
def test_convolution(assert_near: Check, device: str, width: int, reverse: bool):
    for without in (("initial_state",), ("bias", "initial_state"), ()):
        for activation in ("silu", None):
            inputs = conv_inputs(
                2, 9, 3, width, without=without, dtype=torch.float32, device=device
            )
            options = {"activation": activation, "reverse": reverse, **ALL}
            compare(assert_near, causal_conv1d, conv_ref, inputs, **options)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 16, 64), (1, 17, 65), (2, 33, 3), (1, 70, 2)])
def test_convolution_blocks(assert_near: Check, device: str, sizes: tuple[int, int, int]):
    for without in (("initial_state",), ()):
        inputs = conv_inputs(*sizes, width=4, without=without, dtype=torch.float32, device=device)
        compare(assert_near, causal_conv1d, conv_ref, inputs, activation="silu", **ALL)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [(0, 3, 1, 0, 2, 0), (17, 1, 15, 40), (1, 1, 1)], ids=str)
def test_convolution_packed(
    assert_near: Check, device: str, lengths: tuple[int, ...], reverse: bool
):
    for without in (("initial_state",), ()):
        inputs = conv_inputs(
            1,
            sum(lengths),
            3,
            4,
            sequences=len(lengths),
            without=without,
            dtype=torch.float32,
            device=device,
        )
        for dtype in (torch.int32, torch.int64):
            cu = pack(lengths, device).to(dtype)
            options = {"activation": "silu", "reverse": reverse, "cu_seqlens": cu, **ALL}
            compare(assert_near, causal_conv1d, conv_ref, inputs, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_symmetric_convolution(assert_near: Check, device: str, width: int, packed: bool):
    def reference(*args: Any, **kwargs: Any) -> Any:
        return conv_ref(*args, **kwargs, symmetric=True)

    lengths = (0, 5, 1, 3)
    cu = pack(lengths, device) if packed else None
    for activation in ("silu", None):
        inputs = conv_inputs(
            1, 9, 3, width, without=("initial_state",), dtype=torch.float32, device=device
        )
        options = {"activation": activation, "cu_seqlens": cu}
        compare(assert_near, symmetric_conv1d, reference, inputs, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_convolution_long_spans(
    assert_near: Check,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    reverse: bool,
    packed: bool,
):
    """Where few programs do, each walks many steps."""
    monkeypatch.setattr(conv_kernels, "processors", lambda device: 0)
    cu = pack((33, 1, 0, 37, 3), device) if packed else None
    for without in (("initial_state",), ()):
        inputs = conv_inputs(
            1 if packed else 2,
            74,
            5,
            4,
            sequences=5 if packed else None,
            without=without,
            dtype=torch.float32,
            device=device,
        )
        spans = [conv_kernels.grid_of(inputs["x"], 4, p).span for p in PACES]
        assert spans == [32, 76]
        options = {"activation": "silu", "reverse": reverse, "cu_seqlens": cu, **ALL}
        compare(assert_near, causal_conv1d, conv_ref, inputs, **options)


@pytest.mark.parametrize("most", [1, 1024])
def test_convolution_many_parts(
    assert_near: Check, device: str, monkeypatch: pytest.MonkeyPatch, most: int
):
    """One partial sum for every 4 tokens: more than a tile of them, and too many for a kernel."""
    monkeypatch.setattr(conv_kernels, "MOST_PARTS", most)
    without = ("initial_state", "bias") if most == 1 else ("initial_state",)
    inputs = conv_inputs(9, 33, 3, 3, without=without, dtype=torch.float32, device=device)
    compare(assert_near, causal_conv1d, conv_ref, inputs)


@HALVES
def test_convolution_half(assert_near: Check, device: str, half: torch.dtype):
    for weights, without in ((torch.float32, ("initial_state",)), (half, ())):
        inputs = conv_inputs(
            2, 9, 3, 4, without=without, dtype=half, weights=weights, device=device
        )
        compare(assert_near, causal_conv1d, conv_ref, inputs, activation="silu", **ALL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_layouts(assert_near: Check, device: str, layout: str):
    for without in ((), ("initial_state",)):
        inputs = conv_inputs(2, 5, 4, 3, without=without, dtype=torch.float32, device=device)
        strided = each(inputs, LAYOUTS[layout])
        for reverse in (False, True):
            options = {"activation": "silu", "reverse": reverse, **ALL}
            expected = evaluate(causal_conv1d, inputs, **options)
            assert_all_near(assert_near, evaluate(causal_conv1d, strided, **options), expected)


@OVERFLOWS
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_reach_the_window_only(device: str, bad: float, reverse: bool):
    inputs = conv_inputs(
        1, 9, 3, 3, sequences=3, without=("initial_state",), dtype=torch.float32, device=device
    )
    spoiled = inputs["x"].detach().clone()
    spoiled[0, 3:6] = bad
    options = {"cu_seqlens": pack((3, 3, 3), device), "reverse": reverse, "activation": "silu"}
    clean = evaluate(causal_conv1d, inputs, **options)
    actual = evaluate(causal_conv1d, inputs | {"x": spoiled.requires_grad_()}, **options)
    others = [0, 1, 2, 6, 7, 8]
    for key in ("output 0", "gradient of x"):
        assert torch.equal(actual[key][:, others], clean[key][:, others]), key


def test_strides_of_output_gradients_change_nothing(assert_near: Check, device: str):
    inputs = conv_inputs(2, 4, 4, 3, without=("initial_state",), dtype=torch.float32, device=device)
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


def test_runs_repeat_bit_by_bit(device: str):
    inputs = conv_inputs(
        1, 40, 5, 4, without=("initial_state",), dtype=torch.float32, device=device
    )
    options = {"cu_seqlens": pack((13, 0, 27), device), "activation": "silu"}
    first = evaluate(causal_conv1d, inputs, **options)
    assert_equal(evaluate(causal_conv1d, inputs, **options), first)


@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0), (0, 0, 0)], ids=str)
def test_empty(device: str, sizes: tuple[int, int, int]):
    inputs = conv_inputs(*sizes, width=4, dtype=torch.float32, device=device)
    values = evaluate(causal_conv1d, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert not values["gradient of weight"].any()
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], inputs["initial_state"])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_empty_pack(device: str, lengths: tuple[int, ...]):
    options = {"cu_seqlens": pack(lengths, device), "return_final_state": True}
    inputs = conv_inputs(1, 0, 3, 4, sequences=len(lengths), dtype=torch.float32, device=device)
    values = evaluate(causal_conv1d, inputs, **options)
    assert torch.equal(values["output 1"], inputs["initial_state"])
    assert not values["gradient of weight"].any()


STEP_CASES = [
    ((2, 3, 3, None), (), torch.float32),
    ((1, 70, 16, 2), ("z",), torch.float32),  # several blocks of channels
    ((1, 64, 16, 1), ("D",), torch.bfloat16),
    ((3, 1, 1, None), ("dt_bias",), torch.float16),
    ((2, 6, 17, 3), ("D", "z", "dt_bias"), torch.float32),
]


@pytest.mark.parametrize(("sizes", "without", "dtype"), STEP_CASES, ids=str)
def test_step(
    assert_near: Check,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple,
    without: tuple[str, ...],
    dtype: torch.dtype,
):
    launches = []
    fused = step._step_fused

    def counted(*args: Any) -> Tensor:
        launches.append(args)
        return fused(*args)

    monkeypatch.setattr(step, "_step_fused", counted)
    batch, dim, state_size, groups = sizes
    for softplus in (True, False):
        inputs = scan_inputs(
            batch,
            2,
            dim,
            state_size,
            groups=groups,
            without=without,
            dtype=dtype,
            weights=torch.float32,
            device=device,
        )
        inputs["dt"] = inputs["dt"].detach().abs()
        doubled = each(inputs, Tensor.double)
        y, h = selective_scan_ref(**doubled, dt_softplus=softplus, return_final_state=True)
        start = inputs.pop("initial_state").detach()
        tokens = {k: inputs.pop(k).detach() for k in ("x", "dt", "B", "C", "z") if k in inputs}
        for layout in (torch.clone, *LAYOUTS.values()):
            state = torch.empty_like(layout(start)).copy_(start)
            weights = {k: layout(v.detach()) for k, v in inputs.items()}
            for t in range(2):
                token = {k: layout(v[:, t]) for k, v in tokens.items()}
                out = selective_scan_step(state, **token, **weights, dt_softplus=softplus)
                assert_near(out, y[:, t])
            assert_near(state, h)
    assert len(launches) == 2 * 2 * (1 + len(LAYOUTS))


def test_step_of_nothing(device: str):
    for batch, dim in ((0, 3), (2, 0)):
        inputs = scan_inputs(batch, 1, dim, 2, dtype=torch.float32, device=device)
        given = {k: v.detach() for k, v in inputs.items()}
        state = given.pop("initial_state")
        token = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in given.items()}
        assert selective_scan_step(state, **token).shape == (batch, dim)
