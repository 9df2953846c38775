"""The linear scan's forward in Triton. Letters and cuts: `kernels.py`; equation: `reference.py`."""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .kernels import (
    Call,
    checkpoints_shape,
    decay_of,
    entering,
    kept_before,
    load_pair,
    part_of,
    real,
    rows_ahead,
    rows_before,
    rows_of,
    store_pair,
    times,
)
from .prefix_kernel import prefixes


@triton.jit
def _forward_window(
    h,
    hi,
    rows,
    h_at,
    keep_at,
    next_h,
    dim,
    left,
    mask_d,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """WINDOW steps of the state, the first `left` of which are there, and stored."""
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    xs, xis, logs, logs_i = rows
    for i in tl.static_range(WINDOW):
        mask = tl.where(i < left, mask_d, False)
        if KEEP and i % CHUNK == 0:
            store_pair(keep_at, h, hi, mask, COMPLEX)
            keep_at += dim * PARTS
        b, bi = decay_of(
            *(logs[0 if CONSTANT else i], logs_i[0 if CONSTANT else i], left, i),
            CONSTANT=CONSTANT,
            COMPLEX=COMPLEX,
        )
        h, hi = times(b, bi, h, hi, COMPLEX)
        h += xs[i].to(tl.float32)
        hi += xis[i].to(tl.float32)
        store_pair(h_at, h, hi, mask, COMPLEX)
        h_at += next_h
    return h, hi, h_at, keep_at


@triton.jit(do_not_specialize=["length", "tokens"])
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
    next_x = ahead * stride_xl
    next_a = ahead * stride_al
    next_h = ahead * dim * PARTS
    x_at = x_ptr + row * stride_xb + place * stride_xl + offs
    a_at = a_ptr + row * stride_ab + place * stride_al + offs
    h_at = h_ptr + (row * tokens + place) * dim * PARTS + offs
    kept = kept_before(pid_s, first, length, PACKED, CHUNK) + begin // CHUNK
    keep_at = keep_ptr + kept * dim * PARTS + offs
    rows = rows_before(x_ptr, a_ptr, a_at, mask_d, CONSTANT, COMPLEX, BLOCK_D, WINDOW)
    for w in range(-1, tl.cdiv(count, WINDOW)):
        now = rows
        # one window ahead
        left = count - (w + 1) * WINDOW
        rows, x_at, a_at = rows_ahead(
            *(rows, x_at, a_at, next_x, next_a, left, mask_d, CONSTANT, COMPLEX, WINDOW)
        )
        if w >= 0:
            h, hi, h_at, keep_at = _forward_window(
                *(h, hi, now, h_at, keep_at),
                *(next_h, dim, left + WINDOW, mask_d),
                CONSTANT=CONSTANT,
                COMPLEX=COMPLEX,
                KEEP=KEEP,
                WINDOW=WINDOW,
                CHUNK=CHUNK,
            )
    if segment == SEGMENTS - 1:
        store_pair(final_ptr + pid_s * dim * PARTS + offs, h, hi, mask_d, COMPLEX)


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
        ends, products = prefixes(call, call.x, length, adjoint=False)
        _forward_kernel[call.grid](
            *(call.x, call.a, h0, call.cu, ends, products, real(h), real(final), kept),
            *(length, length, *call.sizes),
            **call.strides,
            **call.options,
            HAS_H0=h0 is not None,
            KEEP=keep_states,
        )
    return h, final, kept
