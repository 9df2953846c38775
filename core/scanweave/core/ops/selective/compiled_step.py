"""One token of the selective scan on a CPU through `step.c`: when it is used, and how it is called.

    takes   whether the compiled library runs these tensors
    step    state updated in place

Without a compiler `step.py` computes it in PyTorch.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..launch import adjacent
from ..native import TYPES, Native, floats, pointer, threads

native = Native(Path(__file__).with_name("step.c"), "selective_scan_step")
# state entries that pay for waking a thread: about 30 us of work
WORK_PER_THREAD = 1 << 17


def takes(state: Tensor, *others: Tensor | None) -> bool:
    """Whether the library runs a step on these tensors; compiles it if none has been run yet."""
    if state.device.type != "cpu" or state.dtype != torch.float32 or state.numel() == 0:
        return False
    if state.stride(2) != 1 and state.shape[2] != 1:
        return False
    return native.takes(others)


def _rows(v: Tensor | None) -> tuple[int, int, int, int]:
    """Pointer, dtype and strides of (B, D) or (B, G, N) with adjacent last elements."""
    if v is None:
        return (0, 0, 0, 0)
    return (v.data_ptr(), TYPES[v.dtype], v.stride(0), v.stride(1))


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
    small = [floats(v) for v in (A, D, dt_bias)]
    arguments = [
        threads(state.numel(), WORK_PER_THREAD),
        *(*state.shape, B.shape[1], dt_softplus),
        *(state.data_ptr(), state.stride(0), state.stride(1)),
        *(pointer(v) for v in small),
        *(field for v in (*rows, y) for field in _rows(v)),
    ]
    native.run("scanweave_step", arguments)
    return y
