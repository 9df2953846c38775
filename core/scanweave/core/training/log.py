"""Where a run's numbers go: metrics.csv always, a progress bar, TensorBoard and wandb if wanted.

A row is a dict of numbers for one step. `RunLog.write` hands it to every place; the rows so far
are `RunLog.history`.
"""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .config import TrainConfig

Row = dict[str, float]

# always the first columns, in this order; metrics follow in the order of their first appearance
COLUMNS = ("step", "epoch", "seconds", "samples_per_second", "lr", "loss", "grad_norm")


class _Sink(Protocol):
    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class CsvLog:
    """A CSV file with one header line and one line per row, readable at any moment.

    The header holds `COLUMNS` and every metric seen so far. A metric that appears later adds a
    column at the right: the file is then written anew beside the old one and put in its place.
    """

    def __init__(self, path: Path, *, keep_until: int = 0) -> None:
        """Open a file; rows of an earlier file after step `keep_until` are dropped."""
        self.path = path
        self._file: TextIO | None = None
        self.rows = [row for row in read_history(path) if row["step"] <= keep_until]
        self.columns = list(COLUMNS)
        self._add_columns(self.rows)
        self._rewrite()

    def write(self, row: Row) -> None:
        """Append a row."""
        self.rows.append(row)
        if self._add_columns([row]):
            self._rewrite()
        elif self._file is not None:
            self._writer.writerow(row)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _add_columns(self, rows: list[Row]) -> bool:
        before = len(self.columns)
        for row in rows:
            self.columns += [name for name in row if name not in self.columns]
        return len(self.columns) > before

    def _rewrite(self) -> None:
        self.close()
        fresh = self.path.with_name(f".{self.path.name}.tmp")
        with fresh.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(fresh, self.path)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, restval="")


class _TensorBoardLog:
    def __init__(self, folder: Path, first_step: int) -> None:
        # the package is optional, and importing it takes a second
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name not in ("step", "seconds"):
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class _WandbLog:
    def __init__(self, config: TrainConfig, settings: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "TrainConfig.wandb needs wandb: pip install wandb, or leave it empty"
            ) from error
        self._run = wandb.init(
            project=config.wandb,
            name=config.output_dir.name,
            dir=str(config.output_dir),
            config=dict(settings),
            resume="auto" if config.resume else None,
        )

    def write(self, row: Row) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


class _ProgressBar:
    def __init__(self, console: Console, total: int, step: int) -> None:
        self._console = console
        # a live bar needs a terminal; elsewhere one line per row
        self._bar: Progress | None = None
        if console.is_terminal or console.is_jupyter:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("<"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("training", total=total, completed=step)
            self._bar.start()
        self._total = total
        self._best: Row = {}

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, row: Row) -> None:
        self._best.update(row)
        shown = {k: v for k, v in self._best.items() if k == "loss" or k.startswith("eval/")}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar is None:
            self._console.print(f"step {int(row['step'])}/{self._total}  {text}", highlight=False)
        else:
            self._bar.update(self._task, description=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class RunLog:
    """One place to log to, on the main process; silent on the others."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        total: int,
        step: int = 0,
        settings: Mapping[str, Any] | None = None,
        main: bool = True,
    ) -> None:
        """Open every log that the settings ask for.

        Args:
            config: Settings of the run.
            total: Steps of the whole run.
            step: Steps already made; later rows of an earlier attempt are dropped.
            settings: What wandb stores as the run's settings.
            main: Whether this process logs.

        Raises:
            ImportError: wandb is asked for and not installed.
        """
        self._console = Console(stderr=True)
        self._sinks: list[_Sink] = []
        self._csv: CsvLog | None = None
        self._bar: _ProgressBar | None = None
        self._quiet = not (main and config.progress)
        if not main:
            return
        # the optional ones first: what they raise must leave nothing open
        if config.wandb:
            self._sinks.append(_WandbLog(config, settings or {}))
        if config.tensorboard and _has_tensorboard():
            self._sinks.append(_TensorBoardLog(config.output_dir / "tensorboard", step + 1))
        self._csv = CsvLog(config.output_dir / "metrics.csv", keep_until=step)
        self._sinks.append(self._csv)
        if config.progress:
            self._bar = _ProgressBar(self._console, total, step)
            self._sinks.append(self._bar)

    @property
    def history(self) -> list[Row]:
        """Every row so far, those of earlier attempts included."""
        return self._csv.rows if self._csv is not None else []

    def write(self, row: Row) -> None:
        """Log one row; `row` must hold "step"."""
        for sink in self._sinks:
            sink.write(row)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.advance(step)

    def note(self, text: str, *, always: bool = False) -> None:
        """Show a line, unless progress is turned off or this is not the main process."""
        if not self._quiet or (always and self._csv is not None):
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Close every log."""
        for sink in self._sinks:
            sink.close()


def read_history(path: str | Path) -> list[Row]:
    """Rows of a metrics.csv, without the empty cells; no rows if the file does not exist.

    A last line that a crash cut short is left out.
    """
    path = Path(path)
    if not path.is_file():
        return []
    rows: list[Row] = []
    with path.open(encoding="utf-8", newline="") as file:
        for cells in csv.DictReader(file):
            if None in cells.values():
                break
            try:
                rows.append({name: _number(cell) for name, cell in cells.items() if cell != ""})
            except ValueError:
                break
    return rows


def _number(text: str) -> float:
    # whole numbers stay such: a file written anew must equal the one that was read
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _has_tensorboard() -> bool:
    # torch's writer module is always there and fails on import where tensorboard is missing
    from importlib.util import find_spec

    return find_spec("tensorboard") is not None
