"""Launches the Triton kernels of the short convolution. Equations and letters: `reference.py`."""

# launch options that are no parameters of a kernel
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import adjacent, batch_stride, ceil_div, on_device, power_of_2, processors
from . import portable
from .backward_kernel import backward_kernel, sum_kernel
from .forward_kernel import forward_kernel

# rows, taps and their gradients are held in registers
MAX_WIDTH = 8
# partial sums that one kernel adds; PyTorch cuts longer sums into parallel ones
MOST_PARTS = 1024


class Pace(NamedTuple):
    """Rows loaded at once, shortest and longest span, and programs a multiprocessor to reach."""

    rows: int
    shortest: int
    longest: int
    programs: int


# H200, B128 L197 D768, bfloat16: forward 28 us in spans of up to 32 steps, 32 of 64; backward 42 in
# one wave of programs, 53 in two
FORWARD = Pace(8, 8, 32, 16)
BACKWARD = Pace(4, 16, 100, 12)


class Grid(NamedTuple):
    """How tokens and channels are cut: steps a program, and blocks of both."""

    span: int
    blocks_l: int
    blocks_d: int
    block_d: int


def grid_of(x: Tensor, width: int, pace: Pace, more: int = 0, widest: int = 128) -> Grid:
    """Even spans, as long as still leaves enough programs to hide the memory.

    `more` are steps that are no tokens, `widest` is the most channels of a block.
    """
    batch, tokens, dim = x.shape
    tokens += more
    # channels a thread: 4, or 2 where half of the last block would be empty, or registers short
    block_d = 64 if 0 < dim % 128 <= 64 or width > 6 else 128
    block_d = min(block_d, widest, power_of_2(dim))
    blocks_d = ceil_div(dim, block_d)
    wanted = pace.programs * processors(x.device) // max(batch * blocks_d, 1)
    most = max(ceil_div(tokens, pace.shortest), 1)
    blocks_l = min(max(ceil_div(tokens, pace.longest), wanted, 1), most)
    span = ceil_div(ceil_div(tokens, blocks_l), pace.rows) * pace.rows
    return Grid(span, ceil_div(tokens, max(span, 1)), blocks_d, block_d)


def sequences_of(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
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
    grid = grid_of(x, weight.shape[1], FORWARD)
    with on_device(x):
        forward_kernel[(batch * grid.blocks_l * grid.blocks_d,)](
            x,
            weight.contiguous(),
            None if bias is None else adjacent(bias),
            None if state is None else state.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            sequences_of(cu_seqlens, tokens),
            y,
            tokens,
            dim,
            grid.span,
            grid.blocks_l,
            grid.blocks_d,
            batch_stride(x),
            x.stride(1),
            WIDTH=weight.shape[1],
            LEFT=left,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None and weight.shape[1] > 1,
            PACKED=cu_seqlens is not None,
            REVERSE=reverse,
            SILU=silu,
            BLOCK_L=FORWARD.rows,
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
    """Gradients of x, weight and, where given, bias and state."""
    batch, tokens, dim = x.shape
    width = weight.shape[1]
    grid = grid_of(x, width, BACKWARD)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = batch * grid.blocks_l
    if dx.numel() == 0:
        return [dx, *(v.new_zeros(v.shape) for v in (weight, bias, state) if v is not None)]
    partial = x.new_empty(parts, width + (bias is not None), dim, dtype=torch.float32)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(dim, dtype=bias.dtype, device=x.device)
    x, dy = adjacent(x), adjacent(dy)
    with on_device(x):
        backward_kernel[(parts * grid.blocks_d,)](
            x,
            weight.contiguous(),
            None if bias is None else adjacent(bias),
            None if state is None else state.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            sequences_of(cu_seqlens, tokens),
            dy,
            dx,
            partial,
            tokens,
            dim,
            grid.span,
            grid.blocks_l,
            grid.blocks_d,
            batch_stride(x),
            x.stride(1),
            batch_stride(dy),
            dy.stride(1),
            WIDTH=width,
            LEFT=left,
            HAS_BIAS=bias is not None,
            HAS_STATE=state is not None and width > 1,
            PACKED=cu_seqlens is not None,
            REVERSE=reverse,
            SILU=silu,
            BLOCK_L=BACKWARD.rows,
            BLOCK_D=grid.block_d,
            num_warps=1,
            enable_fp_fusion=True,
        )
        if parts > MOST_PARTS:
            partial = partial.sum(0, keepdim=True)
        sum_kernel[(ceil_div(dim, 32) * partial.shape[1],)](
            partial,
            dweight,
            dbias,
            partial.shape[0],
            dim,
            WIDTH=width,
            HAS_BIAS=bias is not None,
            BLOCK_P=min(128, power_of_2(partial.shape[0])),
            BLOCK_D=32,
            num_warps=8,
            enable_fp_fusion=True,
        )
    grads = [dx, dweight] if dbias is None else [dx, dweight, dbias]
    if state is not None:
        grads.append(_state_gradient(dy, x, weight, bias, state, cu_seqlens, reverse, silu))
    return grads


def _state_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    silu: bool,
) -> Tensor:
    """From the first W - 1 steps of every sequence: no other meets its state."""
    count = weight.shape[1] - 1
    if count == 0:
        return state.new_zeros(state.shape)
    if cu_seqlens is None:
        first = slice(max(x.shape[1] - count, 0), None) if reverse else slice(count)
        x, dy = x[:, first], dy[:, first]
    else:
        start, end = cu_seqlens[:-1].long().unsqueeze(1), cu_seqlens[1:].long().unsqueeze(1)
        step = torch.arange(count, device=x.device)
        token = end - count + step if reverse else start + step
        inside = ((token >= start) & (token < end)).unsqueeze(-1)
        token = token.clamp(0, x.shape[1] - 1)
        # steps that are not there come before the first one of a reversed sequence
        x, dy = (torch.where(inside, v[0][token], 0) for v in (x, dy))
    grads = portable.conv_backward(dy, x, weight, bias, state, None, count, reverse, silu)
    return grads[-1]
