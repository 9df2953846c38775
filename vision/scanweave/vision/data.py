"""Image sets, augmentation and batches for training, from timm's parts.

What timm cannot read by itself are three small sets, those of `stored.py`.

    DataConfig       settings
    ImageSets        training and validation images, and what a model must know of them
    load_sets        settings -> ImageSets
    train_transform  settings -> augmentation
    eval_transform   settings -> resize and crop
    train_loader     a set -> shuffled batches
    eval_loader      a set -> all of it in order
"""
# timm exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from torchvision import transforms

from .stored import STORED, digits

_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how images are varied."""

    dataset: str = ""
    """`digits` (in scikit-learn), `fashion_mnist` or `cifar10_jpeg` (files in `data_dir`), a name
    of timm's such as `torch/cifar10` or `hfds/user/set`, or empty for a folder of images."""
    data_dir: Path | None = None
    """Folder of the set; `train/<class>/<image>` and `validation/<class>/<image>` in the plain
    case."""
    train_split: str = "train"
    """Part to train on."""
    val_split: str = "validation"
    """Part to validate on; empty for none."""
    download: bool = False
    """Let torchvision fetch the set where timm can ask it to."""
    num_classes: int = 0
    """Classes; 0 takes those of the set, where it tells."""
    in_chans: int = 0
    """Image channels, 1 or 3; 0 takes the set's own."""
    img_size: int = 0
    """Side of the images that the model gets; 0 takes the model's."""
    mean: tuple[float, ...] = ()
    """Pixel mean of each channel, in 0..1; empty takes the model's."""
    std: tuple[float, ...] = ()
    """Pixel deviation of each channel; empty takes the model's."""

    crop: Literal["resized", "shift", "none"] = "resized"
    """Training crop: of random size and shape, shifted by up to an eighth, or centred with no
    augmentation but random erasing."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a `resized` crop."""
    hflip: float = 0.5
    """Probability of a mirror image."""
    color_jitter: float = 0.3
    """Strength of colour changes; timm leaves them out with `auto_augment`. Not with `shift`."""
    auto_augment: str = ""
    """timm's policy, such as `rand-m9-mstd0.5-inc1`; with `shift` it must be a `rand-` one."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    """How training images are resized; `random` not with `shift`."""
    re_prob: float = 0.0
    """Probability of erasing a rectangle."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What it is filled with: zeros, one random colour, or noise."""
    repeats: int = 1
    """Times an image appears in an epoch, each time augmented anew; the length of the epoch is
    kept, so that it sees a part of the images (repeated augmentation)."""
    crop_pct: float = 0.0
    """Share of the resized image that validation looks at; 0 takes the model's."""
    eval_batch_size: int = 0
    """Batch size of validation; 0 takes the training's."""
    in_memory: bool = False
    """Keep all images, decoded, on the device that trains, and augment them there, for sets of
    small images; with `crop` shift or none, without `auto_augment` and loading processes."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "img_size", "eval_batch_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.in_chans not in (0, 1, 3):
            raise ValueError(
                f"in_chans must be 1 or 3, or 0 for the set's own, got {self.in_chans}"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        for name in ("hflip", "re_prob", "crop_pct"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.crop not in ("resized", "shift", "none"):
            raise ValueError(f"crop must be resized, shift or none, got {self.crop!r}")
        if self.crop == "shift" and self.interpolation == "random":
            raise ValueError(
                "interpolation must be bilinear or bicubic with crop shift, got random"
            )
        if self.crop == "shift" and self.auto_augment and self.auto_augment[:5] != "rand-":
            raise ValueError(
                f"auto_augment must start with 'rand-' with crop shift, got {self.auto_augment!r}"
            )
        if self.in_memory and (self.crop == "resized" or self.auto_augment):
            raise ValueError(
                "in_memory must be False unless crop is shift or none and auto_augment is empty, "
                f"got {self.crop!r} and {self.auto_augment!r}"
            )


@dataclass
class ImageSets:
    """Images to train on and to validate on; `transform` of both is still to be set."""

    train: Any
    val: Any
    num_classes: int
    in_chans: int


class RepeatedSampler(Sampler[int]):
    """Every image `repeats` times in a row, in random order, cut to one epoch's length.

    Source: Hoffer et al. 2020, arXiv 1901.09335. DeiT gives the repetitions to different
        processes of a step; here they stand in one batch.
    """

    def __init__(self, length: int, repeats: int) -> None:
        self.length, self.repeats = length, repeats

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.length).repeat_interleave(self.repeats)
        yield from order[: self.length].tolist()


def load_sets(config: DataConfig, batch_size: int = 1) -> ImageSets:
    """Open the sets that the settings name.

    Args:
        config: Settings.
        batch_size: For sets that timm streams.

    Raises:
        ValueError: a part or a file is missing, both parts have other classes, or the number of
            classes is neither given nor known.
    """
    if config.dataset == "digits":
        if config.data_dir is not None:
            raise ValueError(
                "data_dir must be left out with dataset digits; for other images choose another "
                f"--recipe (none for plain settings) or --dataset, got {config.data_dir}"
            )
        train, val, classes, channels = *digits(), 10, 1
    elif config.dataset in STORED:
        if config.data_dir is None:
            raise ValueError(f"data_dir must be given with dataset {config.dataset}, got None")
        load, channels = STORED[config.dataset]
        train, val, classes = *load(config.data_dir), 10
    else:
        train, val = _timm_sets(config, batch_size)
        classes, channels = len(_classes(train)), 3
    if not config.val_split:
        val = None
    classes = config.num_classes or classes
    if not classes:
        raise ValueError(f"num_classes must be given for dataset {config.dataset!r}, got 0")
    return ImageSets(train, val, classes, config.in_chans or channels)


def _timm_sets(config: DataConfig, batch_size: int) -> tuple[Any, Any]:
    root = config.data_dir
    if not config.dataset:
        for split in filter(None, (config.train_split, config.val_split)):
            names = _FOLDERS.get(split, (split,))
            # timm would quietly take the whole folder for both parts
            if root is None or not any((root / name).exists() for name in names):
                raise ValueError(
                    f"data_dir must hold a folder {' or '.join(names)}, got {root}; see "
                    "train_split and val_split (empty for no validation)"
                )

    def open_part(split: str, class_map: Mapping[str, int] | None = None) -> Any:
        return create_dataset(
            config.dataset,
            root=None if root is None else str(root),
            split=split,
            is_training=split == config.train_split,
            download=config.download,
            batch_size=batch_size,
            class_map=class_map,  # type: ignore[arg-type]
        )

    train = open_part(config.train_split)
    if not config.val_split:
        return train, None
    val = open_part(config.val_split)
    known, found = _classes(train), _classes(val)
    if odd := sorted(set(found) - set(known)):
        raise ValueError(f"{config.val_split} must hold classes of {config.train_split}, got {odd}")
    if found != known and hasattr(val, "reader"):
        # a class without validation images would shift the numbers of those behind it
        val = open_part(config.val_split, known)
    return train, val


def _classes(images: Any) -> dict[str, int]:
    """Class numbers by name, empty where the set does not tell."""
    for owner in (getattr(images, "reader", None), images):
        table = getattr(owner, "class_to_idx", None)
        if isinstance(table, Mapping):
            return {str(name): int(number) for name, number in table.items()}
    return {}


def train_transform(config: DataConfig, data: Mapping[str, Any]) -> Callable[[Image.Image], Any]:
    """Augmentation of one image, PIL to (C, H, W) float32.

    Args:
        config: Settings.
        data: `input_size` (C, H, W), `mean` and `std`, as timm's `resolve_data_config` gives them.
    """
    size, mean, std = data["input_size"][1:], data["mean"], data["std"]
    erase = {"re_prob": config.re_prob, "re_mode": config.re_mode}
    steps: list[Any] = [PillowMode(data["input_size"][0])]
    if config.crop == "shift":
        policy = config.auto_augment
        hints = {
            "translate_const": int(min(size) * 0.45),
            "img_mean": tuple(min(255, round(255 * x)) for x in mean),
        }
        steps += [
            transforms.Resize(size, transforms.InterpolationMode(config.interpolation)),
            transforms.RandomCrop(size, padding=[-(-size[1] // 8), -(-size[0] // 8)]),
            transforms.RandomHorizontalFlip(config.hflip),
            *([rand_augment_transform(policy, hints)] if policy else []),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
            RandomErasing(config.re_prob, mode=config.re_mode, device="cpu"),
        ]
        return transforms.Compose(steps)
    steps.append(
        create_transform(
            input_size=data["input_size"],
            is_training=True,
            no_aug=config.crop == "none",
            scale=config.scale,
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment or None,
            interpolation=config.interpolation,
            mean=mean,
            std=std,
            **erase,
        )
    )
    if config.crop == "none" and config.re_prob:
        steps.append(RandomErasing(config.re_prob, mode=config.re_mode, device="cpu"))
    return transforms.Compose(steps)


def eval_transform(
    config: DataConfig, data: Mapping[str, Any], *, pixels: bool = False
) -> Callable[[Image.Image], Any]:
    """Resize and centre crop of one image, PIL to (C, H, W) float32, or uint8 with `pixels`."""
    crop = create_transform(
        input_size=data["input_size"],
        interpolation=data["interpolation"],
        mean=data["mean"],
        std=data["std"],
        crop_pct=config.crop_pct or data["crop_pct"],
        use_prefetcher=pixels,
    )
    return transforms.Compose([PillowMode(data["input_size"][0]), crop])


class PillowMode:
    """Turns an image grey or coloured, whatever the file holds."""

    def __init__(self, channels: int) -> None:
        self.mode = "L" if channels == 1 else "RGB"

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image, converted where it has to be."""
        return image if image.mode == self.mode else image.convert(self.mode)


