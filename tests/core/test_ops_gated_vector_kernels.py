"""The matrix-state scan with decays of key channels on Triton kernels, against float64.

Interpreted with chunks of 16 steps, lengths around them, or on a GPU. Gentle and steep chunks run
different code, and both are here in every form. At sizes of real models, on a GPU:
`test_ops_gated_vector_gpu.py`.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import bidirectional_gated_ref, gated_inputs, gated_pairs, pieces
from tests.core.op_cases import LAYOUTS, assert_equal, compare, each, evaluate, pack

from scanweave.core import bidirectional_gated_linear_scan, gated_linear_scan
from scanweave.core.ops.gated import gated_linear_scan_ref, kernels, portable

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
STEPS = 16
# mean log decays: chunks of 16 are steep from 7 a step on
GENTLE, STEEP = 0.5, 12.0
DECAYS = pytest.mark.parametrize("decay", [GENTLE, STEEP])


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


def drawn(device: str, **options: Any) -> dict[str, Any]:
    return {"kind": "all", "dtype": torch.float32, "device": device, **options}


# B, L, H, K, V, groups, exclusive, reverse
CASES = [
    (1, 1, 1, 1, 1, 1, False, False),
    (2, STEPS - 1, 2, 3, 5, 1, True, True),
    (1, STEPS, 2, 16, 16, 2, False, True),
    (1, 2 * STEPS + 3, 2, 17, 3, 2, True, False),
]
OPTIONS = [((), ALL), (("initial_state",), {}), (("write", "skip"), ALL)]


@DECAYS
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("without", "final"), OPTIONS, ids=str)
def test_one_direction(
    assert_near: Check,
    device: str,
    case: tuple,
    without: tuple[str, ...],
    final: dict[str, Any],
    decay: float,
):
    *shape, groups, exclusive, reverse = case
    inputs = gated_inputs(*shape, **drawn(device, groups=groups, without=without, decay=decay))
    options = {"exclusive": exclusive, "reverse": reverse, **final}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)
