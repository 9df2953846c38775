"""Recorders: what they keep equals what the environments did, in every autoreset mode."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from scanweave.rl import RecordEpisodes, RecordVectorEpisodes, make_envs


def replay(episode, seed, env_id="CartPole-v1", limit=12):
    """Play an episode's actions again from its seed."""
    env = gymnasium.make(env_id, max_episode_steps=limit)
    states = [env.reset(seed=seed)[0]]
    for action in episode.actions:
        state, _, terminated, truncated, _ = env.step(action)
        states.append(state)
    assert (episode.terminated, episode.truncated) == (terminated, truncated and not terminated)
    np.testing.assert_array_equal(np.stack(states[:-1]), episode.states)
    np.testing.assert_array_equal(states[-1], episode.final_state)


def test_one_environment():
    env = RecordEpisodes(gymnasium.make("CartPole-v1", max_episode_steps=12))
    rng = np.random.default_rng(0)
    for seed in range(4):
        env.reset(seed=seed)
        if seed == 2:
            # an unfinished episode leaves nothing
            env.step(0)
            env.reset(seed=seed)
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(int(rng.integers(2)))
            done = terminated or truncated
    assert len(env.episodes) == 4
    for seed, episode in enumerate(env.episodes):
        assert episode.meta == {"seed": seed}
        replay(episode, seed)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments(mode):
    envs = make_envs("CartPole-v1", 3, autoreset_mode=mode, env_kwargs={"max_episode_steps": 12})
    recorder = RecordVectorEpisodes(envs)
    rng = np.random.default_rng(0)
    states, _ = recorder.reset(seed=[5, 6, 7])
    seen = []
    for _ in range(40):
        seen.append(states.copy())
        states, _, terminated, truncated, _ = recorder.step(rng.integers(2, size=3))
        done = terminated | truncated
        if mode == AutoresetMode.DISABLED and done.any():
            states, _ = recorder.reset(options={"reset_mask": done})
    assert len(recorder.episodes) >= 6
    firsts = {}
    for episode in recorder.episodes:
        # every recorded state was seen by whoever played, one after the other
        row = episode.meta["row"]
        column = np.stack([one[row] for one in seen])
        start = next(i for i, state in enumerate(column) if (state == episode.states[0]).all())
        np.testing.assert_array_equal(column[start : start + len(episode)], episode.states)
        firsts.setdefault(row, episode)
        assert 1 <= len(episode) <= 12
        assert episode.terminated != episode.truncated
    for row, episode in firsts.items():
        replay(episode, 5 + row)
