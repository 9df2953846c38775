"""One door for all kinds of recorded data.

load_episodes   file, id, dict, list of dicts or environment -> episodes
read_npz        .npz with D4RL's keys -> episodes
"""

import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .columns import KEYS, REQUIRED, episodes_from_columns
from .d4rl import load_d4rl
from .data import Episode, episodes_from_trajectories

MINARI = "minari:"


def load_episodes(
    source: Any,
    *,
    max_episode_steps: int | None = None,
    drop_short_truncated: int = 0,
    download: bool = False,
) -> list[Episode]:
    """Read trajectories from whatever holds them.

    Args:
        source: One of
            the path of an HDF5 file in D4RL's layout, or of an .npz with the same keys;
            the id of a D4RL data set, see `load_d4rl`, or "minari:<id>", see `load_minari`;
            a dict of flat arrays, as `env.get_dataset()` and D4RL's Q-learning helper return;
            an environment of the `d4rl` package: anything with `get_dataset()`;
            an iterable of trajectory dicts, see `episodes_from_trajectories`, or of `Episode`.
        max_episode_steps: See `episodes_from_columns`.
        drop_short_truncated: See `episodes_from_columns`; for files, dicts and environments.
        download: Fetch a named data set that is not on this machine.

    Raises:
        FileNotFoundError: no such file or data set.
        ValueError: the source is none of these, or its content is damaged.
    """
    cut = {
        "max_episode_steps": max_episode_steps,
        "drop_short_truncated": drop_short_truncated,
    }
    if isinstance(source, str) and source.startswith(MINARI):
        from .minari_data import load_minari

        return load_minari(source.removeprefix(MINARI), download=download)
    if isinstance(source, str | os.PathLike):
        if Path(source).suffix == ".npz":
            return read_npz(source, **cut)
        return load_d4rl(source, **cut, download=download)
    if isinstance(source, Mapping):
        return episodes_from_columns(source, **cut)
    if hasattr(source, "get_dataset"):
        name = getattr(getattr(source, "spec", None), "id", None) or type(source).__name__
        return episodes_from_columns(source.get_dataset(), source=str(name), **cut)
    if not isinstance(source, Iterable):
        raise ValueError(f"source must be a path, an id, dicts or an environment, got {source!r}")
    items = list(source)
    if items and all(isinstance(item, Episode) for item in items):
        return items
    if not items or not all(isinstance(item, Mapping) for item in items):
        kinds = sorted({type(item).__name__ for item in items}) or "nothing"
        raise ValueError(f"source must yield trajectory dicts or episodes, got {kinds}")
    return episodes_from_trajectories(items)


def read_npz(
    path: str | os.PathLike[str],
    *,
    max_episode_steps: int | None = None,
    drop_short_truncated: int = 0,
) -> list[Episode]:
    """Read an .npz whose arrays have D4RL's names; nothing in it is unpickled.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or as `episodes_from_columns`; the message names file,
            key and row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: must be a complete .npz file, its directory is missing")
    columns = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in REQUIRED:
                if key not in file:
                    raise ValueError(f"{path}: must have key {key!r}, got {sorted(file)}")
            for key in (key for key in KEYS if key in file):
                try:
                    columns[key] = file[key]
                except (ValueError, OSError, zlib.error, zipfile.BadZipFile) as error:
                    raise ValueError(f"{path}: key {key!r} cannot be read: {error}") from error
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: must be a complete .npz file: {error}") from error
    episodes = episodes_from_columns(
        columns,
        source=str(path),
        max_episode_steps=max_episode_steps,
        drop_short_truncated=drop_short_truncated,
    )
    for episode in episodes:
        episode.meta["source"] = path.name
    return episodes
