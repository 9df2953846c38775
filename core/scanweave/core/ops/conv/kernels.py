"""The short convolution and its gradients in Triton. Equations and letters: `reference.py`.

One program computes BLOCK_L tokens of BLOCK_D channels. The backward recomputes the sums c it
needs from 2 W - 1 shifted tiles of x, so that each tensor is read from memory once; gradients of
taps and bias are one partial sum a program, added by PyTorch.
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

from ..launch import adjacent, ceil_div, on_device, power_of_2, sigmoid

# the backward holds 2 W - 1 tiles in registers
MAX_WIDTH = 8


@triton.jit
def _shifted(x_ptr, stride_l, offs_d, row, low, high, mask_d):
    """Rows of x, 0 outside [low, high)."""
    inside = (row >= low) & (row < high)
    return tl.load(
        x_ptr + row[:, None] * stride_l + offs_d[None, :],
        mask=inside[:, None] & mask_d[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def _bounds(bounds_ptr, row, mask_l, tokens, PACKED: tl.constexpr):
    """First token and end of the sequence that every row belongs to."""
    if PACKED:
        low = tl.load(bounds_ptr + row * 2, mask=mask_l, other=0).to(tl.int64)
        high = tl.load(bounds_ptr + row * 2 + 1, mask=mask_l, other=0).to(tl.int64)
        return low, high
    else:
        return row * 0, row * 0 + tokens


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,  # (D, W)
    bias_ptr,
    state_ptr,  # (S, W - 1, D)
    bounds_ptr,  # (T, 2)
    sequence_ptr,  # (T,)
    y_ptr,
    tokens,
    dim,
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
    pid = tl.program_id(0)
    pid_b = (pid // (blocks_l * blocks_d)).to(tl.int64)
    row = ((pid // blocks_d) % blocks_l).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_l = row < tokens
    mask_d = offs_d < dim
    low, high = _bounds(bounds_ptr, row, mask_l, tokens, PACKED)
    x_ptr += pid_b * stride_xb
    c = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    if HAS_BIAS:
        c += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(WIDTH):
        source = row + (LEFT - j) if REVERSE else row + (j - LEFT)
        x = _shifted(x_ptr, stride_xl, offs_d, source, low, high, mask_d)
        if HAS_STATE:
            # how far before the sequence's start, in scan order
            early = source - high + 1 if REVERSE else low - source
            owner = tl.load(sequence_ptr + row, mask=mask_l, other=0) if PACKED else row * 0 + pid_b
            index = owner.to(tl.int64) * (WIDTH - 1) + (WIDTH - 1) - early
            use = (early > 0) & mask_l
            x += tl.load(
                state_ptr + index[:, None] * dim + offs_d[None, :],
                mask=use[:, None] & mask_d[None, :],
                other=0.0,
            ).to(tl.float32)
        w = tl.load(weight_ptr + offs_d * WIDTH + j, mask=mask_d, other=0.0).to(tl.float32)
        c += x * w[None, :]
    if SILU:
        c *= sigmoid(c)
    out = (pid_b * tokens + row)[:, None] * dim + offs_d[None, :]
    mask = mask_l[:, None] & mask_d[None, :]
    tl.store(y_ptr + out, c.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr,
    weight_ptr,  # (D, W)
    bias_ptr,
    bounds_ptr,  # (T, 2)
    dy_ptr,
    dx_ptr,
    dweight_ptr,  # (programs / blocks_d, W, D)
    dbias_ptr,  # (programs / blocks_d, D)
    tokens,
    dim,
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
    pid = tl.program_id(0)
    pid_b = (pid // (blocks_l * blocks_d)).to(tl.int64)
    row = ((pid // blocks_d) % blocks_l).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_l = row < tokens
    mask_d = offs_d < dim
    low, high = _bounds(bounds_ptr, row, mask_l, tokens, PACKED)
    x_ptr += pid_b * stride_xb
    dy_ptr += pid_b * stride_yb
    SIGN: tl.constexpr = -1 if REVERSE else 1
    # tile k is x[row + SIGN (k - (W - 1))]
    tiles = ()
    for k in tl.static_range(2 * WIDTH - 1):
        source = row + SIGN * (k - (WIDTH - 1))
        tiles = tiles + (_shifted(x_ptr, stride_xl, offs_d, source, low, high, mask_d),)
    dx = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    part = pid // blocks_d
    for j in tl.static_range(WIDTH):
        # x[row] went through tap j into c[row + SIGN (LEFT - j)]
        target = row + SIGN * (LEFT - j)
        dc = _shifted(dy_ptr, stride_yl, offs_d, target, low, high, mask_d)
        if SILU:
            c = tl.zeros([BLOCK_L, BLOCK_D], tl.float32) + bias[None, :]
            for i in tl.static_range(WIDTH):
                w = tl.load(weight_ptr + offs_d * WIDTH + i, mask=mask_d, other=0.0)
                c += tiles[i - j + WIDTH - 1] * w.to(tl.float32)[None, :]
            gate = sigmoid(c)
            dc *= gate * (1.0 + c * (1.0 - gate))
        w = tl.load(weight_ptr + offs_d * WIDTH + j, mask=mask_d, other=0.0).to(tl.float32)
        dx += dc * w[None, :]
        if j == LEFT:
            dc = tl.where(mask_l[:, None], dc, 0.0)
            for i in tl.static_range(WIDTH):
                dw = tl.sum(dc * tiles[i - LEFT + WIDTH - 1], 0)
                tl.store(dweight_ptr + (part * WIDTH + i) * dim + offs_d, dw, mask=mask_d)
            if HAS_BIAS:
                tl.store(dbias_ptr + part * dim + offs_d, tl.sum(dc, 0), mask=mask_d)
    out = (pid_b * tokens + row)[:, None] * dim + offs_d[None, :]
    mask = mask_l[:, None] & mask_d[None, :]
    tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _sequences(cu_seqlens: Tensor | None, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """Bounds (T, 2) and sequence (T,) of every token."""
    if cu_seqlens is None:
        return None, None
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    bounds = torch.stack([cu_seqlens[:-1], cu_seqlens[1:]], 1)[sequence]
    return bounds.contiguous(), sequence


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
    bounds, sequence = _sequences(cu_seqlens, tokens)
    block_l = min(32, power_of_2(tokens))
    block_d = min(64, power_of_2(dim))
    blocks_l, blocks_d = ceil_div(tokens, block_l), ceil_div(dim, block_d)
    with on_device(x):
        _forward_kernel[(batch * blocks_l * blocks_d,)](
            x,
            weight.contiguous(),
            None if bias is None else adjacent(bias),
            None if state is None else state.contiguous(),
            bounds,
            sequence,
            y,
            tokens,
            dim,
            blocks_l,
            blocks_d,
            x.stride(0),
            x.stride(1),
            WIDTH=weight.shape[1],
            LEFT=left,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None and weight.shape[1] > 1,
            PACKED=cu_seqlens is not None,
            REVERSE=reverse,
            SILU=silu,
            BLOCK_L=block_l,
            BLOCK_D=block_d,
            num_warps=4,
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
    block_l = min(16, power_of_2(tokens))
    block_d = min(64, power_of_2(dim))
    blocks_l, blocks_d = ceil_div(tokens, block_l), ceil_div(dim, block_d)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = batch * blocks_l
    dweight = x.new_empty(parts, width, dim, dtype=torch.float32)
    dbias = x.new_empty(parts, dim, dtype=torch.float32)
    if dx.numel() > 0:
        x, dy = adjacent(x), adjacent(dy)
        bounds, _ = _sequences(cu_seqlens, tokens)
        with on_device(x):
            _backward_kernel[(parts * blocks_d,)](
                x,
                weight.contiguous(),
                None if bias is None else adjacent(bias),
                bounds,
                dy,
                dx,
                dweight,
                dbias,
                tokens,
                dim,
                blocks_l,
                blocks_d,
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
                BLOCK_L=block_l,
                BLOCK_D=block_d,
                num_warps=4,
                enable_fp_fusion=True,
            )
    grads = [dx, dweight.sum(0).t().to(weight.dtype).contiguous()]
    if bias is not None:
        grads.append(dbias.sum(0).to(bias.dtype))
    return grads
