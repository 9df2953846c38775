"""The matrix-state scan's Triton kernels against float64: interpreted, or on a GPU.

Interpreting is slow, so chunks are short here (16 steps, the least that matrix products take) and
lengths lie around them; every flag of every kernel is on and off, in both directions.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import bidirectional_gated_ref, gated_inputs, gated_pairs
from tests.core.op_cases import LAYOUTS, assert_equal, compare, each, evaluate, pack

from scanweave.core import bidirectional_gated_linear_scan, gated_linear_scan
from scanweave.core.ops.gated import gated_linear_scan_ref, kernels, portable

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
STEPS = 16


@pytest.fixture
def device() -> str:
    """The interpreter reads and writes memory of the CPU."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another path would give right results as well, so it must not run."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the op left the Triton kernels")

    monkeypatch.setattr(portable, "forward", refused)
    monkeypatch.setattr(portable, "backward", refused)
    monkeypatch.setattr(kernels, "CHUNK", STEPS)
    monkeypatch.setattr(kernels, "WIDE_CHUNK", STEPS)


# B, L, H, K, V, groups, kind, exclusive, reverse
CASES = [
    (1, 1, 1, 1, 1, 1, "none", False, False),
    (2, STEPS - 1, 4, 3, 5, 2, "tokens", False, False),
    (1, STEPS, 2, 16, 16, 1, "tokens", True, True),
    (1, 2 * STEPS + 3, 2, 17, 3, 2, "heads", False, True),
    (1, STEPS + 1, 4, 2, 18, 1, "tokens", True, False),
    (1, 2 * STEPS, 1, 5, 4, 1, "none", False, True),
]
OPTIONS = [((), ALL), (("initial_state",), {}), (("write", "skip"), ALL), (("skip",), {})]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("without", "final"), OPTIONS, ids=str)
def test_one_direction(
    assert_near: Check, device: str, case: tuple, without: tuple[str, ...], final: dict[str, Any]
):
    *shape, groups, kind, exclusive, reverse = case
    inputs = gated_inputs(
        *shape, groups=groups, kind=kind, without=without, dtype=torch.float32, device=device
    )
    options = {"exclusive": exclusive, "reverse": reverse, **final}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("length", [STEPS - 1, 2 * STEPS + 3])
@pytest.mark.parametrize("steep", [-300.0, -1e30, float("-inf")])
def test_steep_decays(assert_near: Check, device: str, steep: float, length: int):
    """What is kept after a steep step is as exact as what was before it."""
    inputs = gated_inputs(1, length, 2, 4, 3, dtype=torch.float32, device=device)
    g = inputs["g"].detach().clone()
    g[:, 3::9] = steep
    inputs["g"] = g.requires_grad_()
    for exclusive in (False, True):
        options = {"exclusive": exclusive, **ALL}
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("form", ["add", "exclusive", "quasi_separable"])
@pytest.mark.parametrize("length", [STEPS - 2, 2 * STEPS + 1])
@pytest.mark.parametrize("without", [(), ("g", "skip"), ("write",)], ids=str)
def test_both_directions(
    assert_near: Check, device: str, without: tuple[str, ...], length: int, form: str
):
    states = form != "quasi_separable" and not without
    without = without if states else (*without, "initial_state")
    inputs = gated_pairs(
        1, length, 4, 5, 3, groups=2, without=without, dtype=torch.float32, device=device
    )
    options: dict[str, Any] = {"form": form, **(ALL if states else {})}
    compare(
        assert_near, bidirectional_gated_linear_scan, bidirectional_gated_ref, inputs, **options
    )


@pytest.mark.parametrize(
    "lengths",
    [(3, 0, STEPS, 1, 2 * STEPS + 1, STEPS - 1), (0, 0, 5), (STEPS, STEPS + 1, 0)],
    ids=str,
)
@pytest.mark.parametrize("form", ["reverse", "add", "quasi_separable"])
def test_packed(assert_near: Check, device: str, form: str, lengths: tuple[int, ...]):
    sizes = (1, sum(lengths), 2, 4, 3)
    options: dict[str, Any] = {"cu_seqlens": pack(lengths, device)}
    drawn = {"groups": 1, "sequences": len(lengths), "dtype": torch.float32, "device": device}
    if form == "reverse":
        inputs = gated_inputs(*sizes, **drawn)
        options |= {"reverse": True, **ALL}
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)
        return
    without = ("initial_state",) if form == "quasi_separable" else ()
    options |= {"form": form, **({} if without else ALL)}
    inputs = gated_pairs(*sizes, without=without, **drawn)
    compare(
        assert_near, bidirectional_gated_linear_scan, bidirectional_gated_ref, inputs, **options
    )


def test_wide_heads_and_states(assert_near: Check, device: str):
    """Several blocks of keys and values, the last ones ragged."""
    for keys, width in ((150, 3), (4, 70)):
        inputs = gated_inputs(1, 19, 2, keys, width, groups=1, dtype=torch.float32, device=device)
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **ALL)


@pytest.mark.parametrize("processors", [1, 1000])
def test_heads_of_a_program(
    assert_near: Check, device: str, monkeypatch: pytest.MonkeyPatch, processors: int
):
    """Heads share products where programs are many, and sums are split where they are few."""
    for module in ("mix_kernel", "pair_kernel"):
        monkeypatch.setattr(f"scanweave.core.ops.gated.{module}.processors", lambda _: processors)
    inputs = gated_inputs(2, 20, 8, 3, 4, groups=1, dtype=torch.float32, device=device)
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **ALL)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half(assert_near: Check, device: str, half: torch.dtype):
    # the interpreter multiplies in float32
    options = {"near_as": half if device == "cuda" else None, **ALL}
    for weights in (torch.float32, half):
        inputs = gated_inputs(1, 20, 2, 4, 3, dtype=half, weights=weights, device=device)
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("decay", [0.0, 1e-6, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("exclusive", [False, True])
def test_extreme_decays(assert_near: Check, device: str, exclusive: bool, decay: float):
    inputs = gated_inputs(1, 2 * STEPS + 3, 2, 4, 3, dtype=torch.float32, device=device)
    inputs["g"] = (decay * (inputs["g"].detach() - 0.5)).requires_grad_()
    options = {"exclusive": exclusive, **ALL}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(device: str, layout: Callable[[torch.Tensor], torch.Tensor]):
    inputs = gated_inputs(2, 5, 2, 3, 4, dtype=torch.float32, device=device)
    expected = evaluate(gated_linear_scan, inputs, **ALL)
    assert_equal(evaluate(gated_linear_scan, each(inputs, layout), **ALL), expected)


def test_empty(device: str):
    for shape in ((0, 5, 2, 3, 4), (2, 0, 2, 3, 4)):
        inputs = gated_inputs(*shape, dtype=torch.float32, device=device)
        values = evaluate(gated_linear_scan, inputs, **ALL)
        assert torch.equal(values["output 1"], inputs["initial_state"].detach())
        assert values["gradient of q"].shape == inputs["q"].shape
