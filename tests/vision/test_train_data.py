"""Image sets in every form, what is done to an image, and the recipes."""

import dataclasses
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("accelerate")

from scanweave.vision import data
from scanweave.vision.data import (
    DataConfig,
    RepeatedSampler,
    eval_transform,
    load_sets,
    train_loader,
    train_transform,
)
from scanweave.vision.recipes import RECIPES, get_recipe
from scanweave.vision.stored import StoredImages
from scanweave.vision.train import parse

GREY = {
    "input_size": (1, 8, 12),
    "mean": (0.5,),
    "std": (0.25,),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
COLOUR = {**GREY, "input_size": (3, 8, 12), "mean": (0.5,) * 3, "std": (0.25,) * 3}

# timm leaves the files that it reads to the garbage collector
unclosed = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def picture(value: int = 102, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (12, 8), (value,) * 3).convert(mode)


def make_folder(root: Path, parts: dict[str, list[str]]) -> Path:
    for part, names in parts.items():
        for number, name in enumerate(names):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            picture(10 * number).save(folder / "0.png")
    return root


def test_digits_are_split_once():
    pytest.importorskip("sklearn")
    sets = load_sets(DataConfig(dataset="digits"))
    assert (len(sets.train), len(sets.val), sets.num_classes, sets.in_chans) == (1348, 449, 10, 1)
    image, label = sets.train[0]
    assert image.size == (8, 8)
    assert label == int(sets.train.labels[0])
    again = load_sets(DataConfig(dataset="digits"))
    assert np.array_equal(again.train.images, sets.train.images)
    both = np.concatenate([sets.train.images, sets.val.images]).reshape(1797, -1)
    # all digits are there: their sum does not depend on the order
    from sklearn.datasets import load_digits

    assert both.max() == 255
    whole = np.clip(load_digits().data * 16, 0, 255).astype(np.uint8)
    assert both.sum() == whole.sum()
    with pytest.raises(ValueError, match="data_dir must be left out with dataset digits"):
        load_sets(DataConfig(dataset="digits", data_dir=Path("images")))


def test_idx_files(tmp_path):
    """Header: two zero bytes, the type, the number of axes, one big-endian size per axis."""
    folder = tmp_path / "fashion_mnist"
    folder.mkdir()
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    for part in ("train", "t10k"):
        for name, values in (("images-idx3", pixels), ("labels-idx1", np.array([7, 1], np.uint8))):
            head = bytes([0, 0, 8, values.ndim])
            head += b"".join(int(n).to_bytes(4, "big") for n in values.shape)
            file = folder / f"{part}-{name}-ubyte.gz"
            file.write_bytes(gzip.compress(head + values.tobytes()))
    sets = load_sets(DataConfig(dataset="fashion_mnist", data_dir=tmp_path))
    image, label = sets.train[1]
    assert label == 1
    assert np.array_equal(np.asarray(image), pixels[1])
    assert (sets.num_classes, sets.in_chans) == (10, 1)
    assert load_sets(DataConfig(dataset="fashion_mnist", data_dir=folder, val_split="")).val is None


def test_strung_jpegs(tmp_path):
    files, offsets = b"", [0]
    for value in (20, 200):
        stream = io.BytesIO()
        picture(value).save(stream, "JPEG")
        files += stream.getvalue()
        offsets.append(len(files))
    arrays = {
        f"{part}_{name}": value
        for part in ("train", "test")
        for name, value in (
            ("jpeg", np.frombuffer(files, np.uint8)),
            ("offset", np.array(offsets)),
            ("label", np.array([3, 9], np.uint8)),
        )
    }
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    sets = load_sets(DataConfig(dataset="cifar10_jpeg", data_dir=tmp_path))
    image, label = sets.val[1]
    assert label == 9
    assert abs(float(np.asarray(image).mean()) - 200) < 2


@pytest.mark.parametrize(
    ("name", "sizes", "channels"),
    [("fashion_mnist", (60000, 10000), 1), ("cifar10_jpeg", (50000, 10000), 3)],
)
def test_real_sets(name, sizes, channels, data_dir):
    sets = load_sets(DataConfig(dataset=name, data_dir=data_dir))
    assert (len(sets.train), len(sets.val)) == sizes
    assert sets.in_chans == channels
    assert np.array_equal(np.bincount(sets.val.labels), [1000] * 10)
    assert sets.train[len(sets.train) - 1][0].size == ((28, 28) if channels == 1 else (32, 32))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dataset": "fashion_mnist"}, "data_dir must be given with dataset fashion_mnist"),
        ({"dataset": "cifar10_jpeg", "data_dir": "."}, "data_dir must hold cifar10_jpeg.npz, got"),
        ({"data_dir": "."}, "data_dir must hold a folder train or training, got"),
        ({}, "data_dir must hold a folder train or training, got None"),
    ],
    ids=str,
)
def test_missing_files_are_named(kwargs, message, tmp_path):
    if "data_dir" in kwargs:
        kwargs = {**kwargs, "data_dir": tmp_path}
    with pytest.raises(ValueError, match=message):
        load_sets(DataConfig(**kwargs))


@unclosed
def test_folder_of_images(tmp_path):
    root = make_folder(tmp_path, {"train": ["ant", "bee", "cat"], "val": ["ant", "cat"]})
    sets = load_sets(DataConfig(data_dir=root))
    assert (sets.num_classes, sets.in_chans, len(sets.train), len(sets.val)) == (3, 3, 3, 2)
    # bees are missing among the validation images, cats keep their number
    assert [sets.val[i][1] for i in range(2)] == [0, 2]
    with pytest.raises(ValueError, match="data_dir must hold a folder test, got"):
        load_sets(DataConfig(data_dir=root, val_split="test"))
    make_folder(tmp_path, {"val": ["dog"]})
    with pytest.raises(ValueError, match=r"validation must hold classes of train, got \['dog'\]"):
        load_sets(DataConfig(data_dir=root))


