"""Decision Mamba: parity with the published model, causality, padding, stepping."""

import pytest
import torch
from safetensors.torch import load_file

from scanweave.core import list_mixers
from scanweave.rl import DecisionMamba, load_official

SIZES = {"state_dim": 3, "act_dim": 2, "hidden_size": 16, "n_layer": 2, "max_length": 6}


@pytest.fixture(scope="module")
def golden(goldens):
    tensors = load_file(goldens / "dmamba_walker2d.safetensors")
    groups = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = tensor
    return groups


@pytest.fixture
def published(golden):
    return load_official(golden["weight"])


def make_inputs(batch=3, steps=6, discrete=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    actions = torch.randn(batch, steps, 2, generator=g)
    return {
        "states": torch.randn(batch, steps, 3, generator=g),
        "actions": torch.randint(2, (batch, steps), generator=g) if discrete else actions,
        "returns_to_go": torch.randn(batch, steps, 1, generator=g),
        "timesteps": torch.arange(steps).expand(batch, steps) + 3,
    }


def make_model(**change):
    torch.manual_seed(1)
    model = DecisionMamba(**{**SIZES, **change}).eval()
    # perturbed, so that no parameter is at a neutral value
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def last_steps(inputs, count):
    return {name: value[:, :count][:, -20:] for name, value in inputs.items()}


def test_published_outputs_loss_and_gradients(golden, published, assert_near):
    outputs = published(**golden["inputs"])
    torch.testing.assert_close(outputs, golden["outputs"][""], atol=1e-5, rtol=0)
    loss = (outputs - golden["target"][""]).square().mean()
    torch.testing.assert_close(loss, golden["loss"][""], atol=1e-6, rtol=0)
    loss.backward()
    for name, parameter in published.named_parameters():
        assert_near(parameter.grad, golden["grad"][name], gradient=True, name=name)


@pytest.mark.parametrize("steps", [1, 2, 5, 19, 20, 21, 45])
def test_published_actions(golden, published, steps):
    """The last 20 steps give the published action, padded as published or not at all."""
    window = last_steps(golden["long_inputs"], steps)
    pads = 20 - window["states"].shape[1]
    padded = {
        name: torch.cat([value.new_zeros(1, pads, *value.shape[2:]), value], dim=1)
        for name, value in window.items()
    }
    mask = torch.arange(20)[None] >= pads
    for inputs, expected in (
        (window, golden["get_action_unpadded"][str(steps)]),
        (padded, golden["get_action"][str(steps)]),
        ({**padded, "mask": mask}, golden["get_action_unpadded"][str(steps)]),
    ):
        torch.testing.assert_close(published(**inputs)[0, -1], expected, atol=1e-5, rtol=0)


def test_published_full_history(golden, published):
    outputs = published(**golden["long_inputs"])[0]
    torch.testing.assert_close(outputs, golden["full_history"][""], atol=1e-5, rtol=0)


def test_published_names_load_strictly_and_back(golden, published):
    assert {k: v.shape for k, v in published.state_dict().items()} == {
        k: v.shape for k, v in golden["weight"].items()
    }
    fresh = DecisionMamba(17, 6)
    fresh.load_state_dict(published.state_dict(), strict=True)
    assert fresh.config["max_ep_len"] == 1000


@pytest.mark.parametrize(
    ("state_dim", "act_dim", "hidden_size", "count"),
    [(11, 3, 128, 877_315), (17, 6, 128, 878_854), (11, 3, 256, 3_155_459)],
)
def test_parameter_counts(state_dim, act_dim, hidden_size, count):
    model = DecisionMamba(state_dim, act_dim, hidden_size)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("remove_act_embs", [False, True])
@pytest.mark.parametrize("mixer", list_mixers(causal=True))
def test_outputs_read_nothing_later(mixer, remove_act_embs):
    model = make_model(mixer=mixer, remove_act_embs=remove_act_embs)
    inputs = make_inputs()
    before = model(**inputs)
    for name, first in (("states", 3), ("actions", 2), ("returns_to_go", 3)):
        changed = {**inputs, name: inputs[name].clone()}
        # the action of step 2 and states and returns of step 3 come after the output of step 2
        changed[name][:, first:] += 1
        torch.testing.assert_close(model(**changed)[:, :3], before[:, :3], atol=1e-5, rtol=0)
        reads = not (remove_act_embs and name == "actions")
        assert (not torch.allclose(model(**changed), before, atol=1e-3)) == reads


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("mixer", list_mixers(causal=True))
def test_padding_changes_nothing(mixer, side):
    model = make_model(mixer=mixer)
    inputs = make_inputs()
    left, right = {"left": (4, 0), "right": (0, 4), "both": (3, 2)}[side]
    padded = {
        name: torch.cat(
            [value[:, :1].expand(-1, left, *value.shape[2:]), value, value[:, :right]], dim=1
        )
        for name, value in inputs.items()
    }
    mask = torch.zeros(3, left + 6 + right, dtype=torch.bool)
    mask[:, left : left + 6] = True
    outputs = model(**padded, mask=mask)[:, left : left + 6]
    torch.testing.assert_close(outputs, model(**inputs), atol=2e-6, rtol=0)
    if side != "right":
        assert not torch.allclose(model(**padded)[:, left : left + 6], outputs, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [{}, {"remove_act_embs": True}, {"timestep_embedding": False}, {"discrete": True}],
    ids=["tokens3", "tokens2", "no_time", "discrete"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_stepping_equals_one_forward(change, grad):
    model = make_model(**change)
    inputs = make_inputs(steps=15, discrete=model.discrete)
    with torch.set_grad_enabled(grad):
        whole = model(**inputs)
        carried, outputs = model.init_state(3), []
        for t in range(15):
            previous = inputs["actions"][:, max(t - 1, 0)]
            first = torch.full((3,), True) if t == 0 else None
            now = (inputs[name][:, t] for name in ("returns_to_go", "timesteps"))
            output, carried = model.step(inputs["states"][:, t], previous, *now, carried, first)
            outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, atol=1e-5, rtol=0)


def test_step_forgets_only_first_rows():
    model = make_model()
    inputs = make_inputs(steps=2)
    with torch.no_grad():
        row = [inputs[n][:, 0] for n in ("states", "actions", "returns_to_go", "timesteps")]
        _, carried = model.step(*row, model.init_state(3), torch.ones(3, dtype=torch.bool))
        kept = [{name: v.clone() for name, v in state.items()} for state in carried]
        mixed, _ = model.step(*row, carried, torch.tensor([False, True, False]))
        alone, _ = model.step(*row, model.init_state(3), torch.ones(3, dtype=torch.bool))
        going, _ = model.step(*row, kept)
    torch.testing.assert_close(mixed[1], alone[1])
    torch.testing.assert_close(mixed[[0, 2]], going[[0, 2]])


def test_timesteps_beyond_the_table_share_its_last_row():
    model = make_model(max_ep_len=5)
    inputs = make_inputs()
    later = {**inputs, "timesteps": inputs["timesteps"] + 100}
    clipped = {**inputs, "timesteps": torch.full((3, 6), 4)}
    torch.testing.assert_close(model(**later), model(**clipped))


def test_initialisations():
    """Trap 2: the published pass sets every dt bias to zero, so every step size to 0.69."""
    ours, theirs = (make_plain(init) for init in ("mamba", "official"))
    assert not theirs.any()
    steps = torch.nn.functional.softplus(ours)
    assert 9e-5 < steps.min() < steps.max() < 0.11


def make_plain(init):
    model = DecisionMamba(3, 2, 64, 1, init=init)
    for name, weight in model.named_parameters():
        if "mlp_channels" in name and name.endswith("weight"):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    return model.state_dict()["transformer.h.0.mamba.dt_proj.bias"]


def test_bad_arguments():
    for name in SIZES:
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            DecisionMamba(**{**SIZES, name: 0})
    with pytest.raises(ValueError, match="n_inner must be at least 1, got 0"):
        DecisionMamba(**SIZES, n_inner=0)
    with pytest.raises(ValueError, match="init must be 'mamba' or 'official', got 'zero'"):
        DecisionMamba(**SIZES, init="zero")
    with pytest.raises(ValueError, match=r"mixer must be one of .*, got 'nothing'"):
        DecisionMamba(**SIZES, mixer="nothing")
    for mixer in list_mixers(causal=False):
        with pytest.raises(ValueError, match="mixer must be causal for an acting agent"):
            DecisionMamba(**SIZES, mixer=mixer)


def test_stepping_needs_a_state():
    model = make_model(mixer="attention")
    inputs = make_inputs()
    row = [inputs[n][:, 0] for n in ("states", "actions", "returns_to_go", "timesteps")]
    with pytest.raises(ValueError, match="mixer must be recurrent for step, got 'attention'"):
        model.step(*row, [], None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(3, 6, 4)}, r"states must be \(B, K, 3\), got \(3, 6, 4\)"),
        ({"actions": torch.zeros(3, 5, 2)}, r"actions must be \(3, 6, 2\), got \(3, 5, 2\)"),
        ({"returns_to_go": torch.zeros(3, 6)}, r"returns_to_go must be \(3, 6, 1\)"),
        ({"timesteps": torch.zeros(3, 6, 1)}, r"timesteps must be \(3, 6\), got \(3, 6, 1\)"),
        ({"mask": torch.ones(3, 7).bool()}, r"mask must be \(3, 6\), got \(3, 7\)"),
        ({"mask": torch.ones(3, 6)}, "mask must be bool, got torch.float32"),
    ],
)
def test_bad_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**{**make_inputs(), **change})


def test_empty_batch_and_bfloat16():
    model = make_model(dtype=torch.bfloat16)
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in make_inputs().items()
    }
    assert model(**inputs).dtype == torch.bfloat16
    empty = {name: value[:0] for name, value in make_inputs().items()}
    assert make_model()(**empty).shape == (0, 6, 2)
