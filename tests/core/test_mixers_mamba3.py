"""Mamba-3 against its recurrence, step by step: outputs, states, names, initial values."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scanweave.core import Mixer, create_mixer

Check = Callable[..., None]
DIM = 16
SIZES: list[dict[str, Any]] = [
    {"d_state": 8, "headdim": 4, "ngroups": 2},
    {"d_state": 6, "headdim": 8, "rope_fraction": 1.0},
    {"d_state": 16, "headdim": 4, "is_outproj_norm": True},
    {"d_state": 4, "headdim": 16, "dt_min": 1.0, "dt_max": 4.0, "A_floor": 3.0},
]
NAMES = {
    "dt_bias": (8,),
    "B_bias": (8, 1, 16),
    "C_bias": (8, 1, 16),
    "D": (8,),
    "in_proj.weight": (2 * 32 + 2 * 2 * 16 + 3 * 8 + 4, DIM),
    "B_norm.weight": (16,),
    "C_norm.weight": (16,),
    "out_proj.weight": (DIM, 32),
}


def build(**sizes: Any) -> Mixer:
    """Without equal parameters."""
    mixer = create_mixer("mamba3", DIM, dtype=torch.float64, **sizes)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def root_mean_square(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs as complex numbers, those without an angle as they are."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angles = F.pad(angles, (0, pairs.shape[-1] - angles.shape[-1]))
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)


def recurrence(
    weights: dict[str, Tensor], x: Tensor, size: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Outputs and last state, one token after the other."""
    state, groups = size["d_state"], size.get("ngroups", 1)
    heads, inner = weights["D"].shape[0], weights["out_proj.weight"].shape[1]
    turns = int(state * size.get("rope_fraction", 0.5)) // 2
    widths = [inner, inner, groups * state, groups * state, heads, heads, heads, turns]
    angle = x.new_zeros(x.shape[0], heads, turns)
    h = x.new_zeros(x.shape[0], heads, state, inner // heads)
    k, v = h[..., 0], h[:, :, 0]
    outputs = []
    for token in x.unbind(1):
        parts = (token @ weights["in_proj.weight"].T).split(widths, -1)
        z, values, B, C, dt, rate, trap, turn = parts
        delta = F.softplus(dt + weights["dt_bias"])
        rate = torch.where(rate >= 0, 1 + rate, 1 / (1 - rate)).clamp(min=size.get("A_floor", 1e-4))
        angle = angle + delta[..., None] * math.pi * torch.tanh(turn)[:, None]
        key, query = (
            root_mean_square(u.unflatten(-1, (groups, state)), weights[f"{name}_norm.weight"])
            .repeat_interleave(heads // groups, 1)
            .add(weights[f"{name}_bias"][:, 0])
            for u, name in ((B, "B"), (C, "C"))
        )
        key, query = rotated(key, angle), rotated(query, angle)
        values, share = values.unflatten(-1, (heads, -1)), torch.sigmoid(trap)
        last, new = k[..., None] * v[..., None, :], key[..., None] * values[..., None, :]
        h = h + ((1 - share) * delta)[..., None, None] * last
        h = torch.exp(-delta * rate)[..., None, None] * h + (share * delta)[..., None, None] * new
        k, v = key, values
        y = (query[..., None, :] @ h).squeeze(-2) + weights["D"][:, None] * values
        if "norm.weight" in weights:
            y = root_mean_square(y, weights["norm.weight"].unflatten(0, (heads, -1)))
        outputs.append((y.flatten(1) * F.silu(z)) @ weights["out_proj.weight"].T)
    return torch.stack(outputs, 1), {"angle": angle % (2 * math.pi), "h": h, "k": k, "v": v}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_its_recurrence(assert_near: Check, size: dict[str, Any]):
    mixer, x = build(**size), torch.randn(2, 70, DIM, dtype=torch.float64, requires_grad=True)
    weights = dict(mixer.named_parameters())
    expected, last = recurrence(weights, x, size)
    y, state = mixer(x, return_state=True)
    assert_near(y, expected, name="output")
    for name, v in last.items():
        assert_near(state[name], v, name=name)
    g = torch.randn_like(y)
    given = [x, *weights.values()]
    wanted = torch.autograd.grad(expected, given, g)
    for name, a, e in zip(["x", *weights], torch.autograd.grad(y, given, g), wanted, strict=True):
        assert_near(a, e, gradient=True, name=name)


def test_angles_make_a_parity(assert_near: Check):
    """A state that turns by pi at every 1 tells odd from even, without decay, at any length."""
    mixer = create_mixer("mamba3", 2, d_state=2, headdim=4, rope_fraction=1.0, A_floor=0.0)
    bits = torch.randint(0, 2, (3, 400))
    with torch.no_grad():
        for p in mixer.parameters():
            p.zero_()
        rows = mixer.in_proj.weight.split(mixer.widths)  # z, v, B, C, dt, a, trap, angle
        rows[6].fill_(50.0)  # write each token once
        rows[5].fill_(-1e9)  # no decay
        rows[7][:, 1] = 50.0  # a 1 turns by pi
        mixer.dt_bias.fill_(math.log(math.e - 1))  # steps of 1
        x = torch.stack([torch.ones(3, 400), bits.float()], -1)
        angle = mixer(x, return_state=True)[1]["angle"]
    assert_near(torch.cos(angle).flatten(), 1.0 - 2 * (bits.sum(1) % 2), dtype=torch.float16)


def test_official_names_and_shapes():
    for norm in (False, True):
        mixer = create_mixer("mamba3", DIM, d_state=16, headdim=4, ngroups=2, is_outproj_norm=norm)
        shapes = NAMES | ({"norm.weight": (32,)} if norm else {})
        assert {k: tuple(v.shape) for k, v in mixer.state_dict().items()} == shapes


def test_initial_values():
    mixer = create_mixer("mamba3", 256, headdim=4, d_state=4, is_outproj_norm=True)
    for name in ("B_bias", "C_bias", "D", "B_norm.weight", "C_norm.weight", "norm.weight"):
        p = mixer.get_parameter(name)
        assert torch.equal(p, torch.ones_like(p)), name
    logs = (F.softplus(mixer.get_parameter("dt_bias")).log() - math.log(1e-3)) / math.log(100)
    assert logs.min() > -1e-3
    assert logs.max() < 1 + 1e-3
    marked = {k for k, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"dt_bias", "D"}
    half = create_mixer("mamba3", DIM, dtype=torch.bfloat16).state_dict()
    kept = {k for k, v in half.items() if v.dtype == torch.float32}
    assert kept == {"dt_bias", "B_bias", "C_bias", "D"}


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ({"headdim": 5}, "headdim must divide the 32 inner channels, got 5"),
        ({"headdim": 8, "ngroups": 3}, "ngroups must divide the 4 heads, got 3"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"d_state": 5}, "d_state must be even, its channels turn in pairs, got 5"),
        ({"d_state": 4, "rope_fraction": 0.25}, "rope_fraction must turn 1 to 2 pairs .*0.25"),
        ({"d_state": 4, "rope_fraction": 1.5}, "rope_fraction must turn 1 to 2 pairs .*1.5"),
        ({"A_floor": -1.0}, "A_floor must be at least 0, got -1.0"),
        ({"dt_min": 0.0}, r"dt_min must be in \(0, dt_max\], got 0.0 and 0.1"),
    ],
    ids=str,
)
def test_errors(size: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        create_mixer("mamba3", DIM, **size)


def test_step_refuses_other_widths():
    mixer = create_mixer("mamba3", DIM, d_state=4)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 16\)"):
        mixer.step(torch.randn(2, 15), mixer.init_state(2))
