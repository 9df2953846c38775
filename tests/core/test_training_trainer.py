"""The loop does what a hand-written one does, and says what is wrong."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from scanweave.core.training import (
    TrainConfig,
    Trainer,
    TrainResult,
    load_checkpoint,
    param_groups,
    read_history,
    schedule_factor,
)

FEATURES = torch.randn(28, 3, generator=torch.Generator().manual_seed(5))
TARGETS = FEATURES.sin().sum(1, keepdim=True)
DATA = TensorDataset(FEATURES, TARGETS)


def make_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
    return nn.Sequential(*layers).to(dtype)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def make_config(path: Path, **values: Any) -> TrainConfig:
    quiet = {"progress": False, "tensorboard": False, "cpu": True, "log_every": 1}
    return TrainConfig(output_dir=path / "run", **{**quiet, "lr": 0.02, "epochs": 2, **values})


def weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_equals_a_hand_written_loop(tmp_path: Path, schedule: Any) -> None:
    config = make_config(
        tmp_path, schedule=schedule, warmup_steps=3, clip_grad=0.5, weight_decay=0.1, final_lr=0.1
    )
    model = make_model()
    result = Trainer(config, model, loss, DataLoader(DATA, 6)).fit()

    other = make_model()
    optimizer = torch.optim.AdamW(param_groups(other, 0.1), lr=0.02)
    rows = []
    for step in range(10):
        factor = schedule_factor(step, 10, schedule=schedule, warmup_steps=3, final=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor
        begin = step % 5 * 6
        value = loss(other, (FEATURES[begin : begin + 6], TARGETS[begin : begin + 6]))
        value.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        rows.append((step + 1, 0.02 * factor, value.item(), norm.item()))
    assert same(weights(model), weights(other))
    assert [(r["step"], r["lr"], r["loss"], r["grad_norm"]) for r in result.history] == rows
    assert any(row[3] > 0.5 for row in rows)
    assert read_history(config.output_dir / "metrics.csv") == result.history


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_accumulation_equals_the_big_batch(tmp_path: Path, clip: float) -> None:
    # 28 samples: groups of 12, 12 and 4, the last of one micro-batch only
    data = TensorDataset(FEATURES.double(), TARGETS.double())
    small, big = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    config = make_config(tmp_path / "small", accumulate=3, clip_grad=clip)
    first = Trainer(config, small, loss, DataLoader(data, 4)).fit()
    config = make_config(tmp_path / "big", clip_grad=clip)
    second = Trainer(config, big, loss, DataLoader(data, 12)).fit()
    assert first.steps == second.steps == 6
    for one, two in zip(weights(small), weights(big), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)
    for one, two in zip(first.history, second.history, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-11)


def test_given_optimizer_and_its_rates(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[4].parameters()}], 0.01
    )
    config = make_config(tmp_path, schedule="linear", epochs=1)
    before = weights(model)
    Trainer(config, model, loss, DataLoader(DATA, 7), optimizer=optimizer).fit()
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.0025]
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
    assert changed == [True, True, False, False, True, True]


class Graph:
    """A batch that only knows how to move itself, as PyG's do."""

    def __init__(self, items: list[tuple[Tensor, Tensor]]) -> None:
        self.x = torch.stack([x for x, _ in items])
        self.y = torch.stack([y for _, y in items])
        self.moved = False

    def to(self, device: Any) -> "Graph":
        self.moved = True
        return self

    def __getitem__(self, index: int) -> Tensor:
        assert self.moved
        return (self.x, self.y)[index]


def as_dict(items: list[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    return {0: torch.stack([x for x, _ in items]), 1: torch.stack([y for _, y in items])}


def as_tensor(items: list[tuple[Tensor, Tensor]]) -> Tensor:
    x = torch.stack([x for x, _ in items])
    return torch.stack([x, torch.stack([y for _, y in items]).expand_as(x)])


@pytest.mark.parametrize("collate", [Graph, as_dict], ids=["object", "dict"])
def test_kinds_of_batches(tmp_path: Path, collate: Callable[..., Any]) -> None:
    model, other = make_model(), make_model()
    config = make_config(tmp_path / "a")
    Trainer(config, model, loss, DataLoader(DATA, 6, True, collate_fn=collate)).fit()
    Trainer(make_config(tmp_path / "b"), other, loss, DataLoader(DATA, 6, True)).fit()
    assert same(weights(model), weights(other))


def test_tensor_batches(tmp_path: Path) -> None:
    def tensor_loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch[0]) - batch[1, :, :1]).square().mean()

    loader = DataLoader(DATA, 6, collate_fn=as_tensor)
    result = Trainer(make_config(tmp_path), make_model(), tensor_loss, loader).fit()
    assert result.history[-1]["loss"] < result.history[0]["loss"]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(FEATURES[:10], TARGETS[:10], strict=True)


