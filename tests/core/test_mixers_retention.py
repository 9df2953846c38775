"""Retention against torchscale's layer (stored values) and against its recurrence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.wave_cases import waves
from torch import Tensor

from scanweave.core import Mixer, create_mixer

Check = Callable[..., None]
# torchscale's MultiScaleRetention (commit 4d1e0e82) with the weights, input and cotangent of
# `waves` in float64: outputs and gradient of its input, (5, 8)
OUTPUTS = [
    [-0.677997028, -0.650480918, -0.622149473, -0.593038207],
    [-0.563183607, -0.532623094, -0.501394975, -0.46953839],
    [1.27577982, 1.17535709, 1.07346114, 0.97021967],
    [0.865762098, 0.760219352, 0.653723722, 0.546408694],
    [1.6576497, 1.55006057, 1.44052854, 1.3291909],
    [1.21618721, 1.10165912, 0.985750166, 0.868605643],
    [1.50035606, 1.44668529, 1.39120119, 1.33397332],
    [1.2750734, 1.21457526, 1.15255474, 1.08908956],
    [0.642221208, 0.663993314, 0.684933149, 0.705014466],
    [0.724212095, 0.742501973, 0.759861175, 0.776267942],
]
GRADIENT = [
    [35.1858106, -42.3216503, 39.4523867, -30.5925246],
    [22.2414544, -12.8136868, -2.32785613, 19.8017012],
    [9.13918576, 3.01718295, -17.4388233, 25.0723339],
    [-22.4692769, 13.1766456, -1.45747725, -11.4326591],
    [22.5850711, -2.47504175, -18.5596739, 33.3101326],
    [-35.7615674, 23.5984976, -1.06786753, -21.9716207],
    [19.5262137, -0.409902934, -17.9861135, 28.3766449],
    [-26.6008354, 13.6632484, 4.66339281, -20.614325],
    [-45.7242347, 47.7159051, 61.2023534, -35.7463945],
    [-75.6526389, 33.8265594, 76.5936466, -25.3195999],
]
# sums of the gradient of every weight times a wave of speed 0.3
GRADIENT_SUMS = {
    "q_proj.weight": -257.40832,
    "k_proj.weight": 3.66402027,
    "v_proj.weight": 214.135618,
    "g_proj.weight": -6.97698191,
    "out_proj.weight": -0.766165421,
}
SIZES: list[dict[str, Any]] = [
    {"num_heads": 1},
    {"num_heads": 4, "expand": 1},
    {"num_heads": 2, "expand": 1.5, "eps": 0.1},
]


def recurrence(mixer: Mixer, x: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    """Token after token, with positions and complex numbers; (B, L, D)."""
    w = {k.removesuffix("_proj.weight"): p for k, p in mixer.named_parameters()}
    keys = x.shape[-1] // heads
    decay = 1 - 2.0 ** (-5 - torch.arange(heads, dtype=x.dtype))
    speed = 10000 ** -torch.linspace(0, 1, keys // 2, dtype=x.dtype)
    h = torch.zeros(x.shape[0], heads, keys // 2, 1, dtype=torch.complex128)
    scale, outputs = torch.zeros_like(decay), []
    for t, token in enumerate(x.unbind(1)):
        q, k, v = ((token @ w[n].T).unflatten(-1, (heads, -1)) for n in "qkv")
        q, k = (torch.view_as_complex(u.unflatten(-1, (-1, 2)).contiguous()) for u in (q, k))
        turn = torch.exp(1j * speed * t)
        h = h * decay[:, None, None] + (k * turn / keys**0.5)[..., None] * v[..., None, :]
        scale = scale * decay + 1
        y = ((q * turn).conj()[..., None, :] @ h).real.squeeze(-2)
        y = y / scale.sqrt()[:, None]
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
        outputs.append((y.flatten(1) * F.silu(token @ w["g"].T)) @ w["out"].T)
    return torch.stack(outputs, 1)


def test_heads_wider_than_the_scan(assert_near: Check):
    """The published models have heads of 256 keys and 512 values."""
    mixer = create_mixer("retnet", 16, num_heads=2, expand=50, dtype=torch.float64)
    assert mixer.state_spec()["h"][0] == (4, 8, 200)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    assert_near(mixer(x), recurrence(mixer, x, 2))
    with torch.no_grad():
        _, state = mixer(x[:, :5], return_state=True)
        assert_near(mixer.step(x[:, 5], state)[0], mixer(x)[:, 5])
    both = create_mixer("retnet_bidirectional", 16, num_heads=2, expand=50, dtype=torch.float64)
    for m in (mixer, both):
        values, outputs = m.core(x)
        assert_near(m.matrix(x) @ values, outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_equals_torchscale(assert_near: Check, dtype: torch.dtype):
    mixer = create_mixer("retnet", 8, num_heads=2, dtype=dtype)
    names = list(GRADIENT_SUMS)
    shapes = {name: p.shape for name, p in mixer.named_parameters()}
    weights = {name: waves(*shapes[name], speed=i + 1.5) for i, name in enumerate(names)}
    mixer.load_state_dict(weights, strict=True)
    x = waves(1, 5, 8, speed=0.7).to(dtype).requires_grad_()
    y = mixer(x)
    # its angles are rounded to float32
    limit = torch.float32
    assert_near(y, torch.tensor(OUTPUTS).view(1, 5, 8), dtype=limit, name="output")
    y.backward(waves(1, 5, 8, speed=1.1).to(dtype))
    expected = torch.tensor(GRADIENT).view(1, 5, 8)
    assert_near(x.grad, expected, dtype=limit, gradient=True, name="input")
    for name, total in GRADIENT_SUMS.items():
        grad = mixer.get_parameter(name).grad
        assert grad is not None
        error = (grad * waves(*grad.shape, speed=0.3)).sum().item() - total
        assert abs(error) < 1e-4 * grad.norm().item(), name


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_its_recurrence(assert_near: Check, size: dict[str, Any]):
    mixer = create_mixer("retnet", 16, dtype=torch.float64, **size)
    x = torch.randn(2, 70, 16, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x), recurrence(mixer, x, size["num_heads"], size.get("eps", 1e-6))
    assert_near(y, expected)
    given, g = [x, *mixer.parameters()], torch.randn_like(y)
    wanted = torch.autograd.grad(expected, given, g)
    for a, e in zip(torch.autograd.grad(y, given, g), wanted, strict=True):
        assert_near(a, e, gradient=True)


def test_state_does_not_count(assert_near: Check):
    """After many tokens a state is as exact as after few: nothing in it grows."""
    mixer = create_mixer("retnet", 8, num_heads=2)
    exact = create_mixer("retnet", 8, num_heads=2, dtype=torch.float64)
    exact.load_state_dict(mixer.state_dict())
    x, states = torch.randn(3000, 1, 8), [mixer.init_state(1), exact.init_state(1)]
    with torch.no_grad():
        for token in x[:-1]:
            _, states[0] = mixer.step(token, states[0])
            _, states[1] = exact.step(token.double(), states[1])
        y, states[0] = mixer.step(x[-1], states[0])
        expected, states[1] = exact.step(x[-1].double(), states[1])
    assert_near(y, expected)
    assert_near(states[0]["h"], states[1]["h"])
    # the series 1 + decay + decay^2 + ... ends at 2^5 and 2^6
    assert_near(states[0]["scale"], torch.tensor([[32.0, 64.0]]))


def test_both_directions_weigh_a_token_once(assert_near: Check):
    """Its matrix is symmetric in distance: decay^|t - s|, by values of one key."""
    mixer = create_mixer("retnet_bidirectional", 8, num_heads=2, dtype=torch.float64)
    with torch.no_grad():
        mixer.get_parameter("k_proj.weight").copy_(mixer.get_parameter("q_proj.weight"))
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    matrix = mixer.matrix(x)
    assert_near(matrix, matrix.transpose(-1, -2))
    q = (x @ mixer.get_parameter("q_proj.weight").T).unflatten(-1, (2, 4))
    diagonal = q.square().sum(-1).transpose(1, 2) / 2
    assert_near(matrix.diagonal(dim1=-2, dim2=-1), diagonal)
    values, outputs = mixer.core(x)
    assert_near(matrix @ values, outputs)


def test_bidirectional_has_no_state():
    mixer = create_mixer("retnet_bidirectional", 8)
    with pytest.raises(ValueError, match="state needs a recurrent mixer, retnet_bidirectional"):
        mixer.init_state(2)
    with pytest.raises(ValueError, match="state needs a causal mixer, retnet_bidirectional"):
        mixer.step(torch.randn(2, 8), {})


def test_initial_values_and_heads():
    mixer = create_mixer("retnet", 192)
    for name, p in mixer.named_parameters():
        gain = 1 if name == "out_proj.weight" else 2**-2.5
        bound = gain * (6 / sum(p.shape)) ** 0.5
        assert 0.98 * bound < p.abs().max().item() <= bound * (1 + 1e-6), name
    assert mixer.state_spec()["h"][0] == (3, 64, 128)
    assert create_mixer("retnet", 6).state_spec()["h"][0] == (1, 6, 12)
    assert create_mixer("retnet", 132).state_spec()["h"][0] == (3, 44, 88)


@pytest.mark.parametrize(
    ("width", "size", "match"),
    [
        (7, {}, "d_model must be even, key channels turn in pairs, got 7"),
        (0, {}, "d_model must be at least 1, got 0"),
        (8, {"expand": 0}, r"expand \* d_model must be at least 1, got 0"),
        (8, {"num_heads": 3}, "num_heads must divide d_model / 2 = 4, got 3"),
        (8, {"num_heads": 8}, "num_heads must divide d_model / 2 = 4, got 8"),
        (8, {"num_heads": 0}, "num_heads must divide d_model / 2 = 4, got 0"),
        (8, {"num_heads": 4, "expand": 0.75}, "num_heads must divide 6 value channels .* got 4"),
        (258, {"num_heads": 1}, "and split 258 key channels into at most 256 each, got 1"),
    ],
    ids=str,
)
def test_errors(width: int, size: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        create_mixer("retnet", width, **size)


def test_step_refuses_other_widths():
    mixer = create_mixer("retnet", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
