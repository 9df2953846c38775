"""One token of the selective scan on a CPU through `step.c`: when it is used, and how it is called.

    takes   whether the compiled library runs these tensors
    step    state updated in place

Compiled when the first step on a CPU runs. Without a compiler `step.py` computes it in PyTorch, and
`compiled.py` says so in the log: it is the same compiler.
"""

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

from ..compiler import BuildError, load_library
from ..launch import adjacent
from . import compiled

SOURCE = compiled.SOURCE.with_name("step.c")
# state entries that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 17
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("SCANWEAVE_COMPILED") != "0":
        try:
            return load_library(SOURCE)[0]
        except BuildError:
            pass
    compiled.status()
    return None


@functools.cache
def _types() -> frozenset[torch.dtype]:
    library = _library()
    if library is None:
        return frozenset()
    return frozenset(v for v in _TYPES if v != torch.float16 or library.scanweave_step_float16())


def takes(state: Tensor, *others: Tensor | None) -> bool:
    """Whether the library runs a step on these tensors; compiles it if none has been run yet."""
    if state.device.type != "cpu" or state.dtype != torch.float32 or state.numel() == 0:
        return False
    if state.stride(2) != 1 and state.shape[2] != 1:
        return False
    types = _types()
    return all(v is None or v.dtype in types for v in others)


def _rows(v: Tensor | None) -> tuple[int, int, int, int]:
    """Pointer, dtype and strides of (B, D) or (B, G, N) with adjacent last elements."""
    if v is None:
        return (0, 0, 0, 0)
    return (v.data_ptr(), _TYPES[v.dtype], v.stride(0), v.stride(1))


def _floats(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(torch.float32).contiguous()


def step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Advance `state` (B, D, N) by one token and return y (B, D); as the registered op."""
    y = x.new_empty(x.shape)
    rows = [None if v is None else adjacent(v) for v in (x, dt, z, B, C)]
    small = [_floats(v) for v in (A, D, dt_bias)]
    arguments = [
        max(1, min(torch.get_num_threads(), state.numel() // WORK_PER_THREAD)),
        *(*state.shape, B.shape[1], dt_softplus),
        *(state.data_ptr(), state.stride(0), state.stride(1)),
        *(0 if v is None else v.data_ptr() for v in small),
        *(field for v in (*rows, y) for field in _rows(v)),
    ]
    library: Any = _library()
    if library.scanweave_step((ctypes.c_int64 * len(arguments))(*arguments)):
        raise MemoryError("selective_scan_step has no memory left; use smaller batches")
    return y
