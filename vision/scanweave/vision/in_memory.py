"""Sets that fit a GPU's memory: decoded once, augmented there, a batch at a time.

Small images cost more to load than to learn from: PIL needs 0.1 ms and more for each, so that one
process feeds a small model slower than a GPU trains it. Here a batch is one gather and a few
elementwise operations, whatever its size, and no loading process runs.

    hold_train     a set and settings -> batches of augmented images
    hold_eval      the same, resized and cropped as for validation
    HeldImages     what they return
    shifted        random crops of padded images, random mirror images
    erased         random rectangles erased, as timm's RandomErasing
"""
# timm exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms

from .data import DataConfig, PillowMode, eval_transform

# timm's and the paper's: share of the area, ratio of height to width, draws until one fits
_ERASED_AREA, _ERASED_ASPECT, _ERASED_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10


class HeldImages(Dataset[Any]):
    """Images of one size in the memory of one device; asked for a batch, it returns tensors.

    Args:
        pixels: (n, H, W, C) uint8.
        labels: (n,) int64, on the same device.
        mean: Of each channel, in 0..1.
        std: Deviation of each channel.
        pick: Makes (B, C, H, W) uint8 images of `pixels` and the numbers (B,) of those wanted;
            by default they come as they are.
        change: Applied to the normalised batch.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        pick: Callable[[Tensor, Tensor], Tensor] | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.pixels, self.labels = pixels, labels
        self._pick = pick or _as_they_are
        self._change = change
        centre, spread = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1)
            for values in (mean, std)
        )
        self._scale, self._offset = 1 / (255 * spread), -centre / spread

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch: images (B, C, H, W) float32 and labels (B,), on the device."""
        wanted = torch.tensor(indices).to(self.pixels.device, non_blocking=True)
        images = torch.addcmul(self._offset, self._pick(self.pixels, wanted).float(), self._scale)
        return images if self._change is None else self._change(images), self.labels[wanted]


def hold_train(
    images: Any, config: DataConfig, data: Mapping[str, Any], device: torch.device
) -> HeldImages:
    """Decode a set, and augment its batches as the settings say.

    Args:
        images: A set of (image, class number); its transform is set here.
        config: Settings; `crop` must be "shift" or "none", `auto_augment` empty.
        data: `input_size` (C, H, W), `mean` and `std`, as timm's `resolve_data_config` gives them.
        device: Where the images shall lie.

    Raises:
        ValueError: the set is streamed.
    """
    channels, height, width = data["input_size"]
    pick: Callable[[Tensor, Tensor], Tensor] | None = None
    if config.crop == "shift":
        mode = transforms.InterpolationMode(config.interpolation)
        decode = transforms.Compose(
            [PillowMode(channels), transforms.Resize((height, width), mode), _pixels]
        )

        def crop(pixels: Tensor, wanted: Tensor) -> Tensor:
            return shifted(pixels, wanted, (-(-height // 8), -(-width // 8)), config.hflip)

        pick = crop
    else:
        # as timm's training transform without augmentation
        decode = eval_transform(config, data, pixels=True)

    def change(batch: Tensor) -> Tensor:
        return erased(batch, config.re_prob, config.re_mode)

    pixels, labels = _decoded(images, decode, device)
    kept = change if config.re_prob else None
    return HeldImages(pixels, labels, data["mean"], data["std"], pick, kept)


def hold_eval(
    images: Any, config: DataConfig, data: Mapping[str, Any], device: torch.device
) -> HeldImages:
    """Decode a set, resized and cropped as for validation; arguments as above."""
    pixels, labels = _decoded(images, eval_transform(config, data, pixels=True), device)
    return HeldImages(pixels, labels, data["mean"], data["std"])


def _decoded(
    images: Any, decode: Callable[[Image.Image], Any], device: torch.device
) -> tuple[Tensor, Tensor]:
    """All pixels (n, H, W, C) and labels of a set."""
    if isinstance(images, IterableDataset):
        raise ValueError(
            f"in_memory must be False with a streamed set, got {type(images).__name__}"
        )
    images.transform = decode
    pairs = [images[index] for index in range(len(images))]
    # channels last: one gather then reads whole pixels
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p, _ in pairs])).permute(0, 2, 3, 1)
    labels = torch.tensor([int(label) for _, label in pairs])
    return pixels.contiguous().to(device), labels.to(device)


def _pixels(image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8, as timm hands images to its loader."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _as_they_are(pixels: Tensor, wanted: Tensor) -> Tensor:
    return pixels[wanted].permute(0, 3, 1, 2)


def shifted(pixels: Tensor, wanted: Tensor, padding: tuple[int, int], hflip: float) -> Tensor:
    """Crops at random places of images with black borders, some of them mirrored.

    Args:
        pixels: All images, (n, H, W, C) uint8.
        wanted: Numbers of those wanted, (B,).
        padding: Rows and columns of the border.
        hflip: Probability of a mirror image.

    Returns:
        (B, C, H, W) uint8.
    """
    count, device = len(wanted), pixels.device
    places = []
    for size, border in zip(pixels.shape[1:3], padding, strict=True):
        moved = torch.randint(-border, border + 1, (count, 1), device=device)
        places.append(torch.arange(size, device=device) + moved)
    rows, columns = places
    mirrored = torch.rand(count, 1, device=device) < hflip
    columns = torch.where(mirrored, columns.flip(1), columns)
    height, width = pixels.shape[1:3]
    within = ((rows >= 0) & (rows < height)).unsqueeze(2)
    within = within & ((columns >= 0) & (columns < width)).unsqueeze(1)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    images = pixels[wanted.view(-1, 1, 1), rows.unsqueeze(2), columns.unsqueeze(1)]
    return (images * within.unsqueeze(3)).permute(0, 3, 1, 2)


def erased(images: Tensor, probability: float, mode: str) -> Tensor:
    """Fill a random rectangle of some of the images.

    Args:
        images: Normalised, (B, C, H, W).
        probability: That an image has one.
        mode: "const" (zeros), "rand" (one normal draw a channel) or "pixel" (one a pixel).

    Returns:
        (B, C, H, W), a new tensor.

    Source: Zhong et al. 2017, arXiv 1708.04896; distributions as in timm's RandomErasing, drawn
        for all images at once.
    """
    count, channels, height, width = images.shape
    draw = torch.rand(5, count, _ERASED_TRIES, device=images.device)
    low, high = _ERASED_AREA
    area = (low + (high - low) * draw[0]) * (height * width)
    low, high = (math.log(value) for value in _ERASED_ASPECT)
    aspect = torch.exp(low + (high - low) * draw[1])
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(1, keepdim=True)
    tall, wide = tall.gather(1, first), wide.gather(1, first)
    chosen = fits.any(1, keepdim=True) & (draw[2, :, :1] < probability)
    spans = []
    for size, length, place in ((height, tall, draw[3, :, :1]), (width, wide, draw[4, :, :1])):
        start = (place * (size - length + 1)).floor()
        steps = torch.arange(size, device=images.device)
        spans.append((steps >= start) & (steps < start + length))
    covered = (chosen & spans[0]).view(count, 1, height, 1) & spans[1].view(count, 1, 1, width)
    shape = {"const": (1,), "rand": (count, channels, 1, 1), "pixel": images.shape}[mode]
    fill = images.new_zeros(shape) if mode == "const" else images.new_empty(shape).normal_()
    return torch.where(covered, fill, images)