def test_stream_without_a_length(tmp_path: Path) -> None:
    config = make_config(tmp_path, max_steps=5)
    result = Trainer(config, make_model(), loss, DataLoader(Stream(), 4)).fit()
    # 10 samples are three batches; the second epoch is cut off by max_steps
    assert result.steps == 5
    assert [row["epoch"] for row in result.history] == [0, 0, 0, 1, 1]


def test_metrics_are_means_between_rows(tmp_path: Path) -> None:
    seen: list[float] = []

    def logged(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        value = loss(model, batch)
        seen.append(value.item())
        extra = {"late": len(seen)} if len(seen) > 4 else {}
        return value, {"double": 2 * value, **extra}

    config = make_config(tmp_path, log_every=3, epochs=1)
    result = Trainer(config, make_model(), logged, DataLoader(DATA, 4)).fit()
    assert [row["step"] for row in result.history] == [3, 6, 7]
    for row, part in zip(result.history, (seen[:3], seen[3:6], seen[6:]), strict=True):
        assert row["loss"] == pytest.approx(sum(part) / len(part))
        assert row["double"] == pytest.approx(2 * row["loss"])
    assert [row.get("late") for row in result.history] == [None, 5.5, 7]
    header = (config.output_dir / "metrics.csv").read_text().splitlines()[0]
    assert header.endswith("loss,grad_norm,double,late")


def test_result_and_files(tmp_path: Path) -> None:
    config = make_config(tmp_path, keep_last=2, epochs=4, best_mode="max")
    values = iter([1.0, 3.0, 3.0, math.nan])
    model = make_model()
    at_step: list[list[Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        at_step.append(weights(model))
        return {"score": next(values), "other": 1}

    trainer = Trainer(config, model, loss, DataLoader(DATA, 7), evaluate, extra={"depth": 2})
    assert trainer.total_steps == 16
    assert not config.output_dir.exists()
    result = trainer.fit()
    folder = config.output_dir / "checkpoints"
    assert isinstance(result, TrainResult)
    assert result.steps == 16
    assert math.isnan(result.metrics["score"])
    assert (result.best_metrics, result.best_step) == ({"score": 3.0, "other": 1.0}, 8)
    assert result.last_checkpoint == folder / "step-00000016"
    assert result.best_checkpoint == folder / "best-00000008"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best-00000008",
        "step-00000012",
        "step-00000016",
    ]
    assert result.samples_per_second > 0
    assert result.seconds > 0
    assert [row["step"] for row in result.history if "eval/score" in row] == [4, 8, 12, 16]
    best = make_model()
    saved = load_checkpoint(folder / "best-00000008", best)
    assert same(weights(best), at_step[1])
    assert saved.config["extra"] == {"depth": 2}
    assert saved.config["train"]["lr"] == 0.02
    written = json.loads((config.output_dir / "config.json").read_text())
    assert written == saved.config


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({}, 2),
        ({"best_metric": "loss"}, 1),
        ({"best_metric": "val_rmse"}, 3),
        ({"best_metric": "loss", "best_mode": "max"}, 3),
        ({"best_mode": "min"}, 3),
    ],
)
def test_which_is_best(tmp_path: Path, values: Any, best: int) -> None:
    table = [(2.0, 0.1, 5.0), (3.0, 0.2, 5.0), (1.0, 0.3, 4.0)]
    rows = iter([dict(zip(("score", "loss", "val_rmse"), row, strict=True)) for row in table])
    config = make_config(tmp_path, eval_every=1, max_steps=3, **values)
    result = Trainer(config, make_model(), loss, DataLoader(DATA, 7), lambda _: next(rows)).fit()
    assert result.best_step == best
    assert result.best_checkpoint is not None
    assert result.best_checkpoint.name == f"best-{best:08d}"


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        torch.rand(3)
        out = model(FEATURES)
        seen.append((model.training, out.requires_grad, model[3].training))
        return {"x": 1.0}

    modes = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        modes.append(model.training and model[3].training)
        return loss(model, batch)

    model, other = make_model(0.5), make_model(0.5)
    config = make_config(tmp_path / "a", eval_every=2)
    Trainer(config, model, watched, DataLoader(DATA, 6, True), evaluate).fit()
    Trainer(make_config(tmp_path / "b"), other, loss, DataLoader(DATA, 6, True)).fit()
    assert same(weights(model), weights(other))
    assert seen == [(False, False, False)] * 5
    assert modes == [True] * 10


