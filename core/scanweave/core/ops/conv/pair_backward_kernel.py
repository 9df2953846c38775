"""Gradients of both directions of the short convolution in one launch. Equations: `reference.py`.

Walks as `pair_kernel.py` does and keeps the gradients of W sums c of each direction in registers
as well: x of token t went into the first direction's sums of t .. t + W - 1 and into the reverse
one's of t + 1 - W .. t, and step t makes the last of both. Both parts of dx are added in float32
and written once. Gradients of taps and biases are one partial sum a program, added by a kernel of
their own in an order that does not change.
"""

# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from .forward_kernel import in_float32, load_rows, load_taps, owners_of
from .pair_kernel import gate_of, load_bias, load_next, own_rows, weighted


@triton.jit
def silu_slope(c):
    """The derivative of c / (1 + exp(-c))."""
    gate = gate_of(c)
    return gate * (1.0 + c * (1.0 - gate))


@triton.jit
def zeros_of(COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """COUNT rows of zeros."""
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros([BLOCK_D], tl.float32),)
    return rows


@triton.jit
def added(sums, dc, near, WIDTH: tl.constexpr):
    """Gradients of W taps, and what one output adds to them."""
    found = ()
    for j in tl.static_range(WIDTH):
        found = found + (sums[j] + dc * near[j],)
    return found


