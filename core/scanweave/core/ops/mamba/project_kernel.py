"""What a Mamba block's scan reads, in one launch: convolution, x_proj and dt_proj of a direction.

A program takes BLOCK_L rows through all channels: it convolves a block of channels, writes it, and
adds its product with the block's columns of x_proj; the rows of r B C that this gives are then
multiplied by dt_proj. The convolved inputs are never read again, and the low-rank time steps never
leave the processor. Values are rounded where the operators in sequence round them.

Letters: B batch, L length, E inner channels, P = R + 2 N, W taps.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, on_device, power_of_2, sigmoid

# rows and channels of a tile, warps, stages of the pipeline
ROWS, CHANNELS, WARPS, STAGES = 64, 32, 4, 2
# taps, and the widest r B C that a program holds
MAX_WIDTH, MAX_PROJECTED = 8, 128


@triton.jit(do_not_specialize=["rows", "length"])
def _project_kernel(
    x_ptr,  # (B L, E), rows stride_x apart
    conv_ptr,  # (E, W)
    bias_ptr,
    x_proj_ptr,  # (P, E)
    dt_proj_ptr,  # (E, R)
    u_ptr,  # (B L, E)
    projected_ptr,  # (B L, P)
    dt_ptr,  # (B L, E)
    rows,
    length,
    dim,
    rank,
    projected,
    stride_x,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REVERSE: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    kind = u_ptr.dtype.element_ty
    # rows are counted from the program's first, so that offsets fit 32 bits
    first = tl.program_id(0).to(tl.int64) * BLOCK_L
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < rows - first
    t = ((first % length).to(tl.int32) + offs_l) % length
    x_ptr += first * stride_x
    u_ptr += first * dim
    dt_ptr += first * dim
    projected_ptr += first * projected
    offs_e = tl.arange(0, BLOCK_E)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < projected
    total = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
    for start in range(0, dim, BLOCK_E):
        e = start + offs_e
        mask_e = e < dim
        c = tl.zeros([BLOCK_L, BLOCK_E], tl.float32)
        if HAS_BIAS:
            c += tl.load(bias_ptr + e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
        for j in tl.static_range(WIDTH):
            shift = WIDTH - 1 - j if REVERSE else j - (WIDTH - 1)
            inside = mask_l & (t + shift >= 0) & (t + shift < length)
            value = tl.load(
                x_ptr + ((offs_l + shift) * stride_x)[:, None] + e[None, :],
                mask=inside[:, None] & mask_e[None, :],
                other=0.0,
            )
            w = tl.load(conv_ptr + e * WIDTH + j, mask=mask_e, other=0.0).to(tl.float32)
            c += value.to(tl.float32) * w[None, :]
        u = (c * sigmoid(c)).to(kind)
        # channels past the last are silu(0) = 0
        tl.store(
            u_ptr + offs_l[:, None] * dim + e[None, :], u, mask=mask_l[:, None] & mask_e[None, :]
        )
        weight = tl.load(
            x_proj_ptr + offs_p[None, :] * dim + e[:, None],
            mask=mask_p[None, :] & mask_e[:, None],
            other=0.0,
        )
        # the interpreter multiplies bfloat16 wrongly
        if INTERPRET:
            total += tl.dot(u.to(tl.float32), weight.to(tl.float32))
        else:
            total = tl.dot(u, weight, total)
    low = total.to(kind)
    at = offs_l[:, None] * projected + offs_p[None, :]
    tl.store(projected_ptr + at, low, mask=mask_l[:, None] & mask_p[None, :])
    for start in range(0, dim, BLOCK_E):
        e = start + offs_e
        mask_e = e < dim
        # rows of B and C meet zeros
        weight = tl.load(
            dt_proj_ptr + e[None, :] * rank + offs_p[:, None],
            mask=mask_e[None, :] & (offs_p < rank)[:, None],
            other=0.0,
        )
        dt = tl.dot(low.to(tl.float32), weight.to(tl.float32)) if INTERPRET else tl.dot(low, weight)
        tl.store(
            dt_ptr + offs_l[:, None] * dim + e[None, :],
            dt.to(kind),
            mask=mask_l[:, None] & mask_e[None, :],
        )


def takes(u: Tensor, conv_weight: Tensor, x_weight: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether the kernel runs these inputs: 16-bit ones, not packed, of ordinary sizes."""
    half = u.dtype in (torch.bfloat16, torch.float16) and x_weight.dtype == u.dtype
    fits = conv_weight.shape[1] <= MAX_WIDTH and x_weight.shape[0] <= MAX_PROJECTED
    return half and fits and cu_seqlens is None


def project(
    u: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Tensor,
    dt_weight: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved inputs (B, L, E), r B C (B, L, P) and time steps (B, L, E) of one direction."""
    batch, length, dim = u.shape
    projected = x_weight.shape[0]
    values = torch.empty((batch, length, dim), dtype=u.dtype, device=u.device)
    dt = torch.empty_like(values)
    low = values.new_empty(batch, length, projected)
    rows = batch * length
    if values.numel() == 0:
        return values, low, dt
    if u.stride(2) != 1 or u.stride(0) != length * u.stride(1):
        u = u.contiguous()
    with on_device(u):
        _project_kernel[(ceil_div(rows, ROWS),)](
            u,
            conv_weight.contiguous(),
            None if conv_bias is None else conv_bias.contiguous(),
            x_weight.contiguous(),
            dt_weight.contiguous(),
            values,
            low,
            dt,
            rows,
            length,
            dim,
            dt_weight.shape[1],
            projected,
            u.stride(1),
            WIDTH=conv_weight.shape[1],
            HAS_BIAS=conv_bias is not None,
            REVERSE=reverse,
            INTERPRET=os.environ.get("TRITON_INTERPRET") == "1",
            BLOCK_L=ROWS,
            BLOCK_E=CHANNELS,
            BLOCK_P=max(64, power_of_2(projected)),
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=True,
        )
    return values, low, dt
