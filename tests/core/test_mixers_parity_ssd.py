"""Mamba-2 and Hydra against public implementations: outputs, gradients, names, initial values."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from scanweave.core import create_mixer

Check = Callable[..., None]
MAMBA2_NAMES = {
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "in_proj.weight": (32 + 32 + 2 * 2 * 3 + 4, 16),
    "conv1d.weight": (44, 1, 4),
    "conv1d.bias": (44,),
    "norm.weight": (32,),
    "out_proj.weight": (16, 32),
}
HYDRA_NAMES = MAMBA2_NAMES | {
    "in_proj.weight": (32 + 32 + 4 * 2 * 3 + 2 * 4, 16),
    "conv1d.weight": (56, 1, 7),
    "conv1d.bias": (56,),
    "fc_D.weight": (4, 32),
}
SIZES: dict[str, Any] = {"d_state": 3, "headdim": 8, "ngroups": 2}


def golden(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


@pytest.mark.parametrize("name", ["hydra_mixer", "hydra_mixer_defaults"])
def test_hydra_outputs_and_gradients(assert_near: Check, goldens: Path, name: str):
    tensors, config = golden(goldens / f"{name}.safetensors")
    config.pop("chunk_size", None)
    mixer = create_mixer("hydra", config.pop("d_model"), **config)
    weights = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
    mixer.load_state_dict(weights, strict=True)
    x = tensors["input"].requires_grad_()
    y = mixer(x)
    assert_near(y, tensors["output"], name="output")
    y.backward(tensors["cotangent"])
    assert_near(x.grad, tensors["grad_input"], gradient=True, name="input")
    for key, p in mixer.named_parameters():
        if f"grad/{key}" in tensors or name == "hydra_mixer":
            assert_near(p.grad, tensors[f"grad/{key}"], gradient=True, name=key)


@pytest.mark.parametrize(
    "size",
    [
        {"n_groups": 1, "state_size": 16},
        {"n_groups": 2, "state_size": 5, "use_bias": True},
        {"n_groups": 4, "state_size": 8, "time_step_limit": (0.05, 0.3), "conv_kernel": 3},
    ],
    ids=str,
)
def test_equals_transformers_mamba2(assert_near: Check, size: dict[str, Any]):
    """Another public implementation, in plain PyTorch on a CPU."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = transformers.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1, chunk_size=8, **size
    )
    theirs = Mamba2Mixer(config, 0)
    ours = create_mixer(
        "mamba2",
        16,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        headdim=8,
        ngroups=config.n_groups,
        dt_limit=config.time_step_limit,
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


@pytest.mark.parametrize(("name", "expected"), [("mamba2", MAMBA2_NAMES), ("hydra", HYDRA_NAMES)])
def test_official_names_and_shapes(name: str, expected: dict[str, tuple]):
    biases = {"in_proj.bias": expected["in_proj.weight"][:1], "out_proj.bias": (16,)}
    for bias in (False, True):
        shapes = expected | (biases if bias else {})
        state = create_mixer(name, 16, bias=bias, **SIZES).state_dict()
        assert {k: tuple(v.shape) for k, v in state.items()} == shapes
    bare = create_mixer(name, 16, conv_bias=False, **SIZES).state_dict()
    assert bare.keys() == expected.keys() - {"conv1d.bias"}


@pytest.mark.parametrize("name", ["mamba2", "hydra"])
def test_heads_by_default(name: str):
    for dim, width in ((768, 64), (96, 64), (4, 8), (50, 50), (33, 33)):
        mixer = create_mixer(name, dim, device="meta")
        assert mixer.headdim == width
        assert mixer.get_parameter("A_log").shape == (2 * dim // width,)


@pytest.mark.parametrize(("name", "rates"), [("mamba2", (1.0, 16.0)), ("hydra", (1.0, 1.0))])
def test_initial_values(name: str, rates: tuple[float, float]):
    mixer = create_mixer(name, 512, headdim=4, d_state=2)
    A = mixer.get_parameter("A_log").exp()
    assert A.min() >= rates[0] - 1e-4
    assert A.max() <= rates[1] + 1e-4
    if rates[0] < rates[1]:
        assert abs(A.mean() - sum(rates) / 2) < 1.5
    assert torch.equal(mixer.get_parameter("D"), torch.ones(256))
    assert torch.equal(mixer.get_parameter("norm.weight"), torch.ones(1024))
    dt = torch.nn.functional.softplus(mixer.get_parameter("dt_bias"))
    logs = (dt.log() - math.log(1e-3)) / math.log(100)
    assert logs.min() > -1e-3
    assert logs.max() < 1 + 1e-3
    assert abs(logs.mean() - 0.5) < 0.1
    marked = {k for k, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_bias"}
    for dtype in (torch.bfloat16, torch.float16):
        half = create_mixer(name, 16, dtype=dtype)
        kept = {k for k, v in half.state_dict().items() if v.dtype == torch.float32}
        assert kept == {"A_log", "D", "dt_bias"}


@pytest.mark.parametrize("name", ["mamba2", "hydra"])
def test_errors(name: str):
    for size, match in (
        ({"headdim": 5}, r"headdim must divide the 32 inner channels, got 5"),
        ({"headdim": 0}, r"headdim must divide the 32 inner channels, got 0"),
        ({"headdim": 8, "ngroups": 3}, r"ngroups must divide the 4 heads, got 3"),
        ({"d_state": 0}, r"d_state must be at least 1, got 0"),
        ({"ngroups": 0}, r"ngroups must be at least 1, got 0"),
        ({"expand": 0}, r"expand \* d_model must be at least 1, got 0"),
        ({"dt_min": 0.0}, r"dt_min must be in \(0, dt_max\], got 0.0 and 0.1"),
        ({"A_init_range": (0, 2)}, r"A_init_range must be \(low, high\) above 0"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer(name, 16, **size)
    with pytest.raises(ValueError, match="d_conv must be odd, got 4"):
        create_mixer("hydra", 16, d_conv=4)
    mixer = create_mixer("mamba2", 16, **SIZES)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 16\)"):
        mixer.step(torch.randn(2, 15), mixer.init_state(2))
