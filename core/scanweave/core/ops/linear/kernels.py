"""The linear scan in Triton: forward, and the pre-pass over segments that both directions share.

One program runs one segment of one sequence for a block of channels, a channel a thread, step by
step with the state in registers; the rows of the next window are read while the present one is
computed. Enough sequences and channels make one segment each. Few long ones are cut: a pre-pass
finds what every segment does to a state (the product of its decays, and its end from zero), and the
main pass starts from those of the segments before it, put together in order. No atomics, no flags:
runs repeat bit by bit. Direction and packing are addressing. A training step keeps the state every
CHUNK steps, from which the backward computes the others again.

Complex tensors are read as pairs of real ones, and their decays come exponentiated.

Letters: S sequences, T tokens, D channels, K segments a sequence. Equation: `reference.py`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, adjacent, batch_stride, ceil_div, power_of_2, processors

# one kept state per 24 steps: a sixth of a byte an element, 3% of a bfloat16 forward's traffic;
# chunks of 32 would take the backward's last registers
CHUNK = 24
# pairs take twice the registers: chunks of 16 spill in the backward
CHUNK_COMPLEX = 8


def chunk_of(x: Tensor) -> int:
    """Steps from one kept state to the next."""
    return CHUNK_COMPLEX if x.is_complex() else CHUNK


@triton.jit
def part_of(
    pid,
    cu_ptr,
    length,
    blocks,
    PACKED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of a program: sequence, segment, channel block; batch row, first token and length of the
    sequence; first step and steps of the segment. Steps count along the forward scan.
    """
    pid_d = pid % blocks
    pid_s = (pid // blocks // SEGMENTS).to(tl.int64)
    segment = pid // blocks % SEGMENTS
    if PACKED:
        first = tl.load(cu_ptr + pid_s).to(tl.int64)
        steps = (tl.load(cu_ptr + pid_s + 1).to(tl.int64) - first).to(tl.int32)
        row = pid_s * 0
    else:
        first = pid_s * 0
        steps = length
        row = pid_s
    span = tl.cdiv(tl.cdiv(steps, SEGMENTS), CHUNK) * CHUNK
    begin = tl.minimum(segment * span, steps)
    count = tl.minimum(span, steps - begin)
    return pid_s, segment, pid_d, row, first, steps, begin, count


@triton.jit
def kept_before(pid_s, first, length, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Kept states of the sequences before this one."""
    if PACKED:
        return first // CHUNK + pid_s
    else:
        return pid_s * tl.cdiv(length, CHUNK)


@triton.jit
def load_pair(ptr, mask, other, COMPLEX: tl.constexpr):
    """Real and imaginary part; of a real number the second is not used."""
    re = tl.load(ptr, mask=mask, other=other)
    im = re
    if COMPLEX:
        im = tl.load(ptr + 1, mask=mask, other=0.0)
    return re, im


@triton.jit
def no_rows(ptr, BLOCK_D: tl.constexpr, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """As `load_rows`, without reading: what there is before the first window."""
    re = ()
    im = ()
    for _ in tl.static_range(ROWS):
        zero = tl.zeros([BLOCK_D], ptr.dtype.element_ty)
        re = re + (zero,)
        im = im + (zero,)
    return re, im


@triton.jit
def load_rows(ptr, next, left, mask_d, other, COMPLEX: tl.constexpr, ROWS: tl.constexpr):
    """ROWS steps' rows, as two tuples of parts, and where the row behind them is; `other` behind
    the first `left`.
    """
    re = ()
    im = ()
    for i in tl.static_range(ROWS):
        a, b = load_pair(ptr, tl.where(i < left, mask_d, False), other, COMPLEX)
        re = re + (a,)
        im = im + (b,)
        # not ptr + i * next: those multiples would be kept in registers
        ptr += next
    return re, im, ptr


@triton.jit
def rows_before(
    x_ptr,
    a_ptr,
    a_at,
    mask_d,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of x and of decays, both parts of each, before any were read; constant decays are."""
    xs, xis = no_rows(x_ptr, BLOCK_D, COMPLEX, ROWS)
    if CONSTANT:
        logs, logs_i, _ = load_rows(a_at, 0, 1, mask_d, 0.0, COMPLEX, 1)
    else:
        logs, logs_i = no_rows(a_ptr, BLOCK_D, COMPLEX, ROWS)
    return xs, xis, logs, logs_i


@triton.jit
def rows_ahead(
    rows,
    x_at,
    a_at,
    next_x,
    next_a,
    left,
    mask_d,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The ROWS steps that begin at `x_at` and `a_at`, `left` of which are there, in place of
    `rows`; and where those behind them begin.
    """
    _, _, logs, logs_i = rows
    ONE: tl.constexpr = 1.0 if COMPLEX else 0.0
    xs, xis, x_at = load_rows(x_at, next_x, left, mask_d, 0.0, COMPLEX, ROWS)
    if not CONSTANT:
        logs, logs_i, a_at = load_rows(a_at, next_a, left, mask_d, ONE, COMPLEX, ROWS)
    return (xs, xis, logs, logs_i), x_at, a_at


@triton.jit
def store_pair(ptr, re, im, mask, COMPLEX: tl.constexpr):
    """Both parts, or the real one alone."""
    tl.store(ptr, re.to(ptr.dtype.element_ty), mask=mask)
    if COMPLEX:
        tl.store(ptr + 1, im, mask=mask)


@triton.jit
def times(a, ai, h, hi, COMPLEX: tl.constexpr):
    """Product of two numbers."""
    if COMPLEX:
        return a * h - ai * hi, a * hi + ai * h
    else:
        return a * h, hi


@triton.jit
def decay_of(a, ai, left, i: tl.constexpr, CONSTANT: tl.constexpr, COMPLEX: tl.constexpr):
    """The decay of step i from what was loaded: 1 behind the first `left` steps, where constant
    ones do not end.
    """
    if not COMPLEX:
        a = tl.exp2(a.to(tl.float32) * LOG2_E)
    if CONSTANT:
        a = tl.where(i < left, a, 1.0)
        if COMPLEX:
            ai = tl.where(i < left, ai, 0.0)
    return a, ai


@triton.jit
def entering(
    h,
    hi,
    ends_ptr,
    products_ptr,
    base,
    dim,
    offs,
    mask_d,
    segment,
    ADJOINT: tl.constexpr,
    COMPLEX: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """The state that a segment starts from: through those before it, in order."""
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    # a group's loads are on their way together; all 31 at once take the compiler half a minute
    GROUP: tl.constexpr = min(8, SEGMENTS)
    for group in range(0, SEGMENTS, GROUP):
        for i in tl.static_range(GROUP):
            j = group + i
            if ADJOINT:
                j = SEGMENTS - 1 - j
                before = j > segment
            else:
                before = j < segment
            at = (base + j) * dim * PARTS + offs
            mask = tl.where(before, mask_d, False)
            e, ei = load_pair(ends_ptr + at, mask, 0.0, COMPLEX)
            p, pi = load_pair(products_ptr + at, mask, 1.0, COMPLEX)
            h, hi = times(p, pi, h, hi, COMPLEX)
            h += e
            hi += ei
    return h, hi


class Plan(NamedTuple):
    """How a scan is cut: channels a program and segments a sequence."""

    block_d: int
    blocks: int
    segments: int


# sequences are not cut into segments shorter than this
SHORTEST = 128
# a program, one warp, reads this many steps ahead: 6 KB of bfloat16 on their way; 64 steps spill.
# Each a multiple of its CHUNK
WINDOW = 48
WINDOW_COMPLEX = 16
# an H100 needs 16 KB and more on their way to a processor; cut sequences are read twice, so
# only fewer programs than this a processor are cut, and then into more than it takes
PROGRAMS = 3.5
CUT_PROGRAMS = 8


def plan_of(x: Tensor, sequences: int) -> Plan:
    """One channel a thread; segments where sequences and channels do not fill the device."""
    steps = x.shape[0] * x.shape[1] // max(sequences, 1)
    return _plan(x.shape[2], sequences, steps, processors(x.device))


@functools.lru_cache(maxsize=256)
def _plan(dim: int, sequences: int, steps: int, processors: int) -> Plan:
    block_d = min(32, power_of_2(dim))
    blocks = ceil_div(dim, block_d)
    programs = max(1, sequences * blocks)
    segments = 1
    if programs < PROGRAMS * processors:
        wanted = CUT_PROGRAMS * processors / programs
        while segments < 32 and 2 * segments <= min(2 * wanted, steps / SHORTEST):
            segments *= 2
    return Plan(block_d, blocks, segments)


def checkpoints_shape(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Shape of the kept states: (at most this many chunks, D), and 2 parts if complex."""
    batch, length, dim = x.shape
    chunk = chunk_of(x)
    if cu_seqlens is None:
        chunks = batch * ((length + chunk - 1) // chunk)
    else:
        chunks = length // chunk + cu_seqlens.shape[0] - 1
    return (chunks, dim, 2) if x.is_complex() else (chunks, dim)


class Call:
    """Tensors as kernels read them, and the arguments that all kernels share."""

    def __init__(self, x: Tensor, log_a: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> None:
        self.sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.plan = plan_of(x, self.sequences)
        self.x, self.a = rows_of(x), rows_of(torch.exp(log_a) if log_a.is_complex() else log_a)
        self.cu = None if cu_seqlens is None else adjacent(cu_seqlens)
        constant = self.a.ndim - x.is_complex() == 1
        self.strides = {
            "stride_xb": batch_stride(self.x),
            "stride_xl": self.x.stride(1),
            "stride_ab": 0 if constant else batch_stride(self.a),
            "stride_al": 0 if constant else self.a.stride(1),
        }
        self.options = {
            "CONSTANT": constant,
            "COMPLEX": x.is_complex(),
            "PACKED": cu_seqlens is not None,
            "REVERSE": reverse,
            "SEGMENTS": self.plan.segments,
            "WINDOW": WINDOW_COMPLEX if x.is_complex() else WINDOW,
            "CHUNK": chunk_of(x),
            "BLOCK_D": self.plan.block_d,
            "num_warps": 1,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }
        self.grid = (self.sequences * self.plan.segments * self.plan.blocks,)
        self.sizes = (x.shape[2], self.plan.blocks)


def rows_of(v: Tensor) -> Tensor:
    """Real numbers with adjacent channels (of pairs, if complex), near enough for 32-bit steps."""
    v = adjacent(v.resolve_conj())
    if v.ndim == 3 and v.stride(1) >= 1 << 24:
        v = v.contiguous()
    return torch.view_as_real(v) if v.is_complex() else v


def real(v: Tensor) -> Tensor:
    """A view of complex numbers as pairs."""
    return torch.view_as_real(v) if v.is_complex() else v
