"""All published models' names, outputs, gradients and actions, as `make_official.py` found them."""

import copy
import json

import pytest
import torch
from tests.rl.make_official import (
    ACTION,
    BATCH,
    HISTORIES,
    RESULT,
    STATE,
    STEPS,
    inputs,
    loss_of,
    products,
    wave,
)

from scanweave.rl import AtariDecisionMamba, export_official, load_official
from scanweave.rl.acting import Step, WindowMemory

FOUND = json.loads(RESULT.read_text(encoding="utf-8"))


def weights_of(kind):
    """The published state dict, buffers included; what is in those is never read."""
    shapes = FOUND[kind]["shapes"]
    return {
        name: torch.zeros(shape) if name in FOUND[kind]["buffers"] else wave(name, tuple(shape))
        for name, shape in shapes.items()
    }


def load(kind):
    return load_official(
        weights_of(kind),
        max_length=STEPS,
        dropout=0.0,
        remove_act_embs="without actions" in kind,
    )


@pytest.mark.parametrize("kind", list(FOUND))
def test_names_and_weights_there_and_back(kind):
    weights, back = weights_of(kind), export_official(load(kind))
    if kind.endswith("first code"):
        # what is exported is in the names of the later repository, which this one's are read as
        back = {name.replace(".mlp_channels.", ".mlp."): value for name, value in back.items()}
    assert {n: list(v.shape) for n, v in back.items()} == FOUND[kind]["shapes"]
    # these tables are in the published models and never read
    unread = {"tok_emb.weight", "transformer.wte.weight", *FOUND[kind]["buffers"]}
    for name in back.keys() - unread:
        assert torch.equal(back[name], weights[name]), name


@pytest.mark.parametrize("kind", list(FOUND))
def test_outputs_loss_and_gradients(kind):
    model, given = load(kind).train(), inputs(kind, STEPS)
    outputs = model(**given)
    torch.testing.assert_close(outputs, torch.tensor(FOUND[kind]["outputs"]), atol=1e-5, rtol=0)
    loss = loss_of(kind, outputs, given["actions"])
    assert loss.item() == pytest.approx(FOUND[kind]["loss"], abs=1e-6)
    loss.backward()
    holder = copy.deepcopy(model)
    unused = set()
    for (name, p), slot in zip(model.named_parameters(), holder.parameters(), strict=True):
        if p.grad is None:
            unused.add(name)
        slot.data = torch.zeros_like(p) if p.grad is None else p.grad
    # gradients under the published names and in the published layouts
    renamed = export_official(holder)
    if kind.endswith("first code"):
        renamed = {n.replace(".mlp_channels.", ".mlp."): value for n, value in renamed.items()}
    expected = FOUND[kind]["gradients"]
    assert unused.isdisjoint(expected)
    ours = products({name: renamed[name] for name in expected})
    largest = max(map(abs, expected.values()))
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-4, abs=2e-6 * largest), name


@pytest.mark.parametrize("steps", HISTORIES)
@pytest.mark.parametrize("kind", list(FOUND))
@torch.inference_mode()
def test_actions_after_histories(kind, steps):
    """Step by step through the memory of an acting agent, padded as that kind is published."""
    model, given = load(kind), inputs(kind, steps)
    # the gym Mamba reads its padding; the Transformer masks it; Atari windows are not padded
    memory = WindowMemory(model, BATCH, "official" if kind.startswith("gym mamba") else "masked")
    none = torch.zeros_like(given["actions"][:, 0])
    for t in range(steps):
        predicted = memory(
            Step(
                given["states"][:, t],
                given["actions"][:, t - 1] if t else none,
                given["returns_to_go"][:, t],
                given["timesteps"][:, t],
                torch.full((BATCH,), t == 0),
            )
        )
    expected = torch.tensor(FOUND[kind]["actions"][str(steps)])
    torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=0)


def test_what_is_stored_can_tell_models_apart():
    """Weights move every figure; kinds differ."""
    assert len({str(found["outputs"]) for found in FOUND.values()}) >= 6
    for kind, found in FOUND.items():
        outputs = torch.tensor(found["outputs"])
        assert outputs.shape == (BATCH, STEPS, ACTION), kind
        assert outputs.std() > 0.05, kind
        assert sum(abs(value) > 1e-6 for value in found["gradients"].values()) > 20, kind
    assert isinstance(load("atari mamba-min"), AtariDecisionMamba)
    assert load("gym mamba-min").config["norm"] == "rms"
    assert load("gym attention").config["state_dim"] == STATE
