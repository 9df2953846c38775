"""One token of the short convolution in one launch, the state moved on in place.

Equations and letters: `reference.py`.
"""
# Triton's launch options
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, ceil_div, on_device, power_of_2, sigmoid


@triton.jit
def _conv_step_kernel(
    x_ptr,  # (B, D)
    state_ptr,  # (B, W - 1, D), updated
    weight_ptr,  # (D, W)
    bias_ptr,  # (D,)
    y_ptr,  # (B, D)
    dim,
    blocks,
    stride_xb,
    stride_sb,
    stride_sw,
    stride_sd,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < dim
    given = tl.load(x_ptr + pid_b * stride_xb + offs_d, mask=mask, other=0.0)
    state = state_ptr + pid_b * stride_sb + offs_d * stride_sd
    weight = weight_ptr + offs_d * WIDTH
    c = tl.load(weight + (WIDTH - 1), mask=mask, other=0.0).to(tl.float32) * given.to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        # inputs as they came: a wider state holds nothing more
        older = tl.load(state + j * stride_sw, mask=mask, other=0.0).to(x_ptr.dtype.element_ty)
        c += tl.load(weight + j, mask=mask, other=0.0).to(tl.float32) * older.to(tl.float32)
        if j > 0:
            moved = older.to(state_ptr.dtype.element_ty)
            tl.store(state + (j - 1) * stride_sw, moved, mask=mask)
    if WIDTH > 1:
        newest = given.to(state_ptr.dtype.element_ty)
        tl.store(state + (WIDTH - 2) * stride_sw, newest, mask=mask)
    if HAS_BIAS:
        c += tl.load(bias_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        c *= sigmoid(c)
    tl.store(y_ptr + pid_b * dim + offs_d, c.to(y_ptr.dtype.element_ty), mask=mask)


def conv_step(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Y (B, D); arguments as the public step's, weights of few taps."""
    batch, dim = x.shape
    y = torch.empty((batch, dim), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = adjacent(x)
    block_d = min(power_of_2(dim), 128)
    blocks = ceil_div(dim, block_d)
    with on_device(x):
        _conv_step_kernel[(batch * blocks,)](
            x,
            state,
            weight.contiguous(),
            None if bias is None else adjacent(bias),
            y,
            dim,
            blocks,
            x.stride(0),
            *state.stride(),
            WIDTH=weight.shape[1],
            HAS_BIAS=bias is not None,
            SILU=silu,
            BLOCK_D=block_d,
            num_warps=max(1, block_d // 32),
            enable_fp_fusion=True,
        )
    return y
