"""Every mixer by its name alone in a model of each domain: it learns, is stored, casts."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanweave.core import list_mixers
from scanweave.core.training import param_groups

timm = pytest.importorskip("timm")
pytest.importorskip("torch_geometric")

import scanweave.vision  # noqa: E402, F401 (registers the models)
from scanweave.graph import GraphMambaConv, gin_conv  # noqa: E402
from scanweave.rl import DecisionMamba  # noqa: E402

WIDTH = 16
STEPS = 5
Call = Callable[[nn.Module], Tensor]
Case = tuple[nn.Module, Call, Tensor]


def images(mixer: str) -> Case:
    """Two layers over a grid of 2 x 3 patches, three classes."""
    model = timm.create_model(
        "ssm_vit_tiny_patch16_224",
        mixer=mixer,
        img_size=(8, 12),
        patch_size=4,
        in_chans=1,
        num_classes=3,
        embed_dim=WIDTH,
        depth=2,
        path="bidirectional",
    )
    x = torch.randn(6, 1, 8, 12)
    return model, lambda m: m(x), torch.arange(6) % 3


def graphs(mixer: str) -> Case:
    """One layer over packed graphs of 4, 1 and 5 nodes beside a convolution, a class a node."""
    model = GraphMambaConv(WIDTH, gin_conv(WIDTH), mixer=mixer, norm="layer_norm")
    x, batch = torch.randn(10, WIDTH), torch.tensor([0] * 4 + [1] + [2] * 5)
    edges = torch.tensor([[0, 1, 1, 2, 3, 5, 6, 8], [1, 0, 2, 1, 2, 6, 5, 9]])
    return model, lambda m: m(x, edges, batch), torch.arange(10) % 4


def trajectories(mixer: str) -> Case:
    """One block over four steps of three tokens, three choices; one window begins with padding."""
    model = DecisionMamba(2, 3, WIDTH, 1, 4, mixer=mixer, discrete=True, dropout=0.0)
    states, rewards = torch.randn(3, 4, 2), torch.rand(3, 4, 1)
    actions, when = torch.arange(12).view(3, 4) % 3, torch.arange(4).expand(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[0, 0] = False
    real = mask.flatten().nonzero().squeeze(1)
    return (
        model,
        lambda m: m(states, actions, rewards, when, mask).flatten(0, 1)[real],
        actions.flatten()[real],
    )


DOMAINS: dict[str, Callable[[str], Case]] = {
    "vision": images,
    "graph": graphs,
    "rl": trajectories,
}
CASES = [
    (domain, mixer)
    for mixer in list_mixers()
    for domain in DOMAINS
    if domain != "rl" or mixer in list_mixers(causal=True)
]


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups(model, 0.01, lr=5e-3), lr=5e-3)


@pytest.mark.parametrize(("domain", "mixer"), CASES, ids=lambda v: v)
def test_learns_is_stored_and_casts(domain: str, mixer: str) -> None:
    model, run, labels = DOMAINS[domain](mixer)
    optimizer = optimiser(model)

    def step() -> float:
        loss = F.cross_entropy(run(model), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step() for _ in range(STEPS)]
    assert losses[-1] < 0.98 * losses[0], losses

    model.eval()
    with torch.no_grad():
        expected = run(model)
        other = DOMAINS[domain](mixer)[0].eval()
        # both a model drawn anew and a copy whose weights were moved must become the same
        assert not torch.equal(run(other), expected)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True), strict=True)
        assert torch.equal(run(other), expected)
        assert torch.equal(run(copy.deepcopy(model)), expected)

    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step()
    assert math.isfinite(loss)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert torch.isfinite(p).all(), name
    with torch.no_grad():
        assert torch.isfinite(run(model)).all()


@pytest.mark.parametrize("mixer", list_mixers(causal=False))
def test_agents_refuse_mixers_that_read_the_future(mixer: str) -> None:
    rule = f"mixer must be causal for an acting agent, got '{mixer}'"
    with pytest.raises(ValueError, match=rule):
        trajectories(mixer)


@pytest.mark.parametrize("mixer", list_mixers(causal=True))
def test_agents_step_or_say_why_not(mixer: str) -> None:
    """A recurrent mixer acts step by step as it reads windows; others refuse."""
    model: Any = DecisionMamba(2, 3, WIDTH, 1, 4, mixer=mixer, remove_act_embs=True).eval()
    states, rewards = torch.randn(2, 4, 2), torch.rand(2, 4, 1)
    actions, when = torch.rand(2, 4, 3), torch.arange(4).expand(2, 4)
    if not model.recurrent:
        assert mixer not in list_mixers(recurrent=True)
        with pytest.raises(ValueError, match=f"mixer must be recurrent for step, got '{mixer}'"):
            model.step(states[:, 0], actions[:, 0], rewards[:, 0], when[:, 0], [])
        return
    with torch.no_grad():
        expected = model(states, actions, rewards, when)
        carried = model.init_state(2)
        for t in range(4):
            y, carried = model.step(states[:, t], actions[:, t], rewards[:, t], when[:, t], carried)
            torch.testing.assert_close(y, expected[:, t], atol=1e-5, rtol=1e-4)
