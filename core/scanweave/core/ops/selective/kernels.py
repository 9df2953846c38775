"""What the forward and the backward kernel of the selective scan share.

One program runs one sequence for a block of channels, step by step, with the state in registers.
Nothing is flipped or permuted in memory: direction and packing are addressing. No atomics: sums
over channels and sequences are partial results that PyTorch adds, so runs repeat bit by bit.

Letters: S sequences, T tokens, D channels, G groups, N state. Equations: `reference.py`, and
`portable.scan_backward` for the gradients.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, adjacent, ceil_div, power_of_2

Direction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

# one kept state per 32 steps: 2 bytes a token and channel at N = 16, as one bfloat16 activation
CHUNK = 32


@triton.jit
def softplus(v):
    """log(1 + exp(v)), to float32 rounding everywhere."""
    # log(1 + e) = 2 atanh(s), s = e / (2 + e) <= 1/3: no logarithm, and exact for small e.
    # Chebyshev fit of 2 atanh(s) / s in s * s on [0, 1/9], relative error 4e-9
    e = tl.exp2(-tl.abs(v) * LOG2_E)
    s = e / (2.0 + e)
    w = s * s
    p = 0.66666317 + w * (0.40024853 + w * (0.27961418 + w * 0.28174657))
    return tl.maximum(v, 0.0) + s * (2.0 + w * p)


@triton.jit
def load_row(ptr, mask, EVEN: tl.constexpr):
    """Load a row, without a mask where the block is full."""
    if EVEN:
        return tl.load(ptr)
    else:
        return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def sequence_of(pid_s, cu_ptr, length, chunk, PACKED: tl.constexpr):
    """Batch row, first token in it, length and first kept state of a program's sequence."""
    if PACKED:
        first = tl.load(cu_ptr + pid_s).to(tl.int64)
        last = tl.load(cu_ptr + pid_s + 1).to(tl.int64)
        return pid_s * 0, first, (last - first).to(tl.int32), first // chunk + pid_s
    else:
        return pid_s, pid_s * 0, length, pid_s * tl.cdiv(length, chunk)


def checkpoints_shape(
    directions: int, x: Tensor, A: Tensor, cu_seqlens: Tensor | None
) -> tuple[int, int, int, int]:
    """Shape of the kept states: (K, at most this many chunks, N, D)."""
    batch, length, dim = x.shape
    if cu_seqlens is None:
        chunks = batch * ((length + CHUNK - 1) // CHUNK)
    else:
        chunks = length // CHUNK + cu_seqlens.shape[0] - 1
    return directions, chunks, A.shape[1], dim


class Plan(NamedTuple):
    """How a kernel is cut: tile, blocks a group, steps a window, registers a thread."""

    block_n: int
    block_d: int
    blocks: int
    window: int
    registers: int | None = None


def forward_plan(x: Tensor, groups: int, state: int, sequences: int) -> Plan:
    """Tile of 1024 states, two steps a window; narrower and deeper for few programs.

    Measured on an H100, bfloat16: 174 us at B128 L197 D768 N16 (narrow and deep: 234 us), but
    1306 us narrow and deep at B8 L4096 D2048 N16, where wide programs take 2469 us, and 18 us
    against 20 us at B64 L60 D256 N16.
    """
    return _forward_plan(x.shape[2] // groups, state, sequences * groups, _processors(x.device))


@functools.lru_cache(maxsize=256)
def _forward_plan(per_group: int, state: int, rows: int, processors: int) -> Plan:
    block_n = power_of_2(state)
    wide = _block_d(per_group, 64, 1024 // block_n)
    if rows * ceil_div(per_group, wide) < 8 * processors:
        narrow = min(wide, 32)
        return Plan(block_n, narrow, ceil_div(per_group, narrow), window=4)
    window = 4 if block_n <= 2 else 2
    # 168 registers leave room for 12 warps a processor of 64 K registers
    return Plan(block_n, wide, ceil_div(per_group, wide), window, registers=168)


def backward_plan(x: Tensor, groups: int, state: int) -> Plan:
    """Tile of 512 states, two steps a window: four spill (1338 us against 1185 us as above)."""
    block_n = power_of_2(state)
    per_group = x.shape[2] // groups
    widest, window = (64, 4) if block_n <= 2 else (32, 2)
    block_d = _block_d(per_group, widest, 512 // block_n)
    return Plan(block_n, block_d, ceil_div(per_group, block_d), window)


def _block_d(per_group: int, widest: int, most: int) -> int:
    return max(1, min(widest, most, power_of_2(per_group)))


@functools.lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; under the interpreter as on an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def strides_and_flags(
    inputs: Direction, z: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, softplus: bool
) -> tuple[dict[str, int], dict[str, bool | int]]:
    """Strides and flags that both kernels take, of inputs with adjacent channels."""
    x, dt, A, B, C, D, bias = inputs
    strides = {
        "stride_xb": x.stride(0),
        "stride_xl": x.stride(1),
        "stride_dtb": dt.stride(0),
        "stride_dtl": dt.stride(1),
        "stride_Bb": B.stride(0),
        "stride_Bl": B.stride(1),
        "stride_Bg": B.stride(2),
        "stride_Cb": C.stride(0),
        "stride_Cl": C.stride(1),
        "stride_Cg": C.stride(2),
        "stride_zb": 0 if z is None else z.stride(0),
        "stride_zl": 0 if z is None else z.stride(1),
    }
    flags = {
        "STATE": A.shape[1],
        "HAS_D": D is not None,
        "HAS_BIAS": bias is not None,
        "HAS_Z": z is not None,
        "PACKED": cu_seqlens is not None,
        "REVERSE": reverse,
        "SOFTPLUS": softplus,
    }
    return strides, flags


def prepare(inputs: Direction) -> Direction:
    """Inputs with adjacent channels.

    Every program re-reads the rows of B and C, so for large inputs they are converted once; for
    small ones two more launches cost more than they save.
    """
    x, dt, A, B, C, D, bias = inputs
    if x.numel() >= 1 << 22:
        B, C = B.float(), C.float()
    D, bias = (None if v is None else adjacent(v) for v in (D, bias))
    return adjacent(x), adjacent(dt), A.contiguous(), adjacent(B), adjacent(C), D, bias
