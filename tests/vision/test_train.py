"""The training script learns, goes on where it stopped, and hands back a model that timm opens."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

pytest.importorskip("accelerate")

from scanweave.core.training import TrainConfig
from scanweave.vision import train
from scanweave.vision.averaging import Averaged
from scanweave.vision.data import ImageSets
from scanweave.vision.settings import Config
from scanweave.vision.stored import StoredImages
from scanweave.vision.train import build_model, build_optimizer, evaluate, fit

TINY = ("patch_size=4", "embed_dim=16", "depth=1", "d_state=2")


def striped(count: int, seed: int) -> StoredImages:
    """8 x 8 grey noise under horizontal (0) or vertical (1) stripes of random phase."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 60, (count, 8, 8))
    for number, image in enumerate(images):
        lines = image if number % 2 == 0 else image.T
        lines[draw.integers(2) :: 2] += 190
    return StoredImages(images.astype(np.uint8), np.arange(count) % 2)


@pytest.fixture
def sets() -> ImageSets:
    return ImageSets(striped(64, 0), striped(24, 1), num_classes=2, in_chans=1)


def config(folder: Path, *, train: dict[str, Any] | None = None, **kwargs: Any) -> Config:
    loop = {
        "output_dir": folder / "run",
        "epochs": 2,
        "batch_size": 16,
        "lr": 1e-2,
        "cpu": True,
        "progress": False,
        "tensorboard": False,
        **(train or {}),
    }
    plain: dict[str, Any] = {"img_size": 8, "model_args": TINY, "crop": "shift", "crop_pct": 1.0}
    return Config(train=TrainConfig(**loop), **{**plain, **kwargs})


def test_stripes_are_told_apart(tmp_path, sets):
    model, result = fit(config(tmp_path, train={"epochs": 8}), sets)
    assert result.steps == 32
    assert not model.training
    assert evaluate(model, sets.val, 7)["top1"] >= 95
    assert result.best_metrics["top1"] >= 95
    assert list(result.metrics) == ["top1", "top5", "loss"]


def test_average_is_evaluated_and_kept(tmp_path, sets):
    settings = config(tmp_path, train={"epochs": 8}, ema_decay=0.9, ema_warmup=True)
    model, result = fit(settings, sets)
    assert list(result.metrics)[:4] == ["ema_top1", "ema_top5", "ema_loss", "top1"]
    assert result.best_metrics["ema_top1"] >= 95
    found = evaluate(model, sets.val, 24)
    assert found["loss"] == pytest.approx(result.best_metrics["ema_loss"], rel=1e-5)
    assert found["loss"] != pytest.approx(result.best_metrics["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"ema_decay": 0.9, "ema_warmup": True, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1},
        {"crop": "resized", "opt": "lamb", "layer_decay": 0.7, "re_prob": 0.5, "repeats": 2},
    ],
    ids=["average and mixup", "layer decay and repeats"],
)
def test_resumed_run_ends_as_an_uninterrupted_one(kwargs, tmp_path, sets):
    # the short run evaluates one step more often: with validation the best epochs might differ
    sets.val = None
    settings = config(tmp_path, train={"schedule": "constant"}, **kwargs)
    straight, result = fit(settings, sets)
    short = dataclasses.replace(settings.train, output_dir=tmp_path / "b", max_steps=3)
    fit(dataclasses.replace(settings, train=short), sets)
    longer = dataclasses.replace(short, max_steps=0, resume=True)
    resumed, again = fit(dataclasses.replace(settings, train=longer), sets)
    assert result.steps == again.steps == 8
    for name, value in straight.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name


def test_resume_refuses_other_settings(tmp_path, sets):
    settings = config(tmp_path, train={"max_steps": 1})
    fit(settings, sets)
    loop = dataclasses.replace(settings.train, resume=True)
    fit(dataclasses.replace(settings, train=loop, eval_batch_size=3), sets)
    with pytest.raises(ValueError, match=r"mixup must be 0.0 as in .* to resume, got 0.8"):
        fit(dataclasses.replace(settings, train=loop, mixup=0.8), sets)


