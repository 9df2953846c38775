"""D4RL's HDF5 layout: every variant reads, every defect is named with file, key and row."""

import h5py
import numpy as np
import pytest

from scanweave.rl import Episode, load_d4rl, save_d4rl


@pytest.fixture
def columns():
    rng = np.random.default_rng(0)
    flags = np.zeros(10, dtype=bool)
    terminals, timeouts = flags.copy(), flags.copy()
    terminals[3] = timeouts[7] = timeouts[9] = True
    return {
        "observations": rng.standard_normal((10, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (10, 2)).astype(np.float32),
        "rewards": rng.standard_normal(10).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


@pytest.fixture
def write(tmp_path):
    def writer(columns):
        path = tmp_path / "set.hdf5"
        with h5py.File(path, "w") as file:
            for key, value in columns.items():
                file[key] = value
            file["metadata/algorithm"] = b"SAC"
            file["infos/qpos"] = np.zeros((10, 2))
        return path

    return writer


def test_episodes_are_cut_at_both_kinds_of_end(columns, write):
    episodes = load_d4rl(write(columns))
    assert [len(e) for e in episodes] == [4, 4, 2]
    assert [e.terminated for e in episodes] == [True, False, False]
    assert [e.truncated for e in episodes] == [False, True, True]
    np.testing.assert_array_equal(
        np.concatenate([e.states for e in episodes]), columns["observations"]
    )
    np.testing.assert_array_equal(np.concatenate([e.rewards for e in episodes]), columns["rewards"])
    assert episodes[0].meta["source"] == "set.hdf5"


def test_double_precision_and_flag_columns(columns, write):
    columns = {
        "observations": columns["observations"].astype(np.float64),
        "actions": columns["actions"].astype(np.float64),
        "rewards": columns["rewards"].astype(np.float64)[:, None],
        "terminals": columns["terminals"].astype(np.float32)[:, None],
        "timeouts": columns["timeouts"].astype(np.int64)[:, None],
    }
    episodes = load_d4rl(write(columns))
    assert [len(e) for e in episodes] == [4, 4, 2]
    assert episodes[0].states.dtype == episodes[0].actions.dtype == np.float32


def test_discrete_actions_and_next_observations(columns, write):
    columns["actions"] = np.arange(10)
    columns["next_observations"] = columns["observations"] + 1
    episodes = load_d4rl(write(columns))
    assert episodes[1].actions.tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(episodes[0].final_state, columns["observations"][3] + 1)


def test_without_timeouts_episodes_are_cut_by_length(columns, write):
    del columns["timeouts"]
    path = write(columns)
    with pytest.raises(ValueError, match=r"set\.hdf5: has no 'timeouts': give max_episode_steps"):
        load_d4rl(path)
    with pytest.raises(ValueError, match="max_episode_steps must be at least 1, got 0"):
        load_d4rl(path, max_episode_steps=0)
    episodes = load_d4rl(path, max_episode_steps=3)
    assert [len(e) for e in episodes] == [3, 1, 3, 3]
    assert [e.terminated for e in episodes] == [False, True, False, False]


def test_unclosed_tail_is_dropped_with_a_warning(columns, write):
    columns["timeouts"][9] = False
    with pytest.warns(UserWarning, match="dropped the last 2 steps, which end no episode"):
        assert len(load_d4rl(write(columns))) == 2
    columns["timeouts"][:] = columns["terminals"][:] = False
    with pytest.raises(ValueError, match="key 'terminals': no episode ends within 10 steps"):
        load_d4rl(write(columns))


def test_short_truncated_episodes_can_be_dropped(columns, write):
    path = write(columns)
    episodes = load_d4rl(path, drop_short_truncated=3)
    assert [len(e) for e in episodes] == [4, 4]
    assert episodes[0].meta["dropped"] == 1
    columns["terminals"][3] = False
    with pytest.raises(ValueError, match="drop_short_truncated must leave an episode, got 99"):
        load_d4rl(write(columns), drop_short_truncated=99)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rewards", None, r"set\.hdf5: must have key 'rewards', got \["),
        ("observations", np.zeros(10), r"key 'observations' must be \(N, \.\.\.\), got \(10,\)"),
        (
            "actions",
            np.zeros((9, 2)),
            "key 'actions' must have one row per observation .10., got 9",
        ),
        ("rewards", np.zeros((10, 2)), r"key 'rewards' must be \(N,\) or \(N, 1\), got \(10, 2\)"),
        ("terminals", np.full(10, 2), "key 'terminals' must hold 0 or 1, got 2 at row 0"),
        ("rewards", np.full(10, b"x"), "key 'rewards' must hold numbers"),
        ("rewards", 3.0, "key 'rewards' must be an array"),
        (
            "next_observations",
            np.zeros((10, 4)),
            r"key 'next_observations' must be shaped as observations \(10, 3\), got \(10, 4\)",
        ),
    ],
)
def test_defects_are_named(columns, write, key, value, message):
    if value is None:
        del columns[key]
    else:
        columns[key] = value
    with pytest.raises(ValueError, match=message):
        load_d4rl(write(columns))


@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_nan_is_named_with_its_row(columns, write, key):
    columns[key][6] = np.nan
    with pytest.raises(
        ValueError, match=rf"set\.hdf5: key '{key}' must be finite, got .* at row 6"
    ):
        load_d4rl(write(columns))


def test_broken_files(columns, write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no D4RL file at .*nothing\.hdf5"):
        load_d4rl(tmp_path / "nothing.hdf5")
    path = write(columns)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"set\.hdf5: must be a complete HDF5 file"):
        load_d4rl(path)
    path.write_text("observations")
    with pytest.raises(ValueError, match=r"set\.hdf5: must be a complete HDF5 file"):
        load_d4rl(path)


def test_damaged_block_is_named(columns, tmp_path):
    path = tmp_path / "set.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in columns.items():
            file.create_dataset(key, data=value, chunks=value.shape, fletcher32=True)
        place = file["rewards"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.hdf5: key 'rewards' cannot be read"):
        load_d4rl(path)


def test_written_episodes_read_back(tmp_path):
    rng = np.random.default_rng(1)
    episodes = [
        Episode(
            rng.standard_normal((n, 2)),
            rng.uniform(-1, 1, (n, 1)),
            rng.standard_normal(n),
            terminated=n == 3,
            truncated=n != 3,
            final_state=rng.standard_normal(2),
        )
        for n in (3, 5, 1)
    ]
    path = tmp_path / "new" / "set.hdf5"
    save_d4rl(path, episodes)
    for before, after in zip(episodes, load_d4rl(path), strict=True):
        for name in ("states", "actions", "rewards", "final_state"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
        assert before.terminated == after.terminated
    with pytest.raises(FileExistsError, match=r"set\.hdf5 exists: choose another path"):
        save_d4rl(path, episodes)
    save_d4rl(path, episodes[:1], overwrite=True)
    assert len(load_d4rl(path)) == 1
    assert [p.name for p in path.parent.iterdir()] == ["set.hdf5"]
    with pytest.raises(ValueError, match="episodes must hold at least one episode"):
        save_d4rl(tmp_path / "none.hdf5", [])


def test_human_demonstrations(data_dir):
    episodes = load_d4rl(data_dir / "rl_adroit_door" / "door_human.hdf5")
    assert len(episodes) == 25
    assert sum(len(e) for e in episodes) == 6729
    assert episodes[0].states.shape[1] == 39
    assert episodes[0].actions.shape[1] == 28
    returns = [e.total_reward for e in episodes]
    assert min(returns) == pytest.approx(230.1, abs=0.1)
    assert max(returns) == pytest.approx(1496.2, abs=0.1)
