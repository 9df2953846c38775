"""Gradients of the linear scan in Triton.

A program walks its segment backwards, CHUNK steps at a time: from the kept state it computes the
chunk's states again, then carries the gradient through the chunk. Gradients of constant decays are
partial sums that PyTorch adds. Letters and cuts: `kernels.py`; equations: `portable.scan_backward`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005, RUF059

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import batch_stride, on_device
from .kernels import (
    Call,
    decay_of,
    entering,
    kept_before,
    load_pair,
    load_rows,
    no_rows,
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
def times_conjugate(a, ai, s, si, COMPLEX: tl.constexpr):
    """Conjugate of the first number, times the second."""
    if COMPLEX:
        return a * s + ai * si, a * si - ai * s
    else:
        return a * s, si


@triton.jit
def _backward_window(
    e,
    ei,
    total,
    total_i,
    h,
    hi,
    gs,
    gis,
    rows,
    dx_at,
    da_at,
    next_out,
    left,
    mask_d,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A chunk's states again from `h`, then the gradient `e` of its last one back to its first; the
    first `left` steps of the chunk are there.
    """
    xs, xis, logs, logs_i = rows
    decays = ()
    decays_i = ()
    carried = ()  # a[t] h[t-1]
    carried_i = ()
    for i in tl.static_range(CHUNK):
        b, bi = decay_of(
            *(logs[0 if CONSTANT else i], logs_i[0 if CONSTANT else i], left, i),
            CONSTANT=CONSTANT,
            COMPLEX=COMPLEX,
        )
        h, hi = times(b, bi, h, hi, COMPLEX)
        decays = decays + (b,)
        decays_i = decays_i + (bi,)
        carried = carried + (h,)
        carried_i = carried_i + (hi,)
        h += xs[i].to(tl.float32)
        hi += xis[i].to(tl.float32)
    for j in tl.static_range(CHUNK):
        s = gs[CHUNK - 1 - j].to(tl.float32) + e
        si = gis[CHUNK - 1 - j].to(tl.float32) + ei
        da, dai = times_conjugate(carried[CHUNK - 1 - j], carried_i[CHUNK - 1 - j], s, si, COMPLEX)
        valid = CHUNK - 1 - j < left
        mask = tl.where(valid, mask_d, False)
        store_pair(dx_at, s, si, mask, COMPLEX)
        dx_at -= next_out
        if CONSTANT:
            total += tl.where(valid, da, 0.0)
            total_i += tl.where(valid, dai, 0.0)
        else:
            store_pair(da_at, da, dai, mask, COMPLEX)
            da_at -= next_out
        e, ei = times_conjugate(decays[CHUNK - 1 - j], decays_i[CHUNK - 1 - j], s, si, COMPLEX)
    return e, ei, total, total_i, dx_at, da_at