def train_loader(
    images: Dataset[Any], batch_size: int, *, repeats: int = 1, num_workers: int = 0
) -> DataLoader[Any]:
    """Shuffled batches of equal size; a set that is smaller than one gives one batch.

    Args:
        images: What to draw from; with `__getitems__` it makes whole batches itself.
        batch_size: Images of a batch.
        repeats: See `DataConfig.repeats`.
        num_workers: Loading processes.
    """
    streamed = isinstance(images, IterableDataset)
    length = 0 if streamed else len(images)  # type: ignore[arg-type]
    sampler = RepeatedSampler(length, repeats) if repeats > 1 and not streamed else None
    whole = _makes_batches(images)
    workers = 0 if whole else num_workers
    return DataLoader(
        images,
        batch_size,
        shuffle=sampler is None and not streamed,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is if whole else None,
        pin_memory=torch.cuda.is_available() and not whole,
        drop_last=length >= batch_size,
        persistent_workers=workers > 0,
    )


def eval_loader(images: Dataset[Any], batch_size: int, *, num_workers: int = 0) -> DataLoader[Any]:
    """All images in order; arguments as above."""
    if _makes_batches(images):
        return DataLoader(images, batch_size, collate_fn=_as_it_is)
    return DataLoader(images, batch_size, num_workers=num_workers)


def _makes_batches(images: Any) -> bool:
    return callable(getattr(images, "__getitems__", None))


def _as_it_is(batch: Any) -> Any:
    return batch