def test_seed_alone_decides(tmp_path: Path) -> None:
    results = []
    for number, seed in enumerate((1, 1, 2)):
        model = make_model(0.5)
        torch.rand(number)
        config = make_config(tmp_path / str(number), seed=seed)
        Trainer(config, model, loss, DataLoader(DATA, 6, True)).fit()
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_bf16_runs_under_autocast_and_leaves_the_model_plain(tmp_path: Path) -> None:
    model = make_model()
    seen = []
    model[0].register_forward_hook(lambda *parts: seen.append(parts[2].dtype))
    result = Trainer(
        make_config(tmp_path / "a", precision="bf16"), model, loss, DataLoader(DATA, 7)
    ).fit()
    assert set(seen) == {torch.bfloat16}
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    model(FEATURES)
    assert seen[-1] == torch.float32
    # another precision in the same program, on the same model
    Trainer(make_config(tmp_path / "b"), model, loss, DataLoader(DATA, 7)).fit()
    assert seen[-1] == torch.float32
    Trainer(make_config(tmp_path / "c", precision="bf16"), model, loss, DataLoader(DATA, 7)).fit()
    assert seen[-1] == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.gpu
def test_fp16_on_a_gpu_resumes_its_loss_scale(tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crashing(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise Crash
        return loss(model, batch)

    calls: list[int] = []
    values: Any = {"cpu": False, "precision": "fp16", "save_every": 3}
    whole, part = make_model(0.5), make_model(0.5)
    expected = Trainer(
        make_config(tmp_path / "a", **values), whole, loss, DataLoader(DATA, 6, True)
    ).fit()
    config = make_config(tmp_path / "b", **values, resume=True)
    with pytest.raises(Crash):
        Trainer(config, part, crashing, DataLoader(DATA, 6, True)).fit()
    fresh = make_model(0.5)
    result = Trainer(config, fresh, loss, DataLoader(DATA, 6, True)).fit()
    assert expected.last_checkpoint is not None
    assert result.last_checkpoint is not None
    first, second = (
        load_checkpoint(expected.last_checkpoint),
        load_checkpoint(result.last_checkpoint),
    )
    assert first.state["scaler"] == second.state["scaler"]
    for one, two in zip(weights(whole), weights(fresh), strict=True):
        torch.testing.assert_close(one, two)


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


def test_geometric_batches_train(tmp_path: Path) -> None:
    geometric = pytest.importorskip("torch_geometric.loader")
    from torch_geometric.data import Data
    from torch_geometric.nn import global_add_pool

    data: Dataset[Any] = [  # type: ignore[assignment]
        Data(x=torch.rand(n, 3), y=torch.tensor([float(n)])) for n in (2, 3, 4, 5, 6, 7)
    ]

    def graph_loss(model: nn.Module, batch: Any) -> Tensor:
        out = global_add_pool(model(batch.x), batch.batch)
        return nn.functional.mse_loss(out.flatten(), batch.y)

    loader = geometric.DataLoader(data, batch_size=4, shuffle=True)
    config = make_config(tmp_path, epochs=6, lr=0.05)
    result = Trainer(config, make_model(), graph_loss, loader).fit()
    assert result.steps == 12
    assert result.history[-1]["loss"] < result.history[0]["loss"]
