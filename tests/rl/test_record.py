"""Controllers and recordings of them."""

import sys

import numpy as np
import pytest

from scanweave.rl import CONTROLLERS, load_d4rl, record_episodes
from scanweave.rl import record as record_module
from scanweave.rl.controllers import perturbed


@pytest.mark.parametrize(("env_id", "margin"), [("Pendulum-v1", 60.0), ("CartPole-v1", 0.0)])
def test_unperturbed_controllers_play_well(env_id, margin):
    episodes = record_episodes(env_id, 24, noise=0.0, action_noise=0.0)
    mean = np.mean([e.total_reward for e in episodes])
    assert abs(mean - CONTROLLERS[env_id].reference_return) <= margin
    assert all(e.truncated and not e.terminated for e in episodes)


def test_perturbation_gives_every_quality():
    episodes = record_episodes("Pendulum-v1", 60, noise=1.0, seed=1)
    returns = np.array([e.total_reward for e in episodes])
    assert returns.min() < -800
    assert returns.max() > -130
    levels = np.array([e.meta["level"] for e in episodes])
    assert np.corrcoef(levels, returns)[0, 1] < -0.3


def test_seed_decides_everything():
    first, again, other = (record_episodes("CartPole-v1", 6, seed=s) for s in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.states, b.states)
        np.testing.assert_array_equal(a.actions, b.actions)
        assert a.meta == b.meta
    assert not np.array_equal(first[0].states[0], other[0].states[0])


def test_players_and_seeds_do_not_depend_on_rows():
    few, many = (record_episodes("Pendulum-v1", 5, action_noise=0.0, num_envs=n) for n in (2, 5))
    for a, b in zip(few, many, strict=True):
        np.testing.assert_allclose(a.states, b.states, atol=1e-5)


def test_bad_arguments():
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        record_episodes("Pendulum-v1", 0)
    with pytest.raises(ValueError, match=r"action_noise must be in 0\.\.1, got 2"):
        record_episodes("Pendulum-v1", 1, action_noise=2)
    with pytest.raises(ValueError, match="env_id must be one of Pendulum-v1, CartPole-v1, got"):
        record_episodes("Acrobot-v1", 1)
    with pytest.raises(ValueError, match="noise must be at least 0, got -1"):
        perturbed(CONTROLLERS["CartPole-v1"], 2, -1, np.random.default_rng(0))


def test_command_line_writes_a_file_once(tmp_path, monkeypatch):
    path = tmp_path / "set.hdf5"
    command = ["record", "--path", str(path), "--env-id", "CartPole-v1", "--episodes", "3"]
    monkeypatch.setattr(sys, "argv", command)
    record_module.main()
    assert len(load_d4rl(path)) == 3
    with pytest.raises(FileExistsError, match=r"set\.hdf5 exists: .* or give --overwrite"):
        record_module.main()
    monkeypatch.setattr(sys, "argv", [*command, "--overwrite"])
    record_module.main()
