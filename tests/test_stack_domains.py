"""Published hybrids by name in a model of each domain."""

import importlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from scanweave.core.stack import PRESETS, Stack
from scanweave.core.training import parse_pairs

timm = pytest.importorskip("timm")
pytest.importorskip("torch_geometric")

import scanweave.vision  # noqa: E402, F401 (registers the models)
from scanweave.graph import GraphMambaConv, gin_conv  # noqa: E402
from scanweave.rl import DecisionMamba, Spaces  # noqa: E402

NAMES = ("samba", "zamba2", "hymba", "moe_mamba")


def small(name: str) -> dict[str, Any]:
    return {"pattern": name, "depth": 2, "meta_tokens": min(2, PRESETS[name].meta_tokens)}


@pytest.mark.parametrize("name", NAMES)
def test_classifies_images(name: str) -> None:
    model = timm.create_model(
        "ssm_vit_tiny_patch16_224",
        mixer="stack_bidirectional",
        mixer_args=small(name),
        img_size=32,
        num_classes=3,
        embed_dim=16,
        depth=1,
    )
    y = model(torch.randn(2, 3, 32, 32))
    assert y.shape == (2, 3)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("mixer", ["stack", "stack_bidirectional"])
@pytest.mark.parametrize("name", NAMES)
def test_mixes_nodes(name: str, mixer: str) -> None:
    conv = GraphMambaConv(16, gin_conv(16), mixer=mixer, mixer_kwargs=small(name)).eval()
    x, edges = torch.randn(7, 16), torch.tensor([[0, 1, 4, 5], [1, 2, 5, 6]])
    batch = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    y = conv(x, edges, batch)
    first = conv(x[:3], edges[:, :2])
    torch.testing.assert_close(y[:3], first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["griffin", *NAMES])
def test_acts_step_by_step(name: str) -> None:
    model: Any = DecisionMamba(2, 3, 16, 1, 4, mixer="stack", mixer_kwargs=small(name)).eval()
    states, rewards = torch.randn(2, 4, 2), torch.rand(2, 4, 1)
    actions, when = torch.rand(2, 4, 3), torch.arange(4).expand(2, 4)
    with torch.no_grad():
        expected = model(states, actions, rewards, when)
        if not model.recurrent:
            with pytest.raises(ValueError, match="mixer must be recurrent for step, got 'stack'"):
                model.step(states[:, 0], actions[:, 0], rewards[:, 0], when[:, 0], [])
            return
        carried = model.init_state(2)
        for t in range(4):
            before = actions[:, t - 1] if t else torch.zeros(2, 3)
            first = torch.full((2,), t == 0)
            y, carried = model.step(states[:, t], before, rewards[:, t], when[:, t], carried, first)
            torch.testing.assert_close(y, expected[:, t], atol=1e-5, rtol=1e-4)


PAIRS = ("pattern=griffin", "depth=3", "letters={'w': ['local_attention', {'window': 5}]}")


@pytest.mark.parametrize("domain", ["rl", "graph"])
def test_command_lines_take_stacks(domain: str) -> None:
    tyro = pytest.importorskip("tyro")
    pytest.importorskip("accelerate")
    script: Any = importlib.import_module(f"scanweave.{domain}.train")
    config = tyro.cli(script.Config, args=["--mixer", "stack", "--mixer-args", *PAIRS])
    assert config.mixer_args == PAIRS
    if domain == "rl":
        model = script.build_model(replace(config, n_layer=1), Spaces(3, 2, False))
        (stack,) = (m for m in model.modules() if isinstance(m, Stack))
        assert stack.pattern == "2*(g f) (w f)"
        assert stack._mixers()["2.0.body"].window == 5  # type: ignore[union-attr]


def test_pairs_are_python_values_or_text() -> None:
    letters = {"w": ["local_attention", {"window": 5}]}
    expected = {"pattern": "griffin", "depth": 3, "letters": letters}
    assert parse_pairs(PAIRS, "mixer_args") == expected
    assert parse_pairs(["pattern=2*(m f)=x"], "mixer_args") == {"pattern": "2*(m f)=x"}
    for wrong in ("depth", "=3", "2x=3"):
        with pytest.raises(ValueError, match=f"mixer_args must be name=value, got '{wrong}'"):
            parse_pairs([wrong], "mixer_args")
    with pytest.raises(ValueError, match="mixer_args must name every argument once, got 'a' twice"):
        parse_pairs(["a=1", "a=2"], "mixer_args")


def test_agents_of_stacks_are_stored() -> None:
    config = {**parse_pairs(PAIRS, "mixer_args"), "norm_kind": "layer"}
    model = DecisionMamba(2, 3, 16, 1, 4, mixer="stack", mixer_kwargs=config).eval()
    assert json.loads(json.dumps(model.config))["mixer_kwargs"] == config
    assert DecisionMamba(**json.loads(json.dumps(model.config))).config == model.config
