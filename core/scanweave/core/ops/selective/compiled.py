"""The selective scan on a CPU through `scan.c`: when it is used, and how it is called.

    takes               whether the compiled library runs these tensors
    forward, backward   any number of directions, float32 sums, gate included
    status              one line for people: in use, or why not

The library is compiled when the first scan on a CPU runs. Without a compiler `portable.py` does
the same work, and one line in the log of "scanweave" says why. SCANWEAVE_COMPILED=0 turns it off.

Letters: S sequences, T tokens, D channels, N state, G groups.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..compiler import BuildError, load_library
from ..launch import adjacent
from .portable import ScanGradients

Direction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

SOURCE = Path(__file__).with_name("scan.c")
# steps of one state entry that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 17
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ABSENT = (0, 0, 0, 0, 0)

_logger = logging.getLogger("scanweave")
_lock = threading.Lock()


class _Library:
    """The two functions, or the reason why there are none."""

    def __init__(self) -> None:
        self.types: frozenset[torch.dtype] = frozenset()
        if os.environ.get("SCANWEAVE_COMPILED") == "0":
            self.about = "off: SCANWEAVE_COMPILED is 0; unset it to compile the scan"
            _logger.info("scans on the CPU run in PyTorch (%s)", self.about)
            return
        try:
            library, made_with = load_library(SOURCE)
        except BuildError as error:
            self.about = f"off: {error}"
            _logger.warning(
                "scans on the CPU run in PyTorch, which is slower (%s); "
                "SCANWEAVE_COMPILED=0 silences this",
                self.about,
            )
            return
        # an array of int64 stands for the struct: ten times faster to fill than ctypes fields
        self.run_forward = library.scanweave_scan_forward
        self.run_backward = library.scanweave_scan_backward
        self.types = frozenset(
            v for v in _TYPES if v != torch.float16 or library.scanweave_float16()
        )
        threads = "OpenMP" if library.scanweave_openmp() else "one thread"
        self.about = f"on: {library.scanweave_lanes()} lanes, {threads}; {made_with}"


_loaded: _Library | None = None


def _library() -> _Library:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _Library()
    return _loaded


def status() -> str:
    """One line: "on: ..." with how it was compiled, or "off: ..." with the reason and the cure."""
    return _library().about


def takes(tensors: Iterable[Tensor]) -> bool:
    """Whether the library runs an op on these tensors; compiles it if none has been run yet."""
    types: frozenset[torch.dtype] | None = None
    for v in tensors:
        if v.device.type != "cpu":
            return False
        if types is None:
            types = _library().types
        if v.dtype not in types:
            return False
    return bool(types)


def _rows(v: Tensor | None) -> tuple[int, ...]:
    """Pointer, dtype and strides of (B, L, D) or (B, L, G, N) with adjacent last elements."""
    if v is None:
        return _ABSENT
    group = v.stride(2) if v.ndim == 4 else 0
    return (v.data_ptr(), _TYPES[v.dtype], v.stride(0), v.stride(1), group)


def _floats(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.to(torch.float32).contiguous()


def _pointer(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


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
        small = [_floats(v) for v in (A, D, dt_bias, initial_state)]
        cu = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        self.sequences = x.shape[0] if cu is None else cu.shape[0] - 1
        self.kept = (rows, small, cu, path)
        parts = x.numel() * A.shape[1] // WORK_PER_THREAD
        self.arguments: list[int] = [
            max(1, min(torch.get_num_threads(), parts)),
            self.sequences,
            x.shape[1],
            x.shape[2],
            A.shape[1],
            B.shape[2],
            reverse,
            dt_softplus,
            _pointer(cu),
            _pointer(path),
            *(_pointer(v) for v in small),
            *(field for v in rows for field in _rows(v)),
        ]


def _run(function: Callable[..., int], arguments: Sequence[int]) -> None:
    if function((ctypes.c_int64 * len(arguments))(*arguments)):
        raise MemoryError("selective_scan has no memory left for its states; use shorter batches")


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
            _pointer(total) if k else 0,
            _pointer(total) if keeps or not last else 0,
            *(_rows(out) if last else _ABSENT),
            _pointer(finals[k]),
        ]
        _run(_library().run_forward, arguments)
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
        dlast = None if dfinal is None else _floats(dfinal[k])
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
            _pointer(y),
            _pointer(dlast),
            *_rows(grad.x),
            *_rows(grad.dt),
            *(_ABSENT if k else _rows(dz)),
            shared is not None and k > 0,
            *(_pointer(v) for v in (grad.A, grad.B, grad.C, grad.D, grad.dt_bias, grad.state)),
        ]
        _run(_library().run_backward, arguments)
        grads.append(grad)
    return grads, dz