@triton.jit(do_not_specialize=["length", "tokens"])
def _backward_kernel(
    g_ptr,  # gradient of h
    x_ptr,
    a_ptr,  # logarithms; decays themselves if complex
    dfinal_ptr,  # (S, D)
    cu_ptr,
    ends_ptr,
    products_ptr,
    keep_ptr,  # (chunks, D)
    dx_ptr,  # (B, L, D)
    da_ptr,  # (B, L, D), or (S, K, D) of constant decays
    dh0_ptr,  # (S, D)
    length,
    tokens,
    dim,
    blocks,
    stride_gb,
    stride_gl,
    stride_xb,
    stride_xl,
    stride_ab,
    stride_al,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
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
    state = pid_s * dim * PARTS + offs
    e = tl.zeros([BLOCK_D], tl.float32)
    ei = tl.zeros([BLOCK_D], tl.float32)
    if HAS_DFINAL:
        e, ei = load_pair(dfinal_ptr + state, mask_d, 0.0, COMPLEX)
    if SEGMENTS > 1:
        base = pid_s * SEGMENTS
        e, ei = entering(
            *(e, ei, ends_ptr, products_ptr, base, dim, offs, mask_d, segment),
            ADJOINT=True,
            COMPLEX=COMPLEX,
            SEGMENTS=SEGMENTS,
        )
    ahead: tl.constexpr = -1 if REVERSE else 1
    next_g = ahead * stride_gl
    next_x = ahead * stride_xl
    next_a = ahead * stride_al
    next_out = ahead * dim * PARTS
    # the last chunk, which may be cut short, is the first to be walked
    chunks = tl.cdiv(count, CHUNK)
    start = (chunks - 1) * CHUNK
    place = first + (steps - 1 - begin - start if REVERSE else begin + start)
    g_at = g_ptr + row * stride_gb + place * stride_gl + offs
    x_at = x_ptr + row * stride_xb + place * stride_xl + offs
    a_at = a_ptr + row * stride_ab + place * stride_al + offs
    out = (row * tokens + place) * dim * PARTS + (CHUNK - 1) * next_out
    dx_at = dx_ptr + out + offs
    da_at = da_ptr + out + offs
    kept = kept_before(pid_s, first, length, PACKED, CHUNK) + (begin + start) // CHUNK
    keep_at = keep_ptr + kept * dim * PARTS + offs
    total = tl.zeros([BLOCK_D], tl.float32)
    total_i = tl.zeros([BLOCK_D], tl.float32)
    h = tl.zeros([BLOCK_D], tl.float32)
    hi = tl.zeros([BLOCK_D], tl.float32)
    gs, gis = no_rows(g_ptr, BLOCK_D, COMPLEX, CHUNK)
    rows = rows_before(x_ptr, a_ptr, a_at, mask_d, CONSTANT, COMPLEX, BLOCK_D, CHUNK)
    for c in range(-1, chunks):
        g_now = gs
        gi_now = gis
        now = rows
        h_now = h
        hi_now = hi
        # the chunk before this one
        mask = tl.where(c + 1 < chunks, mask_d, False)
        more = count - start + (c + 1) * CHUNK
        gs, gis, g_end = load_rows(g_at, next_g, more, mask, 0.0, COMPLEX, CHUNK)
        rows, x_end, a_end = rows_ahead(
            *(rows, x_at, a_at, next_x, next_a, more, mask, CONSTANT, COMPLEX, CHUNK)
        )
        g_at -= CHUNK * next_g
        x_at -= CHUNK * next_x
        a_at -= CHUNK * next_a
        h, hi = load_pair(keep_at, mask, 0.0, COMPLEX)
        keep_at -= dim * PARTS
        if c >= 0:
            e, ei, total, total_i, dx_at, da_at = _backward_window(
                *(e, ei, total, total_i, h_now, hi_now, g_now, gi_now, now, dx_at, da_at),
                *(next_out, more - CHUNK, mask_d),
                CONSTANT=CONSTANT,
                COMPLEX=COMPLEX,
                CHUNK=CHUNK,
            )
    if CONSTANT:
        at = (pid_s * SEGMENTS + segment) * dim * PARTS + offs
        store_pair(da_ptr + at, total, total_i, mask_d, COMPLEX)
    if segment == 0:
        store_pair(dh0_ptr + state, e, ei, mask_d, COMPLEX)


def backward(
    dh: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, log_a and the initial state; constant decays' and states' in float32."""
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    constant = log_a.ndim == 1
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dtype = torch.complex64 if x.is_complex() else torch.float32
    dinitial = x.new_empty((sequences, x.shape[2]), dtype=dtype)
    if dinitial.numel() == 0:
        return dx, torch.zeros_like(log_a), dinitial
    call = Call(x, log_a, cu_seqlens, reverse)
    if constant:
        dlog_a = x.new_empty((sequences, call.plan.segments, x.shape[2]), dtype=dtype)
    else:
        dlog_a = torch.empty_like(log_a, memory_format=torch.contiguous_format)
    g = rows_of(dh)
    last = None if dfinal is None else rows_of(dfinal.contiguous())
    length = x.shape[1]
    with on_device(x):
        ends, products = prefixes(call, g, length, adjoint=True)
        _backward_kernel[call.grid](
            *(g, call.x, call.a, last, call.cu, ends, products, checkpoints),
            *(real(dx), real(dlog_a), real(dinitial)),
            *(length, length, *call.sizes, batch_stride(g), g.stride(1)),
            **call.strides,
            **call.options,
            HAS_DFINAL=dfinal is not None,
        )
    return dx, dlog_a.sum((0, 1)) if constant else dlog_a, dinitial
