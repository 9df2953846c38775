"""What the forward and the backward kernel of the selective scan share.

One program runs one sequence for a block of channels, step by step, with the state in registers.
Nothing is flipped or permuted in memory: direction and packing are addressing. No atomics: sums
over channels and sequences are partial results that PyTorch adds, so runs repeat bit by bit.
Numbers of tokens and sequences are not specialized: they change with every packed batch, and each
new divisor would be compiled again.

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

from ..launch import LOG2_E, adjacent, batch_stride, ceil_div, power_of_2, processors

Direction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

# one kept state per 16 steps: 4 bytes a token and channel at N = 16, as two bfloat16 activations.
# Measured on an H100, B128 L197 D768 N16: 1093 us forward and backward, 1183 us with 32
CHUNK = 16
# so few states are kept for every window of the backward, which then recomputes nothing: 1 byte a
# token and channel at N = 1
SMALL_STATE, LONG_CHUNK, SMALL_WINDOW = 2, 64, 4


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
def span_of(
    slot, cu_ptr, length, sequences, span, chunk, PACKED: tl.constexpr, SPLIT: tl.constexpr
):
    """What a program runs: one sequence, or with SPLIT `span` steps of one.

    Packed sequence s owns the slots from cu[s] // span + s on: enough for its spans, and one if it
    is empty. What is left over has count 0 and start > total.

    Returns:
        sequence, batch row, first token of the sequence, its length, the program's first step,
        its number of steps, index of its first kept state.
    """
    if PACKED:
        sequence = slot
        start = slot * 0
        if SPLIT:
            sequence = slot * 0
            beyond = sequence + sequences
            while beyond - sequence > 1:
                middle = (sequence + beyond) // 2
                owned = tl.load(cu_ptr + middle) // span + middle <= slot
                sequence = tl.where(owned, middle, sequence)
                beyond = tl.where(owned, beyond, middle)
            start = (slot - tl.load(cu_ptr + sequence) // span - sequence) * span
        first = tl.load(cu_ptr + sequence)
        total = tl.load(cu_ptr + sequence + 1) - first
        kept = first // chunk + sequence + start // chunk
        batch = slot * 0
    else:
        sequence = slot
        start = slot * 0
        if SPLIT:
            spans = tl.cdiv(length, span)
            sequence = slot // spans
            start = slot % spans * span
        first = slot * 0
        total = length
        kept = sequence * tl.cdiv(length, chunk) + start // chunk
        batch = sequence
    count = total - start
    if SPLIT:
        count = tl.maximum(tl.minimum(count, span), 0)
        start = tl.where((start > 0) & (count == 0), total + 1, start)
    return (
        sequence.to(tl.int64),
        batch.to(tl.int64),
        first.to(tl.int64),
        total,
        start,
        count,
        kept.to(tl.int64),
    )


@triton.jit
def token_at(path_ptr, t, ahead: tl.constexpr, PATH: tl.constexpr, WIDE: tl.constexpr):
    """Token of step t, from a table or relative to the chunk's first."""
    if PATH and WIDE:
        return tl.load(path_ptr + t * ahead).to(tl.int64)
    elif PATH:
        return tl.load(path_ptr + t * ahead)
    else:
        return t * ahead