def test_train_writes_a_model_that_timm_opens(tmp_path, monkeypatch, sets):
    monkeypatch.setattr(train, "load_sets", lambda *args: sets)
    settings = config(tmp_path, ema_decay=0.5)
    results = train.train(settings)
    history = results.pop("history")
    folder = settings.train.output_dir
    assert history[-1]["step"] == results["steps"] == 8
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "curves.png").stat().st_size > 1000
    model = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    assert sum(p.numel() for p in model.parameters()) == results["parameters"]
    assert model.pretrained_cfg["input_size"] == (1, 8, 8)
    # whoever opens it looks at the images as the validation did
    assert model.pretrained_cfg["crop_pct"] == 1.0
    assert evaluate(model, sets.val, 24)["top1"] == pytest.approx(results["best"]["ema_top1"])


def test_without_validation_the_last_weights_are_kept(tmp_path, sets):
    sets.val = None
    model, result = fit(config(tmp_path, train={"epochs": 1}), sets)
    assert result.best_checkpoint is None
    assert not model.training


def test_equal_seeds_give_equal_models(tmp_path, sets):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        loop = {"output_dir": tmp_path / name, "seed": seed, "epochs": 1}
        model, _ = fit(config(tmp_path, train=loop, mixup=0.5), sets)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_workers_change_nothing(tmp_path, sets):
    weights = []
    for workers in (0, 2):
        loop = {"output_dir": tmp_path / str(workers), "num_workers": workers}
        model, _ = fit(config(tmp_path, train=loop, crop="resized"), sets)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert weights[0].equal(weights[1])


def test_rate_follows_the_batch_and_warm_up_the_epoch(tmp_path, sets, monkeypatch):
    settings = config(
        tmp_path, train={"accumulate": 2, "log_every": 1}, lr_batch=64, warmup_epochs=1
    )
    _, result = fit(settings, sets)
    # two steps of 32 images an epoch: half the rate, reached at the end of the first epoch
    assert [row["lr"] for row in result.history] == pytest.approx([0.0025, 0.005, 0.005, 0.0025])
    monkeypatch.setenv("WORLD_SIZE", "4")
    loader = torch.utils.data.DataLoader(sets.train, 16)  # type: ignore[arg-type]
    scaled = train._scaled(settings, loader)
    assert scaled.lr == 0.02
    assert scaled.warmup_steps == 1


def test_evaluation_does_not_depend_on_its_batch_size(tmp_path, sets):
    model, _ = fit(config(tmp_path, train={"max_steps": 1}), sets)
    whole = evaluate(model, sets.val, 24)
    assert evaluate(model, sets.val, 5) == pytest.approx(whole, rel=1e-5)
    assert whole["top5"] == 100


def test_nothing_to_evaluate(tmp_path, sets):
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        evaluate(build_model(config(tmp_path), sets), [], 4)


def test_decay_and_rates_of_the_groups(tmp_path, sets):
    settings = config(tmp_path, layer_decay=0.5, model_args=(*TINY[:2], "depth=2"))
    model = build_model(settings, sets)
    by_parameter = {
        id(p): group
        for group in build_optimizer(settings, model).param_groups
        for p in group["params"]
    }
    named = {name: by_parameter[id(p)] for name, p in model.named_parameters()}
    assert named["layers.0.mixer.in_proj.weight"]["weight_decay"] == 0.05
    for name in ("layers.0.mixer.A_log", "layers.1.mixer.D_b", "pos_embed", "head.bias"):
        assert named[name]["weight_decay"] == 0, name
    rates = [named[n]["lr"] for n in ("head.weight", "norm_f.weight", "layers.1.mixer.A_log")]
    assert rates[0] == 0.01
    assert rates[2] < rates[0]
    assert named["layers.0.norm.weight"]["lr"] == rates[2] / 2
    assert named["pos_embed"]["lr"] == rates[2] / 4


@pytest.mark.parametrize("opt", ["sgd", "lamb", "adamw"])
def test_optimisers_of_timm(opt, tmp_path, sets):
    settings = config(tmp_path, opt=opt, train={"betas": (0.8, 0.9)})
    optimizer = build_optimizer(settings, build_model(settings, sets))
    assert type(optimizer).__name__.lower() == opt
    group = optimizer.param_groups[0]
    assert group["momentum"] == 0.9 if opt == "sgd" else group["betas"] == (0.8, 0.9)


