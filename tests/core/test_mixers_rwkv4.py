"""RWKV-4's time mix against transformers' layer, and its state in long and steep sequences."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scanweave.core import create_mixer
from scanweave.core.ops.wkv import wkv_ref

Check = Callable[..., None]


def official(inner: int) -> nn.Module:
    """The layer of transformers, in plain PyTorch on a CPU, with none of its parameters 0."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

    config = transformers.RwkvConfig(
        hidden_size=16, attention_hidden_size=inner, num_hidden_layers=2
    )
    theirs = RwkvSelfAttention(config, 0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(std=0.5)
            if name.startswith("time_mix"):
                p.uniform_(0, 1)
    return theirs


@pytest.mark.parametrize("expand", [1, 2])
def test_equals_transformers(assert_near: Check, expand: int):
    theirs, ours = official(16 * expand), create_mixer("rwkv4", 16, expand=expand)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 23, 16, requires_grad=True)
    expected, _ = theirs(x)
    actual = ours(x)
    assert_near(actual, expected, name="output", factor=0.1)
    g = torch.randn_like(actual)
    parameters = dict(theirs.named_parameters())
    wanted = torch.autograd.grad(expected, [x, *parameters.values()], g)
    given = torch.autograd.grad(actual, [x, *(ours.get_parameter(k) for k in parameters)], g)
    for name, a, e in zip(["x", *parameters], given, wanted, strict=True):
        assert_near(a, e, gradient=True, factor=0.1, name=name)


def test_decodes_as_transformers(assert_near: Check):
    """One sequence: its single step mixes the rows of a batch."""
    theirs, ours = official(16), create_mixer("rwkv4", 16)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 9, 16)
    past = [torch.zeros(1, 16, 2) for _ in range(5)]
    past[4] -= 1e30
    with torch.no_grad():
        _, state = ours(x[:, :4], return_state=True)
        theirs(x[:, :4], state=past, use_cache=True)
        for t in range(4, 9):
            y, state = ours.step(x[:, t], state)
            expected, _ = theirs(x[:, t : t + 1], state=past, use_cache=True)
            assert_near(y, expected[:, 0], factor=0.2)
        n, d, m = (p[:, :, 0] for p in past[2:])
        assert_near(state["average"], n / d, factor=0.2)
        assert_near(state["log_weight"], m + torch.log(d), factor=0.2)


def test_loads_names_of_rwkv_lm(assert_near: Check):
    mixer = create_mixer("rwkv4", 8)
    renamed: dict[str, Tensor] = {}
    for key, value in mixer.state_dict().items():
        short = {"time_mix_key": "k", "time_mix_value": "v", "time_mix_receptance": "r"}
        renamed[f"time_mix_{short[key]}" if key in short else key] = value
    other = nn.ModuleDict({"att": create_mixer("rwkv4", 8)})
    other.load_state_dict({f"att.{key}": value for key, value in renamed.items()}, strict=True)
    assert "time_mix_k" in renamed
    x = torch.randn(1, 4, 8)
    assert_near(other["att"](x), mixer(x), factor=0)


def test_initial_values():
    """By the formulas of RWKV-4, for the second of three layers of width 5."""
    mixer = create_mixer("rwkv4", 5, layer=1, num_layers=3)
    shares = [(i / 5) ** (2 / 3) for i in range(5)]
    expected = {
        "time_decay": [-5 + 8 * (i / 4) ** (0.7 + 1.3 * 0.5) for i in range(5)],
        "time_first": [math.log(0.3) + 0.5 * z for z in (0, 1, -1, 0, 1)],
        "time_mix_key": shares,
        "time_mix_value": [s + 0.15 for s in shares],
        "time_mix_receptance": [s**0.5 for s in shares],
    }
    for name, values in expected.items():
        torch.testing.assert_close(mixer.get_parameter(name).flatten(), torch.tensor(values))
    rates = {n: getattr(p, "_optim", {}).get("lr_scale") for n, p in mixer.named_parameters()}
    assert {n: r for n, r in rates.items() if r} == {"time_decay": 2.0, "time_first": 3.0}
    assert not create_mixer("rwkv4", 8, zero_init=True)(torch.randn(1, 3, 8)).any()


