"""Mamba with norms and heads against transformers' Jamba and Zamba."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.stack_cases import from_jamba, from_zamba
from torch import nn

from scanweave.core import create_mixer

Check = Callable[..., None]


def jamba() -> tuple[nn.Module, nn.Module]:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    size = {"mamba_d_state": 5, "mamba_dt_rank": 3, "num_attention_heads": 2}
    config = transformers.JambaConfig(hidden_size=16, num_hidden_layers=2, **size)
    theirs = JambaMambaMixer(config, 0)
    ours = create_mixer("mamba_heads", 16, d_state=5, dt_rank=3)
    randomize(theirs)
    ours.load_state_dict(from_jamba(theirs.state_dict()), strict=True)
    return theirs, ours


def zamba() -> tuple[nn.Module, nn.Module]:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.zamba.modeling_zamba import ZambaMambaMixer

    size: dict[str, Any] = {"mamba_d_state": 5, "mamba_dt_rank": 3, "n_mamba_heads": 4}
    config = transformers.ZambaConfig(hidden_size=16, num_hidden_layers=4, **size)
    theirs = ZambaMambaMixer(config, 0)
    ours = create_mixer("mamba_heads", 16, d_state=5, dt_rank=3, n_heads=4, bcdt_norm=False)
    randomize(theirs)
    ours.load_state_dict(from_zamba(theirs.state_dict()), strict=True)
    return theirs, ours


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))


@pytest.mark.parametrize("make", [jamba, zamba])
def test_equals_transformers(assert_near: Check, make: Callable[[], tuple[nn.Module, nn.Module]]):
    theirs, ours = make()
    x = torch.randn(2, 23, 16, requires_grad=True)
    expected, actual = theirs(x), ours(x)
    assert_near(actual, expected, factor=0.2)
    g = torch.randn_like(actual)
    (wanted,) = torch.autograd.grad(expected, x, g)
    (given,) = torch.autograd.grad(actual, x, g)
    assert_near(given, wanted, gradient=True)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_must_divide(heads: int):
    with pytest.raises(ValueError, match=rf"n_heads must divide expand \* d_model 16, got {heads}"):
        create_mixer("mamba_heads", 8, n_heads=heads)


def test_starts_as_mamba_does():
    mixer = create_mixer("mamba_heads", 64, n_heads=2)
    dt = torch.nn.functional.softplus(mixer.get_parameter("dt_proj.bias"))
    assert dt.min() > 0.9e-3
    assert dt.max() < 0.11
    assert mixer.get_parameter("dt_norm.weight").eq(1).all()
    for name in ("A_log", "D", "dt_proj.bias"):
        assert mixer.get_parameter(name)._no_weight_decay  # type: ignore[attr-defined]