def test_model_settings(tmp_path, sets):
    settings = config(
        tmp_path,
        drop_path=0.2,
        grad_checkpointing=True,
        model_args=(*TINY, "class_token_pos=first", "depth=3"),
    )
    model = build_model(settings, sets)
    assert model.class_position == "first"
    assert model.grad_checkpointing
    assert model.layers[2].drop_path.drop_prob == pytest.approx(0.2)
    cfg = model.pretrained_cfg
    assert cfg["mean"] == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,))
    assert cfg["input_size"] == (1, 8, 8)


def test_weights_from_a_file(tmp_path, sets):
    source = build_model(config(tmp_path, train={"seed": 1}), sets)
    file = tmp_path / "weights.pth"
    torch.save({"model": source.state_dict()}, file)
    model = build_model(config(tmp_path, init_checkpoint=file), sets)
    assert model.get_parameter("pos_embed").equal(source.get_parameter("pos_embed"))
    # one of two classes is not one of a thousand
    assert not model.get_parameter("head.weight").equal(source.get_parameter("head.weight"))


def test_any_timm_model_and_any_size(tmp_path, sets):
    settings = config(tmp_path, model="test_resnet", model_args=(), img_size=32, in_chans=1)
    model, _ = fit(
        dataclasses.replace(settings, train=dataclasses.replace(settings.train, max_steps=1)), sets
    )
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)
    assert build_model(
        config(tmp_path, img_size=0, model="test_vim", model_args=()), sets
    ).pretrained_cfg["input_size"] == (1, 160, 160)


def test_average_follows_the_steps_that_are_made():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    pair = Averaged(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pair.follow(optimizer)
    x = torch.ones(1, 2)
    for _ in range(3):
        optimizer.zero_grad()
        (-pair(x).sum()).backward()
        optimizer.step()
    # the first step copies; then 1, (1 + 2) / 2, (1.5 + 3) / 2
    assert pair(x, averaged=True).item() == 2 * 2.25
    assert pair(x).item() == 2 * 3
    assert int(pair.get_buffer("updates")) == 3
    assert pair.train().average.module.training is False
    assert all(not p.requires_grad for p in pair.average.parameters())


def test_average_refuses_a_decay_of_one():
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\), got 1"):
        Averaged(nn.Linear(1, 1), 1.0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"mixup": -1.0}, "mixup must be at least 0, got -1.0"),
        ({"model_args": ("depth",)}, "model_args must be name=value, got 'depth'"),
        ({"mixup": 1.0, "train": {"batch_size": 5}}, "batch_size must be even with mixup"),
    ],
    ids=str,
)
def test_settings_are_checked(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_unknown_model_and_wrong_mean(tmp_path, sets):
    with pytest.raises(ValueError, match=r"model must be one of timm.list_models\(\), got 'vimm'"):
        build_model(config(tmp_path, model="vimm"), sets)
    with pytest.raises(ValueError, match=r"mean must have 1 values, got \(0.5, 0.5\)"):
        build_model(config(tmp_path, mean=(0.5, 0.5)), sets)


# timm leaves the files to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_command_line_on_a_folder_of_images(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro")
    for part, count in (("train", 8), ("val", 4)):
        images = striped(count, len(part))
        for number in range(count):
            folder = tmp_path / "images" / part / ("across" if number % 2 else "along")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[number]).save(folder / f"{number}.png")
    options = f"--recipe none --data-dir {tmp_path / 'images'} --img-size 8 --crop none"
    options += f" --model-args {' '.join(TINY)} --train.output-dir {tmp_path / 'run'} --train.cpu"
    options += " --train.max-steps 2 --train.batch-size 4 --train.no-progress"
    options += " --train.no-tensorboard"
    monkeypatch.setattr(sys, "argv", ["train", *options.split()])
    train.main()
    shown = json.loads(capsys.readouterr().out)
    assert shown["steps"] == 2
    assert set(shown["best"]) == {"top1", "top5", "loss"}
    assert "history" not in shown
