"""Gradients of the short convolution in Triton. Equations: `reference.py` and `portable.py`.

Walks as `forward_kernel.py` does, W - 1 steps further, and keeps the gradients of W sums c in
registers as well. The next rows are loaded before the present ones are used. Gradients of taps and
bias are one partial sum a program, added by a kernel of their own in an order that does not change.
"""

# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from ..launch import sigmoid
from .forward_kernel import (
    in_float32,
    load_raw,
    load_rows,
    load_taps,
    owners_of,
    position_of,
    state_row,
    with_state,
)


# one compilation serves all lengths
@triton.jit(do_not_specialize=["tokens", "span", "blocks_l", "blocks_d"])
def backward_kernel(
    x_ptr,
    weight_ptr,  # (D, W)
    bias_ptr,
    state_ptr,  # (S, W - 1, D)
    cu_ptr,  # (S + 1,)
    sequence_ptr,  # (T,)
    dy_ptr,
    dx_ptr,
    partial_ptr,  # (programs / blocks_d, W + HAS_BIAS, D)
    tokens,
    dim,
    span,
    blocks_l,
    blocks_d,
    stride_xb,
    stride_xl,
    stride_yb,
    stride_yl,
    WIDTH: tl.constexpr,
    LEFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a span of steps, and what they add to those of taps and bias."""
    RIGHT: tl.constexpr = WIDTH - 1 - LEFT
    AHEAD: tl.constexpr = -1 if REVERSE else 1
    pid = tl.program_id(0)
    part = (pid // blocks_d).to(tl.int64)
    pid_b = (pid // (blocks_l * blocks_d)).to(tl.int64)
    start = ((pid // blocks_d) % blocks_l) * span
    stop = tl.minimum(start + span, tokens)
    offs_d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    origin = pid_b * 0 + (tokens - 1 if REVERSE else 0)
    x_ptr += pid_b * stride_xb + origin * stride_xl
    dy_ptr += pid_b * stride_yb + origin * stride_yl
    dx_ptr += (pid_b * tokens + origin) * dim
    if PACKED:
        sequence_ptr += origin
    taps = load_taps(weight_ptr, offs_d, mask_d, WIDTH)
    bias = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # c[t] meets x[t - LEFT .. t + RIGHT], and x[u] has met c[u - RIGHT .. u + LEFT]
    begin = start - RIGHT
    window = load_rows(x_ptr, begin - LEFT, tokens, AHEAD * stride_xl, offs_d, mask_d, WIDTH - 1)
    if HAS_STATE and not PACKED:
        window = with_state(window, state_ptr, pid_b, begin, dim, offs_d, mask_d, WIDTH)
    before = ()
    dtaps = ()
    for j in tl.static_range(WIDTH):
        if j > 0:
            before = before + (tl.zeros([BLOCK_D], tl.float32),)
        dtaps = dtaps + (tl.zeros([BLOCK_D], tl.float32),)
    stride_x = AHEAD * stride_xl
    stride_y = AHEAD * stride_yl
    x_next = load_raw(x_ptr, begin + RIGHT, tokens, stride_x, offs_d, mask_d, BLOCK_L)
    y_next = load_raw(dy_ptr, begin, tokens, stride_y, offs_d, mask_d, BLOCK_L)
    for first in range(begin, stop + LEFT, BLOCK_L):
        rows = window + in_float32(x_next, BLOCK_L)
        dcs = before + in_float32(y_next, BLOCK_L)
        ahead = first + BLOCK_L
        x_next = load_raw(x_ptr, ahead + RIGHT, tokens, stride_x, offs_d, mask_d, BLOCK_L)
        y_next = load_raw(dy_ptr, ahead, tokens, stride_y, offs_d, mask_d, BLOCK_L)
        if PACKED:
            # those of the steps first - (W - 1) .. first + BLOCK_L - 1 + RIGHT
            owners = owners_of(
                sequence_ptr, first - (WIDTH - 1), tokens, AHEAD, BLOCK_L + WIDTH - 1 + RIGHT
            )
        known = before
        for i in tl.static_range(BLOCK_L):
            step = first + i
            dc = dcs[i + WIDTH - 1]
            if PACKED and HAS_STATE:
                own = owners[i + WIDTH - 1]
                position = position_of(cu_ptr, own, origin + AHEAD * step, REVERSE)
            near = ()
            for j in tl.static_range(WIDTH):
                row = rows[i + j]
                if PACKED and j != LEFT:
                    row = tl.where(owners[i + j + RIGHT] == owners[i + WIDTH - 1], row, 0.0)
                if PACKED and HAS_STATE and j < LEFT:
                    early = LEFT - j - position
                    row += state_row(state_ptr, own, early, dim, offs_d, mask_d, WIDTH)
                near = near + (row,)
            if SILU:
                c = bias
                for j in tl.static_range(WIDTH):
                    c += near[j] * taps[j]
                gate = sigmoid(c)
                dc *= gate * (1.0 + c * (1.0 - gate))
            known = known + (dc,)
            # steps of the neighbours' spans are theirs to add
            mine = tl.where((step >= start) & (step < stop), dc, 0.0)
            dbias += mine
            sums = ()
            for j in tl.static_range(WIDTH):
                sums = sums + (dtaps[j] + mine * near[j],)
            dtaps = sums
            # this was the last sum that x of LEFT steps ago went into
            u = step - LEFT
            dx = tl.zeros([BLOCK_D], tl.float32)
            for j in tl.static_range(WIDTH):
                g = known[i + WIDTH - 1 - j]
                if PACKED and j != LEFT:
                    g = tl.where(owners[i + WIDTH - 1 - j] == owners[i + RIGHT], g, 0.0)
                dx += g * taps[j]
            at = dx_ptr + u.to(tl.int64) * (AHEAD * dim) + offs_d
            inside = tl.where((u >= start) & (u < stop), mask_d, False)
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        window = ()
        before = ()
        for i in tl.static_range(WIDTH - 1):
            window = window + (rows[BLOCK_L + i],)
            before = before + (known[BLOCK_L + i],)
    partial_ptr += part * (WIDTH + HAS_BIAS) * dim + offs_d
    for j in tl.static_range(WIDTH):
        tl.store(partial_ptr + j * dim, dtaps[j], mask=mask_d)
    if HAS_BIAS:
        tl.store(partial_ptr + WIDTH * dim, dbias, mask=mask_d)


# one compilation serves all lengths
@triton.jit(do_not_specialize=["parts"])
def sum_kernel(
    partial_ptr,  # (parts, W + HAS_BIAS, D)
    dweight_ptr,  # (D, W)
    dbias_ptr,
    parts,
    dim,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the partial sums of one tap, or of the bias."""
    j = tl.program_id(0) % (WIDTH + HAS_BIAS)
    offs_d = tl.program_id(0) // (WIDTH + HAS_BIAS) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, BLOCK_P)
    mask_d = offs_d < dim
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p in range(0, parts, BLOCK_P):
        row = (p + offs_p).to(tl.int64) * (WIDTH + HAS_BIAS) + j
        mask = (p + offs_p < parts)[:, None] & mask_d[None, :]
        total += tl.load(partial_ptr + row[:, None] * dim + offs_d[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    at = dweight_ptr + offs_d * WIDTH + j
    tl.store(at, sums.to(dweight_ptr.dtype.element_ty), mask=tl.where(j < WIDTH, mask_d, False))
    if HAS_BIAS:
        mask_d = tl.where(j == WIDTH, mask_d, False)
        tl.store(dbias_ptr + offs_d, sums.to(dbias_ptr.dtype.element_ty), mask=mask_d)
