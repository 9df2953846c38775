"""The same measurement with `core` as it was at another commit, in a process of its own."""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .report import ROOT, Row, read_csv


def measure(args: argparse.Namespace, rows: Sequence[Row]) -> list[Row]:
    """Rows of the op at `args.against`, measured by these benchmarks on the same shapes.

    Raises:
        ValueError: the ref does not exist.
        RuntimeError: the older code does not run under these benchmarks.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--short", "--verify", "--end-of-options", args.against + "^{commit}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise ValueError(f"against must be a commit of this repository, got {args.against!r}")
    commit = found.stdout.strip()
    archive = subprocess.run(
        ["git", "archive", commit, "core"], cwd=ROOT, capture_output=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        out = Path(folder, "rows.csv")
        command = [sys.executable, "-m", "benchmarks.run", args.op, "--device", args.device]
        command += ["--no-peers", "--out", str(out), "--commit", commit]
        command += ["--shapes", ",".join(dict.fromkeys(row.shape for row in rows))]
        for flag in ("dtype", "threads"):
            value = getattr(args, flag)
            command += [] if value is None else [f"--{flag}", str(value)]
        command += ["--toy"] if args.toy else []
        # the older portion comes first, so that `scanweave.core` is it
        paths = [str(Path(folder, "core")), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, paths))
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.exists():
            raise RuntimeError(f"core of {commit} does not run here:\n{ran.stderr[-2000:]}")
        return [replace(row, implementation=f"scanweave@{commit}") for row in read_csv(out)]


def merge(rows: Sequence[Row], older: Sequence[Row]) -> list[Row]:
    """Older rows behind ours of the same op and shape, which stay the base of ratios."""
    merged: list[Row] = []
    keys = list(dict.fromkeys((row.op, row.shape) for row in rows))
    for key in keys:
        merged += [row for row in rows if (row.op, row.shape) == key]
        merged += [row for row in older if (row.op, row.shape) == key]
    return merged
