"""One door for all data: files, dicts of arrays, environments and lists, and what is none."""

import sys
import types

import numpy as np
import pytest

from scanweave.rl import load_episodes, normalized_score, reference_returns
from scanweave.rl.sources import read_npz


def columns():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((7, 3)).astype(np.float32)
    following = np.concatenate([states[1:], states[:1]])
    following[3] = 9
    terminals = np.zeros(7, dtype=bool)
    terminals[6] = True
    return {
        "observations": states,
        "actions": rng.uniform(-1, 1, (7, 2)),
        "rewards": rng.standard_normal(7),
        "terminals": terminals,
        "next_observations": following,
    }


def test_the_dict_of_the_q_learning_helper():
    """No timeouts: an episode also ends where the next observation is not the following row."""
    episodes = load_episodes(columns())
    assert [len(e) for e in episodes] == [4, 3]
    assert [e.terminated for e in episodes] == [False, True]
    assert (episodes[0].final_state == 9).all()
    assert load_episodes(episodes) == episodes


def test_an_environment_of_d4rl_and_its_broken_package(monkeypatch):
    class OldEnv:
        spec = types.SimpleNamespace(id="hopper-medium-v2")

        def get_dataset(self):
            return {**columns(), "timeouts": columns()["terminals"], "infos/qpos": np.zeros(7)}

    # a package that cannot even be imported must not matter
    monkeypatch.setitem(sys.modules, "d4rl", None)
    monkeypatch.setitem(sys.modules, "mujoco_py", None)
    episodes = load_episodes(OldEnv())
    assert [len(e) for e in episodes] == [7]
    assert episodes[0].meta["source"] == "hopper-medium-v2"


def test_trajectory_dicts_from_an_iterator():
    one = {"observations": np.zeros((2, 1)), "actions": np.zeros((2, 1)), "rewards": [1, 2]}
    assert [e.total_reward for e in load_episodes(iter([one, one]))] == [3.0, 3.0]


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, **columns())
    episodes = load_episodes(path)
    assert [len(e) for e in episodes] == [4, 3]
    assert episodes[0].meta["source"] == "set.npz"
    with pytest.raises(FileNotFoundError, match=r"no file at .*other\.npz"):
        read_npz(tmp_path / "other.npz")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"set\.npz: must be a complete \.npz file"):
        read_npz(path)
    np.savez(path, **{**columns(), "rewards": np.full(7, np.nan)})
    with pytest.raises(ValueError, match=r"set\.npz: key 'rewards' .* got nan at row 0"):
        read_npz(path)
    np.savez(path, observations=np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"set\.npz: must have key 'actions', got"):
        read_npz(path)
    np.savez(path, **{**columns(), "actions": np.array([{}] * 7, dtype=object)})
    with pytest.raises(ValueError, match=r"set\.npz: key 'actions' cannot be read: .*pickle"):
        read_npz(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "source must be a path, an id, dicts or an environment, got 3"),
        ([], "source must yield trajectory dicts or episodes, got nothing"),
        ([1], r"source must yield trajectory dicts or episodes, got \['int'\]"),
        ({**columns(), "observations": np.zeros((0, 3))}, "must hold at least one step, got none"),
        (
            {**columns(), "actions": np.zeros((7, 2, 2))},
            r"'actions' must be \(N, A\) or",
        ),
    ],
)
def test_what_is_no_data(source, message):
    with pytest.raises(ValueError, match=message):
        load_episodes(source)


def test_scores():
    assert normalized_score("walker2d-medium-v2", 4592.3) == 100
    np.testing.assert_allclose(
        normalized_score("halfcheetah", [-280.178953, 12135.0]), [0, 100], atol=1e-12
    )
    assert reference_returns("maze2d-umaze-dense-v1") == (68.537689, 193.66285642381482)
    assert reference_returns("maze2d-umaze-v1") == (23.85, 161.86)
    with pytest.raises(ValueError, match=r"name must begin with one of .*, got 'cartpole-v1'"):
        reference_returns("cartpole-v1")
