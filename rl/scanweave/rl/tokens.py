"""Embeddings of what is no flat vector: images, and several choices at once.

    ImageEncoder      images (..., C, H, W) or (..., H, W, C) -> vectors (..., D)
    ChoiceEmbedding   M choices (..., M) -> vectors (..., D), the sum of M tables' rows

Letters: C channels of an image (frames times colours), H, W its sides, D model channels,
M choices made at once.

Source of the encoder's sizes: Mnih et al. 2015 (Nature 518), used by Chen et al. 2021,
arXiv 2106.01345, for Atari.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ImageEncoder(nn.Sequential):
    """Three convolutions and a Linear, tanh at the end; child names are the published model's.

    Args:
        shape: Of one image as the data holds it: (C, H, W), (H, W, C) or (H, W). The smaller
            one of the first and the last axis is the channels.
        hidden_size: Model channels, D.
        device: Where to build.
        dtype: Type of the parameters.

    Raises:
        ValueError: the shape is no image's, or a side is below 36 pixels.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = tuple(shape)
        if len(sizes) not in (2, 3):
            raise ValueError(f"state_dim must be (C, H, W), (H, W, C) or (H, W), got {sizes}")
        last = len(sizes) == 3 and sizes[2] < sizes[0]
        channels = 1 if len(sizes) == 2 else sizes[2] if last else sizes[0]
        height, width = sizes[:2] if last or len(sizes) == 2 else sizes[1:]
        rows, columns = _side(height), _side(width)
        if rows < 1 or columns < 1:
            raise ValueError(f"state_dim must have sides of at least 36 pixels, got {sizes}")
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            nn.Conv2d(channels, 32, 8, stride=4, **dd),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, **dd),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, **dd),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * rows * columns, hidden_size, **dd),
            nn.Tanh(),
        )
        self.shape, self.channels, self.channels_last = sizes, channels, last

    def forward(self, input: Tensor) -> Tensor:
        """Images (..., *shape), pixels divided by 255, to (..., D)."""
        batch = input.shape[: -len(self.shape)]
        flat = input.reshape(-1, *self.shape)
        if len(self.shape) == 2:
            flat = flat.unsqueeze(1)
        elif self.channels_last:
            flat = flat.permute(0, 3, 1, 2)
        return super().forward(flat.contiguous()).unflatten(0, batch)


class ChoiceEmbedding(nn.Module):
    """A table for each of M choices; the rows that were chosen are added.

    Args:
        choices: Options of each choice, M numbers.
        hidden_size: Model channels, D.
        device: Where to build.
        dtype: Type of the parameters.
    """

    offsets: Tensor

    def __init__(
        self,
        choices: Sequence[int],
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(choices), hidden_size, device=device, dtype=dtype)
        starts = torch.tensor([0, *choices[:-1]], device=device).cumsum(0)
        self.register_buffer("offsets", starts, persistent=False)

    def forward(self, actions: Tensor) -> Tensor:
        """Choices (..., M) int64 to (..., D)."""
        return self.table(actions + self.offsets).sum(dim=-2)


def _side(pixels: int) -> int:
    """Side of the last convolution's output."""
    return (((pixels - 8) // 4 + 1) - 4) // 2 + 1 - 2
