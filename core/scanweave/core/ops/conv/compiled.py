"""The short convolution on a CPU through `conv.c`: when it is used, and how it is called.

    takes                         whether the compiled library runs these tensors
    fits                          whether it has room for so many taps
    conv_forward, conv_backward   as those of `portable.py`; float32 sums

Without a compiler `portable.py` serves.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..launch import adjacent
from ..native import TYPES, Native, long_ends, threads

native = Native(Path(__file__).with_name("conv.c"), "the convolution")
takes = native.takes
# elements that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 16
_ABSENT = (0, 0, 0, 0)
# TAPS in conv.c
MAX_WIDTH = 16


def fits(weight: Tensor) -> bool:
    """Whether taps (D, W) are few enough."""
    return weight.shape[1] <= MAX_WIDTH


def _rows(v: Tensor | None) -> tuple[int, int, int, int]:
    """Pointer, dtype and the first two strides; none for (D,)."""
    if v is None:
        return _ABSENT
    first, second = v.stride()[:2] if v.ndim > 1 else (0, 0)
    return (v.data_ptr(), TYPES[v.dtype], first, second)


class _Call:
    """The arguments that both functions take first; holds what the pointers point to."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        left: int,
        reverse: bool,
        silu: bool,
    ) -> None:
        rows = [
            adjacent(x),
            weight,
            None if bias is None else bias.contiguous(),
            None if state is None else adjacent(state.to(x.dtype)),
        ]
        cu = long_ends(cu_seqlens)
        self.kept = (rows, cu)
        self.arguments: list[int] = [
            threads(x.numel(), WORK_PER_THREAD),
            *x.shape,
            *(weight.shape[1], left, reverse, silu),
            *((0, 0) if cu is None else (cu.shape[0] - 1, cu.data_ptr())),
            *(field for v in rows for field in _rows(v)),
        ]


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> Tensor:
    """Compute y (B, L, D); arguments as the registered op's."""
    call = _Call(x, weight, bias, state, cu_seqlens, left, reverse, silu)
    y = x.new_empty(x.shape)
    native.run("scanweave_conv_forward", [*call.arguments, *_rows(y)])
    return y


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> list[Tensor]:
    """Gradients of x, weight and, where given, bias and state."""
    call = _Call(x, weight, bias, state, cu_seqlens, left, reverse, silu)
    dy, dx = adjacent(dy), x.new_empty(x.shape)
    dweight = x.new_empty(weight.shape, dtype=torch.float32)
    dbias = x.new_empty(weight.shape[:1], dtype=torch.float32)
    dstate = None if state is None else state.new_zeros(state.shape)
    rows = [field for v in (dy, dx, dstate) for field in _rows(v)]
    pointers = (dweight.data_ptr(), dbias.data_ptr())
    native.run("scanweave_conv_backward", [*call.arguments, *rows, *pointers])
    grads = [dx, dweight.to(weight.dtype)]
    if bias is not None:
        grads.append(dbias.to(bias.dtype))
    if dstate is not None:
        grads.append(dstate)
    return grads
