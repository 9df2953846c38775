"""A recorded step, on a CPU with a recording that runs the same function again."""

import pytest
import torch

from scanweave.core import list_mixers
from scanweave.rl import DecisionMamba
from scanweave.rl.acting import Step, WindowMemory, make_memory
from scanweave.rl.graphed import GraphedMemory, graphed

ROWS, STEPS = 3, 14


def repeat(run):
    """As a recording does: run a few times before, and give the same tensor every time."""
    for _ in range(3):
        output = run()

    def replay():
        output.copy_(run())
        return output

    return replay


def steps():
    g = torch.Generator().manual_seed(0)
    began = torch.rand(STEPS, ROWS, generator=g) < 0.15
    began[0] = True
    time = torch.zeros(ROWS, dtype=torch.int64)
    for t in range(STEPS):
        time = torch.where(began[t], 0, time)
        actions = torch.randn(ROWS, 2, generator=g) * ~began[t][:, None]
        yield Step(
            torch.randn(ROWS, 3, generator=g),
            actions,
            torch.randn(ROWS, 1, generator=g),
            time,
            began[t],
        )
        time = time + 1


@pytest.mark.parametrize("mode", ["recurrent", "periodic", "staggered"])
@pytest.mark.parametrize("mixer", ["mamba", "rg_lru", "mamba2"])
@torch.inference_mode()
def test_a_replayed_memory_is_the_memory(mixer, mode):
    assert mixer in list_mixers(causal=True, recurrent=True)
    torch.manual_seed(0)
    model = DecisionMamba(3, 2, 32, 2, 5, mixer=mixer).eval()
    plain = make_memory(model, ROWS, mode, "masked")
    replayed = GraphedMemory(make_memory(model, ROWS, mode, "masked"), repeat)
    expected = torch.stack([plain(step) for step in steps()])
    # kept as they are given: a later replay must not write over an earlier answer
    found = torch.stack([replayed(step) for step in steps()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3


def test_only_a_carried_state_is_replayed():
    model = DecisionMamba(3, 2, 16, 1, 5)
    assert isinstance(graphed(make_memory(model, 2, "staggered", "masked")), GraphedMemory)
    assert isinstance(graphed(make_memory(model, 2, "window", "masked")), WindowMemory)


def test_a_step_that_cannot_be_recorded_says_so():
    def refused(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = DecisionMamba(3, 2, 16, 1, 5).eval()
    memory = GraphedMemory(make_memory(model, ROWS, "recurrent", "masked"), refused)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"cuda_graph must be False.*not permitted.*capturing$"),
    ):
        memory(next(steps()))
