"""Rows of results: where they were measured, as CSV and as tables on the terminal."""

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """What a number depends on beside the code; the first columns of every CSV row.

    Attributes:
        date: UTC.
        commit: Of the measured code; "+" after it where files that count differ from it.
        device: GPU, or CPU with its number of cores.
        torch: Version.
        triton: Version, empty where there is none.
        threads: That torch may use on the CPU.
        load: Processes that wanted a core in the minute before; other people's work shows here.
    """

    date: str
    commit: str
    device: str
    torch: str
    triton: str
    threads: int
    load: float


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def current_commit(paths: Sequence[str] = ("core", "benchmarks/*.py")) -> str:
    """Short hash of the checkout, "+" if `paths` differ from it; "unknown" without git."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    changed = _git("status", "--porcelain", "--", *paths)
    return commit + ("+" if changed else "")


def version(package: str) -> str:
    """Installed version of a distribution, empty if it has none."""
    for name in (package, package.replace("_", "-")):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def environment(device: torch.device, commit: str | None = None) -> Environment:
    """Where and on what this process measures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit or current_commit(),
        device=name,
        torch=torch.__version__,
        triton=version("triton"),
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan"),
    )


@dataclass(frozen=True)
class Row:
    """One implementation, one pass, one shape.

    Times are microseconds; None where not measured, with the reason in `note`. `passes` is
    "forward" (without gradients) or "forward+backward". `cpu_us` is the time that all threads of
    the process ran, on a CPU; `kernel_us` the sum of the kernels' own times and `graph_us` a CUDA
    graph's replay, on a GPU. `gb_s` and `floor_fraction` are of `time_us`. `error` is the largest
    relative error of outputs and gradients in this run, compared with what `checked_by` names.
    """

    op: str
    shape: str
    batch: int
    length: int
    dim: int
    state: int
    dtype: str
    passes: str
    implementation: str
    version: str
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    samples: int = 0
    cpu_us: float | None = None
    kernel_us: float | None = None
    graph_us: float | None = None
    peak_mb: float | None = None
    gb_s: float | None = None
    floor_us: float | None = None
    floor_fraction: float | None = None
    error: float | None = None
    checked_by: str = ""
    note: str = ""

    @property
    def time_us(self) -> float | None:
        """Without launches where that is known."""
        return self.median_us if self.kernel_us is None else self.kernel_us


@dataclass(frozen=True)
class AccuracyRow:
    """One output or gradient ("out", or the input's name) of one op, dtype and length."""

    op: str
    dtype: str
    length: int
    tensor: str
    relative_l2: float
    relative_max: float
    checked_by: str


class Record(Protocol):
    """A dataclass whose fields are columns."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def columns(row: type[Record]) -> list[str]:
    """Header of the CSV that holds such rows."""
    return [f.name for f in (*fields(Environment), *fields(row))]


def write_csv(path: Path, where: Environment, rows: Sequence[Record]) -> None:
    """Append rows to a CSV, with a header if it is new.

    Raises:
        ValueError: the file has other columns.
    """
    if not rows:
        return
    header = columns(type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != header:
            raise ValueError(f"out must have the columns {header}, got a file with {found}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, header)
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(where) | asdict(row)
            writer.writerow({k: _rounded(v) for k, v in values.items()})


def _rounded(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else ("" if value is None else value)


def read_csv(path: Path) -> list[Row]:
    """Rows of a CSV that `write_csv` wrote."""
    kinds = {f.name: f.type for f in fields(Row)}

    def parse(name: str, text: str) -> object:
        kind = str(kinds[name])
        if "float" in kind:
            return float(text) if text else None
        return int(text) if "int" in kind else text

    with path.open(newline="") as file:
        return [
            Row(**{k: parse(k, v) for k, v in line.items() if k in kinds})  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _pair(rows: Mapping[str, Row], field: str, scale: float = 1.0) -> str:
    """Forward and forward+backward in one cell; a dash alone if neither is there."""
    values = [getattr(row, field) for row in rows.values()]
    shown = [_number(None if v is None else scale * v) for v in values]
    return " / ".join(shown) if set(shown) != {"-"} else "-"


def ratio(row: Row, base: Row | None) -> float | None:
    """How many times as long as `base` it takes; by the kernels' times if both have them."""
    if base is None or row.median_us is None or base.median_us is None:
        return None
    if row.kernel_us is not None and base.kernel_us is not None:
        return row.kernel_us / base.kernel_us
    return row.median_us / base.median_us


def _spread(rows: Mapping[str, Row]) -> str:
    """Percent of the median between p20 and p80."""
    values = [
        100 * (row.p80_us - row.p20_us) / row.median_us
        for row in rows.values()
        if row.median_us and row.p80_us is not None and row.p20_us is not None
    ]
    return " / ".join(f"{v:.0f}" for v in values)


def by_op(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by op, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.op, []).append(row)
    return groups


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one op: a line per shape and implementation that was timed.

    Cells with a slash are forward / forward+backward; the first line of a shape is its base of
    ratios. Times are medians in microseconds, the spread is that between p20 and p80.
    """
    header = ["shape", "implementation", "us", "spread %", "/ ours"]
    on_cpu = any(row.cpu_us for row in rows)
    times = ["cpu_us"] if on_cpu else ["kernel_us", "graph_us"]
    header += [name.replace("_", " ") for name in times]
    header += ["peak MB", "GB/s", "% of floor", "error"]
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.median_us is not None:
            key = (row.shape, row.dtype, row.implementation)
            groups.setdefault(key, {})[row.passes] = row
    lines = []
    bases: dict[tuple[str, str], dict[str, Row]] = {}
    for (shape, dtype, name), found in groups.items():
        base = bases.setdefault((shape, dtype), found)
        size = next(iter(found.values()))
        ratios = [_number(ratio(row, base.get(p))) for p, row in found.items()]
        lines.append(
            [
                f"{shape} ({size.batch},{size.length},{size.dim},{size.state}) {dtype}",
                name,
                _pair(found, "median_us"),
                _spread(found),
                "1" if found is base else " / ".join(ratios),
                *(_pair(found, name) for name in times),
                _pair(found, "peak_mb"),
                _pair(found, "gb_s"),
                _pair(found, "floor_fraction", 100),
                _number(max(row.error or 0.0 for row in found.values()), 2),
            ]
        )
    return header, lines


def skipped(rows: Sequence[Row]) -> list[str]:
    """One line per note, with the implementations and shapes that it is about."""
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.note:
            where = notes.setdefault((row.implementation, row.note), [])
            where += [] if row.shape in where else [row.shape]
    return [f"{name} {note} ({', '.join(where)})" for (name, note), where in notes.items()]


def accuracy_table(rows: Sequence[AccuracyRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one line per op, dtype and length; columns are tensors.

    Both directions of a tensor share a column, which shows the larger error.
    """
    names = list(dict.fromkeys(r.tensor.removesuffix("_r") for r in rows))
    lines: dict[tuple[str, str, int], dict[str, float]] = {}
    for r in rows:
        cells = lines.setdefault((r.op, r.dtype, r.length), {})
        name = r.tensor.removesuffix("_r")
        cells[name] = max(cells.get(name, 0.0), r.relative_l2)
    return ["op", "dtype", "length", *names], [
        [op, dtype, str(length), *(f"{cells[n]:.1e}" if n in cells else "-" for n in names)]
        for (op, dtype, length), cells in lines.items()
    ]


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table that pastes into a README."""
    cells = [list(header), ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
