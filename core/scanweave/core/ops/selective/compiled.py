"""The selective scan on a CPU through `scan.c`: when it is used, and how it is called.

    takes               whether the compiled library runs these tensors
    forward, backward   any number of directions, float32 sums, gate included
    status              one line for people: in use, or why not

Without a compiler `portable.py` does the same work.

Letters: S sequences, T tokens, D channels, N state, G groups.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..launch import adjacent
from ..native import TYPES, Native, floats, long_ends, pointer, threads
from .portable import ScanGradients

Direction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

native = Native(Path(__file__).with_name("scan.c"), "selective_scan")
takes = native.takes
status = native.status
# steps of one state entry that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 17
_ABSENT = (0, 0, 0, 0, 0)


def _rows(v: Tensor | None) -> tuple[int, ...]:
    """Pointer, dtype and strides of (B, L, D) or (B, L, G, N) with adjacent last elements."""
    if v is None:
        return _ABSENT
    group = v.stride(2) if v.ndim == 4 else 0
    return (v.data_ptr(), TYPES[v.dtype], v.stride(0), v.stride(1), group)


class _Call:
    """The arguments that both functions take first; holds what the pointers point to."""

    def __init__(
        self,
        direction: Direction,
        initial_state: Tensor | None,
        z: Tensor | None,
        cu_seqlens: Tensor | None,
        reverse: bool,
        dt_softplus: bool,
        path: Tensor | None = None,
    ) -> None:
        x, dt, A, B, C, D, dt_bias = direction
        rows = [adjacent(v) for v in (x, dt, B, C)] + [None if z is None else adjacent(z)]
        small = [floats(v) for v in (A, D, dt_bias, initial_state)]
        cu = long_ends(cu_seqlens)
        self.sequences = x.shape[0] if cu is None else cu.shape[0] - 1
        self.kept = (rows, small, cu, path)
        self.arguments: list[int] = [
            threads(x.numel() * A.shape[1], WORK_PER_THREAD),
            self.sequences,
            x.shape[1],
            x.shape[2],
            A.shape[1],
            B.shape[2],
            reverse,
            dt_softplus,
            pointer(cu),
            pointer(path),
            *(pointer(v) for v in small),
            *(field for v in rows for field in _rows(v)),
        ]


def forward(
    directions: list[Direction],
    start: Sequence[Tensor | None],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
    paths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the registered op: out, y where the backward needs it, final states, nothing.

    `paths` (K, L) contiguous int32: step t of direction k is token paths[k, t].
    """
    x, A = directions[0][0], directions[0][2]
    count = len(directions)
    out = x.new_empty(x.shape)
    keeps = training and z is not None
    total = x.new_empty(x.shape if keeps or count > 1 else (0,), dtype=torch.float32)
    finals = None
    for k, direction in enumerate(directions):
        last = k == count - 1
        gate, path = z if last else None, None if paths is None else paths[k]
        call = _Call(direction, start[k], gate, cu_seqlens, reverse[k], dt_softplus, path)
        if finals is None:
            shape = (count, call.sequences, *A.shape)
            finals = x.new_empty(shape, dtype=torch.float32)
        arguments = [
            *call.arguments,
            pointer(total) if k else 0,
            pointer(total) if keeps or not last else 0,
            *(_rows(out) if last else _ABSENT),
            pointer(finals[k]),
        ]
        native.run("scanweave_scan_forward", arguments)
    assert finals is not None
    y = total if keeps else total.new_empty(0)
    return out, y, finals, total.new_empty(0)


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    directions: list[Direction],
    start: Sequence[Tensor | None],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    y: Tensor,
    paths: Tensor | None = None,
    ddt: Sequence[Tensor] | None = None,
) -> tuple[list[ScanGradients], Tensor | None]:
    """Gradients of every direction, and that of the gate.

    With `paths` all directions share x, whose gradient is one float32 sum that all of them hold.
    `ddt` are tensors to write the gradients of dt to.
    """
    dout = adjacent(dout)
    dz = None if z is None else z.new_empty(z.shape)
    y = y.contiguous()
    grads = []
    shared = None
    if paths is not None:
        shared = y.new_empty(directions[0][0].shape, dtype=torch.float32)
    for k, direction in enumerate(directions):
        x, dt, A, B = direction[:4]
        path = None if paths is None else paths[k]
        call = _Call(direction, start[k], z, cu_seqlens, reverse[k], dt_softplus, path)
        dlast = None if dfinal is None else floats(dfinal[k])
        grad = ScanGradients(
            x=x.new_empty(x.shape) if shared is None else shared,
            dt=dt.new_empty(dt.shape) if ddt is None else ddt[k],
            A=A.new_empty(A.shape, dtype=torch.float32),
            B=B.new_zeros(B.shape, dtype=torch.float32),
            C=B.new_zeros(B.shape, dtype=torch.float32),
            D=x.new_empty(x.shape[2:], dtype=torch.float32),
            dt_bias=x.new_empty(x.shape[2:], dtype=torch.float32),
            state=x.new_empty((call.sequences, *A.shape), dtype=torch.float32),
        )
        arguments = [
            *call.arguments,
            *_rows(dout),
            pointer(y),
            pointer(dlast),
            *_rows(grad.x),
            *_rows(grad.dt),
            *(_ABSENT if k else _rows(dz)),
            shared is not None and k > 0,
            *(pointer(v) for v in (grad.A, grad.B, grad.C, grad.D, grad.dt_bias, grad.state)),
        ]
        native.run("scanweave_scan_backward", arguments)
        grads.append(grad)
    return grads, dz
