"""The compiled step of the selective scan on a CPU: against its definition, and when it runs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.core.op_cases import LAYOUTS, Inputs, each, scan_inputs
from torch import Tensor

from scanweave.core import selective_scan_step
from scanweave.core.ops.selective import compiled_step, selective_scan_ref

pytestmark = pytest.mark.poison
Check = Callable[..., None]
# B, D, N, groups: around a vector of 4 to 16 channels, states that fill vectors and that do not
SHAPES = [
    (1, 1, 1, None),
    (3, 16, 1, 1),
    (2, 33, 3, 3),
    (2, 40, 4, None),
    (2, 34, 8, 2),
    (2, 17, 16, None),
    (3, 66, 5, 2),
    (1, 130, 32, 1),
    (2, 5, 64, 5),
]
TOKENS = ("x", "dt", "B", "C", "z")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs the compiled step; skips where there is no compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not compiled_step.native.types:
        pytest.skip(f"no compiled step ({compiled_step.native.status()})")
    calls = []
    step = compiled_step.step
    monkeypatch.setattr(compiled_step, "step", lambda *a: calls.append(1) or step(*a))
    yield
    assert calls


def step_inputs(*sizes: int, **options: Any) -> tuple[Tensor, Inputs]:
    """A state, and the other arguments of `selective_scan_step`."""
    batch, dim, width = sizes
    given = each(scan_inputs(batch, 1, dim, width, **options), lambda v: v)
    inputs = {k: v.detach()[:, 0] if k in TOKENS else v.detach() for k, v in given.items()}
    return inputs.pop("initial_state").float(), inputs


def compare(assert_near: Check, state: Tensor, inputs: Inputs, softplus: bool = True) -> None:
    """Output and new state against the definition in float64."""
    exact = {k: v.double().unsqueeze(1) if k in TOKENS else v.double() for k, v in inputs.items()}
    expected = selective_scan_ref(
        **exact, initial_state=state.double(), dt_softplus=softplus, return_final_state=True
    )
    y = selective_scan_step(state, **inputs, dt_softplus=softplus)
    assert y.dtype == inputs["x"].dtype
    assert_near(y, expected[0][:, 0])
    assert_near(state, expected[1])


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(assert_near: Check, shape: tuple, softplus: bool):
    *sizes, groups = shape
    for without in ((), ("z",), ("D",), ("dt_bias",), ("D", "z", "dt_bias")):
        state, inputs = step_inputs(*sizes, groups=groups, without=without, dtype=torch.float32)
        compare(assert_near, state, inputs, softplus)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 weights", "all 16 bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half_precision_equals_definition(
    assert_near: Check, dtype: torch.dtype, weights: torch.dtype | None
):
    if dtype not in compiled_step.native.types:
        pytest.skip("the compiler knows no float16")
    for width in (1, 3, 16):
        state, inputs = step_inputs(2, 34, width, groups=2, dtype=dtype, weights=weights)
        compare(assert_near, state, inputs)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str):
    for width in (3, 16):
        state, inputs = step_inputs(2, 18, width, groups=2, dtype=torch.float32)
        strided: Inputs = {k: LAYOUTS[layout](v) for k, v in inputs.items()}
        assert any(not v.is_contiguous() for v in strided.values())
        other = state.clone()
        y = selective_scan_step(state, **inputs)
        assert torch.equal(selective_scan_step(other, **strided), y)
        assert torch.equal(other, state)


@pytest.mark.parametrize("width", [1, 3, 16])
def test_state_may_be_part_of_another_tensor(assert_near: Check, width: int):
    state, inputs = step_inputs(2, 18, width, dtype=torch.float32)
    for change in (LAYOUTS["widened"], LAYOUTS["transposed"]):
        part = change(state)
        assert width == 1 or not part.is_contiguous()
        compare(assert_near, part, inputs)
    whole = torch.full((2, 20, width + 1), 7.0)
    part = whole[:, 1:19, :width].copy_(state)
    compare(assert_near, part, inputs)
    assert (whole[:, (0, 19)] == 7).all()
    assert (whole[:, :, width] == 7).all()


@pytest.mark.usefixtures("used")
def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled_step, "WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    try:
        for batch in (1, 5):
            results = []
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                state, inputs = step_inputs(batch, 200, 5, dtype=torch.float32)
                results.append((selective_scan_step(state, **inputs), state))
            for y, state in results[1:]:
                assert torch.equal(y, results[0][0])
                assert torch.equal(state, results[0][1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("width", [1, 5, 16])
def test_bad_values_stay_in_their_channel(width: int, bad: float):
    state, inputs = step_inputs(3, 34, width, dtype=torch.float32)
    for name in ("x", "dt", "initial_state"):
        clean_state, bad_state = state.clone(), state.clone()
        spoiled = dict(inputs)
        if name == "initial_state":
            bad_state[1, 20] = bad
        else:
            spoiled[name] = inputs[name].clone()
            spoiled[name][1, 20] = bad
        clean = selective_scan_step(clean_state, **inputs)
        y = selective_scan_step(bad_state, **spoiled)
        same = torch.ones_like(y, dtype=torch.bool)
        same[1, 20] = False
        assert torch.equal(y[same], clean[same])
        assert torch.equal(bad_state[same], clean_state[same])
        assert not torch.isfinite(y[1, 20])


def test_doubles_and_nothing_stay_with_pytorch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled_step, "step", None)
    state, inputs = step_inputs(2, 5, 3, dtype=torch.float32)
    selective_scan_step(state.double(), **inputs)
    selective_scan_step(state, **inputs | {"A": inputs["A"].double()})
    selective_scan_step(state.bfloat16(), **inputs)
    for sizes in ((0, 5, 3), (2, 0, 3)):
        state, inputs = step_inputs(*sizes, dtype=torch.float32)
        assert selective_scan_step(state, **inputs).shape == sizes[:2]
