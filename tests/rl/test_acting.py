"""The four ways to remember, each against one forward over the steps it claims to read."""

import pytest
import torch

from scanweave.rl import BehaviourCloning, DecisionMamba
from scanweave.rl.acting import Step, WindowMemory, make_memory

LENGTH, STEPS, ROWS = 5, 23, 2


@pytest.fixture(params=[False, True], ids=["tokens3", "tokens2"])
def model(request):
    torch.manual_seed(0)
    model = DecisionMamba(3, 2, 16, 2, LENGTH, remove_act_embs=request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def course():
    return {
        "states": torch.randn(ROWS, STEPS, 3),
        "actions": torch.randn(ROWS, STEPS, 2),
        "returns_to_go": torch.randn(ROWS, STEPS, 1),
        "timesteps": torch.arange(STEPS).expand(ROWS, STEPS),
    }


@torch.inference_mode()
def play(memory, course):
    outputs = []
    for t in range(STEPS):
        previous = course["actions"][:, t - 1] if t else torch.zeros(ROWS, 2)
        first = torch.full((ROWS,), t == 0)
        states, to_go, time = (
            course[name][:, t] for name in ("states", "returns_to_go", "timesteps")
        )
        outputs.append(memory(Step(states, previous, to_go, time, first)))
    return torch.stack(outputs, 1)


@torch.inference_mode()
def expected(model, course, ages):
    """The last output of a forward over the last `age` steps, for every step."""
    return torch.stack(
        [
            model(**{name: value[:, t + 1 - age : t + 1] for name, value in course.items()})[:, -1]
            for t, age in enumerate(ages)
        ],
        dim=1,
    )


@pytest.mark.parametrize(
    ("mode", "ages"),
    [
        ("window", [min(t + 1, LENGTH) for t in range(STEPS)]),
        ("recurrent", [t + 1 for t in range(STEPS)]),
        ("periodic", [t % LENGTH + 1 for t in range(STEPS)]),
        # slots of 5 steps started at 0, 5, 10 ... and 2, 7, 12 ...: the older one is read
        ("staggered", [1, 2, 3, 4, 5] + [4, 5, 3, 4, 5] * 3 + [4, 5, 3]),
    ],
)
def test_memory_equals_a_window_of_its_age(model, course, mode, ages):
    outputs = play(make_memory(model, ROWS, mode, "masked"), course)
    torch.testing.assert_close(outputs, expected(model, course, ages), atol=1e-5, rtol=0)


def test_official_window_reads_its_padding(model, course):
    outputs = play(WindowMemory(model, ROWS, "official"), course)
    padded = {
        name: torch.cat([value.new_zeros(ROWS, LENGTH - 1, *value.shape[2:]), value], 1)
        for name, value in course.items()
    }
    windows = [
        {name: value[:, t : t + LENGTH] for name, value in padded.items()} for t in range(STEPS)
    ]
    with torch.inference_mode():
        reference = torch.stack([model(**window)[:, -1] for window in windows], 1)
    torch.testing.assert_close(outputs, reference, atol=1e-5, rtol=0)
    masked = play(WindowMemory(model, ROWS, "masked"), course)
    assert (outputs - masked)[:, : LENGTH - 1].abs().max() > 1e-3
    torch.testing.assert_close(outputs[:, LENGTH - 1 :], masked[:, LENGTH - 1 :])


def test_state_does_not_grow(model, course):
    memory = make_memory(model, ROWS, "recurrent", "masked")
    play(memory, course)
    sizes = [value.shape for state in memory.carried for value in state.values()]
    assert sizes == [value.shape for state in model.init_state(ROWS) for value in state.values()]


@pytest.mark.parametrize("mode", ["window", "recurrent", "periodic", "staggered"])
def test_cloning_reads_the_present_only(course, mode):
    model = BehaviourCloning(3, 2, 8).eval()
    outputs = play(make_memory(model, ROWS, mode, "masked"), course)
    torch.testing.assert_close(outputs, model.layers(course["states"]))


def test_bad_modes(model):
    with pytest.raises(ValueError, match=r"mode must be one of window, .*, got 'all'"):
        make_memory(model, 1, "all", "masked")
    with pytest.raises(ValueError, match="pad_mode must be one of masked, official, got 'left'"):
        make_memory(model, 1, "window", "left")
    control = DecisionMamba(3, 2, 8, 1, mixer="gated_cnn")
    if not control.recurrent:
        with pytest.raises(ValueError, match="mode must be 'window' for a mixer without a state"):
            make_memory(control, 1, "recurrent", "masked")
