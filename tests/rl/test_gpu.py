"""Agents on a GPU: the same actions as on a CPU, and as a replayed graph. Run with `-m gpu`."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from scanweave.rl import Agent, AgentConfig, DecisionMamba

pytestmark = pytest.mark.gpu
ROWS, STEPS = 5, 30


def play(agent, mode):
    """Actions of `STEPS` calls; rows begin anew now and then."""
    rng = np.random.default_rng(0)
    agent.reset(1.0, num_envs=ROWS, mode=mode)
    actions = []
    for t in range(STEPS):
        obs, reward = rng.standard_normal((ROWS, 4)), rng.standard_normal(ROWS)
        done = rng.random(ROWS) < (1.0 if t == 0 else 0.1)
        actions.append(agent.act(obs, reward, done))
    return np.stack(actions)


@pytest.mark.parametrize("mode", ["window", "recurrent", "periodic", "staggered"])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "rg_lru"])
def test_actions_are_those_of_a_cpu(mixer, mode):
    torch.manual_seed(0)
    agent = Agent(DecisionMamba(4, 2, 64, 2, 6, mixer=mixer), AgentConfig(targets=[1.0])).eval()
    expected = play(agent, mode)
    assert expected.std() > 1e-3
    agent = agent.cuda()
    np.testing.assert_allclose(play(agent, mode), expected, atol=1e-3)
    eager = play(agent, mode)
    agent.config = replace(agent.config, cuda_graph=True)
    for _ in range(2):
        np.testing.assert_allclose(play(agent, mode), eager, atol=1e-5)


def test_a_batch_is_learned_from():
    torch.manual_seed(0)
    agent = Agent(DecisionMamba(4, 2, 64, 2, 6), AgentConfig(targets=[1.0])).cuda().train()
    batch = {
        "states": torch.randn(8, 6, 4),
        "actions": torch.rand(8, 6, 2) * 2 - 1,
        "returns_to_go": torch.randn(8, 6, 1),
        "timesteps": torch.arange(6).expand(8, 6),
        "mask": torch.arange(6).expand(8, 6) >= torch.arange(8)[:, None] // 2,
    }
    batch = {name: value.cuda() for name, value in batch.items()}
    optimizer = torch.optim.AdamW(agent.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss, _ = agent(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
