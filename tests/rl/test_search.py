"""Random search finds a player that earns more than none, and its recording says where from."""

import json

import numpy as np
import pytest

from scanweave.rl import load_d4rl
from scanweave.rl.search import SearchConfig, linear_controller, search_linear, write_mixed

SMALL = SearchConfig(
    env_id="Pendulum-v1",
    iterations=4,
    directions=4,
    best=2,
    max_episode_steps=40,
    episodes=6,
    step=0.5,
    noise=0.5,
)


def test_a_linear_player():
    weights = np.array([[1.0, 2.0, 0.5], [0.0, -1.0, 0.0]])
    controller = linear_controller(weights, np.array([-2.0, -2.0]), np.array([2.0, 2.0]), 3.0)
    twice = np.stack([weights.ravel(), 2 * weights.ravel()])
    actions = controller.act(np.array([[0.5, 0.1], [0.5, 0.1]]), twice)
    np.testing.assert_allclose(actions, [[1.2, -0.1], [2.0, -0.2]], rtol=1e-6)
    assert actions.dtype == np.float32


def test_the_recording_is_repeatable_and_says_where_it_comes_from(tmp_path):
    from dataclasses import replace

    path = write_mixed(replace(SMALL, out=tmp_path / "one"))
    again = write_mixed(replace(SMALL, out=tmp_path / "two"))
    one, two = load_d4rl(path), load_d4rl(again)
    assert len(one) == 6
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.states, b.states)
        assert len(a) == 40
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["name"] == "local/Pendulum-v1/mixed-v0"
    assert facts["settings"]["seed"] == 0
    assert facts["returns"]["episodes"] == 6
    assert len(facts["search"]) == 4
    assert facts["versions"]["gymnasium"]
    with pytest.raises(FileExistsError, match=r"mixed-v0\.hdf5 exists: choose another folder"):
        write_mixed(replace(SMALL, out=tmp_path / "one"))


def test_what_is_refused():
    for change, message in (
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"best": 5, "directions": 4}, "best must be at most directions 4, got 5"),
        ({"noise": 0.0}, r"noise must be positive, got 0\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SearchConfig(**change)
    with pytest.raises(ValueError, match="env_id must have vectors and bounded continuous"):
        search_linear(SearchConfig(env_id="CartPole-v1"))
