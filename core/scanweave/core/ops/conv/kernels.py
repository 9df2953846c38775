"""The short convolution and its gradients in Triton. Equations and letters: `reference.py`.

One program walks a span of steps in the order of the scan, a few channels a thread, and keeps the W
rows that an output needs in registers, so that every row is read once; BLOCK_L rows are loaded at a
time. The backward keeps the gradients of W sums c as well. Gradients of taps and bias are one
partial sum a program, added by PyTorch. Packing and direction are masks and addressing.
"""

# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, ceil_div, on_device, power_of_2, processors, sigmoid

# rows, taps and their gradients are held in registers
MAX_WIDTH = 8
# rows loaded at once
FORWARD_ROWS = 8
BACKWARD_ROWS = 4


@triton.jit
def _rows(ptr, first, tokens, stride, offs_d, mask_d, COUNT: tl.constexpr):
    """The rows of COUNT steps from `first`, 0 outside the tokens."""
    rows = ()
    for i in tl.static_range(COUNT):
        step = first + i
        inside = (step >= 0) & (step < tokens)
        at = ptr + step.to(tl.int64) * stride + offs_d
        row = tl.load(at, mask=tl.where(inside, mask_d, False), other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def _owners(sequence_ptr, first, tokens, ahead, COUNT: tl.constexpr):
    """The sequences of COUNT steps from `first`, -1 outside the tokens."""
    owners = ()
    for i in tl.static_range(COUNT):
        step = first + i
        inside = (step >= 0) & (step < tokens)
        at = sequence_ptr + step.to(tl.int64) * ahead
        owners = owners + (tl.load(at, mask=inside, other=-1),)
    return owners


@triton.jit
def _taps(weight_ptr, offs_d, mask_d, WIDTH: tl.constexpr):
    """The columns of (D, W)."""
    taps = ()
    for j in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + offs_d * WIDTH + j, mask=mask_d, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _state_row(state_ptr, sequence, early, dim, offs_d, mask_d, WIDTH: tl.constexpr):
    """The input `early` steps before a sequence's first; 0 if that is none of W - 1."""
    inside = (sequence >= 0) & (early > 0) & (early < WIDTH)
    row = sequence.to(tl.int64) * (WIDTH - 1) + (WIDTH - 1) - early
    at = state_ptr + row * dim + offs_d
    return tl.load(at, mask=tl.where(inside, mask_d, False), other=0.0).to(tl.float32)


@triton.jit
def _position(cu_ptr, sequence, token, REVERSE: tl.constexpr):
    """Steps from the first one of a sequence to a token's."""
    known = sequence >= 0
    if REVERSE:
        return tl.load(cu_ptr + sequence + 1, mask=known, other=0).to(tl.int64) - 1 - token
    else:
        return token - tl.load(cu_ptr + sequence, mask=known, other=0).to(tl.int64)


@triton.jit
def _forward_kernel(
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
    taps = _taps(weight_ptr, offs_d, mask_d, WIDTH)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # rows LEFT steps before the output's to RIGHT - 1 after it
    window = _rows(x_ptr, start - LEFT, tokens, AHEAD * stride_xl, offs_d, mask_d, WIDTH - 1)
    if HAS_STATE and not PACKED:
        older = ()
        for i in tl.static_range(WIDTH - 1):
            early = LEFT - i - start
            row = _state_row(state_ptr, pid_b, early, dim, offs_d, mask_d, WIDTH)
            older = older + (window[i] + row,)
        window = older
    for first in range(start, stop, BLOCK_L):
        rows = window + _rows(
            x_ptr, first + RIGHT, tokens, AHEAD * stride_xl, offs_d, mask_d, BLOCK_L
        )
        if PACKED:
            owners = _owners(sequence_ptr, first - LEFT, tokens, AHEAD, BLOCK_L + WIDTH - 1)
        for i in tl.static_range(BLOCK_L):
            step = first + i
            if PACKED and HAS_STATE:
                own = owners[i + LEFT]
                position = _position(cu_ptr, own, origin + AHEAD * step, REVERSE)
            c = bias
            for j in tl.static_range(WIDTH):
                row = rows[i + j]
                if PACKED and j != LEFT:
                    row = tl.where(owners[i + j] == owners[i + LEFT], row, 0.0)
                if PACKED and HAS_STATE and j < LEFT:
                    early = LEFT - j - position
                    row += _state_row(state_ptr, own, early, dim, offs_d, mask_d, WIDTH)
                c += row * taps[j]
            if SILU:
                c *= sigmoid(c)
            at = y_ptr + step.to(tl.int64) * (AHEAD * dim) + offs_d
            tl.store(at, c.to(y_ptr.dtype.element_ty), mask=tl.where(step < stop, mask_d, False))
        window = ()
        for i in tl.static_range(WIDTH - 1):
            window = window + (rows[BLOCK_L + i],)


@triton.jit
def _backward_kernel(
    x_ptr,
    weight_ptr,  # (D, W)
    bias_ptr,
    sequence_ptr,  # (T,)
    dy_ptr,
    dx_ptr,
    dweight_ptr,  # (programs / blocks_d, W, D)
    dbias_ptr,  # (programs / blocks_d, D)
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
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
    taps = _taps(weight_ptr, offs_d, mask_d, WIDTH)
    bias = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # c[t] meets x[t - LEFT .. t + RIGHT], and x[u] has met c[u - RIGHT .. u + LEFT]
    begin = start - RIGHT
    window = _rows(x_ptr, begin - LEFT, tokens, AHEAD * stride_xl, offs_d, mask_d, WIDTH - 1)
    before = ()
    dtaps = ()
    for j in tl.static_range(WIDTH):
        if j > 0:
            before = before + (tl.zeros([BLOCK_D], tl.float32),)
        dtaps = dtaps + (tl.zeros([BLOCK_D], tl.float32),)
    for first in range(begin, stop + LEFT, BLOCK_L):
        rows = window + _rows(
            x_ptr, first + RIGHT, tokens, AHEAD * stride_xl, offs_d, mask_d, BLOCK_L
        )
        dcs = before + _rows(dy_ptr, first, tokens, AHEAD * stride_yl, offs_d, mask_d, BLOCK_L)
        if PACKED:
            # those of the steps first - (W - 1) .. first + BLOCK_L - 1 + RIGHT
            owners = _owners(
                sequence_ptr, first - (WIDTH - 1), tokens, AHEAD, BLOCK_L + WIDTH - 1 + RIGHT
            )
        known = before
        for i in tl.static_range(BLOCK_L):
            step = first + i
            dc = dcs[i + WIDTH - 1]
            near = ()
            for j in tl.static_range(WIDTH):
                row = rows[i + j]
                if PACKED and j != LEFT:
                    row = tl.where(owners[i + j + RIGHT] == owners[i + WIDTH - 1], row, 0.0)
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
    for j in tl.static_range(WIDTH):
        tl.store(dweight_ptr + (part * WIDTH + j) * dim + offs_d, dtaps[j], mask=mask_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + part * dim + offs_d, dbias, mask=mask_d)


class _Grid(NamedTuple):
    """How tokens and channels are cut: steps a program, and blocks of both."""

    span: int
    blocks_l: int
    blocks_d: int
    block_d: int


def _grid(x: Tensor, rows: int) -> _Grid:
    """Spans that are even and as long as still leaves enough programs to hide the memory."""
    batch, tokens, dim = x.shape
    # 4 channels a lane, or 2 where half of the last block would be empty
    block_d = 64 if 0 < dim % 128 <= 64 else 128
    block_d = min(block_d, power_of_2(dim))
    blocks_d = ceil_div(dim, block_d)
    wanted = ceil_div(16 * processors(x.device), max(batch * blocks_d, 1))
    blocks_l = min(max(ceil_div(tokens, 64), wanted), ceil_div(tokens, rows))
    span = ceil_div(ceil_div(tokens, max(blocks_l, 1)), rows) * rows
    return _Grid(span, ceil_div(tokens, max(span, 1)), blocks_d, block_d)


def _sequences(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """The sequence of every token, (T,) int32."""
    if cu_seqlens is None:
        return None
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ends = cu_seqlens[1:].contiguous()
    return torch.searchsorted(ends, token, right=True, out_int32=True)


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> Tensor:
    """Y (B, L, D); arguments as the registered op's."""
    batch, tokens, dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = adjacent(x)
    grid = _grid(x, FORWARD_ROWS)
    with on_device(x):
        _forward_kernel[(batch * grid.blocks_l * grid.blocks_d,)](
            x,
            weight.contiguous(),
            None if bias is None else adjacent(bias),
            None if state is None else state.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            _sequences(cu_seqlens, tokens),
            y,
            tokens,
            dim,
            grid.span,
            grid.blocks_l,
            grid.blocks_d,
            x.stride(0),
            x.stride(1),
            WIDTH=weight.shape[1],
            LEFT=left,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None and weight.shape[1] > 1,
            PACKED=cu_seqlens is not None,
            REVERSE=reverse,
            SILU=silu,
            BLOCK_L=FORWARD_ROWS,
            BLOCK_D=grid.block_d,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return y


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> list[Tensor]:
    """Gradients of x, weight and, if given, bias; there must be no state."""
    assert state is None
    batch, tokens, dim = x.shape
    width = weight.shape[1]
    grid = _grid(x, BACKWARD_ROWS)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = batch * grid.blocks_l
    dweight = x.new_empty(parts, width, dim, dtype=torch.float32)
    dbias = x.new_empty(parts, dim, dtype=torch.float32)
    if dx.numel() > 0:
        x, dy = adjacent(x), adjacent(dy)
        with on_device(x):
            _backward_kernel[(parts * grid.blocks_d,)](
                x,
                weight.contiguous(),
                None if bias is None else adjacent(bias),
                _sequences(cu_seqlens, tokens),
                dy,
                dx,
                dweight,
                dbias,
                tokens,
                dim,
                grid.span,
                grid.blocks_l,
                grid.blocks_d,
                x.stride(0),
                x.stride(1),
                dy.stride(0),
                dy.stride(1),
                WIDTH=width,
                LEFT=left,
                HAS_BIAS=bias is not None,
                PACKED=cu_seqlens is not None,
                REVERSE=reverse,
                SILU=silu,
                BLOCK_L=BACKWARD_ROWS,
                BLOCK_D=grid.block_d,
                num_warps=1,
                enable_fp_fusion=True,
            )
    grads = [dx, dweight.sum(0).t().to(weight.dtype).contiguous()]
    if bias is not None:
        grads.append(dbias.sum(0).to(bias.dtype))
    return grads