def chunk_of(state: int) -> tuple[int, int]:
    """Steps of a chunk, and states kept of it."""
    small = state <= SMALL_STATE
    return (LONG_CHUNK, LONG_CHUNK // SMALL_WINDOW) if small else (CHUNK, 1)


def checkpoints_shape(
    directions: int, x: Tensor, A: Tensor, cu_seqlens: Tensor | None
) -> tuple[int, int, int, int]:
    """Shape of the kept states: (K, at most this many, N, D)."""
    batch, length, dim = x.shape
    chunk, each = chunk_of(A.shape[1])
    if cu_seqlens is None:
        chunks = batch * ceil_div(length, chunk)
    else:
        chunks = length // chunk + cu_seqlens.shape[0] - 1
    return directions, chunks * each, A.shape[1], dim


class Plan(NamedTuple):
    """How a kernel is cut: tile, blocks a group, steps a window, registers a thread."""

    block_n: int
    block_d: int
    blocks: int
    window: int
    registers: int | None = None


def forward_plan(x: Tensor, groups: int, state: int, programs: int) -> Plan:
    """Tile of 1024 states, two steps a window; narrower and deeper for few programs or states.

    Measured on an H100, bfloat16: 174 us at B128 L197 D768 N16 (narrow and deep: 234 us), but
    1158 us narrow and deep at B8 L4096 D2048 N16, where wide programs take 2468 us, and 18 us
    against 20 us at B64 L60 D256 N16. Four paths at B128 L3136 D192 N1: 960 us wide with 4 steps
    a window, 1122 us with 8; 1178 us narrow with 16, 1391 us with 4.
    """
    long = x.shape[1] >= 256
    units = processors(x.device)
    return _forward_plan(x.shape[2] // groups, state, programs * groups, units, long)


@functools.lru_cache(maxsize=256)
def _forward_plan(per_group: int, state: int, rows: int, units: int, long: bool) -> Plan:
    block_n = power_of_2(state)
    wide = block_d(per_group, 64, 1024 // block_n)
    if rows * ceil_div(per_group, wide) < 8 * units:
        narrow = min(wide, 32)
        window = (16 if long else 8) if block_n <= 2 else (8 if long else 4)
        return Plan(block_n, narrow, ceil_div(per_group, narrow), window)
    # 168 registers leave room for 12 warps a processor of 64 K registers
    window = 4 if block_n <= 2 else 2
    return Plan(block_n, wide, ceil_div(per_group, wide), window, registers=168)


def backward_plan(x: Tensor, groups: int, state: int) -> Plan:
    """Tile of 512 states, two steps a window: four spill."""
    block_n = power_of_2(state)
    per_group = x.shape[2] // groups
    widest, window = (64, SMALL_WINDOW) if state <= SMALL_STATE else (32, 2)
    width = block_d(per_group, widest, 512 // block_n)
    return Plan(block_n, width, ceil_div(per_group, width), window)


def block_d(per_group: int, widest: int, most: int) -> int:
    """Channels a program, a power of 2."""
    return max(1, min(widest, most, power_of_2(per_group)))


def strides_and_flags(
    inputs: Direction,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    paths: Tensor | None,
    reverse: bool,
    softplus: bool,
) -> tuple[dict[str, int], dict[str, bool | int]]:
    """Strides and flags that both kernels take, of inputs with adjacent channels."""
    x, dt, A, B, C, D, bias = inputs
    strides = {
        "stride_xb": batch_stride(x),
        "stride_xl": x.stride(1),
        "stride_dtb": batch_stride(dt),
        "stride_dtl": dt.stride(1),
        "stride_Bb": batch_stride(B),
        "stride_Bl": B.stride(1),
        "stride_Bg": B.stride(2),
        "stride_Cb": batch_stride(C),
        "stride_Cl": C.stride(1),
        "stride_Cg": C.stride(2),
        "stride_zb": batch_stride(z),
        "stride_zl": 0 if z is None else z.stride(1),
    }
    # tokens of a path are counted from the first, and their offsets may outgrow 32 bits
    widest = max(*(v.stride(1) for v in (x, dt, B, C)), dt.shape[2] * A.shape[1])
    flags = {
        "STATE": A.shape[1],
        "HAS_D": D is not None,
        "HAS_BIAS": bias is not None,
        "HAS_Z": z is not None,
        "PACKED": cu_seqlens is not None,
        "PATH": paths is not None,
        "WIDE": widest * x.shape[1] >= 1 << 31,
        "REVERSE": reverse,
        "SOFTPLUS": softplus,
    }
    return strides, flags


def _float_pair(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C (B, L, G, N) in float32, by one launch where they lie side by side."""
    state = B.shape[3]
    same = B.dtype == C.dtype and B.shape == C.shape and B.stride() == C.stride()
    same = same and B.untyped_storage().data_ptr() == C.untyped_storage().data_ptr()
    beside = same and C.storage_offset() - B.storage_offset() == state and B.stride(-1) == 1
    if not beside or B.dtype == torch.float32:
        return B.float(), C.float()
    both = B.as_strided((*B.shape[:3], 2 * state), B.stride())
    B, C = both.to(torch.float32, memory_format=torch.contiguous_format).split(state, -1)
    return B, C


def prepare(inputs: Direction) -> Direction:
    """Inputs with adjacent channels.

    Every program re-reads the rows of B and C, so for large inputs they are converted once; for
    small ones the launch costs more than it saves.
    """
    x, dt, A, B, C, D, bias = inputs
    if x.numel() >= 1 << 22:
        B, C = _float_pair(B, C)
    D, bias = (None if v is None else adjacent(v) for v in (D, bias))
    return adjacent(x), adjacent(dt), A.contiguous(), adjacent(B), adjacent(C), D, bias
