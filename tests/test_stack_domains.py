"""Published hybrids by name in a model of each domain."""

from typing import Any

import pytest
import torch

from scanweave.core.stack import PRESETS

timm = pytest.importorskip("timm")
pytest.importorskip("torch_geometric")

import scanweave.vision  # noqa: E402, F401 (registers the models)
from scanweave.graph import GraphMambaConv, gin_conv  # noqa: E402
from scanweave.rl import DecisionMamba  # noqa: E402

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
