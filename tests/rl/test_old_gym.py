"""Environments of the older interface play as Gymnasium's do."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from scanweave.rl import Agent, DecisionMamba, OldGym, evaluate_agent, make_envs, play


class Old:
    """Pendulum with the interface of gym 0.21: four values, seeds apart, doubles."""

    def __init__(self, limit=7):
        self.env, self.limit, self.given = gymnasium.make("Pendulum-v1").unwrapped, limit, None
        space = self.env.observation_space
        self.observation_space = SimpleNamespace(
            low=space.low.astype(np.float64), high=space.high.astype(np.float64)
        )
        self.action_space = SimpleNamespace(low=np.float32([-2]), high=np.float32([2]))

    def seed(self, seed):
        self.given = seed

    def reset(self):
        self.steps = 0
        seed, self.given = self.given, None
        return self.env.reset(seed=seed)[0].astype(np.float64)

    def step(self, action):
        self.steps += 1
        observation, reward, _, _, _ = self.env.step(action)
        over = self.steps == self.limit
        info = {"TimeLimit.truncated": True} if over else {}
        return observation, reward, over, info


class Newer(Old):
    """As gym 0.26: five values, and the seed goes to reset."""

    seed = property()

    def reset(self, seed=None):
        self.given = seed
        return super().reset(), {"began": True}

    def step(self, action):
        observation, reward, over, info = super().step(action)
        return observation, reward, False, over, info


@pytest.mark.parametrize("kind", [Old, Newer])
def test_the_same_episodes_as_gymnasium(kind):
    def act(states, rewards, fresh):
        return 2 * np.tanh(states[:, 2:3])

    expected = play(
        make_envs("Pendulum-v1", 2, env_kwargs={"max_episode_steps": 7}), act, seeds=[3, 4]
    )
    found = play(make_envs(lambda limit: OldGym(kind(limit)), 2, env_kwargs={"limit": 7}), act,
                 seeds=[3, 4])  # fmt: skip
    for (one,), (other,) in zip(expected, found, strict=True):
        np.testing.assert_allclose(other.states, one.states, atol=1e-6)
        np.testing.assert_allclose(other.rewards, one.rewards, atol=1e-5)
        assert (other.terminated, other.truncated) == (False, True)


def test_agents_are_evaluated_in_it():
    model = DecisionMamba(3, 1, 16, 1, 4)
    agent = Agent(model, action_low=[-2], action_high=[2])

    def old_pendulum():
        return OldGym(Old())

    found = evaluate_agent(agent, old_pendulum, targets=[-10.0], episodes=2)
    same = evaluate_agent(
        agent, "Pendulum-v1", targets=[-10.0], episodes=2, env_kwargs={"max_episode_steps": 7}
    )
    assert found.env_id == "old_pendulum"
    np.testing.assert_allclose(found.results[0].returns, same.results[0].returns, rtol=1e-5)


def test_ends_and_spaces():
    env = Old()
    env.step = lambda action: (np.zeros(3), 1, True, {})
    wrapped = OldGym(env)
    assert wrapped.step(None)[2:4] == (True, False)
    assert wrapped.observation_space.dtype == np.float32
    env.action_space = SimpleNamespace(n=4)
    assert OldGym(env).action_space == gymnasium.spaces.Discrete(4)
    closed = []
    env.close = lambda: closed.append(1)
    OldGym(env).close()
    assert closed
    env.action_space = SimpleNamespace(nvec=[2, 3])
    with pytest.raises(ValueError, match="action_space must be a Box or Discrete, got namespace"):
        OldGym(env)
    with pytest.raises(ValueError, match="env must have reset, got int"):
        OldGym(3)
