"""A sweep runs what is missing, stops in time, keeps what is done, and shows what is not."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks import jobs as jobs_module
from benchmarks.jobs import Job, parse_devices, read_done, run_jobs
from benchmarks.sweep import (
    Result,
    add_options,
    collect,
    markdown_table,
    read_csv,
    run_table,
    write_csv,
)

ROOT = Path(__file__).resolve().parents[1]
# what stands for a training script: sleeps, says where it ran, leaves its numbers
SCRIPT = """
import json, os, pathlib, sys, time
folder, score, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
started = time.monotonic()
(folder / "attempts").open("a").write("x")
print("hello from", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(seconds)
if score < 0:
    sys.exit("the score is negative")
span = [started, time.monotonic()]
found = {"last": {"score": score}, "parameters": 12, "span": span,
         "device": os.environ["CUDA_VISIBLE_DEVICES"]}
(folder / "results.json").write_text(json.dumps(found))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def make(script: Path, model: str, seed: int, score: float = 1.0, seconds: float = 0.0) -> Job:
    arguments = ("-S", str(script), "{folder}", str(score), str(seconds))
    return Job("toy", "set", model, seed, arguments, {"score": "last/score"})


def run(jobs: list[Job], out: Path, limit: float = 60.0, **options: object) -> dict[str, str]:
    return run_jobs(jobs, out, limit=limit, stream=io.StringIO(), **options)  # type: ignore[arg-type]


def attempts(out: Path, job: Job) -> int:
    path = out / job.name / "attempts"
    return len(path.read_text()) if path.exists() else 0


def test_a_sweep_runs_each_job_once(script: Path, tmp_path: Path):
    out = tmp_path / "runs"
    jobs = [make(script, "a", 0, 1.5), make(script, "a", 1, 2.5)]
    assert run(jobs[:1], out) == {}
    assert run(jobs, out) == {}
    assert [attempts(out, job) for job in jobs] == [1, 1]
    assert [(r.seed, r.value, r.parameters) for r in collect(jobs, out)] == [
        (0, 1.5, 12),
        (1, 2.5, 12),
    ]
    assert (out / "set/a/seed0/log.txt").read_text() == "hello from \n"
    # other arguments make another job: its folder starts empty
    changed = make(script, "a", 0, 3.5)
    assert collect([changed], out) == []
    assert run([changed], out) == {}
    assert collect([changed], out)[0].value == 3.5
    assert attempts(out, changed) == 1


def test_a_failed_job_is_reported_and_run_again(script: Path, tmp_path: Path):
    out = tmp_path / "runs"
    bad, good = make(script, "bad", 0, -1), make(script, "good", 0)
    for count in (1, 2):
        left = run([bad, good], out)
        assert list(left) == [bad.name]
        assert left[bad.name].startswith("exit code 1: the score is negative (")
        assert attempts(out, bad) == count
    assert attempts(out, good) == 1
    nameless = Job("toy", "set", "good", 1, good.arguments, {"other": "last/other"})
    assert "must hold a finite number last/other, got None" in run([nameless], out)[nameless.name]


def test_slots_and_devices_are_kept(script: Path, tmp_path: Path):
    out = tmp_path / "runs"
    jobs = [make(script, "a", seed, seconds=0.3) for seed in range(8)]
    devices = ["cuda:0", "cuda:3"]
    facts = {name: {"device": f"card {name}"} for name in devices}
    assert run(jobs, out, devices=devices, slots=2, facts=facts) == {}
    found = [json.loads((out / job.name / "results.json").read_text()) for job in jobs]
    assert {one["device"] for one in found} == {"0", "3"}
    for device in ("0", "3"):
        spans = [one["span"] for one in found if one["device"] == device]
        most = max(sum(a <= t < b for a, b in spans) for t, _ in spans)
        assert most <= 2
    starts, ends = zip(*(one["span"] for one in found), strict=True)
    assert max(starts[:2]) < min(ends[:2]), "two jobs run at once"
    assert {r.device for r in collect(jobs, out)} == {"card cuda:0", "card cuda:3"}


def test_the_limit_stops_jobs_and_keeps_what_is_done(script: Path, tmp_path: Path):
    out = tmp_path / "runs"
    jobs = [make(script, "a", 0), make(script, "a", 1, seconds=600), make(script, "a", 2)]
    left = run(jobs, out, limit=3.0)
    assert left == {jobs[1].name: "stopped", jobs[2].name: "not started"}
    assert [r.seed for r in collect(jobs, out)] == [0]
    # its folder stays, for scripts that can go on
    assert attempts(out, jobs[1]) == 1
    assert run([jobs[0], jobs[2]], out) == {}


def test_a_job_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs_module, "GRACE", 0.2)
    code = (
        "import os, pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid())); time.sleep(600)"
    )
    job = Job("toy", "set", "deaf", 0, ("-S", "-c", code, "{folder}"), {})
    assert run([job], tmp_path, limit=2.0) == {job.name: "stopped"}
    pid = int((tmp_path / job.name / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_job_that_ends_while_it_is_stopped_counts(tmp_path: Path):
    code = (
        "import pathlib, signal, sys, time; done = [];"
        "signal.signal(signal.SIGTERM, lambda *_: done.append(1));"
        "\nwhile not done: time.sleep(0.02)"
        "\npathlib.Path(sys.argv[1], 'results.json').write_text('{\"score\": 4}')"
    )
    job = Job("toy", "set", "late", 0, ("-S", "-c", code, "{folder}"), {"score": "score"})
    assert run([job], tmp_path, limit=2.0) == {}
    assert collect([job], tmp_path)[0].value == 4


def test_sigterm_to_the_sweep_stops_its_jobs(script: Path, tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.jobs import Job, run_jobs\n"
        f"arguments = ('-S', {str(script)!r}, '{{folder}}', '1', '600')\n"
        "job = Job('toy', 'set', 'a', 0, arguments, {})\n"
        f"run_jobs([job], Path({str(tmp_path)!r}))"
    )
    sweep = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    log = tmp_path / "set/a/seed0/log.txt"
    for _ in range(1000):
        if log.is_file() and log.read_text():
            break
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    assert b"stopping 1 jobs" in sweep.communicate(timeout=60)[1]
    assert sweep.returncode != 0
    listed = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(str(script).encode() in line for line in listed)


def test_run_table_writes_rows_and_a_table(
    script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parser = add_options(argparse.ArgumentParser(), "runs/toy")
    assert parser.parse_args([]).out == Path("runs/toy")
    out = tmp_path / "runs"
    options = parser.parse_args(["--out", str(out), "--devices", "cpu", "--slots", "2"])
    jobs = [make(script, "a", 0, 1.0), make(script, "a", 1, 2.0), make(script, "b", 0, -1)]
    results = run_table(jobs, options, packages=("torch", "no_such_package"))
    assert read_csv(out / "results.csv") == results
    header = (out / "results.csv").read_text().splitlines()[0]
    assert header == (
        "table,dataset,model,seed,metric,value,parameters,seconds,device,versions,commit"
    )
    assert results[0].device.endswith("cores, 2 at once")
    assert results[0].versions.startswith("torch ")
    assert results[0].versions.endswith("no_such_package absent")
    assert results[0].commit
    table = (out / "results.md").read_text()
    assert "| model | parameters | set: score | seconds |" in table
    assert "| a | 12 | 1.50 ± 0.71 (2) | " in table
    assert "| b |  | missing (0 of 1) |  |" in table
    assert "not done: set/b/seed0 (exit code 1" in capsys.readouterr().out


def result(model: str, seed: int, value: float, parameters: int = 5) -> Result:
    return Result("t", "s", model, seed, "m", value, parameters, 7.4, "d", "v", "c")


def test_the_table_shows_spread_counts_and_gaps(tmp_path: Path):
    jobs = [Job("t", "s", m, i, (), {"m": "m"}) for m in ("x", "y", "z") for i in range(3)]
    jobs.append(Job("t", "other", "x", 0, (), {"m": "m"}))
    results = [result("x", 0, 1.0), result("x", 1, 2.0, 6), result("x", 2, 6.0), result("y", 1, 9)]
    # the sample's deviation: n - 1
    assert markdown_table(jobs, results, "m", digits=1).splitlines() == [
        "| model | parameters | s: m | seconds | other: m | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| x | 5 - 6 | 3.0 ± 2.6 (3) | 7 | missing (0 of 1) |  |",
        "| y | 5 | 9.0 (1 of 3) | 7 |  |  |",
        "| z |  | missing (0 of 3) |  |  |  |",
    ]
    write_csv(tmp_path / "new" / "rows.csv", results)
    assert read_csv(tmp_path / "new" / "rows.csv") == results


def test_a_half_written_record_does_not_count(script: Path, tmp_path: Path):
    job = make(script, "a", 0)
    assert run([job], tmp_path) == {}
    path = tmp_path / job.name / "done.json"
    assert read_done(job, tmp_path)
    os.replace(path, path.with_name(".done.json.tmp"))
    assert not read_done(job, tmp_path)
    assert run([job], tmp_path) == {}
    assert attempts(tmp_path, job) == 2


def test_bad_arguments(script: Path, tmp_path: Path):
    assert parse_devices("cuda:1,cpu") == ["cuda:1", "cpu"]
    with pytest.raises(ValueError, match="devices must be cpu or cuda:<number>, got 'gpu'"):
        parse_devices("cpu,gpu")
    with pytest.raises(ValueError, match=r"devices must be different, use slots .* cpu,cpu"):
        parse_devices("cpu,cpu")
    job = make(script, "a", 0)
    with pytest.raises(ValueError, match=r"jobs must have different names, got \['set/a/seed0'\]"):
        run([job, job], tmp_path)
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        run([job], tmp_path, slots=0)
