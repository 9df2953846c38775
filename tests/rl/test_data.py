"""Episodes, and windows against a slow loop."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scanweave.rl import (
    Episode,
    TrajectoryWindows,
    clip_actions,
    episodes_from_trajectories,
    fingerprint,
    keep_batch,
    return_statistics,
    state_statistics,
    top_episodes,
)


def make_episodes(lengths, seed=0, discrete=False):
    rng = np.random.default_rng(seed)
    return [
        Episode(
            states=rng.standard_normal((length, 3)),
            actions=rng.integers(4, size=length) if discrete else rng.uniform(-1, 1, (length, 2)),
            rewards=rng.standard_normal(length),
        )
        for length in lengths
    ]


@pytest.mark.parametrize("length", [1, 4, 20])
@pytest.mark.parametrize("discrete", [False, True])
def test_every_window_equals_a_slow_loop(length, discrete):
    episodes = make_episodes([1, 7, 20, 3], discrete=discrete)
    windows = TrajectoryWindows(episodes, length)
    assert len(windows) == 31
    index = 0
    for episode in episodes:
        for start in range(len(episode)):
            item = windows[index]
            taken = min(length, len(episode) - start)
            pads = length - taken
            assert item["mask"].tolist() == [False] * pads + [True] * taken
            for j in range(taken):
                t = start + j
                where = pads + j
                assert item["states"][where].tolist() == episode.states[t].tolist()
                assert item["actions"][where].tolist() == episode.actions[t].tolist()
                assert item["timesteps"][where] == t
                to_go = float(np.sum(episode.rewards[t:], dtype=np.float64))
                assert item["returns_to_go"][where, 0] == pytest.approx(to_go, abs=1e-6)
            for name in ("states", "actions", "returns_to_go", "timesteps"):
                assert not item[name][:pads].any()
            index += 1


def test_uniform_indices_draw_windows_as_the_published_sampler():
    """An episode in proportion to its length, then a uniform start in it."""
    windows = TrajectoryWindows(make_episodes([2, 6]), 3)
    starts = [(int(windows.starts[i]), i - int(windows.starts[i])) for i in range(len(windows))]
    assert starts == [(0, t) for t in range(2)] + [(2, t) for t in range(6)]


def test_returns_keep_their_digits_after_a_million_steps():
    long = Episode(np.zeros((1_000_000, 3)), np.zeros((1_000_000, 2)), np.full(1_000_000, 1000.1))
    last = make_episodes([3])[0]
    windows = TrajectoryWindows([long, last], 2)
    to_go = windows[1_000_000]["returns_to_go"][0, 0]
    assert to_go.item() == pytest.approx(last.total_reward, abs=1e-5)


def test_loader_yields_whole_batches_and_workers_do_too():
    windows = TrajectoryWindows(make_episodes([5, 6]), 4)
    batches = list(DataLoader(windows, 4, collate_fn=keep_batch))
    assert [tuple(b["states"].shape) for b in batches] == [(4, 4, 3), (4, 4, 3), (3, 4, 3)]
    assert torch.equal(batches[1]["states"][2], windows[6]["states"])
    assert windows.__getitems__([])["mask"].shape == (0, 4)


@pytest.mark.parametrize("index", [-1, 11])
def test_window_index_out_of_range_raises(index):
    windows = TrajectoryWindows(make_episodes([5, 6]), 4)
    with pytest.raises(IndexError, match=r"window indices must be in 0\.\.10"):
        windows[index]


def test_windows_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        TrajectoryWindows(make_episodes([2]), 0)
    with pytest.raises(ValueError, match="episodes must hold at least one episode"):
        TrajectoryWindows([], 3)
    other = Episode(np.zeros((2, 4)), np.zeros((2, 2)), np.zeros(2))
    with pytest.raises(ValueError, match=r"episodes\[1\]\.states must be \(3,\) float32"):
        TrajectoryWindows([*make_episodes([2]), other], 3)


def test_episode_casts_once():
    episode = Episode(
        states=np.zeros((3, 2), dtype=np.float64),
        actions=np.array([[1], [0], [1]]),
        rewards=np.array([[1.0], [2.0], [3.0]]),
        final_state=[1, 2],  # type: ignore[arg-type]
    )
    assert episode.states.dtype == np.float32
    assert episode.actions.dtype == np.int64
    assert episode.actions.shape == episode.rewards.shape == (3,)
    assert episode.final_state is not None
    assert episode.final_state.dtype == np.float32
    assert episode.total_reward == 6.0
    assert Episode(np.zeros((3, 2, 2), np.uint8), np.zeros(3), np.zeros(3)).states.dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": np.zeros(3)}, r"states must be \(T, \.\.\.\), got \(3,\)"),
        ({"states": np.zeros((2, 2))}, "states must have one row per reward, got 2 rows and 3"),
        ({"states": np.full((3, 2), np.nan)}, r"states must be finite, got \[nan nan\] at row 0"),
        ({"states": np.array(["a"] * 3)[:, None]}, "states must hold numbers, got dtype <U1"),
        ({"actions": np.zeros((4, 1))}, "actions must have one row per reward"),
        ({"actions": np.zeros((3, 1, 1))}, r"actions must be \(T, A\) or \(T,\) numbers"),
        (
            {"actions": np.zeros((3, 2, 1), int)},
            r"actions must be \(T,\) numbers, got \(3, 2, 1\)",
        ),
        ({"actions": np.array([0, -1, 0])}, "discrete actions must be at least 0, got -1"),
        ({"rewards": np.array([0, np.inf, 0])}, "rewards must be finite, got inf at row 1"),
        ({"rewards": np.zeros((3, 2))}, r"rewards must be \(T,\) numbers, got \(3, 2\)"),
        (
            {"states": np.zeros((0, 2)), "actions": np.zeros((0, 1)), "rewards": np.zeros(0)},
            "rewards must hold at least one step",
        ),
        ({"final_state": np.zeros(3)}, r"final_state must have a state's shape \(2,\)"),
    ],
)
def test_episode_refuses(change, message):
    fields = {"states": np.zeros((3, 2)), "actions": np.zeros((3, 1)), "rewards": np.zeros(3)}
    with pytest.raises(ValueError, match=message):
        Episode(**{**fields, **change})


def test_trajectory_dicts():
    trajectory = {
        "observations": np.arange(6.0).reshape(3, 2),
        "next_observations": np.arange(2.0, 8.0).reshape(3, 2),
        "actions": np.zeros((3, 1)),
        "rewards": np.ones(3),
        "terminals": np.array([0, 0, 1]),
    }
    cut = {**trajectory, "terminals": np.zeros(3), "timeouts": np.array([False, False, True])}
    first, second = episodes_from_trajectories([trajectory, cut])
    assert (first.terminated, first.truncated) == (True, False)
    assert (second.terminated, second.truncated) == (False, True)
    assert first.final_state is not None
    assert first.final_state.tolist() == [6, 7]
    with pytest.raises(ValueError, match=r"trajectories\[1\] must have 'rewards', got"):
        episodes_from_trajectories(
            [trajectory, {k: v for k, v in trajectory.items() if k != "rewards"}]
        )
    with pytest.raises(ValueError, match=r"trajectories\[0\]: rewards must be finite, got nan at"):
        episodes_from_trajectories([{**trajectory, "rewards": [1, np.nan, 1]}])


def test_top_episodes_holds_the_share():
    episodes = [
        Episode(np.zeros((n, 1)), np.zeros((n, 1)), np.full(n, r))
        for n, r in ((10, 1.0), (10, 3.0), (10, 2.0), (70, 0.0))
    ]
    assert [e.total_reward for e in top_episodes(episodes, 0.2)] == [30, 20]
    assert len(top_episodes(episodes, 0.01)) == 1
    assert len(top_episodes(episodes, 1.0)) == 4
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        top_episodes(episodes, 0)


def test_statistics():
    episodes = make_episodes([4, 9])
    states = np.concatenate([e.states for e in episodes])
    mean, std = state_statistics(episodes)
    np.testing.assert_allclose(mean, states.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(std, states.std(axis=0) + 1e-6, rtol=1e-5)
    summary = return_statistics(episodes)
    assert summary["episodes"] == 2
    assert summary["steps"] == 13
    assert summary["max"] == pytest.approx(max(e.total_reward for e in episodes))


def test_clip_actions_leaves_the_original():
    episode = Episode(np.zeros((2, 1)), np.array([[-3.0], [0.5]]), np.zeros(2))
    clipped = clip_actions([episode], np.array([-1.0]), np.array([1.0]))[0]
    assert clipped.actions.tolist() == [[-1.0], [0.5]]
    assert episode.actions[0, 0] == -3


def test_fingerprint_tells_data_apart():
    def episode(**change):
        given = {
            "states": np.arange(6.0).reshape(3, 2),
            "actions": np.ones((3, 1)),
            "rewards": np.zeros(3),
        }
        return Episode(**{**given, **change})

    plain = fingerprint([episode()])
    assert len(plain) == 64
    assert fingerprint([episode(states=np.float32(np.arange(6)).reshape(3, 2))]) == plain
    others = [
        [episode(rewards=np.array([0, 0, 1e-3]))],
        [episode(actions=np.ones((3, 1), dtype=int))],
        [episode(states=np.arange(6.0).reshape(3, 2)[::-1])],
        [episode(terminated=True)],
        [episode(), episode()],
    ]
    assert len({plain, *map(fingerprint, others)}) == 6
