"""HDF5 files in D4RL's layout: read with checks that name file, key and row; write.

One flat array per key over all N transitions; an episode ends where `terminals` or `timeouts`
is set. Neither the `d4rl` package nor an environment is needed.

    load_d4rl   file -> episodes
    save_d4rl   episodes -> file, never over an existing one unless asked

Letters: N transitions, S state channels, A action channels.
Source: Fu et al. 2020, arXiv 2004.07219; layout of the files of Farama D4RL 89141a6.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .data import Episode, require_finite

if TYPE_CHECKING:
    import h5py


def load_d4rl(
    path: str | os.PathLike[str],
    *,
    max_episode_steps: int | None = None,
    drop_short_truncated: int = 0,
) -> list[Episode]:
    """Read a D4RL HDF5 file and cut it into episodes.

    Steps after the last episode end are dropped, with a warning that counts them.

    Args:
        path: The file, with `observations` (N, S), `actions` (N, A) or (N,), `rewards` and
            `terminals` (N,) or (N, 1), and if present `timeouts` and `next_observations`.
            float64 is cast to float32, 0/1 flags to bool.
        max_episode_steps: Cut after so many steps. Needed where the file has no `timeouts`
            (MuJoCo v0 files), ignored otherwise.
        drop_short_truncated: Drop episodes of fewer steps that a time limit cut: in replay
            files these are artefacts of the recording, and their return is too low
            (Farama D4RL issue 162). 0 keeps all. `meta["dropped"]` of every episode counts them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no HDF5 file or truncated, or a key is absent, mis-shaped, not
            finite or not a flag; the message names file, key and row.
        ImportError: h5py is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no D4RL file at {path}")
    columns = _read(path)
    count = len(columns["rewards"])
    done = columns["terminals"].copy()
    if "timeouts" in columns:
        done |= columns["timeouts"]
    elif max_episode_steps is None:
        raise ValueError(
            f"{path}: has no 'timeouts': give max_episode_steps, after which episodes are cut"
        )
    bounds = _episode_bounds(done, None if "timeouts" in columns else max_episode_steps)
    if not bounds:
        raise ValueError(f"{path}: key 'terminals': no episode ends within {count} steps")
    tail = count - bounds[-1][1]
    if tail:
        warnings.warn(f"{path}: dropped the last {tail} steps, which end no episode", stacklevel=2)
    episodes = [_episode(columns, start, end) for start, end in bounds]
    kept = [e for e in episodes if e.terminated or len(e) >= drop_short_truncated]
    if not kept:
        raise ValueError(
            f"{path}: drop_short_truncated must leave an episode, "
            f"got {drop_short_truncated}, the longest has {max(map(len, episodes))} steps"
        )
    for episode in kept:
        episode.meta.update(source=path.name, dropped=len(episodes) - len(kept))
    return kept


