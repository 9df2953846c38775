"""The linear scan on a CPU through `linear.c`: when it is used, and how it is called.

    takes               whether the compiled library runs these tensors
    forward, backward   real numbers, float32 states

Compiled when the first scan on a CPU runs; `portable.py` serves where there is no compiler. Whether
and why is what `selective.compiled.status` says: it is the same compiler.

Letters: S sequences, D channels.
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

SOURCE = Path(__file__).with_name("linear.c")
# elements that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 16
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("SCANWEAVE_COMPILED") == "0":
        return None
    try:
        return load_library(SOURCE)[0]
    except BuildError:
        return None


@functools.cache
def _types() -> frozenset[torch.dtype]:
    library = _library()
    if library is None:
        return frozenset()
    return frozenset(v for v in _TYPES if v != torch.float16 or library.scanweave_linear_float16())


def takes(tensors: Iterable[Tensor]) -> bool:
    """Whether the library runs an op on these tensors; compiles it if none has been run yet."""
    return all(v.device.type == "cpu" for v in tensors) and all(
        v.dtype in _types() for v in tensors
    )


def _rows(v: Tensor) -> tuple[int, int, int, int]:
    """Pointer, dtype and strides of (B, L, D) with adjacent channels, or of (D,) and (S, D)."""
    batch, step = (v.stride(0), v.stride(1)) if v.ndim == 3 else (0, 0)
    return (v.data_ptr(), _TYPES[v.dtype], batch, step)


def _floats(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(torch.float32).contiguous()


def _pointer(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


class _Call:
    """The arguments that both functions take first; holds what the pointers point to."""

    def __init__(
        self,
        x: Tensor,
        log_a: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> None:
        constant = log_a.ndim == 1
        rows = adjacent(x), log_a.float().contiguous() if constant else adjacent(log_a)
        initial = _floats(initial_state)
        cu = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        self.sequences = x.shape[0] if cu is None else cu.shape[0] - 1
        self.kept = (rows, initial, cu)
        self.arguments: list[int] = [
            max(1, min(torch.get_num_threads(), x.numel() // WORK_PER_THREAD)),
            *(self.sequences, x.shape[1], x.shape[2], reverse, constant),
            *(_pointer(cu), _pointer(initial)),
            *(field for v in rows for field in _rows(v)),
        ]


def _run(name: str, arguments: list[int]) -> None:
    library: Any = _library()
    # an array of int64 stands for the struct: ten times faster to fill than ctypes fields
    if library[name]((ctypes.c_int64 * len(arguments))(*arguments)):
        raise MemoryError("linear_scan has no memory left for its states; use shorter batches")


def forward(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States (B, L, D) in the dtype of x and the final ones (S, D) in float32."""
    call = _Call(x, log_a, initial_state, cu_seqlens, reverse)
    h = x.new_empty(x.shape)
    final = x.new_empty((call.sequences, x.shape[2]), dtype=torch.float32)
    _run("scanweave_linear_forward", [*call.arguments, *_rows(h), _pointer(final)])
    return h, final


def backward(
    dh: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of log_a, and of the initial state in float32."""
    call = _Call(x, log_a, initial_state, cu_seqlens, reverse)
    dh, last, dx = adjacent(dh), _floats(dfinal), x.new_empty(x.shape)
    dinitial = x.new_empty((call.sequences, x.shape[2]), dtype=torch.float32)
    constant = log_a.ndim == 1
    dlog_a = torch.empty_like(dinitial) if constant else log_a.new_empty(log_a.shape)
    _run(
        "scanweave_linear_backward",
        [
            *call.arguments,
            *_rows(dh),
            _pointer(last),
            *_rows(dx),
            *_rows(dlog_a),
            _pointer(dinitial),
        ],
    )
    return dx, dlog_a.sum(0) if constant else dlog_a, dinitial
