"""Checkpoints come back bit for bit, appear whole or not at all, and name what does not fit."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scanweave.core.training import checkpoint as module
from scanweave.core.training import find_checkpoint, load_checkpoint, save_checkpoint
from scanweave.core.training.checkpoint import (
    claim_run,
    link_checkpoint,
    prune_checkpoints,
    read_optimizer_state,
)


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 4))
    model[3].weight = model[0].weight = nn.Parameter(torch.randn(4, 3))  # tied
    model[2].bias.requires_grad_(False)  # never gets a state
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make_optimizer(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    params = list(model.parameters())
    if kind == "sgd":
        return torch.optim.SGD(params, lr=0.1, momentum=0.9)
    return torch.optim.AdamW([{"params": params[:1], "lr": 0.02}, {"params": params[1:]}], 0.1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_goes_on_as_if_never_saved(tmp_path: Path, kind: str) -> None:
    model = make_model()
    optimizer = make_optimizer(model, kind)
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.015
    state = {"progress": {"step": 3}, "text": "é"}
    rows = {"random": torch.arange(6).reshape(2, 3)}
    path = save_checkpoint(
        tmp_path / "a" / "step-00000003",
        model,
        optimizer=optimizer,
        step=3,
        state=state,
        config={"output_dir": tmp_path, "lr": 0.1},
        process=rows,
    )
    torch.manual_seed(9)
    train(model, optimizer)

    other = make_model(1)
    other_optimizer = make_optimizer(other, kind)
    train(other, other_optimizer, 1)
    saved = load_checkpoint(path, other, optimizer=other_optimizer)
    assert (saved.path, saved.step, saved.state) == (path, 3, state)
    assert saved.config == {"output_dir": str(tmp_path), "lr": 0.1}
    assert torch.equal(saved.process["random"], rows["random"])
    assert other_optimizer.param_groups[0]["lr"] == 0.015
    torch.manual_seed(9)
    train(other, other_optimizer)
    for (name, value), twin in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(value, twin), name


def test_files_hold_no_pickle(tmp_path: Path) -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer)
    path = save_checkpoint(tmp_path / "c", model, optimizer=optimizer)
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "process.safetensors",
        "state.json",
    ]
    assert load_file(path / "model.safetensors").keys() == model.state_dict().keys()
    for file in path.glob("*.json"):
        json.loads(file.read_text())


def test_compiled_names_do_not_enter_the_file(tmp_path: Path) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    path = save_checkpoint(tmp_path / "c", compiled)
    load_checkpoint(path, make_model(1))
    load_checkpoint(path, torch.compile(make_model(1), backend="eager"))  # type: ignore[arg-type]


@pytest.mark.parametrize("moment", ["save_file", "fsync", "rename"])
def test_crash_while_saving_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    model = make_model()
    old = save_checkpoint(tmp_path / "checkpoints" / "step-00000001", model, step=1)

    def crash(*args: Any, **kwargs: Any) -> None:
        if moment == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module if moment == "save_file" else os, moment, crash)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path / "checkpoints" / "step-00000002", model, step=2)
    assert find_checkpoint(tmp_path) == old
    assert load_checkpoint(old, make_model(1)).step == 1
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    # the next attempt is not in the way of the half, and the next run clears it up
    save_checkpoint(tmp_path / "checkpoints" / "step-00000002", model, step=2)
    (tmp_path / "checkpoints" / ".step-00000003.tmp").mkdir()
    claim_run(tmp_path, resume=True, overwrite=False)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]


def test_crash_while_deleting_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(folder / f"step-{step:08d}", make_model(), step=step)

    def crash(path: Path) -> None:
        (path / "state.json").unlink()
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", crash)
        with pytest.raises(OSError, match="killed"):
            prune_checkpoints(tmp_path, 1)
    assert find_checkpoint(tmp_path) == folder / "step-00000002"
    claim_run(tmp_path, resume=True, overwrite=False)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_find_and_prune(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    folder = tmp_path / "checkpoints"
    names = ["step-00000005", "step-00000010", "step-00000015", "best-00000010", "best-00000015"]
    for name in [*names, "notes", "step-5", "best-x"]:
        (folder / name).mkdir(parents=True)
    assert find_checkpoint(tmp_path) == folder / "step-00000015"
    assert find_checkpoint(tmp_path, "best") == folder / "best-00000015"
    prune_checkpoints(tmp_path, 2)
    left = {path.name for path in folder.iterdir()}
    assert left == {"step-00000010", "step-00000015", "best-00000015", "notes", "best-x"}
    (folder / "best-00000020").mkdir()
    assert find_checkpoint(tmp_path) == folder / "best-00000020"


@pytest.mark.parametrize("links", [True, False])
def test_linked_checkpoint_outlives_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not supported")

    source = save_checkpoint(tmp_path / "best-00000001", make_model(), step=1)
    with monkeypatch.context() as patch:
        if not links:
            patch.setattr(os, "link", refuse)
        twin = link_checkpoint(source, tmp_path / "step-00000001")
    assert (source / "model.safetensors").stat().st_nlink == (2 if links else 1)
    for file in source.iterdir():
        file.unlink()
    assert load_checkpoint(twin, make_model(1)).step == 1
    with pytest.raises(ValueError, match="path must not exist"):
        link_checkpoint(source, twin)


class TestFit:
    """What does not fit is named, and the model keeps its weights."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        model = make_model()
        optimizer = make_optimizer(model)
        train(model, optimizer)
        return save_checkpoint(tmp_path / "c", model, optimizer=optimizer, step=3)

    def change(self, path: Path, name: str, value: Tensor | None) -> None:
        tensors = load_file(path / "model.safetensors")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, path / "model.safetensors")

    def refuse(self, path: Path, message: str) -> None:
        model = make_model(1)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model, optimizer=make_optimizer(model))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    def test_missing_and_unexpected_keys(self, path: Path) -> None:
        self.change(path, "2.weight", None)
        self.change(path, "extra", torch.zeros(1))
        self.refuse(path, r"model.safetensors must fit the model: missing 2.weight; unexpected e")

    def test_many_missing_keys_are_cut_short(self, path: Path) -> None:
        for name in list(make_model().state_dict())[:7]:
            self.change(path, name, None)
        self.refuse(path, "and 2 more")

    def test_other_shapes(self, path: Path) -> None:
        self.change(path, "2.weight", torch.zeros(5, 3))
        self.refuse(path, r"other shapes: 2.weight \(5, 3\) instead of \(3, 4\)")

    @pytest.mark.parametrize("name", ["model", "optimizer", "process"])
    def test_truncated_tensors(self, path: Path, name: str) -> None:
        file = path / f"{name}.safetensors"
        file.write_bytes(file.read_bytes()[:-1] if name != "process" else b"")
        self.refuse(path, f"{name}.safetensors must be a whole safetensors file, got: ")

    @pytest.mark.parametrize("name", ["state", "config"])
    def test_truncated_text(self, path: Path, name: str) -> None:
        file = path / f"{name}.json"
        file.write_text(file.read_text()[:-1])
        self.refuse(path, f"{name}.json must be a whole JSON file, got: ")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_missing_file(self, path: Path, name: str) -> None:
        (path / name).unlink()
        self.refuse(path, f"{name} must be a whole")

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, "path must be a checkpoint folder with a state.json, got")

    def test_other_format(self, path: Path) -> None:
        document = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**document, "format": 99}))
        self.refuse(path, "must have format 1, got 99")

    def test_optimizer_file_of_another_checkpoint(self, path: Path) -> None:
        save_file({"other/exp_avg": torch.zeros(1)}, path / "optimizer.safetensors")
        self.refuse(path, "must fit its state.json, optimizer state has other/exp_avg")

    def test_other_groups(self, path: Path) -> None:
        model = make_model(1)
        params = list(model.parameters())
        with pytest.raises(ValueError, match="checkpoint's parameter groups, only one of them has"):
            load_checkpoint(path, model, optimizer=torch.optim.AdamW(params[1:]))
        with pytest.raises(ValueError, match="parameter groups, the groups differ"):
            load_checkpoint(path, model, optimizer=torch.optim.AdamW(params))

    def test_optimizer_without_its_model(self, path: Path) -> None:
        model = make_model()
        with pytest.raises(ValueError, match="model must be given together with optimizer"):
            load_checkpoint(path, optimizer=make_optimizer(model))

    def test_saved_without_optimizer(self, tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path / "c", make_model())
        with pytest.raises(ValueError, match="must hold an optimizer's state, it was saved withou"):
            read_optimizer_state(path)


