"""The exponentially weighted average in Triton: one program a sequence and block of channels.

A channel a thread, step by step, all logarithms to base 2; the rows of the next window are read
while the present one is computed. A training step keeps the state every CHUNK steps, from which the
backward computes the others again. No atomics: sums over sequences are added by PyTorch.

Letters: S sequences, D channels. Equations: `reference.py`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF059, SIM108

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LN_2, LOG2_E, adjacent, batch_stride, ceil_div, on_device, power_of_2
from ..linear.kernels import kept_before, load_rows, part_of

# 12 bytes of state per 8 steps
CHUNK = 8
# steps that the forward reads ahead
WINDOW = 16


@triton.jit
def power(v, scale):
    """2 to the v - scale; 0 for v = -inf and 1 for two +inf, where the difference is NaN."""
    same = tl.where(v == float("-inf"), v, 0.0)
    return tl.exp2(tl.where(v == scale, same, v - scale))


@triton.jit
def add_token(n, d, m, k, v, w):
    """The state after a token."""
    moved = m + w
    top = tl.maximum(moved, k)
    past = power(moved, top)
    now = power(k, top)
    return past * n + now * v, past * d + now, top


@triton.jit
def ratio(a, b):
    """Quotient, 0 where nothing was seen."""
    return tl.where(b == 0.0, 0.0, a / tl.where(b == 0.0, 1.0, b))


@triton.jit
def load_state(ptr, dim, mask):
    """Numerator, denominator and the logarithm that they are scaled by."""
    n = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(ptr + dim, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(ptr + 2 * dim, mask=mask, other=float("-inf")).to(tl.float32)
    return n, d, m


@triton.jit
def store_state(ptr, dim, n, d, m, mask):
    """As `load_state` reads it."""
    tl.store(ptr, n, mask=mask)
    tl.store(ptr + dim, d, mask=mask)
    tl.store(ptr + 2 * dim, m, mask=mask)


@triton.jit(do_not_specialize=["length", "tokens"])
def _forward_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    u_ptr,
    h0_ptr,  # (S, 3, D)
    cu_ptr,
    y_ptr,  # (B, L, D)
    final_ptr,  # (S, 3, D)
    keep_ptr,  # (chunks, 3, D), m to base 2
    length,
    tokens,
    dim,
    blocks,
    stride_kb,
    stride_kl,
    stride_vb,
    stride_vl,
    stride_wb,
    stride_wl,
    CONSTANT: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_H0: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_s, segment, pid_d, row, first, steps, begin, count = part_of(
        tl.program_id(0), cu_ptr, length, blocks, PACKED, 1, CHUNK
    )
    offs = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs < dim
    n = tl.zeros([BLOCK_D], tl.float32)
    d = tl.zeros([BLOCK_D], tl.float32)
    m = tl.full([BLOCK_D], float("-inf"), tl.float32)
    if HAS_H0:
        n, d, m = load_state(h0_ptr + pid_s * 3 * dim + offs, dim, mask_d)
        m *= LOG2_E
    ahead: tl.constexpr = -1 if REVERSE else 1
    place = first + (steps - 1 if REVERSE else 0)
    k_at = k_ptr + row * stride_kb + place * stride_kl + offs
    v_at = v_ptr + row * stride_vb + place * stride_vl + offs
    w_at = w_ptr + row * stride_wb + place * stride_wl + offs
    y_at = y_ptr + (row * tokens + place) * dim + offs
    keep_at = keep_ptr + kept_before(pid_s, first, length, PACKED, CHUNK) * 3 * dim + offs
    if HAS_BONUS:
        u = tl.load(u_ptr + offs, mask=mask_d, other=0.0).to(tl.float32) * LOG2_E
    if CONSTANT:
        fixed = tl.load(w_ptr + offs, mask=mask_d, other=0.0).to(tl.float32) * LOG2_E
    next_k = ahead * stride_kl
    next_v = ahead * stride_vl
    next_w = ahead * stride_wl
    ks, ks_i, k_at = load_rows(k_at, next_k, count, mask_d, float("-inf"), False, WINDOW)
    vs, vs_i, v_at = load_rows(v_at, next_v, count, mask_d, 0.0, False, WINDOW)
    if not CONSTANT:
        ws, ws_i, w_at = load_rows(w_at, next_w, count, mask_d, 0.0, False, WINDOW)
    for c in range(tl.cdiv(count, WINDOW)):
        left = count - c * WINDOW
        k_now = ks
        v_now = vs
        # the next window, while this one is computed
        more = left - WINDOW
        ks, ks_i, k_at = load_rows(k_at, next_k, more, mask_d, float("-inf"), False, WINDOW)
        vs, vs_i, v_at = load_rows(v_at, next_v, more, mask_d, 0.0, False, WINDOW)
        if not CONSTANT:
            w_now = ws
            ws, ws_i, w_at = load_rows(w_at, next_w, more, mask_d, 0.0, False, WINDOW)
        for i in tl.static_range(WINDOW):
            mask = tl.where(i < left, mask_d, False)
            if KEEP and i % CHUNK == 0:
                store_state(keep_at, dim, n, d, m, mask)
                keep_at += 3 * dim
            k = k_now[i].to(tl.float32) * LOG2_E
            v = v_now[i].to(tl.float32)
            if CONSTANT:
                w = tl.where(i < left, fixed, 0.0)
            else:
                w = w_now[i].to(tl.float32) * LOG2_E
            if HAS_BONUS:
                top = tl.maximum(m, u + k)
                past = power(m, top)
                now = power(u + k, top)
                y = ratio(past * n + now * v, past * d + now)
                n, d, m = add_token(n, d, m, k, v, w)
            else:
                n, d, m = add_token(n, d, m, k, v, w)
                y = ratio(n, d)
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)
            y_at += ahead * dim
    store_state(final_ptr + pid_s * 3 * dim + offs, dim, n, d, m * LN_2, mask_d)


def checkpoints_shape(k: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    """Shape of the kept states: (at most this many chunks, 3, D)."""
    batch, length, dim = k.shape
    if cu_seqlens is None:
        return batch * ((length + CHUNK - 1) // CHUNK), 3, dim
    return length // CHUNK + cu_seqlens.shape[0] - 1, 3, dim


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """Strides of rows and tokens as kernels name them, 0 where decays are constant."""
    strides = {}
    for name, v in tensors.items():
        constant = v.ndim == 1
        strides[f"stride_{name}b"] = 0 if constant else batch_stride(v)
        strides[f"stride_{name}l"] = 0 if constant else v.stride(1)
    return strides


def options_of(dim: int, **flags: bool) -> dict[str, bool | int]:
    """Flags, tiles and launch options: a channel a thread, a warp a program."""
    block_d = min(32, power_of_2(dim))
    launch = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
    return {**flags, "CHUNK": CHUNK, "BLOCK_D": block_d, **launch}


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, L, D), final states (S, 3, D), and the kept ones, empty unless `keep_states`."""
    length, dim = k.shape[1:]
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = k.new_empty((sequences, 3, dim), dtype=torch.float32)
    shape = checkpoints_shape(k, cu_seqlens) if keep_states else (0,)
    # packed sequences rarely fill every chunk; what is left over must not be random
    fresh = k.new_empty if cu_seqlens is None else k.new_zeros
    kept = fresh(shape, dtype=torch.float32)
    if final.numel() == 0:
        return y, final, kept
    k, v, w = adjacent(k), adjacent(v), adjacent(log_decay)
    options = options_of(
        dim,
        CONSTANT=w.ndim == 1,
        HAS_BONUS=bonus is not None,
        HAS_H0=initial_state is not None,
        PACKED=cu_seqlens is not None,
        REVERSE=reverse,
        KEEP=keep_states,
    )
    blocks = ceil_div(dim, int(options["BLOCK_D"]))
    with on_device(k):
        _forward_kernel[(sequences * blocks,)](
            *(k, v, w, None if bonus is None else bonus.contiguous()),
            None if initial_state is None else initial_state.contiguous(),
            None if cu_seqlens is None else adjacent(cu_seqlens),
            *(y, final, kept, length, length, dim, blocks),
            **strides_of(k=k, v=v, w=w),
            **options,
            WINDOW=WINDOW,
        )
    return y, final, kept
