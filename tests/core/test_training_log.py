"""metrics.csv, the other places that numbers go to, and learning curves."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scanweave.core.training import TrainConfig, plot_history, read_history
from scanweave.core.training.log import COLUMNS, CsvLog, RunLog


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_csv_has_one_header_that_only_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLog(path)
    assert lines(path) == [",".join(COLUMNS)]
    log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": 0.25, "accuracy": 0.75})
    log.write({"step": 3, "eval/loss": 0.125})
    log.write({"accuracy": 1.0, "step": 4})
    # every row is on disk before the log is closed
    assert lines(path) == [
        ",".join([*COLUMNS, "accuracy", "eval/loss"]),
        "1,,,,,0.5,,,",
        "2,,,,,0.25,,0.75,",
        "3,,,,,,,,0.125",
        "4,,,,,,,1.0,",
    ]
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    assert read_history(path)[1] == {"step": 2, "loss": 0.25, "accuracy": 0.75}


def test_csv_goes_on_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLog(path)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.1 * step, "new": 1 / 3})
    log.close()
    again = CsvLog(path, keep_until=2)
    assert [row["step"] for row in again.rows] == [1, 2]
    again.write({"step": 3, "loss": 0.7})
    again.close()
    assert [row["loss"] for row in read_history(path)] == [0.1, 0.2, 0.7]
    assert read_history(path)[0]["new"] == 1 / 3
    assert lines(path)[0] == ",".join([*COLUMNS, "new"])


@pytest.mark.parametrize("tail", ["3,0.5,1", "3", "3,,,,,0.5,1e-", "3,,,,,0.5,"])
def test_line_cut_short_is_left_out(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(",".join([*COLUMNS, "x"]) + "\n2,,,,,0.5,0.1,3\n" + tail)
    assert read_history(path) == [{"step": 2, "loss": 0.5, "grad_norm": 0.1, "x": 3}]
    assert read_history(tmp_path / "absent.csv") == []


def config(path: Path, **values: Any) -> TrainConfig:
    return TrainConfig(output_dir=path, **{"progress": False, "tensorboard": False, **values})


def test_tensorboard_gets_every_number_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(tmp_path, tensorboard=True)
    log = RunLog(settings, total=9)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float(step), "seconds": 1.0})
    log.close()
    resumed = RunLog(settings, total=9, step=2)
    resumed.write({"step": 3, "loss": 30.0, "eval/x": 5.0})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "eval/x"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]


def test_tensorboard_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log = RunLog(config(tmp_path, tensorboard=True), total=3)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_wandb_only_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    def init(**values: Any) -> Run:
        calls.append(values)
        return Run()

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    RunLog(config(tmp_path), total=3).close()
    assert calls == []
    log = RunLog(config(tmp_path, wandb="ssm", resume=True), total=3, settings={"train": {"lr": 1}})
    log.write({"step": 1, "loss": 0.5})
    log.close()
    assert calls[0]["project"] == "ssm"
    assert calls[0]["config"] == {"train": {"lr": 1}}
    assert calls[0]["resume"] == "auto"
    assert calls[1:] == [(1, {"loss": 0.5}), "finish"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"TrainConfig\.wandb needs wandb: pip install wandb"):
        RunLog(config(tmp_path, wandb="ssm"), total=3)


def test_progress_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(config(tmp_path, progress=True), total=3)
    log.advance(1)
    log.write({"step": 1, "loss": 0.5, "lr": 0.1})
    log.write({"step": 2, "eval/accuracy": 0.25})
    log.note("hello [bold]")
    log.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 1/3  loss 0.5",
        "step 2/3  loss 0.5  eval/accuracy 0.25",
        "hello [bold]",
    ]


def test_progress_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    log = RunLog(config(tmp_path, progress=True), total=4)
    log.write({"step": 1, "loss": 0.5})
    log.advance(3)
    log.close()
    shown = capsys.readouterr().err
    assert "loss 0.5" in shown
    assert "3/4" in shown


def test_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = RunLog(config(tmp_path), total=3)
    quiet.write({"step": 1, "loss": 0.5})
    quiet.note("no")
    quiet.note("yes", always=True)
    quiet.close()
    assert capsys.readouterr().err == "yes\n"
    other = RunLog(config(tmp_path / "absent", progress=True), total=3, main=False)
    other.write({"step": 1, "loss": 0.5})
    other.note("no", always=True)
    other.close()
    assert other.history == []
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "absent").exists()


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = [
        {"step": 1.0, "loss": 2.0, "lr": 0.1, "accuracy": 0.1},
        {"step": 2.0, "loss": 1.0, "lr": 0.2, "eval/accuracy": 0.5, "eval/return": 3.0},
    ]
    path = plot_history(history, tmp_path / "new" / "curves.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # loss, accuracy, return, lr: two lines of up to three panels
    from matplotlib.image import imread

    height, width = imread(path).shape[:2]
    assert (width, height) == (1512, 768)
    with pytest.raises(ValueError, match="history must hold metrics, got 1 rows without any"):
        plot_history([{"step": 1.0, "seconds": 2.0}], tmp_path / "x.png")
