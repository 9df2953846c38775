"""Hyena against safari's operator (stored values) and its own sums, initial values, errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from tests.core.wave_cases import waves
from torch import Tensor

from scanweave.core import create_mixer
from scanweave.core.mixers.hyena import Hyena
from scanweave.core.training import param_groups

Check = Callable[..., None]
# safari's HyenaOperator (standalone_hyena.py, commit 02220c69) in float64 with d_model 2, l_max 9,
# and the weights, input and cotangent of `waves` (weights in the order of its parameters, but for
# the positional code, which is its own): kernel, output, gradients (the first 12 of a parameter)
PUBLISHED = json.loads((Path(__file__).parent / "data" / "hyena.json").read_text())
CASES = pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED.keys())


def build(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> Hyena:
    config = case["config"]
    return Hyena(
        2,
        l_max=9,
        order=config["order"],
        emb_dim=config["emb_dim"],
        filter_width=config["filter_order"],
        filter_depth=config["num_inner_mlps"],
        frequency=config["w"],
        dtype=dtype,
    )


def official(case: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict with safari's names."""
    weights = {
        name: waves(*case["shapes"][name], speed=0.7 + 0.1 * i)
        for i, name in enumerate(case["order"])
        if name != "filter_fn.pos_emb.z"
    }
    for name, shape in case["shapes"].items():
        if name.endswith(".freq"):
            weights[name] = weights["filter_fn.implicit_filter.1.freq"]
        elif name == "filter_fn.pos_emb.t":
            weights[name] = torch.linspace(0, 1, 9, dtype=torch.float64).reshape(shape)
        elif name == "filter_fn.modulation.deltas":
            weights[name] = torch.tensor(case["deltas"], dtype=torch.float64).reshape(shape)
        elif name == "filter_fn.pos_emb.z":
            short = case["z"]  # stored up to 40 values
            z = build(case).filter_fn.pos_emb.z.detach().clone()
            z.view(-1)[: len(short)] = torch.tensor(short, dtype=torch.float64)
            weights[name] = z
    assert weights.keys() == case["shapes"].keys()
    return weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@CASES
def test_equals_the_published_operator(
    assert_near: Check, case: dict[str, Any], dtype: torch.dtype
):
    mixer = build(case, dtype)
    mixer.load_state_dict(official(case), strict=True)
    factor = 1 if dtype == torch.float64 else 0.1
    if dtype == torch.float64:  # stored with ten digits
        factor = 100
    kernel, back = mixer.filter_fn(7)
    assert back is None
    assert_near(kernel, torch.tensor(case["kernel"], dtype=torch.float64), factor=factor)
    x = waves(2, 7, 2, speed=0.9).to(dtype).requires_grad_()
    y = mixer(x)
    assert_near(y, torch.tensor(case["output"], dtype=torch.float64), factor=factor)
    y.backward(waves(2, 7, 2, speed=1.3).to(dtype))
    wanted = torch.tensor(case["grad_input"], dtype=torch.float64)
    assert_near(x.grad, wanted, gradient=True, factor=factor, name="input")
    for name, p in mixer.named_parameters():
        assert p.grad is not None, name
        first = torch.tensor(case["grads"][name], dtype=torch.float64)
        assert_near(p.grad.flatten()[:12], first, gradient=True, factor=factor, name=name)


@CASES
def test_positional_code_and_window_are_the_published_ones(
    assert_near: Check, case: dict[str, Any]
):
    filters = build(case).filter_fn
    code = torch.tensor(case["z"], dtype=torch.float64)
    assert_near(filters.pos_emb.z.flatten()[: len(code)], code, factor=100)
    deltas = torch.tensor(case["deltas"], dtype=torch.float64)
    assert_near(filters._rates(deltas), deltas.abs(), factor=100)


def test_other_windows_are_refused():
    case = PUBLISHED["order 2"]
    weights = official(case) | {"filter_fn.modulation.deltas": torch.tensor([[[-1.0, -2.0]]])}
    with pytest.raises(RuntimeError, match=r"modulation.deltas are not those of \(0.3, 1.5\)"):
        build(case).load_state_dict(weights)


