"""The training script on graphs that take a second, and its command line."""

import dataclasses
import json
import sys

import pytest
import torch
from torch_geometric.data import Data

pytest.importorskip("accelerate")

from scanweave.core.training import TrainConfig, read_history
from scanweave.graph import GraphSplits, train
from scanweave.graph.train import Config, build_model, evaluate, fit, predict


def rings_and_paths(count: int, seed: int) -> list[Data]:
    """Cycles and paths of 5 to 8 nodes; edges carry a constant."""
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for number in range(count):
        size = int(torch.randint(5, 9, (), generator=generator))
        step = torch.arange(size if number % 2 else size - 1)
        pair = torch.stack([step, (step + 1) % size])
        edge_index = torch.cat([pair, pair.flip(0)], 1)
        graphs.append(
            Data(
                x=torch.rand(size, 2, generator=generator),
                edge_index=edge_index,
                edge_attr=torch.ones(edge_index.size(1), 1),
                y=torch.tensor([number % 2]),
            )
        )
    return graphs


@pytest.fixture
def splits() -> GraphSplits:
    parts = (rings_and_paths(count, seed) for seed, count in enumerate((32, 8, 8)))
    return GraphSplits(*parts, in_channels=2, edge_dim=1, num_classes=2)


def config(tmp_path, *, train: dict | None = None, **kwargs) -> Config:
    loop = {
        "output_dir": tmp_path / "run",
        "epochs": 2,
        "batch_size": 8,
        "lr": 1e-2,
        "cpu": True,
        "progress": False,
        "tensorboard": False,
        **(train or {}),
    }
    return Config(hidden_channels=16, num_layers=1, train=TrainConfig(**loop), **kwargs)


def test_rings_and_paths_are_told_apart(tmp_path, splits):
    model, result = fit(config(tmp_path, train={"epochs": 15}), splits)
    assert result.steps == 60
    assert not model.training
    assert evaluate(model, splits.train)["accuracy"] == 1.0
    assert evaluate(model, splits.test)["accuracy"] == 1.0
    assert [row["step"] for row in read_history(tmp_path / "run" / "metrics.csv")]


def test_best_epoch_is_kept(tmp_path, splits):
    model, result = fit(config(tmp_path, train={"epochs": 4}), splits)
    assert evaluate(model, splits.val)["loss"] == min(
        row["eval/loss"] for row in result.history if "eval/loss" in row
    )


def test_equal_seeds_give_equal_models(tmp_path, splits):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop = {"output_dir": tmp_path / name, "seed": seed, "epochs": 1}
        model, _ = fit(config(tmp_path, train=loop), splits)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_nothing_to_evaluate(tmp_path, splits):
    with pytest.raises(ValueError, match="graphs must hold at least one graph, got none"):
        evaluate(build_model(config(tmp_path), splits), [])


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path, splits):
    model = build_model(config(tmp_path), splits).eval()
    whole = evaluate(model, splits.test)
    assert evaluate(model, splits.test, batch_size=3) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"mixer": "none"},
        {"conv": "none"},
        {"conv": "gcn", "pool": "max"},
        {"mixer": "mamba", "bidirectional": False, "eval_perms": 3, "ties": "fresh"},
        {"d_state": 4, "norm": "none", "pool": "add", "dropout": 0.1},
        {"order": ("degree", "bfs")},
        {"mixer": "stack", "mixer_args": ("pattern=(m f)", "depth=2")},
        {"mixer": "mamba", "mixer_args": ("expand=2",), "d_state": 4, "norm": "none"},
    ],
    ids=str,
)
def test_every_setting_builds_a_model(kwargs, tmp_path, splits):
    model = build_model(config(tmp_path, **kwargs), splits)
    from torch_geometric.data import Batch

    assert predict(model, Batch.from_data_list(splits.val)).shape == (8, 2)
    layer = model.convs[0]
    assert (layer.mixer is None) == (kwargs.get("mixer") == "none")
    assert (layer.conv is None) == (kwargs.get("conv") == "none")
    if "d_state" in kwargs:
        assert layer.mixer.d_state == 4
        assert layer.norm3 is None


@pytest.mark.parametrize("mixer", ["none", "attention", "gated_cnn"])
def test_state_size_is_for_mixers_that_have_one(mixer, tmp_path, splits):
    """One command compares mixers: those without a state size are as without the setting."""
    models = [build_model(config(tmp_path, mixer=mixer, d_state=d), splits) for d in (0, 4)]
    plain, given = (model.state_dict() for model in models)
    assert plain.keys() == given.keys()
    assert all(v.equal(given[name]) for name, v in plain.items())
    sized = build_model(config(tmp_path, mixer="mamba", d_state=4), splits)
    assert sized.convs[0].mixer.d_state == 4


def test_arguments_of_mixers_need_a_mixer(tmp_path, splits):
    with pytest.raises(ValueError, match="mixer_args must be empty without a mixer, got "):
        build_model(config(tmp_path, mixer="none", mixer_args=("expand=2",)), splits)


def test_unknown_mixer_is_named_with_a_state_size(tmp_path, splits):
    with pytest.raises(ValueError, match=r"mixer must be one of .*, got 'mumble'"):
        build_model(config(tmp_path, mixer="mumble", d_state=4), splits)


def test_train_writes_what_it_returns(tmp_path, monkeypatch, splits):
    monkeypatch.setattr(train, "load_splits", lambda *args, **kwargs: splits)
    results = train.train(config(tmp_path))
    history = results.pop("history")
    assert history[-1]["step"] == results["steps"] == 8
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert set(results["test"]) == set(results["val"]) == {"accuracy", "loss"}
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


def test_run_can_be_resumed(tmp_path, splits):
    straight, _ = fit(
        config(tmp_path, train={"output_dir": tmp_path / "a", "schedule": "constant"}), splits
    )
    settings = config(
        tmp_path, train={"output_dir": tmp_path / "b", "max_steps": 4, "schedule": "constant"}
    )
    fit(settings, splits)
    longer = dataclasses.replace(settings.train, max_steps=0, resume=True)
    resumed, result = fit(dataclasses.replace(settings, train=longer), splits)
    assert result.steps == 8
    for name, value in straight.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name


def test_command_line(tmp_path, monkeypatch, capsys, splits):
    pytest.importorskip("tyro")
    monkeypatch.setattr(train, "load_splits", lambda *args, **kwargs: splits)
    options = f"--mixer none --order degree bfs --train.output-dir {tmp_path / 'run'} --train.cpu"
    options += (
        " --train.max-steps 2 --train.warmup-steps 0 --train.no-progress --train.no-tensorboard"
    )
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    train.main()
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 2
    assert "history" not in shown
