"""The compiled scan on a CPU: every output and gradient in float64's light, and when it runs."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.core.op_cases import (
    LAYOUTS,
    OPTIONAL,
    Inputs,
    assert_all_near,
    assert_equal,
    bidirectional_ref,
    each,
    evaluate,
    pack,
    pair_inputs,
    scan_inputs,
)
from torch import Tensor

from scanweave.core import bidirectional_selective_scan, selective_scan
from scanweave.core.ops.selective import compiled, selective_scan_ref

pytestmark = pytest.mark.poison
Check = Callable[..., None]
# relative L2: rounding of float32 sums, and of results in the 16-bit types
LIMITS = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 3e-3}
# B, L, D, N, groups: around a chunk of 32 steps, a block of 16 channels, a panel of 4 blocks
SHAPES = [
    (1, 1, 1, 1, None),
    (2, 31, 5, 3, 5),
    (3, 32, 16, 16, 1),
    (2, 33, 33, 64, 3),
    (2, 100, 16, 1, 2),
    (1, 100, 130, 5, 1),
    (2, 197, 48, 16, None),
]
RAGGED = (0, 5, 1, 0, 33, 64, 2, 0)
ALL: dict[str, Any] = {"return_final_state": True}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs the compiled scan, forward and backward; skips where there is no compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not compiled.status().startswith("on"):
        pytest.skip(f"no compiled scan ({compiled.status()})")
    calls = []
    run = compiled.native.run

    def spy(function: str, arguments: Sequence[int]) -> None:
        calls.append(function)
        run(function, arguments)

    monkeypatch.setattr(compiled.native, "run", spy)
    yield
    assert set(calls) == {"scanweave_scan_forward", "scanweave_scan_backward"}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def compare(
    op: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, **options: Any
) -> None:
    """Every value within LIMITS of float64 on the same inputs."""
    actual = evaluate(op, inputs, **options)
    dtypes = [v.dtype for name, v in actual.items() if name.startswith("output")]
    exact = evaluate(reference, each(inputs, Tensor.double), rounded_to=dtypes, **options)
    for name, v in actual.items():
        scale = exact[name].norm().clamp_min(torch.finfo(torch.float32).tiny)
        error = ((v.double() - exact[name]).norm() / scale).item() if v.numel() else 0.0
        assert error <= LIMITS[v.dtype], f"{name}: relative error {error:.3g}"


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(shape: tuple, reverse: bool):
    *sizes, groups = shape
    inputs = scan_inputs(*sizes, groups=groups, dtype=torch.float32)
    compare(selective_scan, selective_scan_ref, inputs, reverse=reverse, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 weights", "all 16 bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half_precision_equals_definition(dtype: torch.dtype, weights: torch.dtype | None):
    for sizes, groups in (((2, 45, 33, 16), 3), ((1, 32, 16, 1), None)):
        inputs = scan_inputs(*sizes, groups=groups, dtype=dtype, weights=weights)
        compare(selective_scan, selective_scan_ref, inputs, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [None, 2])
def test_packed_equals_definition(groups: int | None, reverse: bool):
    inputs = scan_inputs(
        1, sum(RAGGED), 34, 3, groups=groups, sequences=len(RAGGED), dtype=torch.float32
    )
    for dtype in (torch.int32, torch.int64):
        cu = pack(RAGGED).to(dtype)
        compare(selective_scan, selective_scan_ref, inputs, reverse=reverse, cu_seqlens=cu, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("count", range(len(OPTIONAL) + 1))
def test_every_set_of_options(count: int, softplus: bool):
    for without in itertools.combinations(OPTIONAL, count):
        inputs = scan_inputs(2, 40, 5, 3, without=without, dtype=torch.float32)
        # without softplus steps may be negative, and states grow until rounding shows
        inputs["dt"] = inputs["dt"].detach().abs().requires_grad_()
        if "dt_bias" in inputs:
            inputs["dt_bias"] = inputs["dt_bias"].detach().abs().requires_grad_()
        compare(selective_scan, selective_scan_ref, inputs, dt_softplus=softplus, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("without", [(), ("z",), ("D", "dt_bias", "initial_state")], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_equals_definition(packed: bool, without: tuple[str, ...]):
    inputs = pair_inputs(
        1 if packed else 3,
        sum(RAGGED),
        20,
        3,
        groups=2,
        sequences=len(RAGGED) if packed else None,
        without=without,
        dtype=torch.float32,
    )
    cu = pack(RAGGED) if packed else None
    compare(bidirectional_selective_scan, bidirectional_ref, inputs, cu_seqlens=cu, **ALL)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_portable_path(
    assert_near: Check, monkeypatch: pytest.MonkeyPatch, packed: bool
):
    inputs = pair_inputs(
        1 if packed else 2,
        sum(RAGGED),
        33,
        16,
        sequences=len(RAGGED) if packed else None,
        dtype=torch.float32,
    )
    options = {"cu_seqlens": pack(RAGGED) if packed else None, **ALL}
    actual = evaluate(bidirectional_selective_scan, inputs, **options)
    monkeypatch.setattr(compiled, "takes", lambda _: False)
    expected = evaluate(bidirectional_selective_scan, inputs, **options)
    assert_all_near(assert_near, actual, expected)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = scan_inputs(2, 40, 18, 3, groups=2, dtype=dtype)
        strided = each(inputs, LAYOUTS[layout])
        assert any(not v.is_contiguous() for v in strided.values())
        for reverse in (False, True):
            options = {"reverse": reverse, **ALL}
            expected = evaluate(selective_scan, inputs, **options)
            assert_equal(evaluate(selective_scan, strided, **options), expected)


@pytest.mark.usefixtures("used")
def test_strides_of_output_gradients_change_nothing():
    inputs = scan_inputs(2, 40, 18, 3, dtype=torch.float32)
    leaves = list(inputs.values())
    out, state = selective_scan(**inputs, **ALL)
    g, gs = torch.randn_like(out), torch.randn_like(state)
    expected = torch.autograd.grad([out, state], leaves, [g, gs], retain_graph=True)
    for change in LAYOUTS.values():
        grads = torch.autograd.grad(
            [out, state], leaves, [change(g), change(gs)], retain_graph=True
        )
        for a, b in zip(grads, expected, strict=True):
            assert torch.equal(a, b)
    ones = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), ones, strict=True):  # stride 0
        assert torch.equal(a, b)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
def test_thread_counts_agree_and_runs_repeat(
    assert_near: Check,
    monkeypatch: pytest.MonkeyPatch,
    threads: Callable[[int], None],
    packed: bool,
):
    monkeypatch.setattr(compiled, "WORK_PER_THREAD", 1)
    inputs = pair_inputs(
        1 if packed else 3,
        sum(RAGGED),
        130,
        3,
        groups=2,
        sequences=len(RAGGED) if packed else None,
        dtype=torch.float32,
    )
    options = {"cu_seqlens": pack(RAGGED) if packed else None, **ALL}
    threads(1)
    alone = evaluate(bidirectional_selective_scan, inputs, **options)
    for count in (2, 3, 7):
        threads(count)
        actual = evaluate(bidirectional_selective_scan, inputs, **options)
        assert_equal(actual, evaluate(bidirectional_selective_scan, inputs, **options))
        assert_all_near(assert_near, actual, alone)
        # only sums over channels or sequences depend on who adds what
        for key in ("output 0", "output 1", "gradient of x[0]", "gradient of dt[1]"):
            assert torch.equal(actual[key], alone[key]), key


@pytest.mark.usefixtures("used")
def test_one_sequence_for_many_threads(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
):
    monkeypatch.setattr(compiled, "WORK_PER_THREAD", 1)
    for count in (2, 5):
        threads(count)
        for length in (1, 70):
            inputs = scan_inputs(1, length, 40, 3, dtype=torch.float32)
            compare(selective_scan, selective_scan_ref, inputs, **ALL)


def test_small_work_starts_no_threads(threads: Callable[[int], None]):
    threads(4)
    small = scan_inputs(2, 9, 6, 3, dtype=torch.float32)
    large = scan_inputs(2, 200, 96, 16, without=("z",), dtype=torch.float32)
    for inputs, expected in ((small, 1), (large, 4)):
        values = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
        values[3:5] = [v.unsqueeze(2) for v in values[3:5]]
        call = compiled._Call(tuple(values), None, None, None, False, True)  # type: ignore[arg-type]
        assert call.arguments[0] == expected


@pytest.mark.usefixtures("used")
def test_batch_row_does_not_depend_on_its_batch():
    inputs = scan_inputs(5, 70, 20, 3, dtype=torch.float32)
    together = evaluate(selective_scan, inputs, **ALL)
    shared = ("A", "D", "dt_bias")
    for i in range(5):
        rows = {k: v if k in shared else v[i : i + 1] for k, v in inputs.items()}
        y, h = selective_scan(**rows, **ALL)
        assert torch.equal(y[0], together["output 0"][i])
        assert torch.equal(h[0], together["output 1"][i])


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "initial_state"])
def test_bad_values_stay_in_their_sequence(name: str, bad: float):
    lengths, owner = (40, 0, 45, 3), 2
    inputs = scan_inputs(1, sum(lengths), 18, 3, sequences=4, dtype=torch.float32)
    spoiled = dict(inputs)
    v = inputs[name].detach().clone()
    v[(owner, 3) if name == "initial_state" else (0, 50)] = bad
    spoiled[name] = v.requires_grad_()
    for reverse in (False, True):
        options = {"cu_seqlens": pack(lengths), "reverse": reverse, **ALL}
        clean = evaluate(selective_scan, inputs, **options)
        actual = evaluate(selective_scan, spoiled, **options)
        for key, v in actual.items():
            if key == "output 1" or key.endswith("initial_state"):
                rest = [0, 1, 3]
                assert torch.equal(v[rest], clean[key][rest]), key
            elif key == "output 0" or key[-2:] in (" x", "dt", " B", " C", " z"):
                assert torch.equal(v[:, :40], clean[key][:, :40]), key
                assert torch.equal(v[:, 85:], clean[key][:, 85:]), key


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "dt"])
def test_bad_values_reach_their_channel_from_then_on(name: str, bad: float):
    inputs = {k: v.detach() for k, v in scan_inputs(2, 40, 18, 3, dtype=torch.float32).items()}
    clean = selective_scan(**inputs)
    inputs[name] = inputs[name].clone()
    inputs[name][1, 35, 17] = bad
    y = selective_scan(**inputs)
    same = torch.ones_like(y, dtype=torch.bool)
    same[1, 35:, 17] = False
    assert torch.equal(y[same], clean[same])
    assert not torch.isfinite(y[1, 35:, 17]).any()


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("dt", [-1e4, -87.0, -15.0, 0.0, 19.9, 20.1, 88.0, 1e4])
@pytest.mark.parametrize("rate", [0.0, -1e-6, -1.0, -1e4, -1e30])
def test_extreme_steps_and_rates(dt: float, rate: float):
    inputs = scan_inputs(1, 12, 3, 2, without=("dt_bias",), dtype=torch.float32)
    for name, value in (("dt", dt), ("A", rate)):
        inputs[name] = torch.full_like(inputs[name], value).requires_grad_()
    actual = evaluate(selective_scan, inputs, **ALL)
    reference = each(inputs, Tensor.double)
    exact = evaluate(selective_scan_ref, reference, rounded_to=[torch.float32] * 2, **ALL)
    # a decay below the normal numbers may be zero, before it is multiplied by steps and inputs
    lost = 1e4 * torch.finfo(torch.float32).tiny
    for key, v in actual.items():
        limit = 1e-5 * exact[key].abs().max() + lost
        assert ((v - exact[key]).abs() <= limit).all(), key


def test_growth_past_the_largest_number_is_infinite():
    ones = torch.ones(1, 3, 1)
    y = selective_scan(ones, 60 * ones, torch.ones(1, 1), ones, ones, dt_softplus=False).flatten()
    expected = torch.tensor([60.0, 60 + 60 * math.exp(60)])
    torch.testing.assert_close(y[:2], expected, rtol=1e-5, atol=0)
    assert y[2] == float("inf")


@pytest.mark.parametrize("sizes", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_empty_inputs(sizes: tuple[int, int, int]):
    inputs = scan_inputs(*sizes, 3, dtype=torch.float32)
    values = evaluate(selective_scan, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert torch.equal(values["output 1"], inputs["initial_state"]) or sizes[1]
    assert all(not v.isnan().any() for v in values.values())
    assert not any(values[f"gradient of {k}"].any() for k in ("A", "D", "dt_bias"))


def test_no_sequences():
    inputs = scan_inputs(1, 0, 4, 3, sequences=0, dtype=torch.float32)
    values = evaluate(selective_scan, inputs, cu_seqlens=pack(()), **ALL)
    assert values["output 1"].shape == (0, 4, 3)
    assert not values["gradient of A"].any()


# opcheck itself reads .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool):
    op = torch.ops.scanweave.selective_scan.default
    given = pair_inputs(1 if packed else 2, 11, 4, 3, groups=2, dtype=torch.float32)
    lists = [list(given[k]) for k in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    cu = pack((3, 0, 8)) if packed else None
    for training in (False, True):
        torch.library.opcheck(op, (*lists, [], given["z"], cu, [False, True], True, training))


def test_doubles_stay_with_the_portable_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "forward", None)
    monkeypatch.setattr(compiled, "backward", None)
    evaluate(selective_scan, scan_inputs(1, 5, 4, 3), **ALL)
    inputs = scan_inputs(1, 5, 4, 3, dtype=torch.float32)
    inputs["A"] = inputs["A"].detach().double().requires_grad_()
    evaluate(selective_scan, inputs, **ALL)