@triton.jit
def last_of(rows, FROM: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows from one on."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (rows[FROM + i],)
    return found


# one compilation serves all lengths; widths are constants, so that rows need no addresses computed
@triton.jit(do_not_specialize=["tokens", "span", "blocks_l", "blocks_d"])
def conv_pair_backward_kernel(
    x_ptr,
    weight_ptr,  # (D, W)
    bias_ptr,
    weight_r_ptr,
    bias_r_ptr,
    sequence_ptr,  # (T,)
    dy_ptr,
    dy_r_ptr,
    dx_ptr,
    partial_ptr,  # (programs / blocks_d, 2, W + HAS_BIAS, D)
    tokens,
    dim: tl.constexpr,
    span,
    blocks_l,
    blocks_d,
    stride_xb,
    stride_xl: tl.constexpr,
    stride_yb,
    stride_yl: tl.constexpr,
    stride_rb,
    stride_rl: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    WHOLE: tl.constexpr,  # one span is all tokens
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a span of inputs, and what its steps add to those of taps and biases."""
    pid = tl.program_id(0)
    part = (pid // blocks_d).to(tl.int64)
    pid_b = (pid // (blocks_l * blocks_d)).to(tl.int64)
    start = ((pid // blocks_d) % blocks_l) * span
    stop = tl.minimum(start + span, tokens)
    begin = start - (WIDTH - 1)
    limit = tl.minimum(stop + (WIDTH - 1), tokens)
    # steps before those are the neighbour's to add; before the first token there is none
    counted = tl.where(start == 0, begin, start)
    offs_d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    x_ptr += pid_b * stride_xb
    dy_ptr += pid_b * stride_yb
    dy_r_ptr += pid_b * stride_rb
    dx_ptr += pid_b * tokens * dim
    window = load_rows(x_ptr, begin, tokens, stride_xl, offs_d, mask_d, WIDTH - 1)
    token = (begin + (WIDTH - 1)).to(tl.int64)
    x_at = x_ptr + token * stride_xl + offs_d
    y_at = dy_ptr + token * stride_yl + offs_d
    r_at = dy_r_ptr + begin.to(tl.int64) * stride_rl + offs_d
    dx_at = dx_ptr + begin.to(tl.int64) * dim + offs_d
    ahead = begin + (WIDTH - 1)
    x_next, x_at = load_next(x_at, ahead, limit, stride_xl, mask_d, BLOCK_L, False)
    y_next, y_at = load_next(y_at, ahead, limit, stride_yl, mask_d, BLOCK_L, False)
    r_next, r_at = load_next(r_at, begin, stop, stride_rl, mask_d, BLOCK_L, True)
    taps = load_taps(weight_ptr, offs_d, mask_d, WIDTH)
    taps_r = load_taps(weight_r_ptr, offs_d, mask_d, WIDTH)
    bias = load_bias(bias_ptr, offs_d, mask_d, HAS_BIAS, BLOCK_D)
    bias_r = load_bias(bias_r_ptr, offs_d, mask_d, HAS_BIAS, BLOCK_D)
    before = zeros_of(WIDTH - 1, BLOCK_D)
    before_r = zeros_of(WIDTH - 1, BLOCK_D)
    dtaps = zeros_of(WIDTH, BLOCK_D)
    dtaps_r = zeros_of(WIDTH, BLOCK_D)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dbias_r = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, stop, BLOCK_L):
        rows = window + in_float32(x_next, BLOCK_L)
        dys = in_float32(y_next, BLOCK_L)
        dys_r = in_float32(r_next, BLOCK_L)
        ahead = first + (BLOCK_L + WIDTH - 1)
        x_next, x_at = load_next(x_at, ahead, limit, stride_xl, mask_d, BLOCK_L, False)
        y_next, y_at = load_next(y_at, ahead, limit, stride_yl, mask_d, BLOCK_L, False)
        ahead = first + BLOCK_L
        leading: tl.constexpr = BLOCK_L < WIDTH - 1
        r_next, r_at = load_next(r_at, ahead, stop, stride_rl, mask_d, BLOCK_L, leading)
        owners = ()
        behind = ()
        if PACKED:
            # those of the steps first - (W - 1) .. first + BLOCK_L - 1 + W - 1
            behind = owners_of(
                sequence_ptr, first - (WIDTH - 1), tokens, 1, BLOCK_L + 2 * WIDTH - 2
            )
            owners = last_of(behind, WIDTH - 1, BLOCK_L + WIDTH - 1)
        known = before
        known_r = before_r
        for i in tl.static_range(BLOCK_L):
            step = first + i
            near, near_r = own_rows(rows, owners, i, WIDTH, PACKED)
            dc = dys[i] * silu_slope(weighted(near, taps, bias, WIDTH))
            dc_r = dys_r[i] * silu_slope(weighted(near_r, taps_r, bias_r, WIDTH))
            known = known + (dc,)
            known_r = known_r + (dc_r,)
            # outputs that are not there have no gradient, so that no end needs a mask
            if not WHOLE:
                dc = tl.where(step >= counted, dc, 0.0)
                dc_r = tl.where(step >= counted, dc_r, 0.0)
            dbias += dc
            dbias_r += dc_r
            dtaps = added(dtaps, dc, near, WIDTH)
            dtaps_r = added(dtaps_r, dc_r, near_r, WIDTH)
            dx = tl.zeros([BLOCK_D], tl.float32)
            for j in tl.static_range(WIDTH):
                g = known[i + WIDTH - 1 - j]
                g_r = known_r[i + j]
                if PACKED and j < WIDTH - 1:
                    g = tl.where(owners[i + WIDTH - 1 - j] == owners[i], g, 0.0)
                    g_r = tl.where(behind[i + j] == owners[i], g_r, 0.0)
                dx += g * taps[j]
                dx += g_r * taps_r[j]
            inside = tl.where((step >= start) & (step < stop), mask_d, False)
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            dx_at += dim
        window = last_of(rows, BLOCK_L, WIDTH - 1)
        before = last_of(known, BLOCK_L, WIDTH - 1)
        before_r = last_of(known_r, BLOCK_L, WIDTH - 1)
    partial_ptr += part * (2 * (WIDTH + HAS_BIAS)) * dim + offs_d
    for j in tl.static_range(WIDTH):
        tl.store(partial_ptr + j * dim, dtaps[j], mask=mask_d)
        tl.store(partial_ptr + (WIDTH + HAS_BIAS + j) * dim, dtaps_r[j], mask=mask_d)
    if HAS_BIAS:
        tl.store(partial_ptr + WIDTH * dim, dbias, mask=mask_d)
        tl.store(partial_ptr + (2 * WIDTH + 1) * dim, dbias_r, mask=mask_d)


# one compilation serves all lengths
@triton.jit(do_not_specialize=["parts"])
def conv_pair_sum_kernel(
    partial_ptr,  # (parts, 2, W + HAS_BIAS, D)
    dweight_ptr,  # (D, W)
    dbias_ptr,
    dweight_r_ptr,
    dbias_r_ptr,
    parts,
    dim,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the partial sums of one tap, or of one bias."""
    ROWS: tl.constexpr = 2 * (WIDTH + HAS_BIAS)
    row = tl.program_id(0) % ROWS
    reverse = row // (WIDTH + HAS_BIAS)
    j = row % (WIDTH + HAS_BIAS)
    offs_d = tl.program_id(0) // ROWS * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_p = tl.arange(0, BLOCK_P)
    mask_d = offs_d < dim
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for p in range(0, parts, BLOCK_P):
        at = ((p + offs_p).to(tl.int64) * ROWS + row) * dim
        mask = (p + offs_p < parts)[:, None] & mask_d[None, :]
        total += tl.load(partial_ptr + at[:, None] + offs_d[None, :], mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    tap = offs_d * WIDTH + j
    mask = tl.where((j < WIDTH) & (reverse == 0), mask_d, False)
    tl.store(dweight_ptr + tap, sums.to(dweight_ptr.dtype.element_ty), mask=mask)
    mask = tl.where((j < WIDTH) & (reverse == 1), mask_d, False)
    tl.store(dweight_r_ptr + tap, sums.to(dweight_r_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        mask = tl.where((j == WIDTH) & (reverse == 0), mask_d, False)
        tl.store(dbias_ptr + offs_d, sums.to(dbias_ptr.dtype.element_ty), mask=mask)
        mask = tl.where((j == WIDTH) & (reverse == 1), mask_d, False)
        tl.store(dbias_r_ptr + offs_d, sums.to(dbias_r_ptr.dtype.element_ty), mask=mask)
