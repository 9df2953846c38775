"""HGRN2 against flash-linear-attention's layer (stored values) and against its recurrence."""

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
# outputs and gradients in float64 of flash-linear-attention's HGRN2Attention (commit bc3b101d), 2
# heads, without ("first") and with ("later") a lower bound of 0.3, with naive_recurrent_gla for its
# kernels and the formula of its fused norm written out; parameters, input and cotangent of `waves`
STORED = Path(__file__).parent / "data" / "hgrn2.npz"
BOUNDS = {"first": 0.0, "later": 0.3}
OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"num_heads": 1, "expand_ratio": 3, "lower_bound": 0.5, "eps": 0.1},
    {"num_heads": 4, "expand_ratio": 6, "lower_bound": 0.01},
]


def recurrence(mixer: Mixer, x: Tensor, options: dict[str, Any]) -> Tensor:
    """Token after token, in one direction or in both; (B, L, D)."""
    w, heads = dict(mixer.named_parameters()), options["num_heads"]
    least = options.get("lower_bound", 0.0)
    q = F.silu(x @ w["q_proj.weight"].T).unflatten(-1, (heads, -1))
    v = (x @ w["i_proj.weight"].T).unflatten(-1, (heads, -1))
    gates = least + (1 - least) * torch.sigmoid(x @ w["f_proj.weight"].T)
    outputs = []
    for d, gate in enumerate(gates.chunk(1 if mixer.causal else 2, -1)):
        tokens = (q, v, gate.unflatten(-1, (heads, -1)))
        read, h = [], torch.zeros(x.shape[0], heads, q.shape[-1], v.shape[-1], dtype=x.dtype)
        for own_q, own_v, f in zip(
            *(u.flip(1 if d else ()).unbind(1) for u in tokens), strict=True
        ):
            h = f.unsqueeze(-1) * h + (1 - f).unsqueeze(-1) * own_v.unsqueeze(-2)
            read.append(torch.einsum("bhk,bhkp->bhp", own_q, h) / q.shape[-1] ** 0.5)
        outputs.append(torch.stack(read, 1).flip(1 if d else ()))
    y = torch.stack(outputs).mean(0).flatten(2)
    y = y / (y.square().mean(-1, keepdim=True) + options.get("eps", 1e-5)).sqrt()
    return (y * w["g_norm.weight"]) @ w["o_proj.weight"].T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("layer", BOUNDS)
def test_equals_flash_linear_attention(assert_near: Check, layer: str, dtype: torch.dtype):
    mixer = create_mixer("hgrn2", 8, num_heads=2, lower_bound=BOUNDS[layer], dtype=dtype)
    check_stored(assert_near, results(fill_with_waves(mixer)), STORED, layer)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["hgrn2", "hgrn2_bidirectional"])
def test_equals_its_recurrence(assert_near: Check, name: str, options: dict[str, Any]):
    mixer = create_mixer(name, 16, dtype=torch.float64, **options)
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x), recurrence(mixer, x, options)
    assert_near(y, expected)
    given, g = [x, *mixer.parameters()], torch.randn_like(y)
    wanted = torch.autograd.grad(expected, given, g)
    for a, e in zip(torch.autograd.grad(y, given, g), wanted, strict=True):
        assert_near(a, e, gradient=True)


def test_constant_inputs_are_remembered_as_they_are(assert_near: Check):
    """A gate writes what it forgets: a state fills up to the value and no further."""
    mixer = create_mixer("hgrn2", 4, num_heads=1, dtype=torch.float64)
    x = torch.randn(1, 1, 4, dtype=torch.float64).expand(1, 2000, 4)
    _, state = mixer(x, return_state=True)
    value = x[0, 0] @ mixer.get_parameter("i_proj.weight").T
    assert_near(state["h"][0, 0], value.expand(4, 4))


@pytest.mark.parametrize(
    ("width", "shape"), [(1024, (8, 128, 128)), (192, (2, 96, 96)), (7, (1, 7, 7))]
)
def test_default_heads(width: int, shape: tuple[int, int, int]):
    assert create_mixer("hgrn2", width).state_spec()["h"][0] == shape


@pytest.mark.parametrize(
    ("width", "options", "match"),
    [
        (0, {}, "d_model must be at least 1, got 0"),
        (8, {"num_heads": 3}, "num_heads must divide d_model 8, got 3"),
        (8, {"num_heads": 0}, "num_heads must divide d_model 8, got 0"),
        (8, {"expand_ratio": 0}, "expand_ratio must be at least 1, got 0"),
        (8, {"lower_bound": 1.0}, r"lower_bound must be in \[0, 1\), got 1.0"),
        (8, {"lower_bound": -0.1}, r"lower_bound must be in \[0, 1\), got -0.1"),
        (257, {"num_heads": 1}, "256 key and value channels a head, got 257 and 257"),
        (8, {"expand_ratio": 300}, "256 key and value channels a head, got 300 and 8"),
    ],
    ids=str,
)
def test_errors(width: int, options: dict[str, Any], match: str):
    for name in ("hgrn2", "hgrn2_bidirectional"):
        with pytest.raises(ValueError, match=match):
            create_mixer(name, width, **options)
