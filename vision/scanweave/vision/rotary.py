"""Rotary positions of a stream of patches, as LocalVim's models without a class token have them.

    (x_2i, x_2i+1) <- rotated by the angle p_i        rows in the first half of the channels,
    p_i = 14 place / side * 10000^(-2i / (D / 2))     columns in the second

    RotaryPositions   the rotation, on a grid that is set

Source: Huang et al. 2024, LocalMamba, arXiv 2403.09338; official code
https://github.com/hunto/LocalMamba/tree/75e5d1f, Apache-2.0, whose buffers have these names.
"""

import torch
from torch import Tensor, nn

# places are counted as on the grid of an image of 224 pixels
_SIDE = 14
_BASE = 10000.0


class RotaryPositions(nn.Module):
    """Rotate pairs of channels of every patch by its row and its column.

    Args:
        dim: Channels D, a multiple of 4.
        grid: Rows and columns of the patches.
        device: Where the tables lie; they are float32.

    Raises:
        ValueError: 4 does not divide `dim`.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(
        self, dim: int, grid: tuple[int, int], device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4 with rope, got {dim}")
        self.dim = dim
        for name in ("freqs_cos", "freqs_sin"):
            # in checkpoints, as the official ones
            self.register_buffer(name, torch.empty(0, device=device))
        self.set_grid(grid)

    @torch.jit.unused
    def set_grid(self, grid: tuple[int, int]) -> None:
        """Make the tables, (h w, D), of a grid."""
        half = self.dim // 2
        with torch.device("cpu"):
            rates = _BASE ** (-torch.arange(0, half, 2) / half)
            angles = [
                (torch.arange(side) / side * _SIDE).unsqueeze(1) * rates.repeat_interleave(2)
                for side in grid
            ]
            rows = angles[0].unsqueeze(1).expand(-1, grid[1], -1)
            columns = angles[1].unsqueeze(0).expand(grid[0], -1, -1)
            table = torch.cat([rows, columns], -1).flatten(0, 1)
        device = self.freqs_cos.device
        self.freqs_cos, self.freqs_sin = table.cos().to(device), table.sin().to(device)

    def forward(self, x: Tensor) -> Tensor:
        """Patches (B, h w, D), rotated."""
        pairs = x.unflatten(-1, [-1, 2])
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).to(x.dtype)
