"""The linear attention of BASED against the published code's layer (stored) and its definition."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.wave_cases import check_stored, fill_with_waves, results
from torch import Tensor

from scanweave.core import Mixer, create_mixer
from scanweave.core.mixers.based import taylor_features

Check = Callable[..., None]
NAMES = ("based", "based_bidirectional")
# outputs and gradients in float64 of HazyResearch/based's LinearAttention (commit 32c1bd4e), all
# pairs at once ("quadratic"), 2 heads of 3 features; parameters, input and cotangent of `waves`
STORED = Path(__file__).parent / "data" / "based.npz"
OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 1},
    {"num_heads": 4, "feature_dim": 1, "eps": 0.1},
    {"num_heads": 2, "feature_dim": 5},
]


def by_definition(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Three terms of the exponential, for all pairs of tokens."""
    q, k, v = (
        (x @ mixer.get_parameter(f"proj_{n}.weight").T)
        .unflatten(-1, (options["num_heads"], -1))
        .transpose(1, 2)
        for n in "qkv"
    )
    scores = q @ k.transpose(-1, -2) / options.get("feature_dim", 16) ** 0.5
    w = 1 + scores + scores.square() / 2
    w = w.tril() if mixer.causal else w
    y = w @ v / (w.sum(-1, keepdim=True) + options.get("eps", 1e-12))
    return y.transpose(1, 2).flatten(2) @ mixer.get_parameter("out_proj.weight").T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_equals_the_published_code(assert_near: Check, dtype: torch.dtype):
    mixer = create_mixer("based", 8, num_heads=2, feature_dim=3, dtype=dtype)
    check_stored(assert_near, results(fill_with_waves(mixer)), STORED)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_definition(assert_near: Check, name: str, options: dict[str, Any]):
    mixer = create_mixer(name, 8, dtype=torch.float64, **options)
    x = torch.randn(2, 70, 8, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x), by_definition(mixer, x, options)
    assert_near(y, expected)
    given, g = [x, *mixer.parameters()], torch.randn_like(y)
    wanted = torch.autograd.grad(expected, given, g)
    for a, e in zip(torch.autograd.grad(y, given, g), wanted, strict=True):
        assert_near(a, e, gradient=True)


@pytest.mark.parametrize("dim", [1, 2, 16, 21])
def test_features_are_a_taylor_series(assert_near: Check, dim: int):
    q, k = torch.randn(2, 50, dim, dtype=torch.float64)
    features = taylor_features(q)
    assert features.shape == (50, (dim + 1) * (dim + 2) // 2)
    s = q @ k.T / dim**0.5
    assert_near(features @ taylor_features(k).T, 1 + s + s.square() / 2)
    # near the exponential where scores are small
    w = taylor_features(0.01 * q) @ taylor_features(k).T
    torch.testing.assert_close(w, torch.exp(0.01 * s), rtol=1e-3, atol=0)


def test_order_plays_no_role(assert_near: Check):
    mixer = create_mixer("based_bidirectional", 8, num_heads=2, dtype=torch.float64)
    x, order = torch.randn(2, 11, 8, dtype=torch.float64), torch.randperm(11)
    assert_near(mixer(x[:, order]), mixer(x)[:, order])


def test_state_is_as_large_as_the_paper_says():
    spec = create_mixer("based", 1024).state_spec()
    assert spec["h"][0] == (16, 153, 65)
    assert create_mixer("based", 8, feature_dim=2).state_spec()["h"][0] == (1, 6, 9)


@pytest.mark.parametrize(
    ("width", "options", "match"),
    [
        (0, {}, "d_model must be at least 1, got 0"),
        (8, {"num_heads": 3}, "num_heads must divide d_model 8, got 3"),
        (8, {"feature_dim": 0}, "feature_dim must be at least 1, got 0"),
        (8, {"feature_dim": 22}, "feature_dim must be at most 21, got 22"),
        (256, {"num_heads": 1}, "256 columns a head, got 153 and 257"),
    ],
    ids=str,
)
def test_errors(width: int, options: dict[str, Any], match: str):
    for name in NAMES:
        with pytest.raises(ValueError, match=match):
            create_mixer(name, width, **options)
