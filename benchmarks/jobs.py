"""Run many jobs side by side, each a Python process with a folder of its own, on some devices.

What `sweep.py`, which says more about folders and files, makes tables of.

    Job             one run
    parse_devices   "cuda:0,cuda:1" -> names of devices
    run_jobs        run what is not done
    read_done       what a finished job left
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from .report import ROOT

# a training loop finishes its step and saves when it gets SIGTERM
GRACE = 15.0
_POLL = 0.05
_PORTIONS = ("core", "vision", "graph", "rl")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        table: Of which table it is a part.
        dataset: Column of the table.
        model: Row of the table.
        seed: Which of several equal runs.
        arguments: Of Python; "{folder}" stands for the job's folder.
        metrics: Name in the table -> place in `results.json`.
    """

    table: str
    dataset: str
    model: str
    seed: int
    arguments: tuple[str, ...]
    metrics: Mapping[str, str]

    @property
    def name(self) -> str:
        """Unique in a sweep; also its folder below the sweep's."""
        return f"{self.dataset}/{self.model}/seed{self.seed}"


def parse_devices(text: str) -> list[str]:
    """Names of devices, from a list with commas or from what the machine has.

    Raises:
        ValueError: a name is neither cpu nor cuda:<number>, or comes twice.
    """
    count = torch.cuda.device_count()
    names = text.split(",") if text else [f"cuda:{i}" for i in range(count)] or ["cpu"]
    for name in names:
        if name != "cpu" and not name.removeprefix("cuda:").isdigit():
            raise ValueError(f"devices must be cpu or cuda:<number>, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"devices must be different, use slots instead, got {text}")
    return names


class _Running:
    """A job's process."""

    def __init__(self, job: Job, place: Path, device: str, threads: int) -> None:
        self.job, self.place, self.device = job, place, device
        stamp = {"arguments": list(job.arguments)}
        if _read_json(place / "job.json") != stamp:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        _write_json(place / "job.json", stamp)
        (place / "results.json").unlink(missing_ok=True)
        paths = [str(ROOT), *(str(ROOT / p) for p in _PORTIONS)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        settings = {
            # threads of several runs that wait by spinning would stop each other
            "OMP_WAIT_POLICY": "passive",
            "CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:") if device != "cpu" else "",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        arguments = [part.replace("{folder}", str(place)) for part in job.arguments]
        self.started = time.monotonic()
        with (place / "log.txt").open("ab") as log:
            # a session of its own: Ctrl-C is for us, and workers can be ended with their parent
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def result(self) -> dict[str, Any]:
        """What `done.json` holds of the run.

        Raises:
            ValueError: the process failed, or left no numbers.
        """
        if self.process.returncode:
            raise ValueError(f"exit code {self.process.returncode}: {self._last_line()}")
        found = _read_json(self.place / "results.json")
        values = {name: _look_up(found, place) for name, place in self.job.metrics.items()}
        seconds = found.get("seconds", time.monotonic() - self.started)
        return {
            "arguments": list(self.job.arguments),
            "metrics": values,
            "parameters": int(found.get("parameters", 0)),
            "seconds": round(float(seconds), 1),
        }

    def kill(self) -> None:
        """End the process and its children at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait()

    def _last_line(self) -> str:
        lines = (self.place / "log.txt").read_text(errors="replace").strip().splitlines()
        return f"{lines[-1].strip() if lines else 'no output'} ({self.place / 'log.txt'})"


def _look_up(found: Mapping[str, Any], place: str) -> float:
    value: Any = found
    for key in place.split("/"):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"results.json must hold a finite number {place}, got {value!r}")
    return float(value)


def _read_json(path: Path) -> dict[str, Any]:
    """A dictionary, empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is never seen half written."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(fresh, path)


def read_done(job: Job, out: Path) -> dict[str, Any]:
    """What a finished job left in its folder below `out`, empty if it is still to be run."""
    found = _read_json(out / job.name / "done.json")
    same = found.get("arguments") == list(job.arguments)
    return found if same and found.get("metrics", {}).keys() == job.metrics.keys() else {}


class _Progress:
    """One line that changes on a terminal; elsewhere a line per job, and one every half minute."""

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        self.total, self.done, self.failed = total, done, 0
        self.started = self._shown = time.monotonic()
        self._stream, self._live = stream, stream.isatty()

    def say(self, text: str) -> None:
        self._stream.write(f"\r\033[K{text}\n" if self._live else f"{text}\n")
        self._stream.flush()

    def tick(self, running: int) -> None:
        now = time.monotonic()
        if now - self._shown < (0.5 if self._live else 30):
            return
        self._shown = now
        text = f"{self.done} of {self.total} done, {self.failed} failed, {running} running, "
        text += f"{now - self.started:.0f} s"
        self._stream.write(f"\r\033[K{text}" if self._live else f"{text}\n")
        self._stream.flush()


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    devices: Sequence[str] = ("cpu",),
    slots: int = 1,
    limit: float = math.inf,
    facts: Mapping[str, Mapping[str, str]] | None = None,
    after: Callable[[Job], None] | None = None,
    stream: TextIO | None = None,
) -> dict[str, str]:
    """Run the jobs that are not done.

    Args:
        jobs: What to run, in this order.
        out: Folder of the sweep.
        devices: Where, as `parse_devices` gives them.
        slots: Jobs on each device at once.
        limit: Seconds, then what still runs is stopped.
        facts: For each device, what else `done.json` keeps of a job that ran there.
        after: Called after each job that finishes.
        stream: Where progress is shown; stderr by default.

    Returns:
        Name of every job that is not done -> why.

    Raises:
        ValueError: two jobs have one name, or slots is not positive.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the jobs are stopped first.
    """
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"jobs must have different names, got {twice} twice")
    if slots < 1:
        raise ValueError(f"slots must be at least 1, got {slots}")
    waiting = [job for job in jobs if not read_done(job, out)]
    left = {job.name: "not started" for job in waiting}
    progress = _Progress(len(jobs), len(jobs) - len(waiting), stream or sys.stderr)
    threads = max(1, (os.cpu_count() or 1) // (slots * len(devices)))
    deadline = time.monotonic() + limit
    running: list[_Running] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def finish(one: _Running) -> None:
        running.remove(one)
        spent = f"{one.job.name} on {one.device}, {time.monotonic() - one.started:.0f} s: "
        try:
            found = one.result()
        except ValueError as reason:
            left[one.job.name] = str(reason)
            progress.failed += 1
            progress.say(f"{spent}failed, {reason}")
            return
        _write_json(one.place / "done.json", {**found, **(facts or {}).get(one.device, {})})
        del left[one.job.name]
        progress.done += 1
        progress.say(spent + ", ".join(f"{k} {v:.4g}" for k, v in found["metrics"].items()))
        if after is not None:
            after(one.job)

    try:
        while (waiting or running) and time.monotonic() < deadline:
            load = {d: sum(one.device == d for one in running) for d in devices}
            device = min(load, key=lambda d: load[d])
            if waiting and load[device] < slots:
                job = waiting.pop(0)
                running.append(_Running(job, out / job.name, device, threads))
                continue
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                finish(one)
            progress.tick(len(running))
            if not ended:
                time.sleep(_POLL)
    finally:
        if running:
            progress.say(f"stopping {len(running)} jobs")
        _stop(running)
        for one in [*running]:
            left[one.job.name] = "stopped"
            if one.process.returncode == 0:
                finish(one)
        signal.signal(signal.SIGTERM, before)
    return left


def _stop(running: Sequence[_Running]) -> None:
    """End processes: politely, so that they save what they have, then at once."""
    for one in running:
        one.process.terminate()
    end = time.monotonic() + GRACE
    while any(one.process.poll() is None for one in running) and time.monotonic() < end:
        time.sleep(_POLL)
    for one in running:
        one.kill()
