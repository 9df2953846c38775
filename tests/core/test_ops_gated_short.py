"""Short sequences, whose chunks read each other without states: interpreted, or on a GPU.

What every flag does is tested in `test_ops_gated_kernels.py`; here are more chunks, blocks and
programs than there, and that the short way gives what the walk over states gives.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import bidirectional_gated_ref, gated_inputs, gated_pairs
from tests.core.op_cases import Inputs, assert_all_near, compare, evaluate

from scanweave.core import bidirectional_gated_linear_scan, gated_linear_scan
from scanweave.core.ops.gated import fused, gated_linear_scan_ref, kernels, walk_kernel

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
Check = Callable[..., None]
STEPS = 16
STATES = ("initial_state",)


@pytest.fixture
def drawn() -> dict[str, Any]:
    """The interpreter reads and writes memory of the CPU."""
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    return {"without": STATES, "dtype": torch.float32, "device": device}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHUNK", STEPS)
    monkeypatch.setattr(kernels, "WIDE_CHUNK", STEPS)


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk would give right results as well, so it must not run."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a short sequence walked over states")

    monkeypatch.setattr(fused, "walk", refused)


@pytest.mark.usefixtures("no_walk")
@pytest.mark.parametrize(
    ("form", "chunks"), [("add", 4), ("exclusive", 2), ("quasi_separable", fused.FEW_CHUNKS)]
)
def test_many_chunks(assert_near: Check, drawn: dict[str, Any], form: str, chunks: int):
    """As many chunks as still are few, and pairs of them with others between."""
    inputs = gated_pairs(1, chunks * STEPS - 3, 1, 3, 2, decay=0.05, **drawn)
    op, ref = bidirectional_gated_linear_scan, bidirectional_gated_ref
    compare(assert_near, op, ref, inputs, form=form)


@pytest.mark.usefixtures("no_walk")
@pytest.mark.parametrize(("keys", "width"), [(150, 3), (4, 70)])
def test_wide_heads_and_keys(assert_near: Check, drawn: dict[str, Any], keys: int, width: int):
    """Several blocks of keys and values, the last ones ragged."""
    inputs = gated_inputs(1, STEPS + 3, 2, keys, width, groups=1, **drawn)
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs)


@pytest.mark.usefixtures("no_walk")
@pytest.mark.parametrize("processors", [1, 1000])
def test_heads_of_a_program(
    assert_near: Check, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch, processors: int
):
    """Heads share products where programs are many, and E is in parts where they are few."""
    for module in ("short_mix_kernel", "pair_kernel"):
        monkeypatch.setattr(f"scanweave.core.ops.gated.{module}.processors", lambda _: processors)
    inputs = gated_pairs(1, STEPS + 4, 4, 3, 4, groups=1, **drawn)
    op, ref = bidirectional_gated_linear_scan, bidirectional_gated_ref
    compare(assert_near, op, ref, inputs, form="quasi_separable")


@pytest.mark.usefixtures("no_walk")
@pytest.mark.parametrize("decay", [0.0, 30.0, 1e4, 1e30])
def test_extreme_decays(assert_near: Check, drawn: dict[str, Any], decay: float):
    inputs = gated_pairs(1, 3 * STEPS - 1, 2, 4, 3, **drawn)
    inputs["g"] = tuple((decay * (g.detach() - 0.5)).requires_grad_() for g in inputs["g"])
    op, ref = bidirectional_gated_linear_scan, bidirectional_gated_ref
    compare(assert_near, op, ref, inputs, form="quasi_separable")


@pytest.mark.usefixtures("no_walk")
@pytest.mark.parametrize("form", ["add", "exclusive", "quasi_separable"])
@pytest.mark.parametrize("steep", [-300.0, -1e30, float("-inf")])
def test_single_steep_decays(assert_near: Check, drawn: dict[str, Any], steep: float, form: str):
    """What is kept after a steep step is as exact as what was before it."""
    inputs = gated_pairs(1, 2 * STEPS + 3, 2, 4, 3, **drawn)
    pair = tuple(g.detach().clone() for g in inputs["g"])
    for g in pair:
        g[:, 3::9] = steep
    inputs["g"] = tuple(g.requires_grad_() for g in pair)
    op, ref = bidirectional_gated_linear_scan, bidirectional_gated_ref
    # decays between tokens are differences of sums; a steep step makes those 160, so that they
    # are rounded to 1e-5, and a GPU's exponential adds to that
    factor = 2 if drawn["device"] == "cuda" else 1
    compare(assert_near, op, ref, inputs, form=form, factor=factor)


@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_walk(
    assert_near: Check, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch, reverse: bool
):
    """One chunk more than is short goes through states."""
    walked: list[bool] = []
    walk = walk_kernel.walk

    def noted(*args: Any, **options: Any) -> Any:
        walked.append(options["back"])
        return walk(*args, **options)

    monkeypatch.setattr(fused, "walk", noted)
    inputs: Inputs = gated_inputs(1, 3 * STEPS - 5, 2, 4, 3, **drawn)
    short = evaluate(gated_linear_scan, inputs, reverse=reverse)
    assert not walked
    monkeypatch.setattr(fused, "FEW_CHUNKS", 2)
    long = evaluate(gated_linear_scan, inputs, reverse=reverse)
    assert walked == [False, False, True]
    assert_all_near(assert_near, short, long)
