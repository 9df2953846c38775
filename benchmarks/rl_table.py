"""Returns of agents that learned from recorded trajectories, each in its environment.

    python -m benchmarks.rl_table --data-dir DATA --devices cpu --slots 2
    python -m benchmarks.rl_table --data-dir DATA --devices cpu --sets "CartPole expert" --seeds 5

DATA holds `rl_pendulum/*.npz`, `rl_cartpole/*.npz` and `rl_adroit_door/door_human.hdf5` (sets whose
files are not there are left out, with a note), and `local/<environment>/mixed-v0.hdf5`, which
`python -m scanweave.rl.search --env-id Hopper-v5 --out DATA/local` records (the settings of the
three published sets are in `rl/README.md`). The others named `local/...` are recorded on the spot
from hand-written controllers.

Reported is the mean return over the evaluation's episodes, last weights, at the first return that
the set asks for (`rl_models.py`); "best of targets" takes the best of all targets afterwards, as
much of the literature does, and is never lower. The same starts for all methods and seeds.
`sweep.py` says what is written where, and what is run again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .rl_models import METHODS, SETS
from .sweep import Job, Result, add_options, run_table

_METRICS = {"return": "return", "best of targets": "best"}


def jobs(options: argparse.Namespace) -> list[Job]:
    """All runs whose data is there; seeds outermost: a short sweep has something of everything."""
    data_dir = options.data_dir.resolve()
    there = [name for name in options.sets if _is_there(name, data_dir)]
    return [
        Job(
            "rl",
            name,
            method,
            seed,
            (
                *("-m", "benchmarks.rl_job", "--folder", "{folder}", "--set", name),
                *("--method", method, "--seed", str(seed)),
                *("--data-dir", str(data_dir), "--steps", str(options.steps)),
            ),
            {**_METRICS, **({"D4RL score": "score"} if SETS[name].d4rl else {})},
        )
        for seed in range(options.seeds)
        for name in there
        for method in options.methods
    ]


def _is_there(name: str, data_dir: Path) -> bool:
    source = SETS[name].source
    return not source or (data_dir / source).is_file()


def main(given: Sequence[str] | None = None) -> list[Result]:
    """Read the options, run what is missing, write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="folder of the files named above")
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, default=3, help="runs of each, with seeds 0, 1, ...")
    add("--steps", type=int, default=500, help="updates of every run")
    options = add_options(parser, "runs/rl_table").parse_args(given)
    for name in options.sets:
        if not _is_there(name, options.data_dir):
            sys.stdout.write(f"left out: {name} (no {options.data_dir / SETS[name].source})\n")
    return run_table(
        jobs(options),
        options,
        packages=("torch", "numpy", "gymnasium", "mujoco"),
        paths=("core", "rl", "benchmarks/*.py"),
        digits=1,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
