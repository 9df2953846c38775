"""Mixers against public implementations: stored outputs, names of parameters, initial values."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from scanweave.core import Mixer, create_mixer, list_mixers

Check = Callable[..., None]
MAMBA_NAMES = {
    "A_log": (32, 16),
    "D": (32,),
    "in_proj.weight": (64, 16),
    "conv1d.weight": (32, 1, 4),
    "conv1d.bias": (32,),
    "x_proj.weight": (33, 32),
    "dt_proj.weight": (32, 1),
    "dt_proj.bias": (32,),
    "out_proj.weight": (16, 32),
}
VIM_NAMES = {
    "A_b_log": (32, 16),
    "D_b": (32,),
    "conv1d_b.weight": (32, 1, 4),
    "conv1d_b.bias": (32,),
    "x_proj_b.weight": (33, 32),
    "dt_proj_b.weight": (32, 1),
    "dt_proj_b.bias": (32,),
}
BIASES = {"in_proj.bias": (64,), "out_proj.bias": (16,)}


def golden(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def loaded(mixer: Mixer, tensors: dict[str, Tensor]) -> Mixer:
    weights = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
    mixer.load_state_dict(weights, strict=True)
    return mixer


def test_mamba_ssm_outputs(assert_near: Check, goldens: Path):
    tensors, config = golden(goldens / "mamba_block.safetensors")
    mixer = loaded(create_mixer("mamba", config.pop("d_model"), **config), tensors)
    with torch.no_grad():
        assert_near(mixer(tensors["x"]), tensors["y"], name="y")
        state, steps = mixer.init_state(3), []
        for token in tensors["x"].unbind(1):
            y, state = mixer.step(token, state)
            steps.append(y)
        assert_near(torch.stack(steps, 1), tensors["y_step"], name="y_step")


def test_vim_outputs_and_gradients(assert_near: Check, goldens: Path):
    tensors, config = golden(goldens / "vim_mixer_v2_nodiv.safetensors")
    assert config["bimamba_type"] == "v2"
    mixer = create_mixer(
        "bimamba",
        config["d_model"],
        d_state=config["d_state"],
        average=config["if_divide_out"],
    )
    loaded(mixer, tensors)
    x = tensors["input"].requires_grad_()
    y = mixer(x)
    assert_near(y, tensors["output"], name="output")
    y.backward(tensors["cotangent"])
    assert_near(x.grad, tensors["grad_input"], gradient=True, name="input")
    names = {name for name, _ in mixer.named_parameters()}
    assert names == {k.removeprefix("grad/") for k in tensors if k.startswith("grad/")}
    for name, p in mixer.named_parameters():
        assert_near(p.grad, tensors[f"grad/{name}"], gradient=True, name=name)


def test_vim_average_halves_the_sum(assert_near: Check):
    for bias in (False, True):
        whole = create_mixer("bimamba", 16, average=False, bias=bias)
        half = create_mixer("bimamba", 16, average=True, bias=bias)
        half.load_state_dict(whole.state_dict())
        x = torch.randn(2, 9, 16)
        shift = whole.get_parameter("out_proj.bias") if bias else 0
        assert_near(half(x) - shift, 0.5 * (whole(x) - shift), factor=2)


@pytest.mark.parametrize("size", [{}, {"time_step_rank": 5, "state_size": 3, "use_bias": True}])
def test_equals_transformers_mamba(assert_near: Check, size: dict[str, Any]):
    """Another public implementation, in plain PyTorch on a CPU."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, **size)
    theirs = MambaMixer(config, 0)
    ours = create_mixer(
        "mamba",
        16,
        d_state=config.state_size,
        dt_rank=int(config.time_step_rank),
        bias=config.use_bias,
    )
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 23, 16, requires_grad=True)
    expected, actual = theirs(x), ours(x)
    assert_near(actual, expected, name="output")
    g = torch.randn_like(actual)
    parameters = dict(theirs.named_parameters())
    wanted = torch.autograd.grad(expected, [x, *parameters.values()], g)
    given = torch.autograd.grad(actual, [x, *(ours.get_parameter(k) for k in parameters)], g)
    for name, a, e in zip(["x", *parameters], given, wanted, strict=True):
        assert_near(a, e, gradient=True, name=name)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"), [("mamba", MAMBA_NAMES), ("bimamba", MAMBA_NAMES | VIM_NAMES)]
)
def test_official_names_and_shapes(name: str, expected: dict[str, tuple], bias: bool):
    expected = expected | (BIASES if bias else {})
    state = create_mixer(name, 16, bias=bias).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == expected
    bare = create_mixer(name, 16, bias=bias, conv_bias=False).state_dict()
    assert bare.keys() == {k for k in expected if not (k.startswith("conv") and k.endswith("bias"))}