def test_what_cannot_be_saved_is_refused_before_writing(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model only"):
        save_checkpoint(tmp_path / "c", model, optimizer=make_optimizer(make_model()))
    with pytest.raises(ValueError, match="optimizer must be a named state where model is a state"):
        save_checkpoint(tmp_path / "c", model.state_dict(), optimizer=make_optimizer(model))
    with pytest.raises(ValueError, match="model state must hold tensors, got int count"):
        save_checkpoint(tmp_path / "c", {"count": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="state must hold JSON values, got: Object of type set"):
        save_checkpoint(tmp_path / "c", model, state={"x": {1}})
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "c", model)
    with pytest.raises(ValueError, match="path must not exist, got"):
        save_checkpoint(tmp_path / "c", model)


def test_run_folder_is_never_overwritten_unasked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    claim_run(run, resume=False, overwrite=False)
    save_checkpoint(run / "checkpoints" / "step-00000004", make_model(), step=4)
    (run / "metrics.csv").write_text("step\n4\n")
    message = r"must not hold a run, got .*newest checkpoint: step-00000004.*set resume.*overwrite"
    with pytest.raises(ValueError, match=message):
        claim_run(run, resume=False, overwrite=False)
    claim_run(run, resume=True, overwrite=False)
    assert find_checkpoint(run) is not None
    claim_run(run, resume=False, overwrite=True)
    assert find_checkpoint(run) is None
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "notes.txt"]
    with pytest.raises(ValueError, match="newest checkpoint: none"):
        claim_run(run, resume=False, overwrite=False)
