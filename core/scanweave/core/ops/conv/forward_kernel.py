"""The short convolution in Triton, and what its backward shares. Equations: `reference.py`.

A program walks a span of steps in the order of the scan, a few channels a thread, and keeps the W
rows that an output needs in registers, so that every row is read once; BLOCK_L rows are loaded at a
time. Packing and direction are masks and addressing.
"""

# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

import triton
import triton.language as tl

from ..launch import sigmoid


@triton.jit
def load_raw(ptr, first, tokens, stride, offs_d, mask_d, COUNT: tl.constexpr):
    """The rows of COUNT steps from `first` in their own dtype, 0 outside the tokens."""
    rows = ()
    for i in tl.static_range(COUNT):
        step = first + i
        inside = (step >= 0) & (step < tokens)
        at = ptr + step.to(tl.int64) * stride + offs_d
        rows = rows + (tl.load(at, mask=tl.where(inside, mask_d, False), other=0.0),)
    return rows


@triton.jit
def in_float32(raw, COUNT: tl.constexpr):
    """COUNT rows in float32."""
    rows = ()
    for i in tl.static_range(COUNT):
        rows = rows + (raw[i].to(tl.float32),)
    return rows


@triton.jit
def load_rows(ptr, first, tokens, stride, offs_d, mask_d, COUNT: tl.constexpr):
    """As `load_raw`, in float32."""
    return in_float32(load_raw(ptr, first, tokens, stride, offs_d, mask_d, COUNT), COUNT)


@triton.jit
def owners_of(sequence_ptr, first, tokens, ahead, COUNT: tl.constexpr):
    """The sequences of COUNT steps from `first`, -1 outside the tokens."""
    owners = ()
    for i in tl.static_range(COUNT):
        step = first + i
        inside = (step >= 0) & (step < tokens)
        at = sequence_ptr + step.to(tl.int64) * ahead
        owners = owners + (tl.load(at, mask=inside, other=-1),)
    return owners


@triton.jit
def load_taps(weight_ptr, offs_d, mask_d, WIDTH: tl.constexpr):
    """The columns of (D, W)."""
    taps = ()
    for j in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + offs_d * WIDTH + j, mask=mask_d, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def state_row(state_ptr, sequence, early, dim, offs_d, mask_d, WIDTH: tl.constexpr):
    """The input `early` steps before a sequence's first; 0 if that is none of W - 1."""
    inside = (sequence >= 0) & (early > 0) & (early < WIDTH)
    row = sequence.to(tl.int64) * (WIDTH - 1) + (WIDTH - 1) - early
    at = state_ptr + row * dim + offs_d
    return tl.load(at, mask=tl.where(inside, mask_d, False), other=0.0).to(tl.float32)


@triton.jit
def position_of(cu_ptr, sequence, token, REVERSE: tl.constexpr):
    """Steps from the first one of a sequence to a token's."""
    known = sequence >= 0
    if REVERSE:
        return tl.load(cu_ptr + sequence + 1, mask=known, other=0).to(tl.int64) - 1 - token
    else:
        return token - tl.load(cu_ptr + sequence, mask=known, other=0).to(tl.int64)


@triton.jit
def with_state(window, state_ptr, sequence, start, dim, offs_d, mask_d, WIDTH: tl.constexpr):
    """The W - 1 rows before step `start`, those before the first step from a state."""
    rows = ()
    for i in tl.static_range(WIDTH - 1):
        early = WIDTH - 1 - i - start
        row = state_row(state_ptr, sequence, early, dim, offs_d, mask_d, WIDTH)
        rows = rows + (window[i] + row,)
    return rows


# one compilation serves all lengths
@triton.jit(do_not_specialize=["tokens", "span", "blocks_l", "blocks_d"])
def forward_kernel(
    x_ptr,
    weight_ptr,  # (D, W)
    bias_ptr,
    state_ptr,  # (S, W - 1, D)
    cu_ptr,  # (S + 1,)
    sequence_ptr,  # (T,)
    y_ptr,
    tokens,
    dim,
    span,
    blocks_l,
    blocks_d,
    stride_xb,
    stride_xl,
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
    """Outputs of a span of steps."""
    RIGHT: tl.constexpr = WIDTH - 1 - LEFT
    AHEAD: tl.constexpr = -1 if REVERSE else 1
    pid = tl.program_id(0)
    pid_b = (pid // (blocks_l * blocks_d)).to(tl.int64)
    start = ((pid // blocks_d) % blocks_l) * span
    stop = tl.minimum(start + span, tokens)
    offs_d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    # the token of step 0
    origin = pid_b * 0 + (tokens - 1 if REVERSE else 0)
    x_ptr += pid_b * stride_xb + origin * stride_xl
    y_ptr += (pid_b * tokens + origin) * dim
    if PACKED:
        sequence_ptr += origin
    taps = load_taps(weight_ptr, offs_d, mask_d, WIDTH)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # rows LEFT steps before the output's to RIGHT - 1 after it
    window = load_rows(x_ptr, start - LEFT, tokens, AHEAD * stride_xl, offs_d, mask_d, WIDTH - 1)
    if HAS_STATE and not PACKED:
        window = with_state(window, state_ptr, pid_b, start, dim, offs_d, mask_d, WIDTH)
    for first in range(start, stop, BLOCK_L):
        rows = window + load_rows(
            x_ptr, first + RIGHT, tokens, AHEAD * stride_xl, offs_d, mask_d, BLOCK_L
        )
        if PACKED:
            owners = owners_of(sequence_ptr, first - LEFT, tokens, AHEAD, BLOCK_L + WIDTH - 1)
        for i in tl.static_range(BLOCK_L):
            step = first + i
            if PACKED and HAS_STATE:
                own = owners[i + LEFT]
                position = position_of(cu_ptr, own, origin + AHEAD * step, REVERSE)
            c = bias
            for j in tl.static_range(WIDTH):
                row = rows[i + j]
                if PACKED and j != LEFT:
                    row = tl.where(owners[i + j] == owners[i + LEFT], row, 0.0)
                if PACKED and HAS_STATE and j < LEFT:
                    early = LEFT - j - position
                    row += state_row(state_ptr, own, early, dim, offs_d, mask_d, WIDTH)
                c += row * taps[j]
            if SILU:
                c *= sigmoid(c)
            at = y_ptr + step.to(tl.int64) * (AHEAD * dim) + offs_d
            tl.store(at, c.to(y_ptr.dtype.element_ty), mask=tl.where(step < stop, mask_d, False))
        window = ()
        for i in tl.static_range(WIDTH - 1):
            window = window + (rows[BLOCK_L + i],)
