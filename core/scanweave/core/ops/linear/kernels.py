"""The linear scan in Triton: forward, and the pre-pass over segments that both directions share.

One program runs one segment of one sequence for a block of channels, a channel a thread, step by
step with the state in registers; the rows of the next window are loaded while the present one is
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

from ..launch import LOG2_E, adjacent, ceil_div, on_device, power_of_2

# one kept state per 16 steps: a quarter of a byte an element, 4% of a bfloat16 forward's traffic
CHUNK = 16


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
def load_rows(ptr, stride, left, mask_d, COMPLEX: tl.constexpr, WINDOW: tl.constexpr):
    """The next WINDOW steps' rows, as two tuples of parts; 0 behind the first `left` of them."""
    re = ()
    im = ()
    for i in tl.static_range(WINDOW):
        a, b = load_pair(ptr + i * stride, tl.where(i < left, mask_d, False), 0.0, COMPLEX)
        re = re + (a,)
        im = im + (b,)
    return re, im


@triton.jit
def store_pair(ptr, re, im, mask, COMPLEX: tl.constexpr):
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
def decay_of(a, ai, go, ADJOINT: tl.constexpr, COMPLEX: tl.constexpr):
    """The decay from what was loaded, 1 past the end; its conjugate for the adjoint."""
    if COMPLEX:
        return tl.where(go, a, 1.0), tl.where(go, -ai if ADJOINT else ai, 0.0)
    else:
        b = tl.exp2(tl.where(go, a.to(tl.float32) * LOG2_E, 0.0))
        return b, b