def test_auto_rank_is_a_sixteenth():
    for dim, rank in ((16, 1), (17, 2), (192, 12), (384, 24)):
        mixer = create_mixer("mamba", dim, d_state=2, device="meta")
        assert mixer.get_parameter("dt_proj.weight").shape == (2 * dim, rank)
    mixer = create_mixer("mamba", 16, dt_rank=7, expand=1.5, d_conv=3)
    assert mixer.get_parameter("dt_proj.weight").shape == (24, 7)
    assert mixer.get_parameter("conv1d.weight").shape == (24, 1, 3)


@pytest.mark.parametrize("name", ["mamba", "bimamba"])
def test_initial_rates_skips_and_time_steps(name: str):
    mixer = create_mixer(name, 64, d_state=5)
    rates = torch.arange(1.0, 6.0).expand(128, 5)
    suffixes = ("", "_b") if name == "bimamba" else ("",)
    for suffix in suffixes:
        torch.testing.assert_close(mixer.get_parameter(f"A{suffix}_log").exp(), rates)
        assert torch.equal(mixer.get_parameter(f"D{suffix}"), torch.ones(128))
        dt = torch.nn.functional.softplus(mixer.get_parameter(f"dt_proj{suffix}.bias"))
        assert dt.min() >= 1e-3 * (1 - 1e-4)
        assert dt.max() <= 0.1 * (1 + 1e-4)
        # log-uniform: half of them under the geometric mean, quarters too
        logs = (dt.log() - math.log(1e-3)) / math.log(100)
        for q in (0.25, 0.5, 0.75):
            assert abs((logs < q).float().mean() - q) < 0.13
        weight = mixer.get_parameter(f"dt_proj{suffix}.weight")
        bound = 4**-0.5  # rank 64 / 16
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.95 * bound
        assert abs(weight.mean()) < 0.1 * bound
    marked = {k for k, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    plain = {"A_log", "D", "dt_proj.bias"}
    assert marked == (plain | {"A_b_log", "D_b", "dt_proj_b.bias"} if name == "bimamba" else plain)


def test_time_steps_follow_their_bounds():
    mixer = create_mixer("mamba", 64, dt_min=0.5, dt_max=0.6)
    dt = torch.nn.functional.softplus(mixer.get_parameter("dt_proj.bias"))
    assert dt.min() >= 0.5 * (1 - 1e-4)
    assert dt.max() <= 0.6 * (1 + 1e-4)
    floored = create_mixer("mamba", 64, dt_min=1e-6, dt_max=1e-5, dt_init_floor=1e-3)
    dt = torch.nn.functional.softplus(floored.get_parameter("dt_proj.bias"))
    torch.testing.assert_close(dt, torch.full_like(dt, 1e-3))


def test_half_precision_models_keep_rates_exact():
    for dtype in (torch.bfloat16, torch.float16):
        mixer = create_mixer("bimamba", 16, dtype=dtype)
        for name in ("A_log", "A_b_log"):
            exact = torch.arange(1.0, 17.0).log().expand(32, 16)
            assert torch.equal(mixer.get_parameter(name), exact)


@pytest.mark.parametrize("name", list_mixers())
def test_seed_decides_every_parameter(name: str):
    mixers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        mixers.append(create_mixer(name, 8))
    states = [m.state_dict() for m in mixers]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])
    mixer = mixers[0]
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    torch.manual_seed(7)
    mixer.reset_parameters()
    first = {k: v.clone() for k, v in mixer.state_dict().items()}
    assert any(not torch.equal(first[k], before[k]) for k in first)
    with torch.no_grad():
        for p in mixer.parameters():
            p.fill_(float("nan"))
    torch.manual_seed(7)
    mixer.reset_parameters()
    for key, v in mixer.state_dict().items():
        assert torch.equal(v, first[key]), key
