"""HDF5 files in D4RL's layout: read with checks that name file, key and row; write.

One flat array per key over all N transitions; an episode ends where `terminals` or `timeouts`
is set. Neither the `d4rl` package nor an environment is needed.

    load_d4rl   file or id -> episodes
    save_d4rl   episodes -> file, never over an existing one unless asked

Letters: N transitions, S state channels, A action channels.
Source: Fu et al. 2020, arXiv 2004.07219; layout of the files of Farama D4RL 89141a6.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .columns import KEYS, REQUIRED, episodes_from_columns
from .d4rl_files import find_d4rl, is_d4rl_id, max_steps_of
from .data import Episode

if TYPE_CHECKING:
    import h5py


def load_d4rl(
    path: str | os.PathLike[str],
    *,
    max_episode_steps: int | None = None,
    drop_short_truncated: int = 0,
    download: bool = False,
) -> list[Episode]:
    """Read a D4RL HDF5 file and cut it into episodes.

    Args:
        path: A file, or the id of a D4RL data set (`hopper-medium-v2`), which is looked for in
            `$D4RL_DATASET_DIR` and `~/.d4rl/datasets`.
        max_episode_steps: See `episodes_from_columns`. Needed where the file has no `timeouts`
            (MuJoCo v0 files); for an id it is known.
        drop_short_truncated: See `episodes_from_columns`.
        download: Fetch the file of an id that is not there (tens to hundreds of MB).

    Raises:
        FileNotFoundError: no such file; for an id it says where it was looked for.
        ValueError: the file is no HDF5 file or truncated, or a key is absent, mis-shaped, not
            finite or not a flag; the message names file, key and row.
        ImportError: h5py is not installed.
    """
    if is_d4rl_id(path):
        name = str(path)
        limit = max_steps_of(name) if max_episode_steps is None else max_episode_steps
        path = find_d4rl(name, download=download)
    else:
        name, limit, path = Path(path).name, max_episode_steps, Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no D4RL file at {path}")
    episodes = episodes_from_columns(
        _read(path),
        source=str(path),
        max_episode_steps=limit,
        drop_short_truncated=drop_short_truncated,
    )
    for episode in episodes:
        episode.meta["source"] = name
    return episodes


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
    """Every column that episodes are made of."""
    h5py = _h5py()
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: must be a complete HDF5 file: {error}") from error
    with file:
        for key in REQUIRED:
            if key not in file:
                raise ValueError(f"{path}: must have key {key!r}, got {sorted(file.keys())}")
        return {key: _read_key(file, path, key) for key in KEYS if key in file}


def _read_key(file: "h5py.File", path: Path, key: str) -> NDArray:
    node = file[key]
    if not isinstance(node, _h5py().Dataset) or node.ndim == 0:
        raise ValueError(f"{path}: key {key!r} must be an array, got {node}")
    try:
        return node[:]
    except OSError as error:
        raise ValueError(f"{path}: key {key!r} cannot be read: {error}") from error


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
