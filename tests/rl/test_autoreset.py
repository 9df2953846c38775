"""An agent in vector environments of every autoreset mode acts as in each environment alone."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from scanweave.rl import Agent, AgentConfig, DecisionMamba, make_envs, play

SEEDS = [3, 11, 4]


@pytest.fixture(scope="module")
def agent():
    torch.manual_seed(0)
    model = DecisionMamba(4, 2, 16, 2, 4, discrete=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return Agent(model, AgentConfig(targets=[30.0], scale=20.0)).eval()


def episodes(agent, autoreset, mode, seeds):
    envs = make_envs("CartPole-v1", len(seeds), autoreset_mode=autoreset)
    # each environment its own target, which a new episode begins with again
    agent.reset([10.0 + seed for seed in seeds], num_envs=len(seeds), mode=mode)
    rows = play(envs, agent.act, episodes=3, seeds=seeds)
    envs.close()
    return rows


@pytest.mark.parametrize("mode", ["window", "recurrent", "periodic", "staggered"])
@pytest.mark.parametrize("autoreset", list(AutoresetMode))
def test_as_each_environment_alone(agent, autoreset, mode):
    together = episodes(agent, autoreset, mode, SEEDS)
    lengths = [[len(episode) for episode in row] for row in together]
    # rows end at different times, so that resets of one fall into episodes of others
    assert len({tuple(row) for row in lengths}) == len(SEEDS)
    for row, seed in zip(together, SEEDS, strict=True):
        (alone,) = episodes(agent, autoreset, mode, [seed])
        for one, other in zip(row, alone, strict=True):
            np.testing.assert_array_equal(one.actions, other.actions)
            np.testing.assert_array_equal(one.states, other.states)


def test_the_modes_agree(agent):
    """All three play the same first episodes, and the agent answers them alike."""
    found = [episodes(agent, autoreset, "staggered", SEEDS) for autoreset in AutoresetMode]
    for rows in found[1:]:
        for row, first in zip(rows, found[0], strict=True):
            for one, other in zip(row, first, strict=True):
                np.testing.assert_array_equal(one.actions, other.actions)
