"""RWKV-5 and RWKV-6 against RWKV-LM's layers (stored values), and what both directions mean."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.rwkv_cases import STORED, stored, wave_weights, waves
from torch import Tensor

from scanweave.core import Mixer, create_mixer

Check = Callable[..., None]
LAYERS = {"rwkv5": "RWKV_Tmix_x052", "rwkv6": "RWKV_Tmix_x060"}
EACH = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@EACH
def test_equals_rwkv_lm(assert_near: Check, name: str, dtype: torch.dtype):
    mixer, layer = create_mixer(name, 8, headdim=4, dtype=dtype), LAYERS[name]
    weights = wave_weights({key: p.shape for key, p in mixer.named_parameters()})
    assert weights.keys() == STORED[layer]["gradient_sums"].keys()
    mixer.load_state_dict(weights, strict=True)
    x = waves(1, 5, 8, speed=0.7).to(dtype).requires_grad_()
    y = mixer(x)
    limit = torch.float32  # of 9 digits stored
    assert_near(y, stored(layer, "output"), dtype=limit, factor=0.1, name="output")
    y.backward(waves(1, 5, 8, speed=1.1).to(dtype))
    expected = stored(layer, "input_gradient")
    assert_near(x.grad, expected, dtype=limit, gradient=True, name="input")
    for key, total in STORED[layer]["gradient_sums"].items():
        grad = mixer.get_parameter(key).grad
        assert grad is not None
        error = (grad * waves(*grad.shape, speed=0.3)).sum().item() - total
        assert abs(error) < 1e-5 * grad.norm().item(), key


@EACH
def test_steps_equal_rwkv_lm(assert_near: Check, name: str):
    mixer = create_mixer(name, 8, headdim=4)
    mixer.load_state_dict(wave_weights({key: p.shape for key, p in mixer.named_parameters()}))
    state, parts = mixer.init_state(1), []
    with torch.no_grad():
        for token in waves(1, 5, 8, speed=0.7).float().unbind(1):
            y, state = mixer.step(token, state)
            parts.append(y)
    assert_near(torch.stack(parts, 1), stored(LAYERS[name], "output"), factor=0.2)


@EACH
def test_initial_values(name: str):
    mixer = create_mixer(name, 8, headdim=4, layer=1, num_layers=3)
    for key, values in STORED[LAYERS[name]]["initial"].items():
        p, expected = mixer.get_parameter(key).flatten(), torch.tensor(values)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6, msg=key)
    scale = mixer.get_parameter("ln_x.weight")
    torch.testing.assert_close(scale, torch.full((8,), (2 / 3) ** 0.7))
    assert mixer.get_parameter("output.weight").any()
    zero = create_mixer(name, 8, zero_init=True)
    assert not zero(torch.randn(1, 3, 8)).any()


@EACH
def test_decay_has_its_own_rate(name: str):
    mixer = create_mixer(name, 8)
    for key, p in mixer.named_parameters():
        scale = getattr(p, "_optim", {}).get("lr_scale")
        assert scale == (2.0 if key == "time_decay" else None), key


def both_ways(mixer: Mixer, x: Tensor, heads: int) -> Tensor:
    """The equations of both directions, a state read at every token before it is written."""
    w = dict(mixer.named_parameters())
    zero, half = torch.zeros_like(x[:, :1]), x.shape[-1] // 2
    before, after = torch.cat([zero, x[:, :-1]], 1), torch.cat([x[:, 1:], zero], 1)
    near = torch.cat([before[..., :half], after[..., half:]], -1)
    if "time_mix_k" in w:
        part = {z: x * w[f"time_mix_{z}"] + near * (1 - w[f"time_mix_{z}"]) for z in "kvrg"}
        decays = torch.exp(-torch.exp(w["time_decay"])).expand(*x.shape[:2], -1, -1)
    else:
        low = torch.tanh((x + (near - x) * w["time_maa_x"]) @ w["time_maa_w1"]).chunk(5, -1)
        more = {z: u @ m for z, u, m in zip("wkvrg", low, w["time_maa_w2"], strict=True)}
        part = {z: x + (near - x) * (w[f"time_maa_{z}"] + m) for z, m in more.items()}
        lift = torch.tanh(part["w"] @ w["time_decay_w1"]) @ w["time_decay_w2"]
        decays = torch.exp(-torch.exp(w["time_decay"] + lift)).unflatten(-1, (heads, -1))
    names = zip("rkvg", ("receptance", "key", "value", "gate"), strict=True)
    r, k, v, z = ((part[u] @ w[f"{n}.weight"].T).unflatten(-1, (heads, -1)) for u, n in names)
    y = (r * w["time_faaaa"] * k).sum(-1, keepdim=True) * v
    for places in (range(x.shape[1]), reversed(range(x.shape[1]))):
        h, read = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), {}
        for t in places:
            read[t] = torch.einsum("bhk,bhkp->bhp", r[:, t], h)
            h = decays[:, t, :, :, None] * h + k[:, t, :, :, None] * v[:, t, :, None]
        y = y + torch.stack([read[t] for t in range(x.shape[1])], 1)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 64e-5).sqrt()
    y = y.flatten(2) * w["ln_x.weight"] + w["ln_x.bias"]
    return (y * torch.nn.functional.silu(z.flatten(2))) @ w["output.weight"].T


@EACH
def test_both_directions_equal_the_equations(assert_near: Check, name: str):
    mixer = create_mixer(f"{name}_bidirectional", 8, headdim=4, dtype=torch.float64)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(2, 33, 8, dtype=torch.float64, requires_grad=True)
    y, expected = mixer(x), both_ways(mixer, x, 2)
    assert_near(y, expected)
    given, g = [x, *mixer.parameters()], torch.randn_like(y)
    wanted = torch.autograd.grad(expected, given, g)
    for a, e in zip(torch.autograd.grad(y, given, g), wanted, strict=True):
        assert_near(a, e, gradient=True)


def test_both_directions_weigh_by_what_lies_between(assert_near: Check):
    """Of one decay, bonus and r = k, the matrix is symmetric; nothing is counted twice."""
    mixer = create_mixer("rwkv5_bidirectional", 8, headdim=4, dtype=torch.float64)
    with torch.no_grad():
        mixer.get_parameter("receptance.weight").copy_(mixer.get_parameter("key.weight"))
        mixer.get_parameter("time_mix_r").copy_(mixer.get_parameter("time_mix_k"))
        mixer.get_parameter("time_decay").fill_(0)
        mixer.get_parameter("time_faaaa").fill_(3)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    matrix = mixer.matrix(x)
    assert_near(matrix, matrix.transpose(-1, -2))
    near = torch.cat([x[:, :1] * 0, x[:, :-1]], 1)[..., :4], torch.cat([x[:, 1:], x[:, :1] * 0], 1)
    near = torch.cat([near[0], near[1][..., 4:]], -1)
    share = mixer.get_parameter("time_mix_k")
    k = (x * share + near * (1 - share)) @ mixer.get_parameter("key.weight").T
    k = k.unflatten(-1, (2, 4)).transpose(1, 2)
    place = torch.arange(6)
    distance = (place[:, None] - place).abs().double()
    weight = torch.where(distance == 0, 3.0, torch.exp(1.0 - distance))
    assert_near(matrix, (k @ k.transpose(-1, -2)) * weight)
    values, outputs = mixer.core(x)
    assert_near(matrix @ values, outputs)


def test_decays_of_rwkv6_are_those_of_the_tokens_between(assert_near: Check):
    """A token that decays everything is a wall, but those beside it see it."""
    mixer = create_mixer("rwkv6_bidirectional", 4, dtype=torch.float64)
    with torch.no_grad():
        mixer.get_parameter("time_decay_w1").zero_()[0, 0] = 100
        mixer.get_parameter("time_decay_w2").zero_()[0] = 12
        mixer.get_parameter("time_decay").fill_(-3)
        for z in "xw":
            mixer.get_parameter(f"time_maa_{z}").zero_()
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    x[..., 0] = torch.tensor([-1.0, -1, 1, -1, -1])
    matrix = mixer.matrix(x)[0, 0]
    assert not matrix[:2, 3:].any()
    assert not matrix[3:, :2].any()
    assert matrix[:2, 2].all()
    assert matrix[2].all()
    assert matrix[3:, 2].all()
    values, outputs = mixer.core(x)
    assert_near(matrix @ values, outputs)


@pytest.mark.parametrize("name", [*LAYERS, *(f"{n}_bidirectional" for n in LAYERS)])
def test_very_fast_decays(assert_near: Check, name: str):
    """Nothing but the neighbours and the token itself is left, and gradients stay finite."""
    exact = create_mixer(name, 8, headdim=4, dtype=torch.float64)
    with torch.no_grad():
        exact.get_parameter("time_decay").fill_(70)
    mixer = create_mixer(name, 8, headdim=4)
    mixer.load_state_dict(exact.state_dict())
    x = torch.randn(2, 20, 8)
    y = mixer(x)
    assert_near(y, exact(x.double()))
    assert not mixer.matrix(x).triu(2).any()
    assert not mixer.matrix(x).tril(-2).any()
    y.square().sum().backward()
    for key, p in mixer.named_parameters():
        assert p.grad is not None
        assert torch.isfinite(p.grad).all(), key


@pytest.mark.parametrize(
    ("name", "width", "size", "match"),
    [
        ("rwkv5", 0, {}, "d_model must be at least 1, got 0"),
        ("rwkv5", 8, {"expand": 0.1}, "expand * d_model must be at least 1, got 0"),
        ("rwkv5", 8, {"headdim": 3}, "headdim must divide the 8 inner channels, got 3"),
        ("rwkv6", 8, {"headdim": 1}, "headdim must be from 2 to 256, got 1"),
        ("rwkv6", 512, {"headdim": 512}, "headdim must be from 2 to 256, got 512"),
        ("rwkv6", 8, {"mix_rank": 0}, "mix_rank must be at least 1, got 0"),
        ("rwkv6", 8, {"decay_rank": 0}, "decay_rank must be at least 1, got 0"),
        ("rwkv6", 8, {"layer": 2, "num_layers": 2}, "layer must be from 0 to num_layers - 1 = 1"),
        ("rwkv5", 8, {"layer": -1}, "layer must be from 0 to num_layers - 1 = 0, got -1"),
    ],
    ids=str,
)
def test_errors(name: str, width: int, size: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=re.escape(match)):
        create_mixer(name, width, **size)


@pytest.mark.parametrize("name", [f"{n}_bidirectional" for n in LAYERS])
def test_bidirectional_has_no_state(name: str):
    mixer = create_mixer(name, 8)
    with pytest.raises(ValueError, match=f"state needs a recurrent mixer, {name} is not one"):
        mixer.state_spec()
    with pytest.raises(ValueError, match=f"state needs a causal mixer, {name} reads the future"):
        mixer.step(torch.randn(2, 8), {})
