"""HiPPO matrices: published entries, their meaning (they remember), their normal part."""

import math

import pytest
import torch
from torch import Tensor

from scanweave.core.mixers.hippo import HIPPO_NAMES, HippoName, hippo, nplr

# the matrices of the s4 repository (e757cef, src/models/hippo/hippo.py, `transition`), size 4,
# in float64, rounded to 12 digits
R3, R5, R7 = 3**0.5, 5**0.5, 7**0.5
PUBLISHED = {
    "legs": [
        [-1, 0, 0, 0],
        [-R3, -2, 0, 0],
        [-R5, -3.872983346207, -3, 0],
        [-R7, -4.582575694956, -5.916079783100, -4],
    ],
    "legt": [
        [-0.5, 0.866025403784, -1.118033988750, 1.322875655532],
        [-0.866025403784, -1.5, 1.936491673104, -2.291287847478],
        [-1.118033988750, -1.936491673104, -2.5, 2.958039891550],
        [-1.322875655532, -2.291287847478, -2.958039891550, -3.5],
    ],
    "lagt": [[-0.5, 0, 0, 0], [-1, -0.5, 0, 0], [-1, -1, -0.5, 0], [-1, -1, -1, -0.5]],
    "fout": [
        [-1, 0, -1.414213562373, 0],
        [0, 0, 0, 0],
        [-1.414213562373, 0, -2, -math.pi],
        [0, 0, math.pi, 0],
    ],
    "foud": [
        [-0.5, 0, 0, 0],
        [0, -0.5, 0, 0],
        [0, 0, -0.5, -2 * math.pi],
        [0, 0, 2 * math.pi, -0.5],
    ],
    "legsd": [
        [-0.5, 0.866025403784, 1.118033988750, 1.322875655532],
        [-0.866025403784, -0.5, 1.936491673104, 2.291287847478],
        [-1.118033988750, -1.936491673104, -0.5, 2.958039891550],
        [-1.322875655532, -2.291287847478, -2.958039891550, -0.5],
    ],
}
INPUTS = {
    "legs": [1, R3, R5, R7],
    "legt": [0.5, R3 / 2, R5 / 2, R7 / 2],
    "lagt": [1, 1, 1, 1],
    "fout": [1, 0, 2**0.5, 0],
    "foud": [1, 0, 2**0.5, 0],
    "legsd": [0.5, R3 / 2, R5 / 2, R7 / 2],
}
names = pytest.mark.parametrize("name", HIPPO_NAMES)


@names
def test_published_entries(name: HippoName):
    A, B = hippo(name, 4)
    assert A.dtype == B.dtype == torch.float64
    assert torch.allclose(A, torch.tensor(PUBLISHED[name], dtype=torch.float64), atol=1e-11)
    assert torch.allclose(B, torch.tensor(INPUTS[name], dtype=torch.float64), atol=1e-11)


@names
@pytest.mark.parametrize("size", [2, 6, 64])
def test_normal_part_and_low_rank_make_the_matrix(name: HippoName, size: int):
    A, B = hippo(name, size)
    values, P, weights, V = nplr(name, size)
    assert P.shape == (2 if name == "legt" else 1, size // 2)
    assert all(v.dtype == torch.complex128 for v in (values, P, weights, V))
    assert (values.imag >= 0).all()
    assert (values.imag.diff() > 0).all()
    assert torch.allclose(values.real, values.real[:1])
    both = torch.cat([V, V.conj()], 1)
    assert torch.allclose(both.mH @ both, torch.eye(size, dtype=both.dtype), atol=1e-12)
    spread = torch.diag(torch.cat([values, values.conj()]))
    low = torch.cat([P, P.conj()], 1)
    again = both @ (spread - low.T @ low.conj()) @ both.mH
    assert (again - A).abs().max() < 1e-13 * A.abs().max()
    assert (2 * (V @ weights).real - B).abs().max() < 1e-13 * size
    # the phase is settled
    first = V[(V.abs() > 1e-9).int().argmax(0), torch.arange(size // 2)]
    assert torch.allclose(first, first.abs().to(first.dtype))


@names
def test_all_but_the_constant_wave_decay(name: HippoName):
    A, _ = hippo(name, 16)
    rates = torch.linalg.eigvals(A).real
    # the sine of frequency 0 is there for its pair alone; nothing drives it
    assert (rates < -1e-3).sum() >= 15
    assert rates.max() < 1e-12
    # and no state grows on the way: A + A^T has no positive eigenvalue
    assert torch.linalg.eigvalsh(A + A.T).max() < 1e-12


def test_clip():
    whole, clipped = nplr("legs", 64).B, nplr("legs", 64, clip=2.0).B
    assert whole.imag.abs().max() > 2.5
    assert torch.equal(clipped.real, whole.real)
    assert torch.equal(clipped.imag, whole.imag.clamp(-2, 2))
    # the stored values stay as they were
    assert torch.equal(nplr("legs", 64).B, whole)


def test_results_are_the_callers_own():
    for first, again in ((hippo("legs", 4), hippo("legs", 4)), (nplr("fout", 4), nplr("fout", 4))):
        before = [v.clone() for v in first]
        for v in first:
            v.zero_()
        assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    with torch.device("meta"):
        assert hippo("legt", 4)[0].device.type == nplr("legt", 4).V.device.type == "cpu"


def remembered(name: HippoName, size: int, signal: Tensor, step: float) -> Tensor:
    """Coefficients after a signal, by the bilinear rule."""
    A, B = hippo(name, size)
    left = torch.eye(size, dtype=A.dtype) - 0.5 * step * A
    turn = torch.linalg.solve(left, torch.eye(size, dtype=A.dtype) + 0.5 * step * A)
    into = torch.linalg.solve(left, step * B)
    c = torch.zeros_like(B)
    for value in signal:
        c = turn @ c + into * value
    return c


def wave(length: int) -> Tensor:
    t = torch.arange(length, dtype=torch.float64) / length
    return sum(
        (torch.sin(2 * math.pi * f * t + f) / f for f in (1.0, 2.5, 3.7)), torch.zeros_like(t)
    )


def legendre(size: int, places: Tensor) -> Tensor:
    """Legendre polynomials of degree 0 .. size - 1 at places in [-1, 1], (places, size)."""
    rows = [torch.ones_like(places), places]
    for n in range(1, size - 1):
        rows.append(((2 * n + 1) * places * rows[n] - n * rows[n - 1]) / (n + 1))
    return torch.stack(rows[:size], 1)


def test_legt_holds_a_window_of_two_over_the_step():
    window, size = 1000, 32
    signal = wave(3000)
    places = 1 - 2 * (torch.arange(window, dtype=torch.float64) + 0.5) / window
    basis = legendre(size, places) * torch.sqrt(2 * torch.arange(size) + 1.0)
    errors = {}
    for step in (2 / window, 1 / window):
        c = remembered("legt", size, signal, step)
        last = signal[-window:].flip(0)
        errors[step] = float((basis @ c - last).norm() / last.norm())
    assert errors[2 / window] < 1e-2
    assert errors[1 / window] > 0.5


def test_errors():
    with pytest.raises(ValueError, match=r"name must be one of legs, legt, .*, got 'leg'"):
        hippo("leg", 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size must be at least 1 for legs, got 0"):
        hippo("legs", 0)
    with pytest.raises(ValueError, match="size must be even and at least 2 for fout, got 3"):
        hippo("fout", 3)
    with pytest.raises(ValueError, match="size must be even and at least 2 for legs, got 5"):
        nplr("legs", 5)
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        nplr("legs", 4, clip=0)
