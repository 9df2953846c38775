"""The short convolution on a CPU through `conv.c`: when it is used, and how it is called.

    takes                         whether the compiled library runs these tensors
    conv_forward, conv_backward   as those of `portable.py`; float32 sums

Compiled when the first convolution on a CPU runs; `portable.py` serves where there is no compiler,
and `selective.compiled` says so in the log: it is the same compiler.
"""

import ctypes
import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiler import BuildError, load_library
from ..launch import adjacent
from ..selective import compiled as scan

SOURCE = Path(__file__).with_name("conv.c")
# elements that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 16
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABSENT = (0, 0, 0, 0)


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("SCANWEAVE_COMPILED") != "0":
        try:
            return load_library(SOURCE)[0]
        except BuildError:
            pass
    scan.status()
    return None


@functools.cache
def _types() -> frozenset[torch.dtype]:
    library = _library()
    if library is None:
        return frozenset()
    return frozenset(v for v in _TYPES if v != torch.float16 or library.scanweave_conv_float16())


def takes(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the library runs an op on these tensors; compiles it if none has been run yet."""
    given = [v for v in tensors if v is not None]
    return all(v.device.type == "cpu" for v in given) and all(v.dtype in _types() for v in given)


def _rows(v: Tensor | None) -> tuple[int, int, int, int]:
    """Pointer, dtype and the first two strides; none for (D,)."""
    if v is None:
        return _ABSENT
    first, second = v.stride()[:2] if v.ndim > 1 else (0, 0)
    return (v.data_ptr(), _TYPES[v.dtype], first, second)


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
        cu = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        self.kept = (rows, cu)
        self.arguments: list[int] = [
            max(1, min(torch.get_num_threads(), x.numel() // WORK_PER_THREAD)),
            *x.shape,
            *(weight.shape[1], left, reverse, silu),
            *((0, 0) if cu is None else (cu.shape[0] - 1, cu.data_ptr())),
            *(field for v in rows for field in _rows(v)),
        ]


def _run(name: str, arguments: list[int]) -> None:
    library: Any = _library()
    # an array of int64 stands for the struct: ten times faster to fill than ctypes fields
    if library[name]((ctypes.c_int64 * len(arguments))(*arguments)):
        raise MemoryError("the convolution has no memory left for its sums; use shorter batches")


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
    _run("scanweave_conv_forward", [*call.arguments, *_rows(y)])
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
    _run("scanweave_conv_backward", [*call.arguments, *rows, *pointers])
    grads = [dx, dweight.to(weight.dtype)]
    if bias is not None:
        grads.append(dbias.to(bias.dtype))
    if dstate is not None:
        grads.append(dstate)
    return grads
