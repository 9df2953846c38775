"""The linear scan on a CPU through `linear.c`: when it is used, and how it is called.

    takes               whether the compiled library runs these tensors
    forward, backward   real numbers, float32 states

Without a compiler `portable.py` serves.

Letters: S sequences, D channels.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..launch import adjacent
from ..native import TYPES, Native, floats, long_ends, pointer, threads

native = Native(Path(__file__).with_name("linear.c"), "linear_scan")
takes = native.takes
# elements that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 16


def _rows(v: Tensor) -> tuple[int, int, int, int]:
    """Pointer, dtype and strides of (B, L, D) with adjacent channels, or of (D,) and (S, D)."""
    batch, step = (v.stride(0), v.stride(1)) if v.ndim == 3 else (0, 0)
    return (v.data_ptr(), TYPES[v.dtype], batch, step)


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
        initial = floats(initial_state)
        cu = long_ends(cu_seqlens)
        self.sequences = x.shape[0] if cu is None else cu.shape[0] - 1
        self.kept = (rows, initial, cu)
        self.arguments: list[int] = [
            threads(x.numel(), WORK_PER_THREAD),
            *(self.sequences, x.shape[1], x.shape[2], reverse, constant),
            *(pointer(cu), pointer(initial)),
            *(field for v in rows for field in _rows(v)),
        ]


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
    native.run("scanweave_linear_forward", [*call.arguments, *_rows(h), pointer(final)])
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
    dh, last, dx = adjacent(dh), floats(dfinal), x.new_empty(x.shape)
    dinitial = x.new_empty((call.sequences, x.shape[2]), dtype=torch.float32)
    constant = log_a.ndim == 1
    dlog_a = torch.empty_like(dinitial) if constant else log_a.new_empty(log_a.shape)
    native.run(
        "scanweave_linear_backward",
        [
            *call.arguments,
            *_rows(dh),
            pointer(last),
            *_rows(dx),
            *_rows(dlog_a),
            pointer(dinitial),
        ],
    )
    return dx, dlog_a.sum(0) if constant else dlog_a, dinitial
