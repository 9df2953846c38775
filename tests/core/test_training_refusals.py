"""What the training loop refuses, and what it stops at."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.core.training_cases import (
    DATA,
    Stream,
    loss,
    make_config,
    make_model,
    same,
    weights,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from scanweave.core.training import (
    Trainer,
    load_checkpoint,
)


@pytest.mark.parametrize("kind", ["nan loss", "infinite loss", "nan gradient"])
def test_infinite_loss_stops_before_anything_is_saved(tmp_path: Path, kind: str) -> None:
    calls = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        value = loss(model, batch)
        if len(calls) < 6:
            return value
        if kind == "nan gradient":
            # sqrt has an infinite slope at 0, times 0 is NaN
            return value + (0 * model[4].bias).square().sum().sqrt()
        return value * (math.nan if kind == "nan loss" else math.inf)

    config = make_config(tmp_path, save_every=1, epochs=2)
    model = make_model()
    message = (
        r"must be finite, got NaN or infinity in step 6 \(newest checkpoint: .*step-00000005\)"
    )
    with pytest.raises(FloatingPointError, match=message):
        Trainer(config, model, failing, DataLoader(DATA, 7)).fit()
    names = sorted(path.name for path in (config.output_dir / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005"]
    saved = make_model()
    load_checkpoint(config.output_dir / "checkpoints" / "step-00000005", saved)
    assert same(weights(saved), weights(model))


def test_infinite_loss_is_found_later_where_looking_costs(tmp_path: Path) -> None:
    calls = []

    def failing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (math.nan if len(calls) in (6, 7) else 1.0)

    config = make_config(tmp_path, save_every=4, log_every=5, max_steps=20)
    trainer = Trainer(config, make_model(), failing, DataLoader(DATA, 7))
    trainer._look_each_step = False  # as on a GPU
    with pytest.raises(FloatingPointError, match=r"in step 6 \(newest checkpoint: .*00000004\)"):
        trainer.fit()
    assert len(calls) == 8
    names = [path.name for path in (config.output_dir / "checkpoints").iterdir()]
    assert names == ["step-00000004"]


def test_run_folder_and_finished_runs(tmp_path: Path) -> None:
    def trainer(**values: Any) -> Trainer:
        return Trainer(
            make_config(tmp_path, schedule="constant", **values),
            make_model(),
            loss,
            DataLoader(DATA, 7),
            lambda _: {"score": 1.0},
        )

    first = trainer().fit()
    with pytest.raises(ValueError, match=r"output_dir must not hold a run, got .*step-00000008"):
        trainer().fit()
    again = trainer(resume=True).fit()
    assert again.history == first.history
    assert (again.steps, again.metrics, again.best_step) == (8, {"score": 1.0}, 4)
    assert again.seconds == pytest.approx(first.seconds, abs=0.5)
    longer = trainer(resume=True, epochs=3).fit()
    assert (longer.steps, longer.history[:8]) == (12, first.history)
    anew = trainer(overwrite=True, epochs=1).fit()
    assert (anew.steps, len(anew.history)) == (4, 4)


def test_resume_without_a_checkpoint_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, resume=True, progress=True)
    assert Trainer(config, make_model(), loss, DataLoader(DATA, 7)).fit().steps == 8
    assert "no checkpoint yet, starting anew" in capsys.readouterr().err
    Trainer(config, make_model(), loss, DataLoader(DATA, 7)).fit()
    assert "going on from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "batch", "message"),
    [
        ({"lr": 0.5}, 7, r"lr must be 0\.02 as in .*step-00000008 to resume, got 0\.5"),
        ({"betas": (0.5, 0.9)}, 7, r"betas must be \[0\.9, 0\.999\] as in"),
        ({"accumulate": 2}, 7, "accumulate must be 1 as in"),
        ({}, 4, "batches per epoch must be 4 as in .* got 7"),
    ],
)
def test_resuming_another_run_is_refused(
    tmp_path: Path, values: Any, batch: int, message: str
) -> None:
    Trainer(make_config(tmp_path), make_model(), loss, DataLoader(DATA, 7)).fit()
    model = make_model()
    before = weights(model)
    config = make_config(tmp_path, resume=True, epochs=3, **values)
    with pytest.raises(ValueError, match=message):
        Trainer(config, model, loss, DataLoader(DATA, batch)).fit()
    assert same(weights(model), before)


def test_resuming_another_model_is_refused(tmp_path: Path) -> None:
    Trainer(make_config(tmp_path), make_model(), loss, DataLoader(DATA, 7)).fit()
    config = make_config(tmp_path, resume=True, epochs=3)
    with pytest.raises(ValueError, match=r"model\.safetensors must fit the model: missing 0\.0\."):
        Trainer(config, nn.ModuleList([make_model()]), loss, DataLoader(DATA, 7)).fit()


def test_what_a_trainer_refuses(tmp_path: Path) -> None:
    loader = DataLoader(DATA, 7)
    with pytest.raises(ValueError, match="max_steps must be set for a loader without a length"):
        Trainer(make_config(tmp_path), make_model(), loss, DataLoader(Stream(), 4))
    with pytest.raises(ValueError, match="warmup_steps must be at most the run's 8 steps, got 9"):
        Trainer(make_config(tmp_path, warmup_steps=9), make_model(), loss, loader)
    with pytest.raises(ValueError, match="precision must be no or bf16 without a GPU, got fp16"):
        Trainer(make_config(tmp_path, precision="fp16"), make_model(), loss, loader)


def test_empty_stream_is_refused(tmp_path: Path) -> None:
    class Empty(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    config = make_config(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="loader must yield at least one batch per epoch, got no"):
        Trainer(config, make_model(), loss, DataLoader(Empty(), 4)).fit()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda v: v.expand(2), r"loss must return a scalar tensor, .* got \(2,\)"),
        (lambda v: 1.0, "loss must return a scalar tensor, or one and a dict, got float"),
        (lambda v: (v, v), r"loss must return a scalar tensor, or one and a dict, got \(\)"),
        (lambda v: (v, {}, 3), "loss must return a scalar tensor, .* got tuple"),
        (lambda v: (v, {"lr": 1, "a": 1}), "loss must not name a metric lr: the log uses it"),
        (lambda v: (v, {"a": v.expand(2)}), r"metric a must be one number, got \(2,\)"),
    ],
)
def test_bad_losses_are_refused(tmp_path: Path, result: Any, message: str) -> None:
    def bad(model: nn.Module, batch: Any) -> Any:
        return result(loss(model, batch))

    with pytest.raises(ValueError, match=message):
        Trainer(make_config(tmp_path), make_model(), bad, DataLoader(DATA, 7)).fit()


@pytest.mark.parametrize(
    ("result", "values", "message"),
    [
        (None, {}, "evaluate must return a dict of numbers, got None"),
        ({}, {}, "evaluate must return a dict of numbers, got {}"),
        ({"a": "b"}, {}, "evaluate must return a dict of numbers, got {'a': 'b'}"),
        ({"a": 1}, {"best_metric": "b"}, "best_metric must be one of a, got 'b'"),
    ],
)
def test_bad_evaluations_are_refused(
    tmp_path: Path, result: Any, values: Any, message: str
) -> None:
    config = make_config(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        Trainer(config, make_model(), loss, DataLoader(DATA, 7), lambda _: result).fit()
