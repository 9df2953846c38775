"""Gradients of the linear scan in Triton.

A program walks its segment backwards, CHUNK steps at a time: from the kept state it computes the
chunk's states again, then carries the gradient through the chunk. Gradients of constant decays are
partial sums that PyTorch adds. Letters and cuts: `kernels.py`; equations: `portable.scan_backward`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .kernels import (
    CHUNK,
    Call,
    decay_of,
    entering,
    kept_before,
    load_pair,
    load_rows,
    part_of,
    real,
    rows_of,
    store_pair,
    times,
)


@triton.jit
def times_conjugate(a, ai, s, si, COMPLEX: tl.constexpr):
    """Conjugate of the first number, times the second."""
    return times(a, -ai if COMPLEX else ai, s, si, COMPLEX)


@triton.jit
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
    chunks = tl.cdiv(count, WINDOW)
    # the first step of the last chunk
    start = begin + (chunks - 1) * WINDOW
    place = first + (steps - 1 - start if REVERSE else start)
    g_base = g_ptr + row * stride_gb + offs
    x_base = x_ptr + row * stride_xb + offs
    a_base = a_ptr + row * stride_ab + offs
    out_base = row * tokens * dim * PARTS + offs
    kept = kept_before(pid_s, first, length, PACKED, CHUNK) + begin // WINDOW
    total = tl.zeros([BLOCK_D], tl.float32)
    total_i = tl.zeros([BLOCK_D], tl.float32)
    if CONSTANT:
        fixed, fixed_i = load_pair(a_base, mask_d, 0.0, COMPLEX)
    left = count - (chunks - 1) * WINDOW
    gs, gis = load_rows(
        g_base + place * stride_gl, ahead * stride_gl, left, mask_d, COMPLEX, WINDOW
    )
    xs, xis = load_rows(
        x_base + place * stride_xl, ahead * stride_xl, left, mask_d, COMPLEX, WINDOW
    )
    if not CONSTANT:
        logs, logs_i = load_rows(
            a_base + place * stride_al, ahead * stride_al, left, mask_d, COMPLEX, WINDOW
        )
    for w in range(chunks):
        chunk = chunks - 1 - w
        left = count - chunk * WINDOW
        # nothing is before the first chunk
        more = tl.where(chunk > 0, WINDOW, 0)
        before = place - WINDOW * ahead
        g_now = gs
        gi_now = gis
        x_now = xs
        xi_now = xis
        gs, gis = load_rows(
            g_base + before * stride_gl, ahead * stride_gl, more, mask_d, COMPLEX, WINDOW
        )
        xs, xis = load_rows(
            x_base + before * stride_xl, ahead * stride_xl, more, mask_d, COMPLEX, WINDOW
        )
        if not CONSTANT:
            a_now = logs
            ai_now = logs_i
            logs, logs_i = load_rows(
                a_base + before * stride_al, ahead * stride_al, more, mask_d, COMPLEX, WINDOW
            )
        h, hi = load_pair(keep_ptr + (kept + chunk) * dim * PARTS + offs, mask_d, 0.0, COMPLEX)
        decays = ()
        decays_i = ()
        carried = ()  # a[t] h[t-1]
        carried_i = ()
        for i in tl.static_range(WINDOW):
            if CONSTANT:
                b, bi = decay_of(fixed, fixed_i, i < left, False, COMPLEX)
            else:
                b, bi = decay_of(a_now[i], ai_now[i], i < left, False, COMPLEX)
            h, hi = times(b, bi, h, hi, COMPLEX)
            decays = decays + (b,)
            decays_i = decays_i + (bi,)
            carried = carried + (h,)
            carried_i = carried_i + (hi,)
            h += x_now[i].to(tl.float32)
            hi += xi_now[i].to(tl.float32)
        row_out = out_base + place * dim * PARTS
        for j in tl.static_range(WINDOW):
            i: tl.constexpr = WINDOW - 1 - j
            s = g_now[i].to(tl.float32) + e
            si = gi_now[i].to(tl.float32) + ei
            da, dai = times_conjugate(carried[i], carried_i[i], s, si, COMPLEX)
            mask = tl.where(i < left, mask_d, False)
            at = row_out + i * ahead * dim * PARTS
            store_pair(dx_ptr + at, s, si, mask, COMPLEX)
            if CONSTANT:
                total += tl.where(i < left, da, 0.0)
                total_i += tl.where(i < left, dai, 0.0)
            else:
                store_pair(da_ptr + at, da, dai, mask, COMPLEX)
            e, ei = times_conjugate(decays[i], decays_i[i], s, si, COMPLEX)
        place = before
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
    call = Call(x, log_a, cu_seqlens, reverse, window=CHUNK)
    if constant:
        dlog_a = x.new_empty((sequences, call.plan.segments, x.shape[2]), dtype=dtype)
    else:
        dlog_a = torch.empty_like(log_a, memory_format=torch.contiguous_format)
    g = rows_of(dh)
    last = None if dfinal is None else rows_of(dfinal.contiguous())
    length = x.shape[1]
    with on_device(x):
        ends, products = call.prefixes(g, length, adjoint=True)
        _backward_kernel[call.grid](
            *(g, call.x, call.a, last, call.cu, ends, products, checkpoints),
            *(real(dx), real(dlog_a), real(dinitial)),
            *(length, length, *call.sizes, g.stride(0), g.stride(1)),
            **call.strides,
            **call.options,
            HAS_DFINAL=dfinal is not None,
        )
    return dx, dlog_a.sum((0, 1)) if constant else dlog_a, dinitial
