"""The definition of the rotation of channel pairs.

    y1 = x1 cos(a) - x2 sin(a)
    y2 = x1 sin(a) + x2 cos(a)              (x1, x2) times exp(i a); the other channels stay

Pair j of R is channels 2 j and 2 j + 1, or, in halves, j and j + R. Turning back is turning by -a.
Computed in float32, or float64 if an input is.
"""

import torch
from torch import Tensor

from ..checks import computing_dtype


def rotate_pairs_ref(x: Tensor, angles: Tensor, *, halves: bool = False) -> Tensor:
    """The definition. Same contract as `rotate_pairs`."""
    dtype, count = computing_dtype(x, angles), angles.shape[-1]
    moving, rest = x.split([2 * count, x.shape[-1] - 2 * count], -1)
    axis = -2 if halves else -1
    first, second = moving.to(dtype).unflatten(-1, (2, -1) if halves else (-1, 2)).unbind(axis)
    cos, sin = torch.cos(angles.to(dtype)), torch.sin(angles.to(dtype))
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], axis)
    return torch.cat([turned.flatten(-2).to(x.dtype), rest], -1)