def summed(mixer: Any, x: Tensor) -> Tensor:
    """The operator by its sums over pairs of tokens, in float64."""
    length, dim, width = x.shape[1], mixer.d_model, mixer.d_conv
    u = mixer.in_proj(x)
    left = width - 1 if mixer.causal else (width - 1) // 2
    near = torch.nn.functional.pad(u, (0, 0, left, width - 1 - left))
    taps = mixer.short_filter.weight[:, 0]
    u = mixer.short_filter.bias + sum(taps[:, j] * near[:, j : j + length] for j in range(width))
    *gates, v = u.split(dim, -1)
    kernel, back = mixer.filter_fn(length)
    for j in range(mixer.order - 1):
        v = v * gates[mixer.order - 1 - j]
        own = slice(j * dim, (j + 1) * dim)
        y = mixer.filter_fn.bias[own] * v
        for t in range(length):
            for s in range(length):
                if t - mixer.l_max < s <= t:
                    y[:, t] += kernel[own, t - s] * v[:, s]
                if back is not None and t <= s < t + mixer.l_max:
                    y[:, t] += back[own, s - t] * v[:, s]
        v = y
    return mixer.out_proj(v * gates[0])


@pytest.mark.parametrize("name", ["hyena", "hyena_bidirectional"])
@pytest.mark.parametrize("config", [{"l_max": 4}, {"order": 4, "d_conv": 5, "l_max": 64}], ids=str)
def test_equals_its_sums(assert_near: Check, name: str, config: dict[str, Any]):
    mixer = create_mixer(name, 3, dtype=torch.float64, **config)
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = summed(mixer, x)
    assert_near(mixer(x), expected)
    packed = mixer(x[:1], cu_seqlens=pack((4, 0, 7)))
    with torch.no_grad():
        parts = [summed(mixer, v) for v in x[:1].split((4, 7), 1)]
    assert_near(packed, torch.cat(parts, 1))


def test_state_stops_growing():
    mixer = create_mixer("hyena", 4, l_max=6)
    state = mixer.init_state(2)
    sizes = []
    for count in (1, 3, 4, 9):
        _, state = mixer(torch.randn(2, count, 4), state=state, return_state=True)
        sizes.append(state["past"].shape[1])
    assert sizes == [1, 4, 5, 5]


def test_kernels_are_exact_under_autocast():
    mixer = create_mixer("hyena", 4)
    assert isinstance(mixer, Hyena)
    exact, _ = mixer.filter_fn(200)
    with torch.autocast("cpu", torch.bfloat16):
        kernel, _ = mixer.filter_fn(200)
    assert torch.equal(kernel, exact)


def test_initial_values_and_groups():
    mixer = create_mixer("hyena", 64, order=3, frequency=7.0, filter_width=16)
    assert isinstance(mixer, Hyena)
    assert abs(mixer.filter_fn.bias.std() - 1) < 0.2
    assert torch.equal(
        mixer.get_parameter("filter_fn.implicit_filter.1.freq"), torch.full((1, 16), 7.0)
    )
    names = {id(p): k for k, p in mixer.named_parameters()}
    groups = param_groups(mixer, 0.1, lr=1.0)
    free = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert {k for k in names.values() if k.startswith("filter_fn")} <= free
    assert not {"in_proj.weight", "out_proj.weight"} & free
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    assert rates.pop("filter_fn.pos_emb.z") == 1e-5
    assert set(rates.values()) == {1.0}
    # a wider window lets kernels reach further
    near, far = (
        create_mixer("hyena", 8, decay_range=v).filter_fn(1024)[0][:, 512:].abs().max()  # pyright: ignore
        for v in ((0.05, 0.1), (0.5, 5.0))
    )
    assert near < 1e-6 < far


def test_errors():
    for config, match in (
        ({"order": 1}, "order must be at least 2, got 1"),
        ({"l_max": 0}, "l_max must be at least 1, got 0"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"emb_dim": 4}, "emb_dim must be odd and at least 3, got 4"),
        ({"emb_dim": 1}, "emb_dim must be odd and at least 3, got 1"),
        ({"filter_width": 0}, "filter_width must be at least 1, got 0"),
        ({"filter_depth": -1}, "filter_depth must be at least 0, got -1"),
        ({"decay_range": (0.5, 0.1)}, r"decay_range must be \(fast, slow\) above 0"),
        ({"decay_range": (0.0, 0.1)}, "decay_range must be"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("hyena", 8, **config)
    with pytest.raises(ValueError, match="d_conv must be odd, got 4"):
        create_mixer("hyena_bidirectional", 8, d_conv=4)
    mixer = create_mixer("hyena", 8)
    with pytest.raises(ValueError, match=r"state must hold \['conv', 'past'\], got \['h'\]"):
        mixer(torch.zeros(1, 2, 8), state={"h": torch.zeros(1)})
    state = mixer.init_state(1)
    with pytest.raises(ValueError, match=r"state\['past'\] must be \(1, 0, 8\), got \(1, 0, 7\)"):
        mixer(torch.zeros(1, 2, 8), state=state | {"past": torch.zeros(1, 0, 7)})