def keys_up_to(mixer: nn.Module, size: float) -> None:
    with torch.no_grad():
        weight = mixer.get_parameter("key.weight")
        weight.mul_(size / weight.abs().sum(1, keepdim=True))


@pytest.mark.parametrize("name", ["rwkv4", "rwkv4_bidirectional"])
def test_large_keys(assert_near: Check, name: str):
    """Exponentials of keys that float32 does not have."""
    exact = create_mixer(name, 8, dtype=torch.float64)
    keys_up_to(exact, 200)
    mixer = create_mixer(name, 8)
    mixer.load_state_dict(exact.state_dict())
    x = torch.randn(2, 50, 8)
    x[..., 0] = x[..., 0].sign() * 3
    assert mixer.get_parameter("key.weight").abs().sum(1).min() > 199
    y = mixer(x)
    # a rounding of keys of 200 is one of 1e-5 in a weight
    assert_near(y, exact(x.double()), factor=10)
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mixer.parameters())


def test_state_neither_grows_nor_drifts(assert_near: Check):
    mixer = create_mixer("rwkv4", 8)
    exact = create_mixer("rwkv4", 8, dtype=torch.float64)
    exact.load_state_dict(mixer.state_dict())
    x = torch.randn(2000, 1, 8)
    states = [mixer.init_state(1), exact.init_state(1)]
    with torch.no_grad():
        for token in x[:-1]:
            _, states[0] = mixer.step(token, states[0])
            _, states[1] = exact.step(token.double(), states[1])
        y, states[0] = mixer.step(x[-1], states[0])
        expected, states[1] = exact.step(x[-1].double(), states[1])
        whole, last = exact(x.double().transpose(0, 1), return_state=True)
    assert_near(y, expected)
    assert_near(expected, whole[:, -1])
    for key, value in states[1].items():
        assert_near(states[0][key], value, factor=2)
        assert_near(value, last[key])


def test_both_directions_are_the_mean_of_both(assert_near: Check):
    mixer = create_mixer("rwkv4_bidirectional", 6, dtype=torch.float64)
    p = dict(mixer.named_parameters())
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    zero = torch.zeros_like(x[:, :1])
    before, after = torch.cat([zero, x[:, :-1]], 1), torch.cat([x[:, 1:], zero], 1)
    near = torch.cat([before[..., :3], after[..., 3:]], -1)

    def project(name: str) -> Tensor:
        share = p[f"time_mix_{name}"]
        return (x * share + near * (1 - share)) @ p[f"{name}.weight"].T

    k, v, r = (project(name) for name in ("key", "value", "receptance"))
    rates: Any = -p["time_decay"].exp(), p["time_first"]
    forward = wkv_ref(k, v, *rates)
    back = wkv_ref(k.flip(1), v.flip(1), *rates)
    assert isinstance(forward, Tensor)
    assert isinstance(back, Tensor)
    y = (torch.sigmoid(r) * (forward + back.flip(1)) / 2) @ p["output.weight"].T
    assert_near(mixer(x), y)
    assert_near(mixer.matrix(x).sum(-1), torch.ones(2, 6, 7))


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ({"expand": 0.1}, r"expand \* d_model must be at least 1, got 0"),
        ({"layer": 3, "num_layers": 3}, "layer must be from 0 to num_layers - 1 = 2, got 3"),
        ({"num_layers": 0}, "layer must be from 0 to num_layers - 1 = -1, got 0"),
    ],
    ids=str,
)
def test_errors(size: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        create_mixer("rwkv4", 8, **size)


def test_bidirectional_has_no_state():
    mixer = create_mixer("rwkv4_bidirectional", 8)
    with pytest.raises(ValueError, match="state needs a recurrent mixer, rwkv4_bidirectional"):
        mixer.init_state(2)
    with pytest.raises(ValueError, match="state needs a causal mixer, rwkv4_bidirectional"):
        mixer.step(torch.randn(2, 8), {})
