"""What kernels of the selective scan do to their inputs first, and with sums found in part."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from scanweave.core import bidirectional_selective_scan
from scanweave.core.ops.selective import backward
from scanweave.core.ops.selective.kernels import Direction, prepare
from scanweave.core.ops.selective.partials import add_partials


def direction(B: Tensor, C: Tensor, elements: int) -> Direction:
    x = torch.zeros(1).expand(1, 1, elements)
    return x, x, torch.zeros(1, 1), B, C, None, None


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gap", [0, 2])
def test_rows_of_large_inputs_are_widened(groups: int, gap: int) -> None:
    """By one launch where B and C lie side by side; the values are the same."""
    joint = torch.randn(2, 5, groups, 8 + gap).bfloat16()
    B, C = joint[..., :4], joint[..., 4 + gap :]
    _, _, _, wide_B, wide_C, _, _ = prepare(direction(B, C, 1 << 22))
    assert wide_B.dtype == wide_C.dtype == torch.float32
    assert torch.equal(wide_B, B.float())
    assert torch.equal(wide_C, C.float())
    shared = wide_B.untyped_storage().data_ptr() == wide_C.untyped_storage().data_ptr()
    assert shared == (gap == 0)
    few = prepare(direction(B, C, 1 << 10))
    assert few[3].dtype == few[4].dtype == torch.bfloat16


def test_rows_of_two_tensors_are_widened() -> None:
    B, C = torch.randn(2, 5, 1, 4).half(), torch.randn(2, 5, 1, 4).half()
    _, _, _, wide_B, wide_C, _, _ = prepare(direction(B, C, 1 << 22))
    assert torch.equal(wide_B, B.float())
    assert torch.equal(wide_C, C.float())
    _, _, _, same, twice, _, _ = prepare(direction(B, B, 1 << 22))
    assert torch.equal(same, twice)
    kept = prepare(direction(B.float(), C.float(), 1 << 22))
    assert torch.equal(kept[3], B.float())


@pytest.mark.interpret
@pytest.mark.parametrize(("blocks", "state", "rows"), [(1, 16, 5), (3, 5, 7), (24, 16, 70)])
@pytest.mark.parametrize("slots", [1, 33])
def test_partial_sums(blocks: int, state: int, rows: int, slots: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dA = torch.randn(slots, 9, state, device=device)
    dB, dC = (torch.randn(2, rows, 1, blocks, state, device=device) for _ in range(2))
    dD, dbias = torch.randn(slots, 9, device=device), None
    kinds = torch.float32, torch.float16, torch.float32
    sum_A, sum_B, sum_C, sum_D, sum_bias = add_partials(dA, dB, dC, dD, dbias, kinds)
    assert sum_bias is None
    assert sum_D is not None
    torch.testing.assert_close(sum_A, dA.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum_B, dB.sum(3).half(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(sum_C, dC.sum(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum_D, dD.sum(0), rtol=1e-5, atol=1e-5)
    bias_alone = add_partials(dA, dB, dC, None, dD, kinds)
    assert bias_alone[3] is None
    assert bias_alone[4] is not None
    assert torch.equal(bias_alone[4], sum_D)


@pytest.mark.interpret
def test_partial_sums_of_one_direction_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first are gone when the second's are made."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen: list[weakref.ref[Tensor]] = []

    def adding(*args: Any) -> Any:
        seen.extend(weakref.ref(v) for v in args[:3])
        return add_partials(*args)

    def beginning(inputs: Direction) -> Direction:
        assert all(one() is None for one in seen)
        return prepare(inputs)

    monkeypatch.setattr(backward, "add_partials", adding)
    monkeypatch.setattr(backward, "prepare", beginning)

    def two(*shape: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(*shape, device=device).requires_grad_() for _ in range(2))

    B, C = two(1, 5, 1, 3), two(1, 5, 1, 3)
    y = bidirectional_selective_scan(two(1, 5, 4), two(1, 5, 4), two(4, 3), B, C)
    torch.autograd.grad(y.sum(), (*B, *C))
    assert len(seen) == 6
