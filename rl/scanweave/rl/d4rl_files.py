"""Where D4RL's data sets lie: ids, files, and the download that happens on request only.

    D4RL_IDS       every id that is known -> file below `BASE_URL`
    is_d4rl_id     whether a name is one of them
    find_d4rl      id -> file in `$D4RL_DATASET_DIR` or `~/.d4rl/datasets`, downloaded if asked
    max_steps_of   id -> steps after which its episodes are cut
    fetch          URL -> file: progress, size and checksum checked, appears whole or not at all

Source: `d4rl/infos.py` and the README of Farama D4RL 89141a6 (names and folders of the files).
"""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

BASE_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
_BLOCK = 1 << 20
Progress = Callable[[int, int | None], None]


def _mujoco() -> dict[str, str]:
    kinds = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
    found = {}
    for env in ("halfcheetah", "hopper", "walker2d", "ant"):
        for version in ("v1", "v2"):
            for kind in kinds:
                file = f"gym_mujoco_{version}/{env}_{kind.replace('-', '_')}-{version}.hdf5"
                found[f"{env}-{kind}-{version}"] = file
        for kind in ("random", "medium", "expert", "medium-expert"):
            found[f"{env}-{kind}-v0"] = f"gym_mujoco/{env}_{kind.replace('-', '_')}.hdf5"
        replay = "walker" if env == "walker2d" else env
        found[f"{env}-medium-replay-v0"] = f"gym_mujoco/{replay}_mixed.hdf5"
    return found


def _antmaze() -> dict[str, str]:
    sets = {
        "umaze": "u-maze_noisy_multistart_False_multigoal_False",
        "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
        "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
        "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
        "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
        "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
    }
    found = {}
    for name, middle in sets.items():
        found[f"antmaze-{name}-v0"] = f"ant_maze_new/Ant_maze_{middle}_sparse.hdf5"
        found[f"antmaze-{name}-v2"] = f"ant_maze_v2/Ant_maze_{middle}_sparse_fixed.hdf5"
    return found


def _adroit() -> dict[str, str]:
    old = {
        "human": "{}-v0_demos_clipped",
        "cloned": "{}-demos-v0-bc-combined",
        "expert": "{}-v0_expert_clipped",
    }
    found = {}
    for task in ("pen", "hammer", "door", "relocate"):
        for kind, name in old.items():
            found[f"{task}-{kind}-v0"] = f"hand_dapg/{name.format(task)}.hdf5"
            found[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    return found


D4RL_IDS: dict[str, str] = {
    **_mujoco(),
    **_antmaze(),
    **_adroit(),
    "kitchen-complete-v0": "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-partial-v0": "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-mixed-v0": "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
    **{f"maze2d-{m}-v1": f"maze2d/maze2d-{m}-sparse-v1.hdf5" for m in ("umaze", "medium", "large")},
    **{
        f"maze2d-{m}-dense-v1": f"maze2d/maze2d-{m}-dense-v1.hdf5"
        for m in ("umaze", "medium", "large")
    },
}
_MAX_STEPS = {
    "antmaze-umaze": 700,
    "maze2d-umaze": 300,
    "maze2d-medium": 600,
    "maze2d-large": 800,
    "pen-human": 200,
    "hammer-human": 600,
    "door-human": 300,
    "relocate-human": 500,
    "pen": 100,
    "hammer": 200,
    "door": 200,
    "relocate": 200,
    "kitchen": 280,
}


def is_d4rl_id(name: object) -> bool:
    """Whether `name` is the id of a D4RL data set and not a path."""
    return isinstance(name, str) and name in D4RL_IDS


def max_steps_of(name: str) -> int:
    """Steps after which the time limit ends an episode of a data set."""
    return next((steps for start, steps in _MAX_STEPS.items() if name.startswith(start)), 1000)


def find_d4rl(name: str, *, download: bool = False, base_url: str = BASE_URL) -> Path:
    """The file of a data set on this machine.

    Args:
        name: One of `D4RL_IDS`.
        download: Fetch it if it is not there, into the first folder that is looked in.
        base_url: Where the files are kept.

    Raises:
        ValueError: the id is unknown, or a v1 file of hopper, which is wrong (D4RL issue 86).
        FileNotFoundError: it is not there and `download` is False.
        OSError: the download failed; what was there before is untouched.
    """
    if name not in D4RL_IDS:
        raise ValueError(f"name must be a D4RL data set such as hopper-medium-v2, got {name!r}")
    if name.startswith("hopper") and name.endswith("-v1"):
        raise ValueError(f"name must not be a v1 file of hopper, which is wrong, got {name!r}")
    file = D4RL_IDS[name].rpartition("/")[2]
    configured = os.environ.get("D4RL_DATASET_DIR")
    folders = [Path(configured)] if configured else []
    folders.append(Path.home() / ".d4rl" / "datasets")
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    if not download:
        places = " or ".join(map(str, folders))
        raise FileNotFoundError(
            f"no {file} in {places}: set D4RL_DATASET_DIR, or give download=True to fetch "
            f"{base_url}{D4RL_IDS[name]}"
        )
    return fetch(f"{base_url}{D4RL_IDS[name]}", folders[0] / file)


def fetch(
    url: str,
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Download a file; at `path` it appears whole or not at all.

    Args:
        url: What to fetch.
        path: Where to put it; `<path>.sha256` gets its checksum, for later comparison.
        sha256: Checksum that it must have; the server's size is checked in any case.
        overwrite: Replace an existing file.
        progress: Called with bytes done and bytes in all (None where the server does not tell);
            by default a line on standard error, where that is a terminal.

    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        OSError: the server does not answer, or the file is short.
        ValueError: the checksum differs.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another path or give overwrite=True")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    show = progress or (_line if sys.stderr.isatty() else _nothing)
    digest, done = hashlib.sha256(), 0
    try:
        try:
            answer = urllib.request.urlopen(url, timeout=60)
        except (urllib.error.URLError, TimeoutError) as error:
            raise OSError(f"{url}: cannot be fetched: {error}") from error
        with answer, partial.open("wb") as file:
            length = answer.headers.get("Content-Length")
            total = int(length) if length else None
            try:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    show(done, total)
            except http.client.HTTPException as error:
                raise OSError(f"{url}: broke off after {done} bytes: {error}") from error
        if total is not None and done != total:
            raise OSError(f"{url}: must have {total} bytes, got {done}")
        if sha256 is not None and digest.hexdigest() != sha256.lower():
            raise ValueError(f"{url}: sha256 must be {sha256}, got {digest.hexdigest()}")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    path.with_name(f"{path.name}.sha256").write_text(
        f"{digest.hexdigest()}  {path.name}\n", encoding="utf-8"
    )
    return path


def _line(done: int, total: int | None) -> None:
    of = f" of {total / 1e6:.0f}" if total else ""
    sys.stderr.write(f"\r{done / 1e6:.0f}{of} MB{chr(10) if done == total else ''}")
    sys.stderr.flush()


def _nothing(done: int, total: int | None) -> None:
    pass
