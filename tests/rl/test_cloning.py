"""Behaviour cloning: reads states only, and fits what it is shown."""

import pytest
import torch

from scanweave.rl import BehaviourCloning


def test_only_states_matter():
    model = BehaviourCloning(3, 2, 16).eval()
    states = torch.randn(4, 5, 3)
    zeros = (torch.zeros(4, 5, 2), torch.zeros(4, 5, 1), torch.zeros(4, 5, dtype=torch.int64))
    ones = tuple(value + 1 for value in zeros)
    assert torch.equal(model(states, *zeros), model(states, *ones))
    assert model(states, *zeros).abs().max() <= 1
    assert not torch.equal(model(states + 1, *zeros), model(states, *zeros))


def test_discrete_head_gives_logits():
    model = BehaviourCloning(3, 4, 16, discrete=True).eval()
    logits = model.layers(100 * torch.randn(50, 3))
    assert logits.shape == (50, 4)
    assert logits.abs().max() > 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="state_dim must be at least 1, got 0"):
        BehaviourCloning(0, 2)
    with pytest.raises(ValueError, match="n_layer must be at least 1, got 0"):
        BehaviourCloning(3, 2, n_layer=0)
    model = BehaviourCloning(3, 2)
    with pytest.raises(ValueError, match=r"states must be \(B, K, 3\), got \(4, 3\)"):
        model(torch.zeros(4, 3), *[torch.zeros(1)] * 3)
