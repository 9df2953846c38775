"""Graph models on real data: sequence mixers in several node orders beside attention and no mixer.

    python -m benchmarks.graph_table --data-dir data --devices cuda:0 --slots 9
    python -m benchmarks.graph_table --data-dir data --devices cpu --sets MUTAG,Cora,CiteSeer

`graph_models.py` says what is compared and with which settings; `sweep.py` how runs are run, and
that the same command goes on where an earlier one ended. `--seconds S` measures first how long an
epoch of every model takes with all slots busy, and then gives the sets whose runs have a process
each (Peptides-func) as many epochs, the same for all models, as fit into S seconds. With `--long N`
the first N of the seeds of `GMN` also get as many epochs as fit into S seconds alone, as the
column "<set>, long".

    make_jobs   sets and models -> jobs
    collect     what finished runs left, those of stopped jobs included -> rows
    choose      measured times -> epochs
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .graph_models import MODELS, SETS
from .jobs import Job, parse_devices, read_done, run_jobs
from .report import current_commit, environment, version
from .sweep import Result, add_options, markdown_table, write_csv

TABLE = "graph"
PACKAGES = ("torch", "triton", "torch_geometric")
# an epoch count that was measured to fit; the least that says anything, and what papers train
_LEAST, _MOST = 3, 200
# a process start with its data, and an allowance for sets that do not run alone
_START, _SAFETY = 20.0, 1.12
_PROBE_STEPS = 45
_PROBE_LIMIT = 120.0


def make_jobs(
    sets: Sequence[str],
    models: Sequence[str],
    options: argparse.Namespace,
    epochs: dict[str, int] | None = None,
) -> list[Job]:
    """Jobs of a table, seeds outermost: a sweep that is cut short has something of everything.

    Args:
        sets: Keys of `SETS`.
        models: Keys of `MODELS`.
        options: Of the command.
        epochs: For a set, or a set and ", long", how many instead of its own.

    Returns:
        Jobs; a job of a set whose runs go `together` has all seeds.
    """
    epochs = epochs or {}
    jobs = []
    for name in sets:
        chosen = SETS[name]
        seeds = [str(seed) for seed in range(options.seeds or chosen.seeds)]
        if f"{name}, long" in epochs:
            jobs += [
                _job(name, "GMN", seed, options, epochs[f"{name}, long"], ", long")
                for seed in seeds[: options.long]
            ]
        groups = [",".join(seeds)] if chosen.together else seeds
        jobs += [
            _job(name, model, group, options, epochs.get(name, 0))
            for group in groups
            for model in models
        ]
    return jobs


def _job(
    name: str,
    model: str,
    seeds: str,
    options: argparse.Namespace,
    epochs: int,
    column: str = "",
    *extra: str,
) -> Job:
    arguments = ["-m", "benchmarks.graph_job", "--folder", "{folder}", "--set", name]
    arguments += ["--model", model, "--seeds", seeds, "--epochs", str(epochs)]
    arguments += ["--data-dir", str(options.data_dir), "--cache-dir", str(options.cache_dir)]
    first = int(seeds.split(",")[0])
    place = f"seeds/{first}/test/{SETS[name].metric}"
    return Job(TABLE, name + column, model, first, (*arguments, *extra), {"first": place})


def collect(jobs: Sequence[Job], out: Path, facts: dict[str, str]) -> list[Result]:
    """Test metrics of all finished runs; jobs that were stopped may have finished some."""
    results = []
    for job in jobs:
        metric = SETS[job.dataset.removesuffix(", long")].metric
        for seed in _seeds(job):
            file = out / job.name / f"seed{seed}" / "results.json"
            same = _read(out / job.name / "job.json").get("arguments") == list(job.arguments)
            if not (same and (found := _read(file))):
                continue
            row = Result(
                job.table,
                job.dataset,
                job.model,
                seed,
                metric,
                found["test"][metric],
                found["parameters"],
                round(found["seconds"], 1),
                **{name: facts[name] for name in ("device", "versions", "commit")},
            )
            results.append(row)
            results.append(replace(row, metric=f"validation {metric}", value=found["val"][metric]))
    return results


def _seeds(job: Job) -> list[int]:
    return [int(seed) for seed in job.arguments[job.arguments.index("--seeds") + 1].split(",")]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def choose(
    times: dict[str, float], seeds: int, slots: int, seconds: float, long: int
) -> tuple[int, int]:
    """Epochs that fit.

    Args:
        times: Seconds of an epoch of every model, with all slots busy.
        seeds: Runs of every model.
        slots: Runs at once.
        seconds: For all of them together.
        long: Runs of GMN that take all of that time, each in a slot of its own.

    Returns:
        Epochs of all models, and of the long runs (0 without).
    """
    free = max(slots - long, 1)
    runs = seeds * len(times)
    # the last round leaves slots empty, half of them on average
    work = free * seconds - runs * _START - 0.5 * free * seconds / max(runs / free, 1)
    epochs = work / (seeds * sum(times.values()) * _SAFETY)
    alone = (seconds - _START) / (times.get("GMN", 1.0) * _SAFETY) if long else 0
    return min(max(int(epochs), _LEAST), _MOST), min(int(alone), _MOST)


def _probe(
    sets: Sequence[str], models: Sequence[str], options: argparse.Namespace, devices: list[str]
) -> dict[str, int]:
    """Epochs for the sets whose runs have a process each, kept for the next call."""
    file = options.out / "epochs.json"
    epochs: dict[str, int] = _read(file)
    for name in sets:
        if SETS[name].together or name in epochs:
            continue
        # as many processes as later, so that they hinder each other as much
        slots = options.slots * len(devices)
        filled = [*models, *["GMN"] * options.long]
        filled += [models[i % len(models)] for i in range(slots - len(filled))]
        jobs = [
            replace(
                _job(name, model, str(n), options, 1, ", probe", "--probe", str(_PROBE_STEPS)),
                metrics={"epoch": "epoch", "step": "step"},
            )
            for n, model in enumerate(filled)
        ]
        run_jobs(jobs, options.out, devices=devices, slots=options.slots, limit=_PROBE_LIMIT)
        times: dict[str, float] = {}
        for job in jobs:
            if found := read_done(job, options.out):
                times[job.model] = max(times.get(job.model, 0), found["metrics"]["epoch"])
        if not times:
            raise RuntimeError(f"no model of {name} ran; see the logs in {options.out}")
        for model in models:
            times.setdefault(model, max(times.values()))
        count = options.seeds or SETS[name].seeds
        epochs[name], long = choose(times, count, slots, options.seconds, options.long)
        if long:
            epochs[f"{name}, long"] = long
        shown = ", ".join(f"{model} {time:.1f}" for model, time in times.items())
        sys.stderr.write(f"{name}: seconds an epoch: {shown}; epochs: {epochs}\n")
        file.write_text(json.dumps(epochs), encoding="utf-8")
    return epochs


def write(
    jobs: Sequence[Job], options: argparse.Namespace, facts: dict[str, str], note: str
) -> str:
    """Write the CSV and the Markdown table, and return the table."""
    results = collect(jobs, options.out, facts)
    path = options.csv or options.out / "results.csv"
    write_csv(path, results)
    expected = [replace(job, seed=seed) for job in jobs for seed in _seeds(job)]
    parts = []
    for name in dict.fromkeys(job.dataset for job in jobs):
        own = [job for job in expected if job.dataset == name]
        metric = SETS[name.removesuffix(", long")].metric
        found = [row for row in results if row.dataset == name]
        parts.append(markdown_table(own, found, metric, digits=4))
    text = "\n\n".join([*parts, note]) + "\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    """Run what is missing, write the table."""
    parser = add_options(argparse.ArgumentParser(description=__doc__), "runs/graph_table")
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="folder of the sets, as Config.data_dir")
    add("--cache-dir", type=Path, default=Path("runs/data"), help="for orders and encodings")
    add("--sets", default=",".join(SETS), help="names with commas")
    add("--models", default="|".join(MODELS), help="names with |")
    add("--seeds", type=int, default=0, help="runs of each model; 0 for those of the set")
    add("--seconds", type=float, default=0, help="for Peptides-func; 0 trains all its epochs")
    add("--long", type=int, default=0, help="long runs of GMN on Peptides-func")
    options = parser.parse_args()
    sets, models = options.sets.split(","), options.models.split("|")
    for text, known in ((sets, SETS), (models, MODELS)):
        if unknown := [name for name in text if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    devices = parse_devices(options.devices)
    versions = " ".join(f"{name} {version(name) or 'absent'}" for name in PACKAGES)
    commit = options.commit or current_commit(("core", "graph"))
    device = environment(torch.device(devices[0]), commit).device
    shared = f", {options.slots} at once" if options.slots > 1 else ""
    facts = {"device": device + shared, "versions": versions, "commit": commit}

    options.out.mkdir(parents=True, exist_ok=True)
    epochs = _probe(sets, models, options, devices) if options.seconds else {}
    jobs = make_jobs(sets, models, options, epochs)
    note = f"Epochs chosen to fit: {epochs}." if epochs else ""

    def after(_: Job) -> None:
        write(jobs, options, facts, note)

    left = run_jobs(
        jobs,
        options.out,
        devices=devices,
        slots=options.slots,
        limit=options.limit,
        after=after,
    )
    text = write(jobs, options, facts, note)
    notes = [f"not done: {name} ({reason})" for name, reason in left.items()]
    sys.stdout.write("\n".join([text, *notes]) + "\n")


if __name__ == "__main__":
    main()
