"""The rotation of channel pairs in PyTorch's operators, written where the result belongs.

Neighbouring channels are complex numbers as they lie in memory, so one product turns them. The
gradient of x is dy turned back, and with it that of an angle is x1 dx2 - x2 dx1.

Letters: P channels, R pairs that turn.
"""

import torch
from torch import Tensor

from ..checks import computing_dtype


def _complex(x: Tensor) -> Tensor:
    """(..., 2 R) -> (..., R), a view if strides and offset let it be one."""
    pairs = x.unflatten(-1, (-1, 2))
    even = all(s % 2 == 0 for s in (*pairs.stride()[:-1], pairs.storage_offset()))
    return torch.view_as_complex(pairs if even and pairs.stride(-1) == 1 else pairs.contiguous())


class Turn:
    """The turn by `angles` (..., R), broadcast, in a given dtype; forwards or back."""

    def __init__(self, angles: Tensor, dtype: torch.dtype, halves: bool) -> None:
        self.dtype, self.halves, self.count = dtype, halves, angles.shape[-1]
        angles = angles.to(dtype)
        self.cos, self.sin = angles.cos(), angles.sin()

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both channels of every pair, (..., R) each."""
        width = 2 * self.count
        if self.halves:
            return x[..., : self.count], x[..., self.count : width]
        return x[..., :width:2], x[..., 1:width:2]

    def wide(self, x: Tensor, back: bool) -> Tensor:
        """`x` (..., P) turned, new and contiguous, in the dtype of the turn."""
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        sin = -self.sin if back else self.sin
        width, moving, to = 2 * self.count, x, out
        # views of everything would cost single steps more than the arithmetic
        if width < x.shape[-1]:
            out[..., width:].copy_(x[..., width:])
            moving, to = x[..., :width], out[..., :width]
        moving = moving.to(self.dtype)
        if self.halves:
            first, second = self._parts(moving)
            to_first, to_second = self._parts(out)
            torch.mul(first, self.cos, out=to_first).addcmul_(second, sin, value=-1)
            torch.mul(second, self.cos, out=to_second).addcmul_(first, sin)
        else:
            turn = torch.complex(self.cos, sin)
            torch.mul(_complex(moving), turn, out=_complex(to))
        return out

    def slopes(self, x: Tensor, dx: Tensor) -> Tensor:
        """Gradient of the angles, not summed over what shares them, (..., R)."""
        first, second = self._parts(x)
        dfirst, dsecond = self._parts(dx)
        return (first * dsecond).addcmul_(second, dfirst, value=-1)


def forward(x: list[Tensor], angles: Tensor, halves: bool) -> list[Tensor]:
    """Each of `x` turned, in its own dtype."""
    turn = Turn(angles, computing_dtype(*x, angles), halves)
    return [turn.wide(u, False).to(u.dtype) for u in x]


def backward(
    dout: list[Tensor], x: list[Tensor], angles: Tensor, halves: bool, slopes: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of `x`, and if asked of `angles`."""
    turn = Turn(angles, computing_dtype(*dout, *x, angles), halves)
    dangles, grads = None, []
    for du, u in zip(dout, x, strict=True):
        dx = turn.wide(du, True)
        grads.append(dx.to(u.dtype))
        if slopes:
            one = turn.slopes(u.to(turn.dtype), dx).sum_to_size(angles.shape)
            dangles = one if dangles is None else dangles.add_(one)
    return grads, None if dangles is None else dangles.to(angles.dtype).contiguous()
