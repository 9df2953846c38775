"""Linear attention against fast-transformers' layers (stored values) and against its equation."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.wave_cases import check_stored, fill_with_waves, results
from torch import Tensor

from scanweave.core import Mixer, create_mixer
from scanweave.core.mixers.linear_attention import elu_plus_one

Check = Callable[..., None]
# outputs and gradients in float64 of fast-transformers (commit 2ad36b97): AttentionLayer with
# LinearAttention on a FullMask ("all"), and RecurrentAttentionLayer with RecurrentLinearAttention
# token by token ("causal"); 2 heads, with the parameters, input and cotangent of `waves`
STORED = Path(__file__).parent / "data" / "linear_attention.npz"
NAMES = {"causal": "linear_attention", "all": "linear_attention_bidirectional"}
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda u: F.elu(u) + 1,
    "relu": F.relu,
    "identity": lambda u: u,
}
OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 1},
    {"num_heads": 4, "feature_map": "relu", "eps": 0.1},
    {"num_heads": 2, "feature_map": "relu", "norm": "rms", "bias": False},
    {"num_heads": 2, "feature_map": "identity", "norm": "rms", "eps": 1e-3},
]


def by_definition(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """All pairs of tokens, a head at a time."""
    q, k, v = (
        F.linear(x, *(mixer.get_parameter(f"{n}_projection.{p}") for p in parts))
        for n in ("query", "key", "value")
        for parts in [("weight", "bias") if options.get("bias", True) else ("weight",)]
    )
    phi: Callable[[Tensor], Tensor] = MAPS[options.get("feature_map", "elu")]
    eps = options.get("eps", 1e-6)
    width, outputs = x.shape[-1] // options["num_heads"], []
    for i in range(options["num_heads"]):
        own = slice(i * width, (i + 1) * width)
        w = phi(q[..., own]) @ phi(k[..., own]).transpose(1, 2)
        w = w.tril() if mixer.causal else w
        y = w @ v[..., own]
        if options.get("norm", "sum") == "sum":
            y = y / (w.sum(-1, keepdim=True) + eps)
        else:
            y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
            y = y * mixer.get_parameter("norm.weight")
        outputs.append(y)
    return mixer.get_submodule("out_projection")(torch.cat(outputs, -1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", NAMES)
def test_equals_fast_transformers(assert_near: Check, kind: str, dtype: torch.dtype):
    mixer = create_mixer(NAMES[kind], 8, num_heads=2, dtype=dtype)
    check_stored(assert_near, results(fill_with_waves(mixer)), STORED, kind)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", NAMES.values())
def test_equals_its_definition(assert_near: Check, name: str, options: dict[str, Any]):
    mixer = create_mixer(name, 12, dtype=torch.float64, **options)
    x = torch.randn(2, 70, 12, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x), by_definition(mixer, x, options)
    assert_near(y, expected)
    given, g = [x, *mixer.parameters()], torch.randn_like(y)
    wanted = torch.autograd.grad(expected, given, g)
    for a, e in zip(torch.autograd.grad(y, given, g), wanted, strict=True):
        assert_near(a, e, gradient=True)


def test_order_plays_no_role(assert_near: Check):
    mixer = create_mixer("linear_attention_bidirectional", 8, num_heads=2, dtype=torch.float64)
    x, order = torch.randn(2, 11, 8, dtype=torch.float64), torch.randperm(11)
    assert_near(mixer(x[:, order]), mixer(x)[:, order])
    # packed sequences run another way: two scans
    cu_seqlens = torch.tensor([0, 11], dtype=torch.int32)
    for y in (x[:1], x[:1, order]):
        assert_near(mixer(y, cu_seqlens=cu_seqlens), mixer(y))


def test_weights_are_those_of_an_average():
    for name in NAMES.values():
        mixer = create_mixer(name, 8, num_heads=2)
        matrix = mixer.matrix(torch.randn(2, 9, 8))
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 2, 9))


def test_features_keep_their_digits():
    """elu(x) + 1 is exp(x) below 0, which 1 would swallow."""
    x = torch.linspace(-30, 3, 24)
    exact = torch.where(x > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(elu_plus_one(x).double(), exact, rtol=1e-6, atol=0)
    for value, slope in ((-2.0, math.exp(-2)), (0.0, 1.0), (2.0, 1.0)):
        x = torch.tensor(value, requires_grad=True)
        elu_plus_one(x).backward()
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("norm", ["sum", "rms"])
def test_sums_of_many_tokens_in_half_precision(assert_near: Check, norm: str, dtype: torch.dtype):
    """Sums over all tokens pass 65504, float16's largest number; outputs do not."""
    options: dict[str, Any] = {"num_heads": 1, "norm": norm}
    for name in NAMES.values():
        mixer = create_mixer(name, 4, **options)
        exact = create_mixer(name, 4, **options, dtype=torch.float64)
        half = create_mixer(name, 4, **options, dtype=dtype)
        half.load_state_dict(mixer.state_dict())
        exact.load_state_dict(half.state_dict())
        mixer.load_state_dict(half.state_dict())
        x = (20 * torch.rand(1, 3000, 4) + 20).to(dtype)
        expected = exact(x.double())
        with torch.autocast("cpu", dtype):
            assert_near(mixer(x.float()), expected, factor=2)
        assert_near(half(x), expected, factor=2)
        assert_near(half(x, cu_seqlens=torch.tensor([0, 3000])), expected, factor=2)
        if mixer.recurrent:
            with torch.no_grad():
                _, state = half(x[:, :-1], return_state=True)
                assert_near(half.step(x[:, -1], state)[0], expected[:, -1], factor=2)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (128, 2), (100, 2), (7, 1), (97, 97)])
def test_default_heads(width: int, heads: int):
    mixer = create_mixer("linear_attention", width)
    keys = width // heads
    assert mixer.state_spec()["h"][0] == (heads, keys, keys + 1)
    plain = create_mixer("linear_attention", width, norm="rms")
    assert plain.state_spec()["h"][0] == (heads, keys, keys)


@pytest.mark.parametrize(
    ("width", "options", "match"),
    [
        (0, {}, "d_model must be at least 1, got 0"),
        (8, {"num_heads": 3}, "num_heads must divide d_model 8, got 3"),
        (8, {"num_heads": 0}, "num_heads must divide d_model 8, got 0"),
        (8, {"feature_map": "exp"}, "feature_map must be one of elu, relu, identity, got 'exp'"),
        (8, {"norm": "layer"}, "norm must be 'sum' or 'rms', got 'layer'"),
        (8, {"feature_map": "identity"}, "norm must be 'rms' with feature_map 'identity', got"),
        (256, {"num_heads": 1}, "at most 256 features and 256 columns a head, got 256 and 257"),
        (257, {"num_heads": 1, "norm": "rms"}, "256 columns a head, got 257 and 257"),
    ],
    ids=str,
)
def test_errors(width: int, options: dict[str, Any], match: str):
    for name in NAMES.values():
        with pytest.raises(ValueError, match=match):
            create_mixer(name, width, **options)


def test_step_refuses_other_widths():
    mixer = create_mixer("linear_attention", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
