"""LRU against its paper's equations in float64, initial values, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from torch import Tensor, nn

from scanweave.core import create_mixer
from scanweave.core.mixers.lru import LRU
from scanweave.core.training import param_groups

Check = Callable[..., None]


def published(mixer: LRU, x: Tensor) -> Tensor:
    """The recurrence of the paper's appendix A, token by token in complex128."""
    p = {k: v.detach().double() for k, v in mixer.named_parameters()}
    decay = torch.exp(torch.complex(-p["nu_log"].exp(), p["theta_log"].exp()))
    B = torch.complex(p["B_re"], p["B_im"]) * p["gamma_log"].exp()[:, None]
    C = torch.complex(p["C_re"], p["C_im"])
    h, rows = torch.zeros(x.shape[0], mixer.d_state, dtype=torch.complex128), []
    for token in x.double().unbind(1):
        h = decay * h + token.to(B.dtype) @ B.T
        rows.append((h @ C.T).real + p["D"] * token)
    y = torch.stack(rows, 1)
    if mixer.glu is None:
        return y
    a, b = (nn.functional.gelu(y) @ p["glu.weight"].T + p["glu.bias"]).chunk(2, -1)
    return a * torch.sigmoid(b)


@pytest.mark.parametrize(
    "config", [{}, {"d_state": 5, "r_min": 0.9, "r_max": 0.99, "max_phase": 0.3}], ids=str
)
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_equals_the_equations(
    assert_near: Check, config: dict[str, Any], glu: bool, dtype: torch.dtype
):
    mixer, x = LRU(6, glu=glu, dtype=dtype, **config), torch.randn(2, 29, 6, dtype=dtype)
    expected = published(mixer, x)
    assert_near(mixer(x), expected, dtype=dtype, factor=0.1)
    with torch.no_grad():
        state, rows = mixer.init_state(2), []
        for token in x.unbind(1):
            y, state = mixer.step(token, state)
            rows.append(y)
    assert_near(torch.stack(rows, 1), expected, dtype=dtype, factor=0.2)
    packed = mixer(x[:1], cu_seqlens=pack((4, 25)))
    parts = [published(mixer, v) for v in x[:1].split((4, 25), 1)]
    assert_near(packed, torch.cat(parts, 1), dtype=dtype, factor=0.1)


def test_is_time_invariant_and_linear_without_its_gate(assert_near: Check):
    mixer, x = LRU(6, glu=False, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    assert_near(mixer(3 * x[:1] - x[1:]), 3 * mixer(x)[:1] - mixer(x)[1:])
    later = torch.cat([torch.zeros(2, 4, 6, dtype=torch.float64), x], 1)
    assert_near(mixer(later)[:, 4:], mixer(x))
    assert torch.equal(mixer.matrix(x), mixer.matrix(-x))


def test_initial_values():
    mixer = LRU(64, d_state=4096, r_min=0.5, r_max=0.9, max_phase=1.0)
    size, phase = torch.exp(-mixer.nu_log.exp()), mixer.theta_log.exp()
    assert size.min() >= 0.5 - 1e-5
    assert size.max() <= 0.9 + 1e-5
    # uniform in area: the squares are uniform
    assert abs(size.square().mean() - (0.25 + 0.81) / 2) < 0.01
    assert phase.max() <= 1 + 1e-5
    assert abs(phase.mean() - 0.5) < 0.02
    assert torch.allclose(mixer.gamma_log.exp().square(), 1 - size.square(), atol=1e-5)
    for part, std in ((mixer.B_re, 128**-0.5), (mixer.C_im, 1 / 64), (mixer.B_im, 128**-0.5)):
        assert abs(part.std() / std - 1) < 0.03
    for edge in (0.0, 1.0):
        ring = LRU(8, d_state=9, r_min=edge, r_max=edge)
        assert all(torch.isfinite(p).all() for p in ring.parameters())
    half = create_mixer("lru", 8, dtype=torch.bfloat16).state_dict()
    kept = {k for k, v in half.items() if v.dtype == torch.float32}
    assert kept == {"nu_log", "theta_log", "gamma_log", "D"}


def test_parameters():
    mixer = create_mixer("lru", 8, d_state=3)
    shapes = {k: tuple(v.shape) for k, v in mixer.state_dict().items()}
    ring = dict.fromkeys(("nu_log", "theta_log", "gamma_log"), (3,))
    into, out = dict.fromkeys(("B_re", "B_im"), (3, 8)), dict.fromkeys(("C_re", "C_im"), (8, 3))
    gate = {"glu.weight": (16, 8), "glu.bias": (16,)}
    assert shapes == ring | into | out | {"D": (8,)} | gate
    assert "glu.weight" not in create_mixer("lru", 8, glu=False).state_dict()
    names = {id(p): k for k, p in mixer.named_parameters()}
    groups = param_groups(mixer, 0.1)
    free = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert free >= {*ring, "D", "glu.bias"}
    assert "glu.weight" not in free


def test_save_and_load_are_exact():
    first, second = create_mixer("lru", 8), create_mixer("lru", 8)
    x = torch.randn(2, 5, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x), second(x))


def test_errors():
    for config, match in (
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"r_min": -0.1}, r"r_min must be in \[0, r_max\] and r_max <= 1, got -0.1 and 1.0"),
        ({"r_min": 0.9, "r_max": 0.8}, r"r_min must be in \[0, r_max\]"),
        ({"r_max": 1.1}, r"r_min must be in \[0, r_max\] and r_max <= 1, got 0.0 and 1.1"),
        ({"max_phase": 0}, r"max_phase must be in \(0, 2 pi\], got 0"),
        ({"max_phase": 7 * math.pi}, r"max_phase must be in \(0, 2 pi\]"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("lru", 8, **config)
    mixer = create_mixer("lru", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
