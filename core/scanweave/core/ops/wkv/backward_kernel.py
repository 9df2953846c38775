"""Gradients of the exponentially weighted average in Triton.

A program walks the chunks of its sequence from the last to the first: it computes a chunk's states
again, then carries the gradient through it, while the chunk before is read. Letters: `kernels.py`;
equations: `portable.backward`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005, RUF059, SIM108

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, adjacent, ceil_div, on_device
from ..linear.kernels import kept_before, load_rows, part_of
from .kernels import add_token, load_state, options_of, power, ratio, store_state, strides_of


@triton.jit(do_not_specialize=["length", "tokens"])
def _backward_kernel(
    g_ptr,  # gradient of y
    k_ptr,
    v_ptr,
    w_ptr,
    u_ptr,
    h0_ptr,
    dfinal_ptr,  # (S, 3, D)
    cu_ptr,
    keep_ptr,
    dk_ptr,  # (B, L, D)
    dv_ptr,
    dw_ptr,  # (B, L, D), or (S, D) of constant decays
    du_ptr,  # (S, D)
    dh0_ptr,  # (S, 3, D)
    length,
    tokens,
    dim,
    blocks,
    stride_gb,
    stride_gl,
    stride_kb,
    stride_kl,
    stride_vb,
    stride_vl,
    stride_wb,
    stride_wl,
    CONSTANT: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_s, segment, pid_d, row, first, steps, begin, count = part_of(
        tl.program_id(0), cu_ptr, length, blocks, PACKED, 1, CHUNK
    )
    offs = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs < dim
    state = pid_s * 3 * dim + offs
    infinite = tl.full([BLOCK_D], float("inf"), tl.float32)
    en = tl.zeros([BLOCK_D], tl.float32)
    ed = tl.zeros([BLOCK_D], tl.float32)
    em = tl.zeros([BLOCK_D], tl.float32)
    if HAS_DFINAL:
        en, ed, em = load_state(dfinal_ptr + state, dim, mask_d)
    low = infinite
    dw_sum = tl.zeros([BLOCK_D], tl.float32)
    du_sum = tl.zeros([BLOCK_D], tl.float32)
    ahead: tl.constexpr = -1 if REVERSE else 1
    chunks = tl.cdiv(count, CHUNK)
    kept = kept_before(pid_s, first, length, PACKED, CHUNK)
    if HAS_BONUS:
        u = tl.load(u_ptr + offs, mask=mask_d, other=0.0).to(tl.float32) * LOG2_E
    if CONSTANT:
        fixed = tl.load(w_ptr + offs, mask=mask_d, other=0.0).to(tl.float32) * LOG2_E
    next_k = ahead * stride_kl
    next_v = ahead * stride_vl
    next_w = ahead * stride_wl
    next_g = ahead * stride_gl
    # the last chunk, which may be cut short; the others are read while the one after is computed
    start = (chunks - 1) * CHUNK
    place = first + (steps - 1 - start if REVERSE else start)
    k_at = k_ptr + row * stride_kb + place * stride_kl + offs
    v_at = v_ptr + row * stride_vb + place * stride_vl + offs
    w_at = w_ptr + row * stride_wb + place * stride_wl + offs
    g_at = g_ptr + row * stride_gb + place * stride_gl + offs
    keep_at = keep_ptr + (kept + chunks - 1) * 3 * dim + offs
    some = tl.where(count > 0, mask_d, False)
    ks, ks_i, _ = load_rows(k_at, next_k, count - start, some, float("-inf"), False, CHUNK)
    vs, vs_i, _ = load_rows(v_at, next_v, count - start, some, 0.0, False, CHUNK)
    gs, gs_i, _ = load_rows(g_at, next_g, count - start, some, 0.0, False, CHUNK)
    if not CONSTANT:
        ws, ws_i, _ = load_rows(w_at, next_w, count - start, some, 0.0, False, CHUNK)
    before_n, before_d, before_m = load_state(keep_at, dim, some)
    out = (row * tokens + place + (CHUNK - 1) * ahead) * dim + offs
    for c in range(chunks):
        left = count - (chunks - 1 - c) * CHUNK
        more = tl.where(c + 1 < chunks, mask_d, False)
        n = before_n
        d = before_d
        m = before_m
        k_now = ks
        v_now = vs
        g_now = gs
        # the chunk before, while this one is computed
        k_at -= CHUNK * next_k
        v_at -= CHUNK * next_v
        g_at -= CHUNK * next_g
        keep_at -= 3 * dim
        ks, ks_i, _ = load_rows(k_at, next_k, CHUNK, more, 0.0, False, CHUNK)
        vs, vs_i, _ = load_rows(v_at, next_v, CHUNK, more, 0.0, False, CHUNK)
        gs, gs_i, _ = load_rows(g_at, next_g, CHUNK, more, 0.0, False, CHUNK)
        if not CONSTANT:
            w_now = ws
            w_at -= CHUNK * next_w
            ws, ws_i, _ = load_rows(w_at, next_w, CHUNK, more, 0.0, False, CHUNK)
        before_n, before_d, before_m = load_state(keep_at, dim, more)
        n_rows = (n,)
        d_rows = (d,)
        m_rows = (m,)
        for i in tl.static_range(CHUNK):
            if CONSTANT:
                w = tl.where(i < left, fixed, 0.0)
            else:
                w = w_now[i].to(tl.float32) * LOG2_E
            k = k_now[i].to(tl.float32) * LOG2_E
            n, d, m = add_token(n, d, m, k, v_now[i].to(tl.float32), w)
            n_rows = n_rows + (n,)
            d_rows = d_rows + (d,)
            m_rows = m_rows + (m,)
        if HAS_DFINAL:  # the gradients of the final state are on its scale
            low = tl.where((c == 0) & (m != float("-inf")), m, low)
        for j in tl.static_range(CHUNK):
            k = k_now[CHUNK - 1 - j].to(tl.float32) * LOG2_E
            v = v_now[CHUNK - 1 - j].to(tl.float32)
            g = g_now[CHUNK - 1 - j].to(tl.float32)
            n = n_rows[CHUNK - 1 - j]
            d = d_rows[CHUNK - 1 - j]
            m = m_rows[CHUNK - 1 - j]
            real = CHUNK - 1 - j < left
            if CONSTANT:
                w = tl.where(real, fixed, 0.0)
            else:
                w = w_now[CHUNK - 1 - j].to(tl.float32) * LOG2_E
            if HAS_BONUS:
                top = tl.maximum(m, u + k)
                past = power(m, top)
                now = power(u + k, top)
                total = past * d + now
                y = ratio(past * n + now * v, total)
            else:
                top = m_rows[CHUNK - j]
                total = d_rows[CHUNK - j]
                y = ratio(n_rows[CHUNK - j], total)
            g = ratio(g, total)
            # a read of nothing sends nothing back, on any scale
            top = tl.where(total == 0.0, infinite, top)
            if not HAS_BONUS:
                least = tl.minimum(low, top)
                en = en * power(least, low) + g * power(least, top)
                ed = ed * power(least, low) - y * g * power(least, top)
                low = least
            weight = power(k, low)
            dv = weight * en
            dk = weight * (v * en + ed)
            dw = power(m + w, low) * (n * en + d * ed)
            low -= w
            if HAS_BONUS:
                dv += now * g
                read_k = now * g * (v - y)
                dk += read_k
                du_sum += read_k
                least = tl.minimum(low, top)
                en = en * power(least, low) + g * power(least, top)
                ed = ed * power(least, low) - y * g * power(least, top)
                low = least
            mask = tl.where(real, mask_d, False)
            tl.store(dk_ptr + out, dk.to(dk_ptr.dtype.element_ty), mask=mask)
            tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=mask)
            if CONSTANT:
                dw_sum += tl.where(real, dw, 0.0)
            else:
                tl.store(dw_ptr + out, dw.to(dw_ptr.dtype.element_ty), mask=mask)
            out -= ahead * dim
    if CONSTANT:
        tl.store(dw_ptr + pid_s * dim + offs, dw_sum, mask=mask_d)
    if HAS_BONUS:
        tl.store(du_ptr + pid_s * dim + offs, du_sum, mask=mask_d)
    if HAS_H0:
        n, d, m = load_state(h0_ptr + state, dim, mask_d)
        # a sequence without tokens hands its state on, with the gradient
        scale = tl.where(count > 0, power(m * LOG2_E, low), 1.0)
        en *= scale
        ed *= scale
        em = tl.where(count > 0, en * n + ed * d, em)
        store_state(dh0_ptr + state, dim, en, ed, em, mask_d)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, log_decay, bonus and the initial state."""
    length, dim = k.shape[1:]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    constant = log_decay.ndim == 1
    if constant:
        dw = k.new_empty((sequences, dim), dtype=torch.float32)
    else:
        dw = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    fresh = k.new_zeros if bonus is None else k.new_empty
    du = fresh((sequences, dim), dtype=torch.float32)
    dstate = k.new_empty((sequences, 3, dim), dtype=torch.float32)
    if dstate.numel():
        g, k, v, w = adjacent(dy), adjacent(k), adjacent(v), adjacent(log_decay)
        options = options_of(
            dim,
            CONSTANT=constant,
            HAS_BONUS=bonus is not None,
            HAS_H0=initial_state is not None,
            HAS_DFINAL=dfinal is not None,
            PACKED=cu_seqlens is not None,
            REVERSE=reverse,
        )
        blocks = ceil_div(dim, int(options["BLOCK_D"]))
        with on_device(k):
            _backward_kernel[(sequences * blocks,)](
                *(g, k, v, w, None if bonus is None else bonus.contiguous()),
                None if initial_state is None else initial_state.contiguous(),
                None if dfinal is None else dfinal.contiguous(),
                None if cu_seqlens is None else adjacent(cu_seqlens),
                *(checkpoints, dk, dv, dw, du, dstate, length, length, dim, blocks),
                **strides_of(g=g, k=k, v=v, w=w),
                **options,
            )
    return dk, dv, dw.sum(0) if constant else dw, du.sum(0), dstate
