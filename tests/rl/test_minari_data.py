"""Minari data sets: written without jax, read back exactly, damage named."""

import sys

import gymnasium
import h5py
import numpy as np
import pytest

pytest.importorskip("minari")

from gymnasium import spaces

from scanweave.rl import Episode, load_episodes, load_minari, save_minari


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store of its own, and no jax."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jax", None)
    return tmp_path


def episodes(lengths=(4, 3), seed=0):
    rng = np.random.default_rng(seed)
    return [
        Episode(
            rng.standard_normal((n, 4)),
            rng.integers(2, size=n),
            rng.standard_normal(n),
            terminated=number == 0,
            truncated=number > 0,
            final_state=rng.standard_normal(4),
        )
        for number, n in enumerate(lengths)
    ]


def same(one, other):
    np.testing.assert_array_equal(one.states, other.states)
    np.testing.assert_array_equal(one.actions, other.actions)
    np.testing.assert_array_equal(one.rewards, other.rewards)
    np.testing.assert_array_equal(one.final_state, other.final_state)
    assert (one.terminated, one.truncated) == (other.terminated, other.truncated)


def test_written_and_read_back():
    given = episodes()
    save_minari("local/cartpole/test-v0", given, env="CartPole-v1")
    for source in (
        load_minari("local/cartpole/test-v0"),
        load_episodes("minari:local/cartpole/test-v0"),
    ):
        for one, other in zip(given, source, strict=True):
            same(one, other)
    assert source[1].meta == {"source": "local/cartpole/test-v0", "episode": 1}
    with pytest.raises(FileExistsError, match="local/cartpole/test-v0 exists"):
        save_minari("local/cartpole/test-v0", given, env="CartPole-v1")
    with pytest.raises(FileNotFoundError, match="other-v0"):
        load_minari("local/cartpole/other-v0")


def test_images_stay_exact():
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(5, 40, 40, 3), dtype=np.uint8)
    given = Episode(frames[:4], np.arange(4) % 3, np.ones(4), final_state=frames[4])
    box = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    save_minari("local/i-v0", [given], observation_space=box, action_space=spaces.Discrete(3))
    read = load_minari("local/i-v0")[0]
    assert read.states.dtype == np.uint8
    np.testing.assert_array_equal(read.states, frames[:4])


@pytest.mark.filterwarnings("ignore:.*is set to None", "ignore:env_spec is None")
def test_nested_observations_are_flattened_as_gymnasium_does():
    space = spaces.Dict(
        {
            "goal": spaces.Box(-1, 1, (2,), np.float64),
            "rest": spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2, 2), np.float32))),
        }
    )
    from minari.data_collector.episode_buffer import EpisodeBuffer

    space.seed(0)
    seen = [space.sample() for _ in range(3)]
    buffer = EpisodeBuffer(
        id=0,
        observations={
            "goal": [one["goal"] for one in seen],
            "rest": ([one["rest"][0] for one in seen], [one["rest"][1] for one in seen]),
        },
        actions=[np.zeros(1, np.float32)] * 2,
        rewards=[0.0, 1.0],
        terminations=[False, True],
        truncations=[False, False],
    )
    import minari

    minari.create_dataset_from_buffers(
        dataset_id="local/d-v0",
        buffer=[buffer],
        observation_space=space,
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        algorithm_name="x",
        author="x",
        author_email="x",
        code_permalink="x",
        description="x",
    )
    read = load_minari("local/d-v0")[0]
    expected = np.stack([spaces.flatten(space, one) for one in seen])
    np.testing.assert_allclose(read.states, expected[:2], rtol=1e-6)
    np.testing.assert_allclose(read.final_state, expected[2], rtol=1e-6)


def test_damage_is_named(store):
    save_minari("local/bad-v0", episodes(), env="CartPole-v1")
    with h5py.File(store / "local/bad-v0/data/main_data.hdf5", "r+") as file:
        file["episode_1/rewards"][2] = np.nan
    with pytest.raises(ValueError, match=r"local/bad-v0: episode 1: rewards .* nan at row 2"):
        load_minari("local/bad-v0")


def test_what_cannot_be_written():
    with pytest.raises(ValueError, match="episodes must hold at least one episode, got none"):
        save_minari("local/x-v0", [], env="CartPole-v1")
    with pytest.raises(ValueError, match="env must be given, or observation_space"):
        save_minari("local/x-v0", episodes())
    lacking = episodes()
    lacking[1].final_state = None
    with pytest.raises(ValueError, match="must have a final_state, got none in episode 1"):
        save_minari("local/x-v0", lacking, env=gymnasium.make("CartPole-v1"))