@triton.jit
def _prefix_kernel(
    x_ptr,
    a_ptr,  # logarithms; decays themselves if complex
    cu_ptr,
    ends_ptr,  # (S, K, D): state after the segment, from zero
    products_ptr,  # (S, K, D): product of its decays
    length,
    dim,
    blocks,
    stride_xb,
    stride_xl,
    stride_ab,
    stride_al,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_s, segment, pid_d, row, first, steps, begin, count = part_of(
        tl.program_id(0), cu_ptr, length, blocks, PACKED, SEGMENTS, CHUNK
    )
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    offs = offs_d * PARTS
    # no segment starts from the last one, nor the adjoint from the first
    count = tl.where(segment == (0 if ADJOINT else SEGMENTS - 1), 0, count)
    start = begin + count - 1 if ADJOINT else begin
    place = first + (steps - 1 - start if REVERSE else start)
    ahead: tl.constexpr = 1 if ADJOINT == REVERSE else -1
    x_base = x_ptr + row * stride_xb + offs
    a_base = a_ptr + row * stride_ab + offs
    h = tl.zeros([BLOCK_D], tl.float32)
    hi = tl.zeros([BLOCK_D], tl.float32)
    p = h + 1.0
    pi = tl.zeros([BLOCK_D], tl.float32)
    if CONSTANT:
        fixed, fixed_i = load_pair(a_base, mask_d, 0.0, COMPLEX)
    for w in range(tl.cdiv(count, WINDOW)):
        left = count - w * WINDOW
        xs, xis = load_rows(
            x_base + place * stride_xl, ahead * stride_xl, left, mask_d, COMPLEX, WINDOW
        )
        if not CONSTANT:
            logs, logs_i = load_rows(
                a_base + place * stride_al, ahead * stride_al, left, mask_d, COMPLEX, WINDOW
            )
        for i in tl.static_range(WINDOW):
            if CONSTANT:
                b, bi = decay_of(fixed, fixed_i, i < left, ADJOINT, COMPLEX)
            else:
                b, bi = decay_of(logs[i], logs_i[i], i < left, ADJOINT, COMPLEX)
            x = xs[i].to(tl.float32)
            xi = xis[i].to(tl.float32)
            if ADJOINT:
                h, hi = times(b, bi, h + x, hi + xi, COMPLEX)
            else:
                h, hi = times(b, bi, h, hi, COMPLEX)
                h += x
                hi += xi
            p, pi = times(b, bi, p, pi, COMPLEX)
        place += ahead * WINDOW
    out = (pid_s * SEGMENTS + segment) * dim * PARTS + offs
    store_pair(ends_ptr + out, h, hi, mask_d, COMPLEX)
    store_pair(products_ptr + out, p, pi, mask_d, COMPLEX)


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
    for j in tl.static_range(SEGMENTS - 1):
        k: tl.constexpr = SEGMENTS - 1 - j if ADJOINT else j
        before = k > segment if ADJOINT else k < segment
        mask = tl.where(before, mask_d, False)
        at = (base + k) * dim * PARTS + offs
        e, ei = load_pair(ends_ptr + at, mask, 0.0, COMPLEX)
        p, pi = load_pair(products_ptr + at, mask, 1.0, COMPLEX)
        h, hi = times(p, pi, h, hi, COMPLEX)
        h += e
        hi += ei
    return h, hi


@triton.jit
def _forward_kernel(
    x_ptr,
    a_ptr,  # logarithms; decays themselves if complex
    h0_ptr,  # (S, D)
    cu_ptr,
    ends_ptr,
    products_ptr,
    h_ptr,  # (B, L, D)
    final_ptr,  # (S, D)
    keep_ptr,  # (chunks, D)
    length,
    tokens,
    dim,
    blocks,
    stride_xb,
    stride_xl,
    stride_ab,
    stride_al,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_H0: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_s, segment, pid_d, row, first, steps, begin, count = part_of(
        tl.program_id(0), cu_ptr, length, blocks, PACKED, SEGMENTS, CHUNK
    )
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    offs = offs_d * PARTS
    h = tl.zeros([BLOCK_D], tl.float32)
    hi = tl.zeros([BLOCK_D], tl.float32)
    if HAS_H0:
        h, hi = load_pair(h0_ptr + pid_s * dim * PARTS + offs, mask_d, 0.0, COMPLEX)
        h = h.to(tl.float32)
        hi = hi.to(tl.float32)
    if SEGMENTS > 1:
        base = pid_s * SEGMENTS
        h, hi = entering(
            *(h, hi, ends_ptr, products_ptr, base, dim, offs, mask_d, segment),
            ADJOINT=False,
            COMPLEX=COMPLEX,
            SEGMENTS=SEGMENTS,
        )
    place = first + (steps - 1 - begin if REVERSE else begin)
    ahead: tl.constexpr = -1 if REVERSE else 1
    x_base = x_ptr + row * stride_xb + offs
    a_base = a_ptr + row * stride_ab + offs
    h_base = h_ptr + row * tokens * dim * PARTS + offs
    kept = kept_before(pid_s, first, length, PACKED, CHUNK) + begin // CHUNK
    keep_row = keep_ptr + kept * dim * PARTS + offs
    if CONSTANT:
        fixed, fixed_i = load_pair(a_base, mask_d, 0.0, COMPLEX)
    xs, xis = load_rows(
        x_base + place * stride_xl, ahead * stride_xl, count, mask_d, COMPLEX, WINDOW
    )
    if not CONSTANT:
        logs, logs_i = load_rows(
            a_base + place * stride_al, ahead * stride_al, count, mask_d, COMPLEX, WINDOW
        )
    for w in range(tl.cdiv(count, WINDOW)):
        left = count - w * WINDOW
        following = place + WINDOW * ahead
        x_now = xs
        xi_now = xis
        xs, xis = load_rows(
            *(x_base + following * stride_xl, ahead * stride_xl, left - WINDOW, mask_d),
            COMPLEX=COMPLEX,
            WINDOW=WINDOW,
        )
        if not CONSTANT:
            a_now = logs
            ai_now = logs_i
            logs, logs_i = load_rows(
                *(a_base + following * stride_al, ahead * stride_al, left - WINDOW, mask_d),
                COMPLEX=COMPLEX,
                WINDOW=WINDOW,
            )
        h_row = h_base + place * dim * PARTS
        for i in tl.static_range(WINDOW):
            go = i < left
            mask = tl.where(go, mask_d, False)
            if KEEP:
                if i % CHUNK == 0:
                    store_pair(keep_row + i // CHUNK * dim * PARTS, h, hi, mask, COMPLEX)
            if CONSTANT:
                b, bi = decay_of(fixed, fixed_i, go, False, COMPLEX)
            else:
                b, bi = decay_of(a_now[i], ai_now[i], go, False, COMPLEX)
            h, hi = times(b, bi, h, hi, COMPLEX)
            h += x_now[i].to(tl.float32)
            hi += xi_now[i].to(tl.float32)
            store_pair(h_row + i * ahead * dim * PARTS, h, hi, mask, COMPLEX)
        place += ahead * WINDOW
        keep_row += WINDOW // CHUNK * dim * PARTS
    if segment == SEGMENTS - 1:
        store_pair(final_ptr + pid_s * dim * PARTS + offs, h, hi, mask_d, COMPLEX)


class Plan(NamedTuple):
    """How a scan is cut: channels a program, segments a sequence, steps a window."""

    block_d: int
    blocks: int
    segments: int
    window: int


# sequences are not cut into segments shorter than this
SHORTEST = 128
# a warp of 32 channels that reads 32 steps ahead has 4 KB on its way; 16 KB a processor hide the
# latency of an H100's memory
WARPS_A_PROCESSOR = 3.5
CUT_WARPS_A_PROCESSOR = 8


def plan_of(x: Tensor, sequences: int) -> Plan:
    """One channel a thread; segments where sequences and channels do not fill the device."""
    steps = x.shape[0] * x.shape[1] // max(sequences, 1)
    return _plan(x.shape[2], sequences, steps, _processors(x.device), x.is_complex())


@functools.lru_cache(maxsize=256)
def _plan(dim: int, sequences: int, steps: int, processors: int, wide: bool) -> Plan:
    block_d = min(32, power_of_2(dim))
    blocks = ceil_div(dim, block_d)
    programs = max(1, sequences * blocks)
    segments = 1
    if programs < WARPS_A_PROCESSOR * processors:
        wanted = CUT_WARPS_A_PROCESSOR * processors / programs
        while segments < 32 and 2 * segments <= min(2 * wanted, steps / SHORTEST):
            segments *= 2
    return Plan(block_d, blocks, segments, CHUNK if wide else 2 * CHUNK)


@functools.lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; under the interpreter as on an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def checkpoints_shape(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Shape of the kept states: (at most this many chunks, D), and 2 parts if complex."""
    batch, length, dim = x.shape
    if cu_seqlens is None:
        chunks = batch * ((length + CHUNK - 1) // CHUNK)
    else:
        chunks = length // CHUNK + cu_seqlens.shape[0] - 1
    return (chunks, dim, 2) if x.is_complex() else (chunks, dim)


class Call:
    """Tensors as kernels read them, and the arguments that all kernels share."""

    def __init__(
        self, x: Tensor, log_a: Tensor, cu_seqlens: Tensor | None, reverse: bool, window: int = 0
    ) -> None:
        self.sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.plan = plan_of(x, self.sequences)
        self.x, self.a = rows_of(x), rows_of(torch.exp(log_a) if log_a.is_complex() else log_a)
        self.cu = None if cu_seqlens is None else adjacent(cu_seqlens)
        constant = self.a.ndim - x.is_complex() == 1
        self.strides = {
            "stride_xb": self.x.stride(0),
            "stride_xl": self.x.stride(1),
            "stride_ab": 0 if constant else self.a.stride(0),
            "stride_al": 0 if constant else self.a.stride(1),
        }
        self.options = {
            "CONSTANT": constant,
            "COMPLEX": x.is_complex(),
            "PACKED": cu_seqlens is not None,
            "REVERSE": reverse,
            "SEGMENTS": self.plan.segments,
            "WINDOW": window or self.plan.window,
            "CHUNK": CHUNK,
            "BLOCK_D": self.plan.block_d,
            "num_warps": 1,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }
        self.grid = (self.sequences * self.plan.segments * self.plan.blocks,)
        self.sizes = (x.shape[2], self.plan.blocks)

    def states(self, like: Tensor, *size: int) -> Tensor:
        """Uninitialised float32 (..., D), and 2 parts if complex."""
        return like.new_empty((*size, *self.x.shape[2:]), dtype=torch.float32)

    def prefixes(self, rows: Tensor, length: int, adjoint: bool) -> tuple[Tensor | None, ...]:
        """What every segment does to a state; nothing where there is one segment."""
        if self.plan.segments == 1:
            return None, None
        ends, products = (self.states(self.x, self.sequences, self.plan.segments) for _ in range(2))
        strides = self.strides | {"stride_xb": rows.stride(0), "stride_xl": rows.stride(1)}
        _prefix_kernel[self.grid](
            *(rows, self.a, self.cu, ends, products, length, *self.sizes),
            **strides,
            **self.options,
            ADJOINT=adjoint,
        )
        return ends, products


def rows_of(v: Tensor) -> Tensor:
    """Real numbers with adjacent channels (of pairs, if complex), near enough for 32-bit steps."""
    v = adjacent(v.resolve_conj())
    if v.ndim == 3 and v.stride(1) >= 1 << 24:
        v = v.contiguous()
    return torch.view_as_real(v) if v.is_complex() else v


def forward(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """States (B, L, D), the final ones (S, D), and the kept ones, empty unless `keep_states`."""
    length = x.shape[1]
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.complex64 if x.is_complex() else torch.float32
    final = x.new_empty((sequences, x.shape[2]), dtype=dtype)
    shape = checkpoints_shape(x, cu_seqlens) if keep_states else (0,)
    # packed sequences rarely fill every chunk; what is left over must not be random
    fresh = torch.empty if cu_seqlens is None else torch.zeros
    kept = fresh(shape, dtype=torch.float32, device=x.device)
    if final.numel() == 0:
        return h, final, kept
    call = Call(x, log_a, cu_seqlens, reverse)
    h0 = None if initial_state is None else rows_of(initial_state.contiguous())
    with on_device(x):
        ends, products = call.prefixes(call.x, length, adjoint=False)
        _forward_kernel[call.grid](
            *(call.x, call.a, h0, call.cu, ends, products, real(h), real(final), kept),
            *(length, length, *call.sizes),
            **call.strides,
            **call.options,
            HAS_H0=h0 is not None,
            KEEP=keep_states,
        )
    return h, final, kept


def real(v: Tensor) -> Tensor:
    """A view of complex numbers as pairs."""
    return torch.view_as_real(v) if v.is_complex() else v
