"""Sets in memory give the batches that timm's parts would, only at once."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

pytest.importorskip("accelerate")

from scanweave.core.training import TrainConfig
from scanweave.vision.data import DataConfig, ImageSets, eval_loader, eval_transform, train_loader
from scanweave.vision.in_memory import HeldImages, erased, hold_eval, hold_train, shifted
from scanweave.vision.settings import Config
from scanweave.vision.stored import StoredImages
from scanweave.vision.train import fit

CPU = torch.device("cpu")
COLOUR = {
    "input_size": (3, 8, 12),
    "mean": (0.4, 0.5, 0.6),
    "std": (0.25, 0.2, 0.3),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
GREY = {**COLOUR, "input_size": (1, 8, 12), "mean": (0.5,), "std": (0.25,)}


def stored(count: int, colour: bool = True, size: tuple[int, int] = (8, 12)) -> StoredImages:
    draw = np.random.default_rng(0)
    shape = (count, *size, 3) if colour else (count, *size)
    return StoredImages(draw.integers(0, 256, shape, dtype=np.uint8), np.arange(count) % 5)


@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
@pytest.mark.parametrize("size", [(8, 12), (9, 7)], ids=str)
@pytest.mark.parametrize("data", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("colour", [False, True])
def test_validation_sees_the_same_images(crop_pct, size, data, colour):
    config = DataConfig(crop_pct=crop_pct)
    one_by_one, held = (stored(5, colour, size) for _ in range(2))
    one_by_one.transform = eval_transform(config, data)
    held = hold_eval(held, config, data, CPU)
    pairs = zip(eval_loader(one_by_one, 2), eval_loader(held, 2), strict=True)
    for (images, labels), (found, numbers) in pairs:
        torch.testing.assert_close(found, images, rtol=0, atol=1e-5)
        assert numbers.equal(labels)
        assert found.dtype == torch.float32


def test_without_augmentation_training_sees_them_too():
    config = DataConfig(crop="none", in_memory=True, hflip=0.5)
    held = hold_train(stored(6), config, COLOUR, CPU)
    plain = hold_eval(stored(6), config, COLOUR, CPU)
    order = [4, 0, 3]
    for found, expected in zip(held.__getitems__(order), plain.__getitems__(order), strict=True):
        assert found.equal(expected)
    assert held[4][0].equal(plain[4][0])


def test_shifts_are_crops_of_padded_images():
    """Every crop is one of the windows of the padded image or of its mirror image."""
    pixels = torch.randint(1, 256, (2, 4, 5, 3), dtype=torch.uint8)
    found = shifted(pixels, torch.tensor([1, 0] * 200), (1, 2), 0.5)
    seen = [set(), set()]
    for number, crop in enumerate(found):
        image = pixels[(number + 1) % 2]
        padded = torch.nn.functional.pad(image, (0, 0, 2, 2, 1, 1))
        windows = {
            (top, left, flip): padded[top : top + 4, left : left + 5].flip(1 if flip else ())
            for top in range(3)
            for left in range(5)
            for flip in (False, True)
        }
        match = [key for key, window in windows.items() if window.permute(2, 0, 1).equal(crop)]
        assert len(match) == 1
        seen[number % 2].add(match[0])
    # 30 windows, each drawn with equal probability
    assert all(len(keys) == 30 for keys in seen)
    still = shifted(pixels, torch.tensor([0, 1]), (0, 0), 0.0)
    assert still.equal(pixels.permute(0, 3, 1, 2))
    assert shifted(pixels, torch.tensor([0]), (0, 0), 1.0)[0].equal(
        pixels[0].flip(1).permute(2, 0, 1)
    )


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_a_rectangle_is_erased(mode):
    images = torch.full((400, 3, 16, 20), 7.0)
    found = erased(images, 0.5, mode)
    changed = (found != 7).any(1)
    shares = []
    for mask, image in zip(changed, found, strict=True):
        if not mask.any():
            continue
        rows, columns = mask.any(1), mask.any(0)
        inside = image[:, rows][:, :, columns]
        assert mask.sum() == rows.sum() * columns.sum(), "a rectangle"
        assert int(rows.int().diff().abs().sum()) <= 2, "in one piece"
        shares.append(float(mask.float().mean()))
        if mode == "const":
            assert not inside.any()
        same = inside.eq(inside[:, :1, :1]).all()
        assert bool(same) == (mode != "pixel" or mask.sum() == 1)
    # 400 fair draws: 5 standard deviations are 50
    assert 150 <= len(shares) <= 250
    assert 0.01 < min(shares) < 0.05
    assert 0.3 < max(shares) < 0.36
    assert images.eq(7).all()
    assert erased(images, 0.0, mode).equal(images)


def test_batches_follow_the_seed_and_vary():
    config = DataConfig(crop="shift", in_memory=True, re_prob=0.5)
    held = hold_train(stored(8), config, COLOUR, CPU)
    torch.manual_seed(3)
    batches = [held.__getitems__([1, 2, 3])[0] for _ in range(2)]
    assert not batches[0].equal(batches[1])
    torch.manual_seed(3)
    assert held.__getitems__([1, 2, 3])[0].equal(batches[0])
    loader = train_loader(held, 4, num_workers=3)
    assert loader.num_workers == 0
    assert [len(labels) for _, labels in loader] == [4, 4]


def striped(count: int, seed: int) -> StoredImages:
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 60, (count, 8, 8))
    for number, image in enumerate(images):
        lines = image if number % 2 == 0 else image.T
        lines[draw.integers(2) :: 2] += 190
    return StoredImages(images.astype(np.uint8), np.arange(count) % 2)


def settings(folder: Any, **loop: Any) -> Config:
    return Config(
        img_size=8,
        model_args=("patch_size=4", "embed_dim=16", "depth=1", "d_state=2"),
        crop="shift",
        crop_pct=1.0,
        in_memory=True,
        re_prob=0.25,
        train=TrainConfig(
            output_dir=folder,
            batch_size=16,
            lr=1e-2,
            cpu=True,
            progress=False,
            tensorboard=False,
            **{"epochs": 8, **loop},
        ),
    )


def test_a_model_learns_from_memory_and_goes_on(tmp_path):
    def sets() -> ImageSets:
        return ImageSets(striped(64, 0), striped(24, 1), num_classes=2, in_chans=1)

    straight, result = fit(settings(tmp_path / "a"), sets())
    assert result.metrics["top1"] >= 95
    half = settings(tmp_path / "b", max_steps=13, schedule="constant")
    fit(half, sets())
    loop = dataclasses.replace(half.train, max_steps=20, resume=True)
    resumed, _ = fit(dataclasses.replace(half, train=loop), sets())
    whole, _ = fit(settings(tmp_path / "c", max_steps=20, schedule="constant"), sets())
    for name, value in whole.state_dict().items():
        assert value.equal(resumed.state_dict()[name]), name
    assert not straight.training


def test_what_cannot_be_held():
    for kwargs in ({}, {"crop": "shift", "auto_augment": "rand-m5"}):
        with pytest.raises(ValueError, match="in_memory must be False unless crop is shift or non"):
            DataConfig(in_memory=True, **kwargs)

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match="in_memory must be False with a streamed set, got Stream"):
        hold_eval(Stream(), DataConfig(), GREY, CPU)


def test_labels_and_pixels_are_kept_once():
    held = hold_eval(stored(3), DataConfig(), COLOUR, CPU)
    assert isinstance(held, HeldImages)
    assert held.pixels.dtype == torch.uint8
    assert held.pixels.shape == (3, 8, 12, 3)
    assert held.labels.tolist() == [0, 1, 2]