def save_d4rl(
    path: str | os.PathLike[str], episodes: Sequence[Episode], *, overwrite: bool = False
) -> None:
    """Write episodes as one HDF5 file in D4RL's layout, atomically.

    Every episode must end, so one that neither terminated nor was truncated gets a timeout.
    `next_observations` is written when every episode knows its final state.

    Raises:
        ValueError: no episodes.
        FileExistsError: the file exists and `overwrite` is False.
        ImportError: h5py is not installed.
    """
    path = Path(path)
    if not episodes:
        raise ValueError("episodes must hold at least one episode, got none")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another path or give overwrite=True")
    columns = {
        "observations": np.concatenate([e.states for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminals": np.concatenate([_end_flag(len(e), e.terminated) for e in episodes]),
        "timeouts": np.concatenate([_end_flag(len(e), not e.terminated) for e in episodes]),
    }
    if all(e.final_state is not None for e in episodes):
        columns["next_observations"] = np.concatenate(
            [np.concatenate([e.states[1:], np.asarray(e.final_state)[None]]) for e in episodes]
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _h5py().File(partial, "w") as file:
            for key, array in columns.items():
                file.create_dataset(key, data=array, compression="gzip")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, NDArray]:
    """Every column that episodes need, checked and cast."""
    h5py = _h5py()
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: must be a complete HDF5 file: {error}") from error
    with file:
        columns = {
            key: _read_key(file, path, key)
            for key in ("observations", "actions", "rewards", "terminals")
        }
        for key in ("timeouts", "next_observations"):
            if key in file:
                columns[key] = _read_key(file, path, key)
    count = len(columns["observations"])
    for key, array in columns.items():
        if key in ("rewards", "terminals", "timeouts"):
            array = _flat(path, key, array)
        if len(array) != count:
            raise ValueError(
                f"{path}: key {key!r} must have one row per observation ({count}), got {len(array)}"
            )
        try:
            require_finite(f"key {key!r}", array)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        columns[key] = _flags(path, key, array) if key in ("terminals", "timeouts") else array
    following = columns.get("next_observations")
    if following is not None and following.shape != columns["observations"].shape:
        raise ValueError(
            f"{path}: key 'next_observations' must be shaped as observations "
            f"{columns['observations'].shape}, got {following.shape}"
        )
    return columns


def _read_key(file: "h5py.File", path: Path, key: str) -> NDArray:
    if key not in file:
        raise ValueError(f"{path}: must have key {key!r}, got {sorted(file.keys())}")
    node = file[key]
    if not isinstance(node, _h5py().Dataset) or node.ndim == 0:
        raise ValueError(f"{path}: key {key!r} must be an array, got {node}")
    if node.dtype.kind not in "biuf":
        raise ValueError(f"{path}: key {key!r} must hold numbers, got dtype {node.dtype}")
    try:
        array = node[:]
    except OSError as error:
        raise ValueError(f"{path}: key {key!r} cannot be read: {error}") from error
    if key in ("observations", "actions", "next_observations") and array.dtype.kind == "f":
        array = array.astype(np.float32)
    if key in ("observations", "next_observations") and array.ndim < 2:
        raise ValueError(f"{path}: key {key!r} must be (N, ...), got {array.shape}")
    return array


def _flat(path: Path, key: str, array: NDArray) -> NDArray:
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{path}: key {key!r} must be (N,) or (N, 1), got {array.shape}")
    return array


def _flags(path: Path, key: str, array: NDArray) -> NDArray:
    bad = (array != 0) & (array != 1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{path}: key {key!r} must hold 0 or 1, got {array[row]} at row {row}")
    return array.astype(bool)


def _episode_bounds(done: NDArray, max_episode_steps: int | None) -> list[tuple[int, int]]:
    """(start, end) of every closed episode."""
    ends = np.flatnonzero(done) + 1
    if max_episode_steps is None:
        starts = np.concatenate([[0], ends[:-1]]).astype(int)
        return list(zip(starts.tolist(), ends.tolist(), strict=True)) if len(ends) else []
    if max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be at least 1, got {max_episode_steps}")
    bounds, start = [], 0
    for end in [*ends.tolist(), len(done)]:
        while end - start >= max_episode_steps:
            bounds.append((start, start + max_episode_steps))
            start += max_episode_steps
        if end > start and done[end - 1]:
            bounds.append((start, end))
            start = end
    return bounds


def _episode(columns: dict[str, NDArray], start: int, end: int) -> Episode:
    terminated = bool(columns["terminals"][end - 1])
    following = columns.get("next_observations")
    return Episode(
        states=columns["observations"][start:end],
        actions=columns["actions"][start:end],
        rewards=columns["rewards"][start:end],
        terminated=terminated,
        truncated=not terminated,
        final_state=None if following is None else following[end - 1],
    )


def _end_flag(length: int, value: bool) -> NDArray:
    flags = np.zeros(length, dtype=bool)
    flags[-1] = value
    return flags


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise ImportError("scanweave.rl needs h5py: pip install 'scanweave[rl]'") from error
    return h5py