@unclosed
def test_sets_of_torchvision(tmp_path):
    root = make_folder(tmp_path, {"train": ["ant", "bee"], "validation": ["ant", "bee"]})
    sets = load_sets(DataConfig(dataset="torch/image_folder", data_dir=root))
    assert sets.num_classes == 2
    sets.train.transform = train_transform(DataConfig(crop="none"), COLOUR)
    image, label = sets.train[1]
    assert image.shape == (3, 8, 12)
    assert label == 1


def test_number_of_classes_must_be_known(monkeypatch):
    monkeypatch.setattr(data, "create_dataset", lambda *args, **kwargs: [(picture(), 0)])
    with pytest.raises(ValueError, match="num_classes must be given for dataset 'wds/set', got 0"):
        load_sets(DataConfig(dataset="wds/set"))
    assert load_sets(DataConfig(dataset="wds/set", num_classes=7)).num_classes == 7


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_kind_of_picture(mode, shape):
    image = eval_transform(DataConfig(), shape)(picture(mode=mode))
    assert image.shape == shape["input_size"]
    assert image.numpy() == pytest.approx((102 / 255 - 0.5) / 0.25, abs=0.02)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"crop": "shift", "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 1.0},
        {"crop": "shift", "interpolation": "bilinear"},
        {"crop": "resized", "auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5},
        {"crop": "resized", "interpolation": "random", "color_jitter": 0.4},
        {"crop": "none", "re_prob": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_augmentation_varies_an_image(kwargs, shape):
    draw = np.random.default_rng(0)
    image = Image.fromarray(draw.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    change = train_transform(DataConfig(**kwargs), shape)
    images = [change(image) for _ in range(4)]
    assert all(x.shape == shape["input_size"] and x.isfinite().all() for x in images)
    assert not all(x.equal(images[0]) for x in images)


def test_no_augmentation_is_none():
    change = train_transform(DataConfig(crop="none"), COLOUR)
    assert change(picture()).equal(eval_transform(DataConfig(), COLOUR)(picture()))


def test_shift_moves_by_an_eighth():
    """8 rows move by at most one, 12 columns by at most two; what comes in is black."""
    change = train_transform(DataConfig(crop="shift", hflip=0.0), GREY)
    edges = set()
    for _ in range(60):
        black = change(picture(255))[0] < 0
        edges.add((int(black.all(1).sum()), int(black.all(0).sum())))
    assert edges == {(down, across) for down in (0, 1) for across in (0, 1, 2)}


def test_repetitions_stand_together_and_keep_the_length():
    sampler = RepeatedSampler(10, 3)
    order = list(sampler)
    assert len(order) == len(sampler) == 10
    assert [order.count(i) for i in dict.fromkeys(order)] == [3, 3, 3, 1]
    assert order != list(sampler)


def test_batches_are_equal_and_shuffled():
    images = StoredImages(np.zeros((10, 2, 2), np.uint8), np.arange(10))
    images.transform = lambda image: torch.zeros(1)
    labels = [batch[1].tolist() for batch in train_loader(images, 4)]
    assert [len(x) for x in labels] == [4, 4]
    assert labels != [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [len(batch[1]) for batch in train_loader(images, 16)] == [10]
    assert len(list(train_loader(images, 5, repeats=2))) == 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": -1}, "img_size must be at least 0, got -1"),
        ({"in_chans": 2}, "in_chans must be 1 or 3, or 0 for the set's own, got 2"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"hflip": 1.5}, r"hflip must be in \[0, 1\], got 1.5"),
        ({"crop": "big"}, "crop must be resized, shift or none, got 'big'"),
        ({"crop": "shift", "interpolation": "random"}, "interpolation must be bilinear or bicubic"),
        ({"crop": "shift", "auto_augment": "v0"}, "auto_augment must start with 'rand-'"),
    ],
    ids=str,
)
def test_settings_are_checked(kwargs: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**kwargs)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_models_that_exist(name):
    recipe = get_recipe(name)
    assert recipe.recipe == name
    assert timm.is_model(recipe.model)


def test_recipes_have_the_sources_rates():
    for name, images, rate in (
        ("vim_tiny", 1024, 1e-3),
        ("vim_small", 512, 1e-3),
        ("vim_tiny_stride8", 1024, 1e-5),
        ("vmamba_base", 1024, 1e-3),
    ):
        recipe = get_recipe(name)
        assert 8 * recipe.train.batch_size == images == recipe.lr_batch, name
        assert recipe.train.lr == rate, name
    assert get_recipe("vmamba_tiny").train.clip_grad == 5.0
    assert get_recipe("vim_tiny").train.clip_grad == 0.0


def test_unknown_recipe():
    with pytest.raises(ValueError, match=r"recipe must be one of none, digits, .*, got 'vim'"):
        get_recipe("vim")


def test_options_change_a_recipe():
    pytest.importorskip("tyro")
    config = parse(["--recipe", "vim_small", "--train.batch-size", "32", "--data-dir", "x"])
    expected = get_recipe("vim_small")
    loop = dataclasses.replace(expected.train, batch_size=32)
    assert config == dataclasses.replace(expected, train=loop, data_dir=Path("x"))
    assert parse([]) == get_recipe("digits")
    assert parse(["--recipe=none", "--mean", "0.5"]).mean == (0.5,)
