"""Both directions of the short causal convolution in one launch. Equations: `reference.py`.

The first direction's output of token t + W - 1 and the reverse one's of token t meet the same W
inputs, t .. t + W - 1. Step t makes these two, so that one walk in the tokens' order with W rows in
registers serves both, and every row is read once. Steps run from 1 - W to L - 1.
"""

# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from ..launch import LOG2_E
from .forward_kernel import in_float32, load_rows, load_taps, owners_of


@triton.jit
def gate_of(c):
    """1 / (1 + exp(-c)) through the reciprocal root: a division takes 3 instructions more."""
    root = tl.rsqrt(1.0 + tl.exp2(-c * LOG2_E))
    return root * root


@triton.jit
def load_next(at, first, limit, stride, mask_d, COUNT: tl.constexpr, LEADING: tl.constexpr):
    """The rows of COUNT steps from `first`, 0 from `limit` on, and where the next one is.

    Pointers move from row to row, as a product a row costs more. LEADING: the first are below 0.
    """
    rows = ()
    for i in tl.static_range(COUNT):
        step = first + i
        inside = step < limit
        if LEADING:
            inside = (step >= 0) & inside
        rows = rows + (tl.load(at, mask=tl.where(inside, mask_d, False), other=0.0),)
        at += stride
    return rows, at


@triton.jit
def load_bias(bias_ptr, offs_d, mask_d, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A bias in float32, 0 where there is none."""
    if HAS_BIAS:
        return tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    else:
        return tl.zeros([BLOCK_D], tl.float32)


@triton.jit
def own_rows(rows, owners, STEP: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """What the taps of the first direction meet at a step, then those of the reverse one.

    `owners` are the sequences of the tokens that `rows` hold; another sequence's are 0.
    """
    near = ()
    near_r = ()
    for j in tl.static_range(WIDTH):
        row = rows[STEP + j]
        row_r = rows[STEP + WIDTH - 1 - j]
        if PACKED and j < WIDTH - 1:
            row = tl.where(owners[STEP + j] == owners[STEP + WIDTH - 1], row, 0.0)
            row_r = tl.where(owners[STEP + WIDTH - 1 - j] == owners[STEP], row_r, 0.0)
        near = near + (row,)
        near_r = near_r + (row_r,)
    return near, near_r


@triton.jit
def weighted(near, taps, bias, WIDTH: tl.constexpr):
    """The sum c of one output."""
    c = bias
    for j in tl.static_range(WIDTH):
        c += near[j] * taps[j]
    return c


# one compilation serves all lengths; widths are constants, so that rows need no addresses computed
@triton.jit(do_not_specialize=["tokens", "span", "blocks_l", "blocks_d"])
def conv_pair_kernel(
    x_ptr,
    weight_ptr,  # (D, W)
    bias_ptr,
    weight_r_ptr,
    bias_r_ptr,
    sequence_ptr,  # (T,)
    y_ptr,
    y_r_ptr,
    tokens,
    dim: tl.constexpr,
    span,
    blocks_l,
    blocks_d,
    stride_xb,
    stride_xl: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """SiLU of both directions' sums, of a span of steps."""
    pid = tl.program_id(0)
    pid_b = (pid // (blocks_l * blocks_d)).to(tl.int64)
    begin = ((pid // blocks_d) % blocks_l) * span - (WIDTH - 1)
    stop = tl.minimum(begin + span, tokens)
    limit = tl.minimum(stop + (WIDTH - 1), tokens)
    offs_d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    x_ptr += pid_b * stride_xb
    y_ptr += pid_b * tokens * dim
    y_r_ptr += pid_b * tokens * dim
    window = load_rows(x_ptr, begin, tokens, stride_xl, offs_d, mask_d, WIDTH - 1)
    x_at = x_ptr + (begin + (WIDTH - 1)).to(tl.int64) * stride_xl + offs_d
    y_at = y_ptr + (begin + (WIDTH - 1)).to(tl.int64) * dim + offs_d
    y_r_at = y_r_ptr + begin.to(tl.int64) * dim + offs_d
    ahead = begin + (WIDTH - 1)
    coming, x_at = load_next(x_at, ahead, limit, stride_xl, mask_d, BLOCK_L, False)
    taps = load_taps(weight_ptr, offs_d, mask_d, WIDTH)
    taps_r = load_taps(weight_r_ptr, offs_d, mask_d, WIDTH)
    bias = load_bias(bias_ptr, offs_d, mask_d, HAS_BIAS, BLOCK_D)
    bias_r = load_bias(bias_r_ptr, offs_d, mask_d, HAS_BIAS, BLOCK_D)
    for first in range(begin, stop, BLOCK_L):
        rows = window + in_float32(coming, BLOCK_L)
        ahead = first + (BLOCK_L + WIDTH - 1)
        coming, x_at = load_next(x_at, ahead, limit, stride_xl, mask_d, BLOCK_L, False)
        owners = ()
        if PACKED:
            owners = owners_of(sequence_ptr, first, tokens, 1, BLOCK_L + WIDTH - 1)
        for i in tl.static_range(BLOCK_L):
            near, near_r = own_rows(rows, owners, i, WIDTH, PACKED)
            c = weighted(near, taps, bias, WIDTH)
            c *= gate_of(c)
            inside = first + (i + WIDTH - 1) < limit
            inside = tl.where(inside, mask_d, False)
            tl.store(y_at, c.to(y_ptr.dtype.element_ty), mask=inside)
            c = weighted(near_r, taps_r, bias_r, WIDTH)
            c *= gate_of(c)
            inside = (first + i >= 0) & (first + i < stop)
            inside = tl.where(inside, mask_d, False)
            tl.store(y_r_at, c.to(y_r_ptr.dtype.element_ty), mask=inside)
            y_at += dim
            y_r_at += dim
        window = ()
        for i in tl.static_range(WIDTH - 1):
            window = window + (rows[BLOCK_L + i],)
