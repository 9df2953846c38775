"""Graph models on real data: sequence mixers in several node orders beside attention and no mixer.

    python -m benchmarks.graph_table --data-dir data --devices cuda:0 --slots 9
    python -m benchmarks.graph_table --data-dir data --devices cpu --sets MUTAG,Cora,CiteSeer

`graph_models.py` says what is compared and with which settings; `sweep.py` how runs are run, and
that the same command goes on where an earlier one ended. `--epochs` shortens all runs to what the
time allows, the same for all models. `--long-epochs` adds runs of GMN alone on Peptides-func with
so many, as the column "Peptides-func, long".

    make_jobs   sets and models -> jobs
    collect     what finished runs left, those of stopped jobs included -> rows
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
from .jobs import Job, parse_devices, run_jobs
from .report import current_commit, environment, version
from .sweep import Result, add_options, markdown_table, write_csv

TABLE = "graph"
PACKAGES = ("torch", "triton", "torch_geometric")
_LONG = "Peptides-func"


def make_jobs(sets: Sequence[str], models: Sequence[str], options: argparse.Namespace) -> list[Job]:
    """Jobs of a table, seeds outermost: a sweep that is cut short has something of everything.

    Args:
        sets: Keys of `SETS`.
        models: Keys of `MODELS`.
        options: Of the command.

    Returns:
        Jobs; a job of a set whose runs go `together` has all seeds.
    """
    jobs = []
    for name in sets:
        chosen = SETS[name]
        seeds = [str(seed) for seed in range(options.seeds or chosen.seeds)]
        groups = [",".join(seeds)] if chosen.together else seeds
        epochs = options.epochs
        if name == _LONG and options.long_epochs:
            # they take longest
            jobs += [_job(f"{name}, long", "GMN", g, options, options.long_epochs) for g in groups]
        jobs += [_job(name, model, g, options, epochs) for g in groups for model in models]
    return jobs


def _job(column: str, model: str, seeds: str, options: argparse.Namespace, epochs: int) -> Job:
    name = _set_of(column)
    arguments = ["-m", "benchmarks.graph_job", "--folder", "{folder}", "--set", name]
    arguments += ["--model", model, "--seeds", seeds, "--epochs", str(epochs)]
    arguments += ["--data-dir", str(options.data_dir), "--cache-dir", str(options.cache_dir)]
    first = int(seeds.split(",")[0])
    place = f"seeds/{first}/test/{SETS[name].metric}"
    return Job(TABLE, column, model, first, tuple(arguments), {"first": place})


def _set_of(column: str) -> str:
    return column.removesuffix(", long")


def collect(jobs: Sequence[Job], out: Path, facts: dict[str, str]) -> list[Result]:
    """Test metrics of all finished runs; jobs that were stopped may have finished some."""
    results = []
    for job in jobs:
        metric = SETS[_set_of(job.dataset)].metric
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


def write(jobs: Sequence[Job], options: argparse.Namespace, facts: dict[str, str]) -> str:
    """Write the CSV and the Markdown table, and return the table."""
    results = collect(jobs, options.out, facts)
    path = options.csv or options.out / "results.csv"
    write_csv(path, results)
    expected = [replace(job, seed=seed) for job in jobs for seed in _seeds(job)]
    parts = []
    for name in dict.fromkeys(job.dataset for job in jobs):
        own = [job for job in expected if job.dataset == name]
        metric = SETS[_set_of(name)].metric
        found = [row for row in results if row.dataset == name]
        parts.append(markdown_table(own, found, metric, digits=4))
    text = "\n\n".join(parts) + "\n"
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
    add("--epochs", type=int, default=0, help="of every run; 0 for those of the set")
    add("--long-epochs", type=int, default=0, help="GMN on Peptides-func once more, with so many")
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
    jobs = make_jobs(sets, models, options)

    def after(_: Job) -> None:
        write(jobs, options, facts)

    left = run_jobs(
        jobs,
        options.out,
        devices=devices,
        slots=options.slots,
        limit=options.limit,
        after=after,
    )
    text = write(jobs, options, facts)
    notes = [f"not done: {name} ({reason})" for name, reason in left.items()]
    sys.stdout.write("\n".join([text, *notes]) + "\n")


if __name__ == "__main__":
    main()
