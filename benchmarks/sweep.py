"""Many training runs side by side, and the table that they make; `vision_table.py` shows the use.

    jobs = [Job("vision", "cifar10", "vim", 0, ("-m", "scanweave.vision.train",
            "--train.output-dir", "{folder}", "--train.resume"), {"top-1": "last/top1"})]
    options = add_options(argparse.ArgumentParser(), "runs/vision_table").parse_args()
    results = run_table(jobs, options, packages=("torch", "timm"), paths=("core", "vision"))

A job is one run of Python in a folder of its own, `<out>/<dataset>/<model>/seed<n>`, which stands
for "{folder}" in its arguments. It sees one GPU only, as cuda:0, or none, and the checkout's
packages. At its end it must leave `results.json` in its folder, a dictionary: `metrics` names the
numbers that count, "last/top1" being `results["last"]["top1"]`; "parameters" and "seconds" are
taken too if they are there. What it prints is in `log.txt`.

`done.json` marks a finished job, and comes into being whole. The same command again runs only what
is missing; a job that was stopped may go on where it was, if its script can, since its folder is
kept unless its arguments have changed. Jobs start in the order given (put seeds outermost, so that
a sweep that is cut short has something of everything), `slots` at a time on each device. After
`limit` seconds they get SIGTERM, and SIGKILL if that does not help.

    Job, run_jobs, parse_devices   one run, and how runs are run; see `jobs.py`
    add_options    --out, --devices, --slots, --limit, --csv, --commit
    run_table      run, collect, write the CSV and the Markdown table beside it
    collect        finished jobs -> Result, one per metric: a row of the CSV
    write_csv, read_csv, markdown_table
"""

import argparse
import csv
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .jobs import Job, parse_devices, read_done, run_jobs
from .report import current_commit, environment, markdown, version

__all__ = [
    "Job",
    "Result",
    "add_options",
    "collect",
    "markdown_table",
    "parse_devices",
    "read_csv",
    "run_jobs",
    "run_table",
    "write_csv",
]


@dataclass(frozen=True)
class Result:
    """One metric of one finished job: a row of the CSV.

    `seconds` are those that the script reports, or the process took; with several jobs on a device
    at once, as `device` says, they are not what a run alone needs.
    """

    table: str
    dataset: str
    model: str
    seed: int
    metric: str
    value: float
    parameters: int
    seconds: float
    device: str
    versions: str
    commit: str


def add_options(parser: argparse.ArgumentParser, out: str) -> argparse.ArgumentParser:
    """Options of a command that calls `run_table`."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help=f"folder of the runs (default {out})")
    add("--devices", default="", help="cuda:0,cuda:1,... or cpu; default: what there is")
    add("--slots", type=int, default=1, help="jobs on each device at once")
    add("--limit", type=float, default=math.inf, help="seconds, then what runs is stopped")
    add("--csv", type=Path, help="where the rows go (default <out>/results.csv)")
    add("--commit", default="", help="of the code, where there is no git checkout")
    return parser


def collect(jobs: Sequence[Job], out: Path) -> list[Result]:
    """What the finished jobs found, in the order of the jobs."""
    return [
        Result(
            job.table,
            job.dataset,
            job.model,
            job.seed,
            metric,
            value,
            found["parameters"],
            found["seconds"],
            *(found.get(name, "") for name in ("device", "versions", "commit")),
        )
        for job in jobs
        if (found := read_done(job, out))
        for metric, value in found["metrics"].items()
    ]


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write results to a CSV, in the place of what it held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.tmp")
    with fresh.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    os.replace(fresh, path)


def read_csv(path: Path) -> list[Result]:
    """Results of a CSV that `write_csv` wrote."""
    kinds = {"seed": int, "parameters": int, "value": float, "seconds": float}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Result(**{name: kinds.get(name, str)(cell) for name, cell in line.items()})
            for line in csv.DictReader(file)
        ]


def _cell(values: Sequence[float], expected: int, digits: int) -> str:
    """Mean ± standard deviation of the sample, and of how many runs."""
    if not values:
        return f"missing (0 of {expected})"
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return f"{text} ({len(values)}{f' of {expected}' if len(values) < expected else ''})"


def markdown_table(
    jobs: Sequence[Job], results: Sequence[Result], metric: str, *, digits: int = 2
) -> str:
    """One line per model, one column per data set: mean ± standard deviation (runs).

    Args:
        jobs: What should be there; runs without a result are shown as missing.
        results: What is there.
        metric: Which of the metrics.
        digits: After the decimal point.
    """
    datasets = list(dict.fromkeys(job.dataset for job in jobs))
    lines = []
    for model in dict.fromkeys(job.model for job in jobs):
        own = [r for r in results if r.model == model and r.metric == metric]
        sizes = sorted({r.parameters for r in own if r.parameters})
        cells = [model, " - ".join(f"{size:,}" for size in dict.fromkeys(sizes[:1] + sizes[-1:]))]
        for dataset in datasets:
            count = sum(job.model == model and job.dataset == dataset for job in jobs)
            found = [r for r in own if r.dataset == dataset]
            text = _cell([r.value for r in found], count, digits) if count else ""
            seconds = f"{statistics.mean(r.seconds for r in found):.0f}" if found else ""
            cells += [text, seconds]
        lines.append(cells)
    header = ["model", "parameters"]
    for dataset in datasets:
        header += [f"{dataset}: {metric}", "seconds"]
    return markdown(header, lines)


def run_table(
    jobs: Sequence[Job],
    options: argparse.Namespace,
    *,
    packages: Sequence[str] = ("torch", "triton"),
    paths: Sequence[str] = ("core",),
    digits: int = 2,
) -> list[Result]:
    """Run what is missing; write the CSV after every job, at the end `.md` with a table per metric.

    Args:
        jobs: All runs of the table.
        options: As `add_options` defines them.
        packages: Whose versions each row names.
        paths: What must be as committed, or the commit gets a "+".
        digits: Of the Markdown table.

    Raises:
        ValueError: as `run_jobs` and `parse_devices`.
    """
    devices = parse_devices(options.devices)
    path = options.csv or options.out / "results.csv"
    versions = " ".join(f"{name} {version(name) or 'absent'}" for name in packages)
    commit = options.commit or current_commit(paths)
    shared = f", {options.slots} at once" if options.slots > 1 else ""
    facts = {
        name: {
            "device": environment(torch.device(name), commit).device + shared,
            "versions": versions,
            "commit": commit,
        }
        for name in devices
    }
    left = run_jobs(
        jobs,
        options.out,
        devices=devices,
        slots=options.slots,
        limit=options.limit,
        facts=facts,
        after=lambda _: write_csv(path, collect(jobs, options.out)),
    )
    results = collect(jobs, options.out)
    write_csv(path, results)
    metrics = dict.fromkeys(name for job in jobs for name in job.metrics)
    text = "\n\n".join(markdown_table(jobs, results, name, digits=digits) for name in metrics)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    notes = [f"not done: {name} ({reason})" for name, reason in left.items()]
    sys.stdout.write("\n".join([text, *notes, f"rows: {path}"]) + "\n")
    return results
