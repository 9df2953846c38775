"""Launches the Triton kernels of the short convolution. Equations and letters: `reference.py`."""

# launch options that are no parameters of a kernel
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
from torch import Tensor

from ..launch import adjacent, ceil_div, on_device, power_of_2, processors
from .backward_kernel import backward_kernel, sum_kernel
from .forward_kernel import forward_kernel

# rows, taps and their gradients are held in registers
MAX_WIDTH = 8
# rows loaded at once
FORWARD_ROWS = 8
BACKWARD_ROWS = 4
# partial sums that one kernel adds; PyTorch cuts longer sums into parallel ones
MOST_PARTS = 1024


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
        forward_kernel[(batch * grid.blocks_l * grid.blocks_d,)](
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
    if dx.numel() == 0:
        return [dx, *(v.new_zeros(v.shape) for v in (weight, bias) if v is not None)]
    partial = x.new_empty(parts, width + (bias is not None), dim, dtype=torch.float32)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(dim, dtype=bias.dtype, device=x.device)
    x, dy = adjacent(x), adjacent(dy)
    with on_device(x):
        backward_kernel[(parts * grid.blocks_d,)](
            x,
            weight.contiguous(),
            None if bias is None else adjacent(bias),
            _sequences(cu_seqlens, tokens),
            dy,
            dx,
            partial,
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
            BLOCK_P=min(64, power_of_2(partial.shape[0])),
            BLOCK_D=32,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return [dx, dweight] if dbias is None else [dx, dweight, dbias]
