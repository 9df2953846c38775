"""The matrix-state scan on a CPU through `gated.c`: when it is used, and how it is called.

    takes               whether the compiled library runs these tensors
    forward, backward   as those of `portable.py`, in float32
    step                one token, the state updated in place

Without a compiler `portable.py` serves.

Letters: S sequences, H heads, G groups, K keys, V values.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..launch import adjacent
from ..native import TYPES, Native, floats, long_ends, pointer, threads
from .portable import Gradients

native = Native(Path(__file__).with_name("gated.c"), "gated_linear_scan")
takes = native.takes
# entries of the state and steps that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 18


def _rows(v: Tensor | None) -> tuple[int, int, int, int, int]:
    """Pointer, dtype and strides of (B, L, H) or (B, L, H, .) with adjacent last elements."""
    if v is None:
        return (0, 0, 0, 0, 0)
    batch, step, head = v.stride()[:3]
    return (v.data_ptr(), TYPES[v.dtype], batch, step, head)


class _Call:
    """The arguments that both functions take first; holds what the pointers point to."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        write: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
        exclusive: bool,
        shift: bool,
    ) -> None:
        (_, length, heads, width), (groups, keys) = v.shape, q.shape[2:]
        rows = [adjacent(u) for u in (q, k, v)]
        # one number a head may lie anywhere
        rows += [u if u is None or u.ndim == 3 else adjacent(u) for u in (g, write)]
        state, cu = floats(initial_state), long_ends(cu_seqlens)
        self.sequences = v.shape[0] if cu is None else cu.shape[0] - 1
        self.kept = (rows, state, cu)
        decay = 0 if g is None else g.ndim - 2
        self.arguments: list[int] = [
            threads(v.numel() * keys, WORK_PER_THREAD),
            *(self.sequences, length, heads, groups, keys, width),
            *(reverse, exclusive, shift, decay),
            *(pointer(cu), pointer(state)),
            *(field for u in rows for field in _rows(u)),
        ]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    exclusive: bool,
    shift: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) without skip, and final states (S, H, K, V), both in float32."""
    assert dtype == torch.float32
    call = _Call(q, k, v, g, write, initial_state, cu_seqlens, reverse, exclusive, shift)
    out = torch.empty(v.shape, dtype=dtype)
    final = torch.empty((call.sequences, v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)
    native.run("scanweave_gated_forward", [*call.arguments, pointer(out), pointer(final)])
    return out, final


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    exclusive: bool,
    shift: bool,
    dtype: torch.dtype,
) -> Gradients:
    """Gradients of `forward` under `dout` (B, L, H, V) and `dfinal` (S, H, K, V)."""
    assert dtype == torch.float32
    call = _Call(q, k, v, g, write, initial_state, cu_seqlens, reverse, exclusive, shift)
    (batch, length, heads, width), (groups, keys) = v.shape, q.shape[2:]
    dout, last = adjacent(dout), floats(dfinal)
    # of a shifted q the last token of a sequence is never read
    of_keys = (batch, length, heads, keys)
    dq = torch.zeros(of_keys, dtype=dtype) if shift else torch.empty(of_keys, dtype=dtype)
    dk, dv = torch.empty(of_keys, dtype=dtype), torch.empty(v.shape, dtype=dtype)
    dg = None if g is None else torch.empty(g.shape, dtype=dtype)
    dwrite = None if write is None else torch.empty(write.shape, dtype=dtype)
    dinitial = torch.empty((call.sequences, heads, keys, width), dtype=dtype)
    native.run(
        "scanweave_gated_backward",
        [
            *call.arguments,
            *_rows(dout),
            *(pointer(u) for u in (last, dq, dk, dv, dg, dwrite, dinitial)),
        ],
    )
    if groups < heads:
        dq, dk = (u.unflatten(2, (groups, -1)).sum(3) for u in (dq, dk))
    return Gradients(dq, dk, dv, dg, dwrite, dinitial)


def step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    exclusive: bool,
) -> Tensor:
    """Advance `state` (B, H, K, V), contiguous float32, and return (B, H, V) float32 without skip.

    Arguments as the public step's.
    """
    q, k, v_row = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    g, write = (u if u is None else u.unsqueeze(1) for u in (g, write))
    call = _Call(q, k, v_row, g, write, state, None, False, exclusive, False)
    out = torch.empty(v.shape, dtype=torch.float32)
    native.run("scanweave_gated_forward", [*call.arguments, pointer(out), pointer(state)])
    return out
