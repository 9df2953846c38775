"""Gated linear attention against flash-linear-attention's layer (stored) and its recurrence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.wave_cases import check_stored, fill_with_waves, results
from torch import Tensor

from scanweave.core import Mixer, create_mixer

Check = Callable[..., None]
# outputs and gradients in float64 of flash-linear-attention's GatedLinearAttention (commit
# bc3b101d), 2 heads and rank 3, with naive_recurrent_gla for its kernels and the formula of its
# fused norm written out; parameters, input and cotangent of `waves`
STORED = Path(__file__).parent / "data" / "gla.npz"
OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"num_heads": 1, "expand_k": 1, "expand_v": 0.5, "eps": 0.1},
    {"num_heads": 4, "expand_v": 2, "gate_logit_normalizer": 0.5, "gate_low_rank_dim": 2},
]


def drawn(name: str, options: dict[str, Any]) -> Mixer:
    """A mixer whose gates differ."""
    mixer = create_mixer(name, 16, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def recurrence(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Token after token, in one direction or in both; (B, L, D)."""
    w, heads = dict(mixer.named_parameters()), options["num_heads"]

    def split(u: Tensor) -> Tensor:
        return u.unflatten(-1, (heads, -1))

    q, k, v, z = (split(x @ w[f"{n}_proj.weight"].T) for n in "qkvg")
    low = x @ w["gk_proj.0.weight"].T
    logits = low @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    decays = F.sigmoid(logits) ** (1 / options.get("gate_logit_normalizer", 16))
    ways = (
        [decays]
        if mixer.causal
        else [u.flip(1) if d else u for d, u in enumerate(decays.chunk(2, -1))]
    )
    outputs = []
    for d, a in enumerate(split(u) for u in ways):
        tokens = [u.flip(1) if d else u for u in (q, k, v)]
        h = torch.zeros(x.shape[0], heads, q.shape[-1], v.shape[-1], dtype=x.dtype)
        read = []
        for t in range(x.shape[1]):
            own_q, own_k, own_v = (u[:, t] for u in tokens)
            h = h * a[:, t].unsqueeze(-1) + own_k.unsqueeze(-1) * own_v.unsqueeze(-2)
            read.append(torch.einsum("bhk,bhkp->bhp", own_q, h) / q.shape[-1] ** 0.5)
        y = torch.stack(read, 1)
        outputs.append(y.flip(1) if d else y)
    y = torch.stack(outputs).mean(0)
    y = y / (y.square().mean(-1, keepdim=True) + options.get("eps", 1e-5)).sqrt()
    y = y * w["g_norm_swish_gate.weight"] * F.silu(z)
    return y.flatten(2) @ w["o_proj.weight"].T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_equals_flash_linear_attention(assert_near: Check, dtype: torch.dtype):
    mixer = create_mixer("gla", 8, num_heads=2, gate_low_rank_dim=3, dtype=dtype)
    check_stored(assert_near, results(fill_with_waves(mixer)), STORED)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["gla", "gla_bidirectional"])
def test_equals_its_recurrence(assert_near: Check, name: str, options: dict[str, Any]):
    mixer = drawn(name, options)
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x), recurrence(mixer, x, options)
    assert_near(y, expected)
    given, g = [x, *mixer.parameters()], torch.randn_like(y)
    wanted = torch.autograd.grad(expected, given, g)
    for a, e in zip(torch.autograd.grad(y, given, g), wanted, strict=True):
        assert_near(a, e, gradient=True)


def test_directions_have_gates_of_their_own():
    mixer = create_mixer("gla_bidirectional", 8, num_heads=2)
    bias = mixer.get_parameter("gk_proj.1.bias")
    with torch.no_grad():
        bias[:4], bias[4:] = 100.0, -1000.0  # keep all, forget nearly all
    matrix = mixer.matrix(torch.randn(1, 6, 8))
    assert matrix.tril(-1).abs().sum() > 100 * matrix.triu(1).abs().sum() > 0


def test_bidirectional_has_no_state():
    mixer = create_mixer("gla_bidirectional", 8)
    with pytest.raises(ValueError, match="state needs a recurrent mixer, gla_bidirectional"):
        mixer.init_state(2)
    with pytest.raises(ValueError, match="state needs a causal mixer, gla_bidirectional"):
        mixer.step(torch.randn(2, 8), {})


@pytest.mark.parametrize(
    ("width", "shape"),
    [
        (1024, (8, 64, 128)),
        (192, (2, 48, 96)),
        (128, (1, 64, 128)),
        (8, (1, 4, 8)),
        (7, (1, 3, 7)),
        (200, (2, 50, 100)),
    ],
)
def test_default_heads(width: int, shape: tuple[int, int, int]):
    assert create_mixer("gla", width).state_spec()["h"][0] == shape


def test_initial_values():
    mixer = create_mixer("gla", 192)
    for name, p in mixer.named_parameters():
        if p.ndim == 2:
            bound = 2**-2.5 * (6 / sum(p.shape)) ** 0.5
            assert 0.98 * bound < p.abs().max().item() <= bound * (1 + 1e-6), name
    assert not mixer.get_parameter("gk_proj.1.bias").any()
    assert (mixer.get_parameter("g_norm_swish_gate.weight") == 1).all()


@pytest.mark.parametrize(
    ("width", "options", "match"),
    [
        (0, {}, "d_model must be at least 1, got 0"),
        (8, {"expand_k": 0}, r"expand_k \* d_model must be at least 1, got 0"),
        (8, {"expand_v": 0.1}, r"expand_v \* d_model must be at least 1, got 0"),
        (8, {"gate_low_rank_dim": 0}, "gate_low_rank_dim must be at least 1, got 0"),
        (8, {"gate_logit_normalizer": 0.0}, "gate_logit_normalizer must be above 0, got 0.0"),
        (8, {"num_heads": 3}, "num_heads must divide 4 key and 8 value channels, got 3"),
        (8, {"num_heads": 8}, "num_heads must divide 4 key and 8 value channels, got 8"),
        (8, {"num_heads": 0}, "num_heads must divide 4 key and 8 value channels, got 0"),
        (258, {"num_heads": 1}, "at most 256 key and value channels a head, got 129 and 258"),
        (263, {}, "key and value channels a head, got 131 and 263"),
    ],
    ids=str,
)
def test_errors(width: int, options: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        create_mixer("gla", width, **options)


def test_step_refuses_other_widths():
    mixer = create_mixer("gla", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
