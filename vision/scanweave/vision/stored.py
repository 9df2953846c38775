"""Small sets that timm cannot read by itself, in memory as arrays or as encoded files.

StoredImages    images and class numbers
STORED          name -> reader of files in a folder, and channels
digits          scikit-learn's handwritten digits
"""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

_TEST_SHARE = 0.25


class StoredImages(Dataset[Any]):
    """Images kept in memory, as pixels or as encoded files.

    Args:
        images: uint8, (n, H, W) or (n, H, W, 3); or n encoded images.
        labels: n class numbers.
    """

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.images[index]
        image = Image.open(io.BytesIO(item)) if isinstance(item, bytes) else Image.fromarray(item)
        return image if self.transform is None else self.transform(image), int(self.labels[index])


class EncodedImages:
    """A sequence of files that lie one behind the other in one array of bytes."""

    def __init__(self, content: np.ndarray, offsets: np.ndarray) -> None:
        self.content, self.offsets = content, offsets

    def __getitem__(self, index: int) -> bytes:
        return self.content[self.offsets[index] : self.offsets[index + 1]].tobytes()


def digits() -> tuple[StoredImages, StoredImages]:
    """The 1,797 digits of scikit-learn, 8 x 8, three quarters and one quarter."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "dataset digits needs scikit-learn: pip install 'scanweave[demo]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    # 0..16 become 0..255
    images = np.clip(np.asarray(pixels) * 16, 0, 255).astype(np.uint8).reshape(-1, 8, 8)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = np.split(order, [round(_TEST_SHARE * len(order))])
    numbers = np.asarray(labels)
    return StoredImages(images[train], numbers[train]), StoredImages(images[test], numbers[test])


def _find(root: Path, name: str) -> Path:
    """A file in `root` or up to two folders below."""
    found = next((p for depth in ("", "*/", "*/*/") for p in sorted(root.glob(depth + name))), None)
    if found is None:
        raise ValueError(f"data_dir must hold {name}, got {root}")
    return found


def _fashion_mnist(root: Path) -> tuple[StoredImages, StoredImages]:
    """Original IDX files: a header of four bytes and one size per axis, then uint8."""

    def read(name: str) -> np.ndarray:
        data = gzip.decompress(_find(root, name).read_bytes())
        sizes = np.frombuffer(data, ">u4", data[3], 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(sizes)

    parts = [
        StoredImages(read(f"{part}-images-idx3-ubyte.gz"), read(f"{part}-labels-idx1-ubyte.gz"))
        for part in ("train", "t10k")
    ]
    return parts[0], parts[1]


def _cifar10_jpeg(root: Path) -> tuple[StoredImages, StoredImages]:
    """JPEG files in `cifar10_jpeg.npz`: `<part>_jpeg`, `<part>_offset`, `<part>_label`."""
    with np.load(_find(root, "cifar10_jpeg.npz"), allow_pickle=False) as file:
        parts = [
            StoredImages(
                EncodedImages(file[f"{part}_jpeg"], file[f"{part}_offset"]), file[f"{part}_label"]
            )
            for part in ("train", "test")
        ]
    return parts[0], parts[1]


STORED: dict[str, tuple[Callable[[Path], tuple[StoredImages, StoredImages]], int]] = {
    "fashion_mnist": (_fashion_mnist, 1),
    "cifar10_jpeg": (_cifar10_jpeg, 3),
}
