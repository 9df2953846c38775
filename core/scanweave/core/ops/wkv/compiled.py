"""The weighted average on a CPU through `wkv.c`: when it is used, and how it is called.

    takes               whether the compiled library runs these tensors
    forward, backward   as those of `portable.py`; float32 states

Without a compiler `portable.py` serves.

Letters: S sequences, D channels.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..launch import adjacent
from ..native import TYPES, Native, floats, long_ends, pointer, threads

native = Native(Path(__file__).with_name("wkv.c"), "wkv")
takes = native.takes
# elements that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 14


def _rows(v: Tensor) -> tuple[int, int, int, int]:
    """Pointer, dtype and strides of (B, L, D) with adjacent channels, or of (D,) and (S, D)."""
    batch, step = (v.stride(0), v.stride(1)) if v.ndim == 3 else (0, 0)
    return (v.data_ptr(), TYPES[v.dtype], batch, step)


class _Call:
    """The arguments that both functions take first; holds what the pointers point to."""

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        bonus: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
    ) -> None:
        self.constant = log_decay.ndim == 1
        decays = log_decay.float().contiguous() if self.constant else adjacent(log_decay)
        rows = adjacent(k), adjacent(v), decays
        small = floats(bonus), floats(initial_state)
        cu = long_ends(cu_seqlens)
        self.sequences = k.shape[0] if cu is None else cu.shape[0] - 1
        self.kept = (rows, small, cu)
        self.arguments: list[int] = [
            threads(k.numel(), WORK_PER_THREAD),
            *(self.sequences, k.shape[1], k.shape[2], reverse, self.constant),
            *(pointer(t) for t in (cu, *small)),
            *(field for t in rows for field in _rows(t)),
        ]


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, D) in the dtype of v, and final states (S, 3, D) in float32."""
    call = _Call(k, v, log_decay, bonus, initial_state, cu_seqlens, reverse)
    y = v.new_empty(v.shape)
    final = k.new_empty((call.sequences, 3, k.shape[2]), dtype=torch.float32)
    native.run("scanweave_wkv_forward", [*call.arguments, *_rows(y), pointer(final)])
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, log_decay, bonus and the initial state; sums of many are float32."""
    call = _Call(k, v, log_decay, bonus, initial_state, cu_seqlens, reverse)
    dy, last = adjacent(dy), floats(dfinal)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dbonus = k.new_empty((call.sequences, k.shape[2]), dtype=torch.float32)
    dinitial = k.new_empty((call.sequences, 3, k.shape[2]), dtype=torch.float32)
    dw = torch.empty_like(dbonus) if call.constant else log_decay.new_empty(log_decay.shape)
    native.run(
        "scanweave_wkv_backward",
        [
            *call.arguments,
            *_rows(dy),
            pointer(last),
            *(field for t in (dk, dv, dw) for field in _rows(t)),
            *(pointer(dbonus), pointer(dinitial)),
        ],
    )
    return dk, dv, dw.sum(0) if call.constant else dw, dbonus.sum(0), dinitial
