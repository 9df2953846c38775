"""Vector environments: every autoreset mode gives the episodes that single environments give."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from scanweave.rl import make_envs, play, read_spaces


class Countdown(gymnasium.Env):
    """Ends after 2 + seed % 3 steps, then 3, 4, 2, 3 ...; observations tell who and when."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self):
        self.number = 0

    def reset(self, *, seed=None, options=None):
        self.number = seed if seed is not None else self.number + 1
        self.step_count, self.trace = 0, 0.0
        return self._observe(), {}

    def step(self, action):
        self.step_count += 1
        # the past actions enter the observation, so a wrong or doubled action shows
        self.trace = 0.5 * self.trace + float(action[0])
        over = self.step_count == 2 + self.number % 3
        reward = float(self.number + 10 * self.step_count) + float(action[0])
        return self._observe(), reward, over and self.number % 2 == 0, over, {}

    def _observe(self):
        return np.array([self.number, self.step_count, self.trace], dtype=np.float32)


def act(states, rewards, fresh):
    return np.sin(states.sum(axis=1, keepdims=True)).astype(np.float32)


def single(seed, episodes):
    """The same episodes by the plain loop over one environment."""
    env = Countdown()
    played = []
    state, _ = env.reset(seed=seed)
    for _ in range(episodes):
        states, rewards, over = [state], [], False
        while not over:
            action = act(states[-1][None], None, None)[0]
            state, reward, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            states.append(state)
            rewards.append(reward)
        played.append((np.stack(states), np.array(rewards), terminated))
        state, _ = env.reset()
    return played


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("copy", [True, False])
def test_rows_equal_single_environments(mode, copy):
    seeds = [4, 9, 2, 3]
    envs = SyncVectorEnv([Countdown] * 4, autoreset_mode=mode, copy=copy)
    calls = []

    def watched(states, rewards, fresh):
        calls.append((states.copy(), rewards.copy(), fresh.copy()))
        return act(states, rewards, fresh)

    rows = play(envs, watched, episodes=3, seeds=seeds)
    for seed, row in zip(seeds, rows, strict=True):
        assert len(row) == 3
        for episode, (states, rewards, terminated) in zip(row, single(seed, 3), strict=True):
            np.testing.assert_array_equal(episode.states, states[:-1])
            np.testing.assert_array_equal(episode.final_state, states[-1])
            np.testing.assert_allclose(episode.rewards, rewards, rtol=1e-6)
            np.testing.assert_array_equal(episode.actions, act(states[:-1], None, None))
            assert (episode.terminated, episode.truncated) == (terminated, not terminated)
    # `fresh` marks exactly the observations that open an episode; their reward is 0
    for states, rewards, fresh in calls:
        np.testing.assert_array_equal(fresh, states[:, 1] == 0)
        assert not rewards[fresh].any()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_pendulum_rows_do_not_depend_on_their_number(mode):
    def push(states, rewards, fresh):
        return np.clip(states[:, 2:3] * 2, -2, 2)

    alone = [
        play(make_envs("Pendulum-v1", 1, autoreset_mode=mode), push, seeds=[seed])[0][0]
        for seed in (5, 6, 7)
    ]
    together = play(make_envs("Pendulum-v1", 3, autoreset_mode=mode), push, seeds=[5, 6, 7])
    for one, row in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.states, row[0].states, atol=1e-6)
        assert len(one) == 200
        assert row[0].truncated


def test_spaces():
    box, choice = gymnasium.spaces.Box, gymnasium.spaces.Discrete
    flat = box(-1.0, 1.0, (3,))
    spaces = read_spaces(flat, box(-2.0, 2.0, (1,)))
    assert (spaces.state_dim, spaces.act_dim, spaces.discrete) == (3, 1, False)
    assert spaces.action_low == [-2]
    assert read_spaces(flat, choice(4)).act_dim == 4
    assert read_spaces(choice(3), flat).state_dim == 3
    with pytest.raises(ValueError, match="observation_space must be an image or flatten, got Seq"):
        read_spaces(gymnasium.spaces.Sequence(flat), flat)
    with pytest.raises(ValueError, match="action_space must start at 0"):
        read_spaces(flat, choice(3, start=1))
    with pytest.raises(ValueError, match="action_space must be a flat Box, Discrete, Multi"):
        read_spaces(flat, gymnasium.spaces.Text(3))
    with pytest.raises(ValueError, match="action_space must be bounded"):
        read_spaces(flat, box(-np.inf, np.inf, (2,)))


def test_bad_arguments():
    envs = SyncVectorEnv([Countdown] * 2)
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        play(envs, act, episodes=0)
    with pytest.raises(ValueError, match=r"seeds must be one per environment \(2\), got 1"):
        play(envs, act, seeds=[1])
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        make_envs("Pendulum-v1", 0)
    envs.metadata = {}
    with pytest.raises(ValueError, match="envs must tell metadata"):
        play(envs, act)
