"""Scores of every mixer on four small tasks at equal numbers of parameters, one process.

    python -m benchmarks.mixer_scores
    python -m benchmarks.mixer_scores --mixers mamba,attention --tasks digits --seeds 1
    python -m benchmarks.mixer_scores --tasks Peptides --data-dir data --device cuda

Rows are those of `sweep.Result`; the CSV grows by one after every run, and the same command again
runs only what is not in it, so that a mixer added later costs its own runs alone. `mixer_tasks.py`
says what the tasks are. Mixers that cannot do a task are left out of it, and tasks without their
files altogether, with the reason. `seconds` are the process's own on a CPU, the clock's on a GPU.
"""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch

from scanweave.core import list_mixers, mixer_info
from scanweave.core.training import seed_everything

from .mixer_tasks import DATA_DIR, TASKS, Task, learn, make_task, match_width, refusal
from .report import ROOT, current_commit, environment, version
from .sweep import Result, read_csv

CSV = ROOT / "benchmarks" / "results" / "mixer_scores.csv"
_PACKAGES = ("torch", "timm", "torch-geometric", "gymnasium")


def run(name: str, task: Task, mixer: str, seed: int, *, steps: int = 0) -> Result:
    """Train and score once.

    Args:
        name: Of the task.
        task: What is learned.
        mixer: Name of a registered mixer.
        seed: Of weights and batches.
        steps: 0 for those of the task.
    """
    width = match_width(task, mixer)
    seed_everything(seed)
    model = task.build(mixer, width).to(task.device).train()
    clock = time.process_time if task.device.type == "cpu" else time.perf_counter
    began = clock()
    learn(task, model, seed, steps)
    seconds = clock() - began
    model.eval()
    with torch.no_grad():
        score = task.score(model)
    return Result(
        "mixers",
        name,
        mixer,
        seed,
        task.metric,
        score,
        sum(p.numel() for p in model.parameters()),
        round(seconds, 1),
        environment(task.device, "").device,
        " ".join(f"{package} {version(package) or 'absent'}" for package in _PACKAGES),
        current_commit(("core", "vision", "graph", "rl", "benchmarks/mixer_tasks.py")),
    )


def append(path: Path, result: Result) -> None:
    """Add a row, and the header to a file that is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(result))


def main(given: Sequence[str] | None = None) -> list[Result]:
    """Run what is missing; returns the rows that are new.

    Raises:
        ValueError: a task or mixer is unknown.
        RuntimeError: a run failed; the others were done first.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixer_scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--csv", type=Path, default=CSV)
    add("--tasks", default=",".join(TASKS), help="names with commas")
    add("--mixers", default=",".join(list_mixers()), help="names with commas")
    add("--seeds", type=int, default=3, help="runs of each, with seeds 0, 1, ...")
    add("--steps", type=int, default=0, help="0 for those of each task")
    add("--device", default="cpu")
    add("--data-dir", type=Path, default=DATA_DIR, help="folder of Peptides-func's files")
    add("--limit", type=float, default=float("inf"), help="seconds, then no run is begun")
    options = parser.parse_args(given)
    names, mixers = options.tasks.split(","), options.mixers.split(",")
    for name in names:
        if name not in TASKS:
            raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {name!r}")
    for mixer in mixers:
        mixer_info(mixer)
    torch.set_num_threads(1)
    end = time.monotonic() + options.limit
    tasks: dict[str, Task] = {}
    for name in names:
        try:
            tasks[name] = make_task(name, options.device, options.data_dir)
        except ValueError as reason:
            sys.stdout.write(f"{name} is left out, {reason}\n")
    done = {(r.dataset, r.model, r.seed) for r in read_csv(options.csv)} if _exists(options) else ()
    refused = {(name, mixer): refusal(tasks[name], mixer) for name in tasks for mixer in mixers}
    for (name, mixer), reason in refused.items():
        if reason:
            sys.stdout.write(f"{name}: {mixer} is left out, {reason}\n")
    found, failed = [], []
    # seeds outermost, so that what is cut short has something of everything
    for seed in range(options.seeds):
        for name in tasks:
            for mixer in mixers:
                if refused[name, mixer] or (name, mixer, seed) in done or time.monotonic() > end:
                    continue
                try:
                    result = run(name, tasks[name], mixer, seed, steps=options.steps)
                except (RuntimeError, TypeError, ValueError) as reason:
                    failed.append(f"{name}, {mixer}, seed {seed}: {reason}")
                    sys.stderr.write(f"failed: {failed[-1]}\n")
                    continue
                append(options.csv, result)
                found.append(result)
                sys.stdout.write(
                    f"{name}, {mixer}, seed {seed}: {result.value:.1f} {result.metric}, "
                    f"{result.parameters:,} parameters, {result.seconds:.0f} s\n"
                )
                sys.stdout.flush()
    if failed:
        raise RuntimeError(f"{len(failed)} runs failed, the first: {failed[0]}")
    return found


def _exists(options: argparse.Namespace) -> bool:
    return options.csv.is_file()


if __name__ == "__main__":
    main(sys.argv[1:])
