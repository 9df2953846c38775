"""The loop does what a hand-written one does, and says what is wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.training_cases import (
    DATA,
    FEATURES,
    TARGETS,
    Stream,
    loss,
    make_config,
    make_model,
    same,
    weights,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from scanweave.core.training import (
    Trainer,
    TrainResult,
    load_checkpoint,
    param_groups,
    read_history,
    schedule_factor,
)


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


@pytest.mark.slow
def test_compiled_training_equals_eager(tmp_path: Path) -> None:
    results = []
    for mode, graphs in (("no", 0), ("default", 1)):
        model = make_model()
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        config = make_config(tmp_path / mode, compile=mode)
        saved = Trainer(config, model, loss, DataLoader(DATA, 7)).fit().last_checkpoint
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == graphs
        # the names are those of the model as it is
        plain = make_model()
        assert saved is not None
        load_checkpoint(saved, plain)
        assert same(weights(plain), weights(model))
        results.append(weights(plain))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


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
