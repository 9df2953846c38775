"""Flat columns over all transitions, as D4RL keeps them: check them, cut them into episodes.

    episodes_from_columns   dict of arrays (a D4RL file's, `env.get_dataset()`, an .npz) -> episodes
    KEYS                    columns that are read; others are ignored

Every error names the source, the key and the row. Letters: N transitions, S state channels,
A action channels.

Source: Fu et al. 2020, arXiv 2004.07219; layout of the files of Farama D4RL 89141a6.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .data import Episode, require_finite

REQUIRED = ("observations", "actions", "rewards", "terminals")
KEYS = (*REQUIRED, "timeouts", "next_observations")


def episodes_from_columns(
    columns: Mapping[str, ArrayLike],
    *,
    source: str = "columns",
    max_episode_steps: int | None = None,
    drop_short_truncated: int = 0,
) -> list[Episode]:
    """Cut flat columns into episodes: one ends where `terminals` or `timeouts` is set.

    Without `timeouts`, an episode also ends after `max_episode_steps`, or, when that is not
    given but `next_observations` is, where the next row does not go on from it (the dicts of
    D4RL's Q-learning helper, which leaves out the last step of episodes cut by time). Steps
    after the last end are dropped, with a warning that counts them.

    Args:
        columns: `observations` (N, S), `actions` (N, A) or (N,), `rewards` and `terminals` (N,)
            or (N, 1), and if present `timeouts` and `next_observations`. float64 is cast to
            float32, 0/1 flags to bool; other keys are ignored.
        source: Named by errors and by `meta["source"]`.
        max_episode_steps: See above.
        drop_short_truncated: Drop episodes of fewer steps that a time limit cut: in replay
            files these are artefacts of the recording, and their return is too low
            (Farama D4RL issue 162). 0 keeps all. `meta["dropped"]` of every episode counts them.

    Raises:
        ValueError: a key is absent, mis-shaped, not finite or not a flag, or no episode ends.
    """
    checked = _check(columns, source)
    count = len(checked["rewards"])
    done = checked["terminals"].copy()
    if "timeouts" in checked:
        done |= checked["timeouts"]
        max_episode_steps = None
    elif max_episode_steps is None and "next_observations" in checked:
        done |= _breaks(checked)
    elif max_episode_steps is None:
        raise ValueError(
            f"{source}: has no 'timeouts': give max_episode_steps, after which episodes are cut"
        )
    bounds = _episode_bounds(done, max_episode_steps)
    if not bounds:
        raise ValueError(f"{source}: key 'terminals': no episode ends within {count} steps")
    tail = count - bounds[-1][1]
    if tail:
        warnings.warn(
            f"{source}: dropped the last {tail} steps, which end no episode", stacklevel=3
        )
    episodes = [_episode(checked, start, end) for start, end in bounds]
    kept = [e for e in episodes if e.terminated or len(e) >= drop_short_truncated]
    if not kept:
        raise ValueError(
            f"{source}: drop_short_truncated must leave an episode, "
            f"got {drop_short_truncated}, the longest has {max(map(len, episodes))} steps"
        )
    for episode in kept:
        episode.meta.update(source=source, dropped=len(episodes) - len(kept))
    return kept


def _check(columns: Mapping[str, ArrayLike], source: str) -> dict[str, NDArray]:
    """Every column that episodes need, checked and cast."""
    checked: dict[str, NDArray] = {}
    for key in REQUIRED:
        if key not in columns:
            raise ValueError(f"{source}: must have key {key!r}, got {sorted(columns)}")
    for key in KEYS:
        if key in columns:
            checked[key] = _cast(key, columns[key], source)
    count = len(checked["observations"])
    if not count:
        raise ValueError(f"{source}: key 'observations' must hold at least one step, got none")
    for key, array in checked.items():
        if key in ("rewards", "terminals", "timeouts"):
            array = _flat(source, key, array)
        if len(array) != count:
            raise ValueError(
                f"{source}: key {key!r} must have one row per observation ({count}), "
                f"got {len(array)}"
            )
        try:
            require_finite(f"key {key!r}", array)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        checked[key] = _flags(source, key, array) if key in ("terminals", "timeouts") else array
    following = checked.get("next_observations")
    if following is not None and following.shape != checked["observations"].shape:
        raise ValueError(
            f"{source}: key 'next_observations' must be shaped as observations "
            f"{checked['observations'].shape}, got {following.shape}"
        )
    return checked


def _cast(key: str, values: ArrayLike, source: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim == 0:
        raise ValueError(f"{source}: key {key!r} must be an array, got {array}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{source}: key {key!r} must hold numbers, got dtype {array.dtype}")
    if key in ("observations", "actions", "next_observations") and array.dtype.kind == "f":
        # replay files hold float64: twice the memory, and it would spread to what it meets
        array = array.astype(np.float32)
    if key in ("observations", "next_observations") and array.ndim < 2:
        raise ValueError(f"{source}: key {key!r} must be (N, ...), got {array.shape}")
    if key == "actions" and array.ndim > 2:
        raise ValueError(f"{source}: key {key!r} must be (N, A) or (N,), got {array.shape}")
    return array


def _flat(source: str, key: str, array: NDArray) -> NDArray:
    if array.ndim == 2 and array.shape[1] == 1:
        return array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"{source}: key {key!r} must be (N,) or (N, 1), got {array.shape}")
    return array


def _flags(source: str, key: str, array: NDArray) -> NDArray:
    bad = (array != 0) & (array != 1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"{source}: key {key!r} must hold 0 or 1, got {array[row]} at row {row}")
    return array.astype(bool)


def _breaks(columns: dict[str, NDArray]) -> NDArray:
    """Rows whose next observation is not the following row; the last row is one."""
    states, following = columns["observations"], columns["next_observations"]
    joined = (following[:-1] == states[1:]).reshape(len(states) - 1, -1).all(axis=1)
    return np.append(~joined, True)


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
