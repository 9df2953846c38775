"""HiPPO's memory: what it rebuilds, its recurrence, pieces and steps, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from scanweave.core.mixers.hippo import hippo
from scanweave.core.mixers.hippo_memory import MEMORY_NAMES, HippoMemory, MemoryName

Check = Callable[..., None]
names = pytest.mark.parametrize("name", MEMORY_NAMES)


def memory_of(name: MemoryName, size: int, window: int) -> HippoMemory:
    return HippoMemory(name, size, window=None if name == "legs" else window)


def signals(length: int, count: int = 2) -> Tensor:
    """Sums of three waves, (1, length, count), float64."""
    t = torch.arange(length, dtype=torch.float64) / length
    waves = [
        sum((torch.sin(2 * math.pi * f * t + f + i) / f for f in (1.0, 2.5, 3.7)), 0 * t)
        for i in range(count)
    ]
    return torch.stack(waves, -1).unsqueeze(0)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


# measured 0.011, 4e-5, 0.12 (it jumps where the window closes) and 0.02, in either dtype
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("name", "window", "length", "limit"),
    [
        ("legs", 0, 1500, 2e-2),
        ("legt", 500, 500, 1e-4),
        ("fout", 500, 500, 0.15),
        ("lagt", 50, 500, 0.03),
    ],
)
def test_past_is_rebuilt(
    name: MemoryName, window: int, length: int, limit: float, dtype: torch.dtype
):
    memory, x = memory_of(name, 32, window), signals(1500)
    _, state = memory(x.to(dtype))
    assert error(memory.reconstruct(state, length), x[:, -length:]) < limit


@names
def test_equals_its_recurrence(assert_near: Check, name: MemoryName):
    """Coefficients after every token, with inverses of dense matrices, and their gradient."""
    memory, x = memory_of(name, 6, 10), torch.randn(2, 80, 3, dtype=torch.float64)
    x.requires_grad_()
    A, B = hippo(name, 6)
    eye, c, rows = torch.eye(6, dtype=torch.float64), torch.zeros(2, 3, 6, dtype=torch.float64), []
    for k, value in enumerate(x.unbind(1), start=1):
        step = {"legs": 1 / k, "lagt": 0.1}.get(name, 0.2)
        inverse = torch.linalg.inv(eye - step / 2 * A)
        c = c @ (inverse @ (eye + step / 2 * A)).T + value.unsqueeze(-1) * (inverse @ B) * step
        rows.append(c)
    coefficients, state = memory(x)
    expected = torch.stack(rows, 1)
    assert_near(coefficients, expected)
    assert_near(state["c"], expected[:, -1])
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    assert_near(torch.autograd.grad(coefficients, x, g)[0], wanted, gradient=True)


@names
def test_pieces_and_steps_equal_the_whole(assert_near: Check, name: MemoryName):
    memory, x = memory_of(name, 8, 20), torch.randn(2, 70, 3)
    whole, last = memory(x)
    state, parts = memory.init_state(2, 3), []
    for piece in x.split((5, 0, 40, 25), 1):
        part, state = memory(piece, state=state)
        parts.append(part)
    assert_near(torch.cat(parts, 1), whole)
    assert_near(state["c"], last["c"])
    assert state["count"].tolist() == last["count"].tolist() == [70, 70]
    state, rows = memory.init_state(2, 3), []
    for token in x.unbind(1):
        row, state = memory.step(token, state)
        rows.append(row)
    assert_near(torch.stack(rows, 1), whole)


@names
def test_half_precision_is_summed_in_float32(assert_near: Check, name: MemoryName):
    memory, x = memory_of(name, 8, 20), torch.randn(1, 70, 2).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coefficients, state = memory(x)
    assert coefficients.dtype == state["c"].dtype == torch.float32
    assert_near(coefficients, memory(x.double())[0])


def test_rows_may_have_begun_at_different_times(assert_near: Check):
    """Legs divides by each row's own number of tokens; what was not there is 0."""
    memory, x = HippoMemory("legs", 8), torch.randn(2, 30, 1, dtype=torch.float64)
    _, longer = memory(x[:1])
    _, shorter = memory(x[1:, :10])
    both = {k: torch.cat([longer[k], shorter[k]]) for k in longer}
    y, state = memory.step(x[:, 20], both)
    for i, own in enumerate((longer, shorter)):
        assert_near(y[i : i + 1], memory.step(x[i : i + 1, 20], own)[0])
    rebuilt = memory.reconstruct(state, 31)
    assert not rebuilt[1, :20].any()
    assert rebuilt[1, 20:].all()
    assert rebuilt[0].all()


def test_more_coefficients_hold_more():
    x = signals(1500, 1)
    errors = []
    for size in (4, 8, 12):
        memory = HippoMemory("legt", size, window=1000)
        errors.append(error(memory.reconstruct(memory(x)[1], 1000), x[:, 500:]))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 100 * errors[-1]


def test_errors():
    options: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("foud",), {}, "name must be one of legs, legt, lagt, fout, got 'foud'"),
        (("legs", 1), {}, "size must be from 2 to 256, got 1"),
        (("legs", 257), {}, "size must be from 2 to 256, got 257"),
        (("fout", 5), {"window": 9}, "size must be even and at least 2 for fout, got 5"),
        (("legs",), {"window": 9}, "window must be None for legs, which keeps all, got 9"),
        (("legt",), {}, "window must be a number of tokens for legt, got None"),
        (("lagt",), {"window": 0}, "window must be at least 1, got 0"),
    ]
    for given, named, match in options:
        with pytest.raises(ValueError, match=match):
            HippoMemory(*given, **named)
    memory = HippoMemory("legt", 4, window=9)
    with pytest.raises(ValueError, match=r"x must be \(B, L, D\), got \(2, 3\)"):
        memory(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"x must be \(B, D\), got \(2,\)"):
        memory.step(torch.ones(2), {})
    with pytest.raises(ValueError, match="state must be of 2 sequences of 3 channels with 4"):
        memory(torch.ones(2, 5, 3), state=memory.init_state(2, 1))
    for length in (-1, 10):
        with pytest.raises(ValueError, match=f"length must be from 0 to 9, got {length}"):
            memory.reconstruct(memory.init_state(1, 1), length)
    assert memory.reconstruct(memory.init_state(1, 2), 0).shape == (1, 0, 2)
    assert "legt, size=4, window=9" in repr(memory)
