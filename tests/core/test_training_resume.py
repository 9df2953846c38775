"""A run that dies at any moment and is resumed ends at the same bits as one that does not.

Run as a script, this file trains in a process of its own, for the tests that kill it.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from scanweave.core.training import TrainConfig, Trainer, TrainResult, seed_everything
from scanweave.core.training import checkpoint as checkpoint_module
from scanweave.core.training import trainer as trainer_module

STEPS = 44


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise of all three generators."""

    def __len__(self) -> int:
        return 26

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.tensor([index / 26, random.random(), np.random.rand()])  # noqa: NPY002
        x = x.float() + 0.1 * torch.randn(3)
        return x, x.sum(0, keepdim=True).sin()


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    # noise from NumPy and Python in the model as well: dropout is not all that may draw
    noise = 0.01 * (random.random() + float(np.random.randn()))  # noqa: NPY002
    value = nn.functional.mse_loss(model(batch[0]), batch[1] + noise)
    return value, {"noise": noise}


def train(
    folder: Path,
    *,
    before_step: Callable[[], None] = lambda: None,
    workers: int = 0,
    replacement: bool = False,
    signalled: bool = False,
) -> TrainResult:
    """Seven micro-batches and four steps per epoch; saving and evaluating at odd moments."""
    seed_everything(3)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)
    )
    data = Augmented()
    sampler = RandomSampler(data, replacement=True, num_samples=26) if replacement else None
    loader = DataLoader(data, 4, sampler is None, sampler=sampler, num_workers=workers)

    def stepped(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        before_step()
        return loss(model, batch)

    def evaluate(model: nn.Module) -> dict[str, float]:
        x = torch.linspace(0, 1, 12).reshape(4, 3)
        value = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        return {"loss": value.item(), "draw": torch.rand(()).item()}

    config = TrainConfig(
        output_dir=folder,
        max_steps=STEPS,
        accumulate=2,
        lr=0.02,
        warmup_steps=5,
        log_every=3,
        eval_every=4,
        save_every=5,
        resume=True,
        cpu=True,
        progress=False,
        tensorboard=False,
    )
    return Trainer(config, model, loss=stepped, loader=loader, evaluate=evaluate).fit()


def final_bits(folder: Path) -> dict[str, bytes]:
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


def rows_without_times(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "samples_per_second")} for row in rows
    ]


def assert_same_run(folder: Path, other: Path) -> None:
    bits = final_bits(folder)
    assert bits.keys() == {"model.safetensors", "optimizer.safetensors", "process.safetensors"}
    assert bits == final_bits(other)
    assert rows_without_times(folder) == rows_without_times(other)
    names = [sorted(p.name for p in (run / "checkpoints").iterdir()) for run in (folder, other)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    assert len(rows_without_times(folder)) > STEPS // 3
    return folder


class Crash(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def crash_at(count: int) -> Callable[..., None]:
    calls = [0]

    def call(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == count:
            raise Crash

    return call


def around(function: Callable[..., Any], crash: Callable[..., None], *, after: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not after:
            crash()
        result = function(*args, **kwargs)
        if after:
            crash()
        return result

    return call


@pytest.mark.parametrize("calls", [[1], [2], [20], [41, 9], [77], [30, 1, 2, 25]])
def test_crash_in_a_step(tmp_path: Path, whole: Path, calls: list[int]) -> None:
    for count in calls:
        with pytest.raises(Crash):
            train(tmp_path / "run", before_step=crash_at(count))
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


PLACES = {
    "writing weights": (checkpoint_module, "save_file", False),
    "wrote weights": (checkpoint_module, "save_file", True),
    "before renaming": (os, "rename", False),
    "after renaming": (os, "rename", True),
    "before linking": (trainer_module, "link_checkpoint", False),
    "while linking": (os, "link", True),
    "before deleting": (trainer_module, "prune_checkpoints", False),
    "while deleting": (checkpoint_module.shutil, "rmtree", False),
    "after deleting": (trainer_module, "prune_checkpoints", True),
    "in the log": (trainer_module.RunLog, "write", False),
    "after the log": (trainer_module.RunLog, "write", True),
}


CASES = [
    (place, count)
    for place in PLACES
    # one evaluation alone is both the best so far and at a step that is saved
    for count in ((1,) if place == "before linking" else (1, 3))
]


@pytest.mark.parametrize(("place", "count"), CASES)
def test_crash_outside_a_step(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, place: str, count: int
) -> None:
    owner, name, after = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, around(getattr(owner, name), crash_at(count), after=after))
        with pytest.raises(Crash):
            train(tmp_path / "run")
    train(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_replacement_sampling_resumes(tmp_path: Path, whole: Path) -> None:
    train(tmp_path / "a", replacement=True)
    with pytest.raises(Crash):
        train(tmp_path / "b", replacement=True, before_step=crash_at(35))
    train(tmp_path / "b", replacement=True)
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert final_bits(tmp_path / "a") != final_bits(whole)


def test_workers_neither_change_nor_hinder(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path / "run", workers=2, before_step=crash_at(35))
    train(tmp_path / "run", workers=1)
    assert_same_run(tmp_path / "run", whole)


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), *options],
        env={**os.environ, "PYTHONPATH": str(root / "core"), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(process: subprocess.Popen[str], folder: Path, rows: int) -> None:
    path = folder / "metrics.csv"
    while not path.is_file() or path.read_text().count("\n") <= rows:
        if process.poll() is not None:
            pytest.fail(f"the process ended too early: {process.communicate()[1]}")
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_processes_resume_to_the_same_bits(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    for count in (3, 9):
        with start(folder) as process:
            wait_for_rows(process, folder, count)
            # anywhere in the next steps: in a step, in a save, between them
            time.sleep(random.SystemRandom().uniform(0, 0.05))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "checkpoints" / f"step-{STEPS:08d}").exists()
    train(folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tmp_path: Path, whole: Path, number: int) -> None:
    folder = tmp_path / "run"

    def interrupt() -> None:
        calls.append(1)
        if len(calls) == 26:
            os.kill(os.getpid(), number)

    calls: list[int] = []
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(folder, before_step=interrupt)
    assert stopped.value.code == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    # the 26th micro-batch is in step 15: four steps per epoch, the last of one micro-batch
    assert (folder / "checkpoints" / "step-00000015").is_dir()
    train(folder)
    assert_same_run(folder, whole)


@pytest.mark.timeout(300)
def test_interrupted_program_ends_cleanly(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    with start(folder, "--workers") as process:
        wait_for_rows(process, folder, 2)
        # as a terminal does: the loader's workers get the signal too
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "stopping after this step; once more to stop at once" in errors
    assert "the same command with resume set goes on from there" in errors
    assert "Traceback" not in errors
    train(folder)
    assert_same_run(folder, whole)


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", before_step=interrupt)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


if __name__ == "__main__":
    train(
        Path(sys.argv[1]),
        before_step=lambda: time.sleep(0.02),
        workers=2 if "--workers" in sys.argv else 0,
    )
