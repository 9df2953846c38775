"""Layer norm and RMS norm on a GPU: one pass over the rows each way, a sum of branches included.

A program holds whole rows in registers, so mean and variance are two passes over what it holds.
Gradients of weight and bias are summed over a program's rows and then, by PyTorch, over programs.
Without a bias it is the RMS norm, which takes no mean off.

Letters: R rows, D channels.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, ceil_div, on_device, power_of_2, processors

# elements of a program's tile and of a thread; the backward holds four values of each element.
# H200, 25216 x 384 in float32 with a branch in bfloat16: backward 61 us, 71 by the forward's tiles
TILE, THREAD = 2048, 16
BACKWARD_TILE, BACKWARD_THREAD = 512, 8
# programs a multiprocessor and the fewest tiles of one, backward
PROGRAMS = 12
EACH = 4


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    branch_ptr,
    w_ptr,
    b_ptr,
    total_ptr,
    out_ptr,
    rows,
    size,
    stride_x,
    stride_branch,
    eps,
    HAS_BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # a layer norm
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_r = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < size
    channel = offs_d[None, :]
    mask = (offs_r < rows) & mask_d[None, :]
    x = tl.load(x_ptr + offs_r * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch_at = branch_ptr + offs_r * stride_branch + channel
        x += tl.load(branch_at, mask=mask, other=0.0).to(tl.float32)
        # what is normalised is the sum as it is kept
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offs_r * size + channel, total, mask=mask)
        x = total.to(tl.float32)
    if HAS_BIAS:
        x = tl.where(mask, x - (tl.sum(x, 1) / size)[:, None], 0.0)
    out = x * tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None] * w[None, :]
    if HAS_BIAS:
        b = tl.load(b_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        out += b[None, :]
    tl.store(out_ptr + offs_r * size + channel, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "each"])
def _backward_kernel(
    dout_ptr,
    dtotal_ptr,
    x_ptr,
    w_ptr,
    dx_ptr,
    dbranch_ptr,
    dparams_ptr,  # (programs, 2, D), or without a bias (programs, 1, D)
    rows,
    size,
    each,  # tiles of a program
    stride_dout,
    stride_dtotal,
    stride_x,
    eps,
    HAS_TOTAL: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # a layer norm
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < size
    channel = offs_d[None, :]
    w = tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # summed over rows once, at the end
    dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if HAS_BIAS:
        db = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for tile in range(0, each):
        offs_r = ((pid * each + tile) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
        mask = (offs_r < rows) & mask_d[None, :]
        x = tl.load(x_ptr + offs_r * stride_x + channel, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + offs_r * stride_dout + channel, mask=mask, other=0.0)
        dout = dout.to(tl.float32)
        if HAS_BIAS:
            x = tl.where(mask, x - (tl.sum(x, 1) / size)[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(x * x, 1) / size + eps)[:, None]
        # rows that are not there: with eps = 0 their scale is infinite, and 0 times that is NaN
        scale = tl.where(offs_r < rows, scale, 0.0)
        normed = x * scale
        dw += dout * normed
        dnormed = dout * w[None, :]
        along = (tl.sum(dnormed * normed, 1) / size)[:, None]
        if HAS_BIAS:
            db += dout
            dx = scale * (dnormed - (tl.sum(dnormed, 1) / size)[:, None] - normed * along)
        else:
            dx = scale * (dnormed - normed * along)
        at = offs_r * size + channel
        if HAS_TOTAL:
            dtotal_at = dtotal_ptr + offs_r * stride_dtotal + channel
            dx += tl.load(dtotal_at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            tl.store(dbranch_ptr + at, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dparams_at = dparams_ptr + pid * (2 if HAS_BIAS else 1) * size + offs_d
    tl.store(dparams_at, tl.sum(dw, 0), mask=mask_d)
    if HAS_BIAS:
        tl.store(dparams_at + size, tl.sum(db, 0), mask=mask_d)


def _tile(rows: int, size: int, most: int, thread: int) -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_D and warps."""
    block_d = power_of_2(size)
    block_r = max(1, min(most // block_d, power_of_2(rows)))
    return block_r, block_d, min(16, max(1, block_r * block_d // (32 * thread)))


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What is normalised, `x` (R, D) itself without a branch, and its norm in `dtype`."""
    rows, size = x.shape
    out = torch.empty((rows, size), dtype=dtype, device=x.device)
    total = x = adjacent(x)
    if branch is not None:
        branch = adjacent(branch)
        total = torch.empty_like(out, dtype=torch.promote_types(x.dtype, branch.dtype))
    if out.numel() == 0:
        return total, out
    block_r, block_d, warps = _tile(rows, size, TILE, THREAD)
    with on_device(x):
        _forward_kernel[(ceil_div(rows, block_r),)](
            x,
            branch,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            total,
            out,
            rows,
            size,
            x.stride(0),
            0 if branch is None else branch.stride(0),
            eps,
            HAS_BRANCH=branch is not None,
            HAS_BIAS=bias is not None,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return total, out


def backward(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    eps: float,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients: in `dtype`, the same in `branch_dtype`, and of the parameters in float32.

    Those are of weight and bias, (2, D), or of the weight, (1, D). `x` is what was normalised and
    `dtotal` its gradient from elsewhere, all (R, D).
    """
    rows, size = x.shape
    dx = torch.empty((rows, size), dtype=dtype, device=x.device)
    apart = dtype != branch_dtype
    dbranch = torch.empty_like(dx, dtype=branch_dtype) if apart else dx
    count = 2 if has_bias else 1
    if dx.numel() == 0:
        return dx, dbranch, weight.new_zeros((count, size), dtype=torch.float32)
    dout, x, dtotal = adjacent(dout), adjacent(x), None if dtotal is None else adjacent(dtotal)
    block_r, block_d, warps = _tile(rows, size, BACKWARD_TILE, BACKWARD_THREAD)
    tiles = ceil_div(rows, block_r)
    # every program writes a row of sums or two, which are read again
    each = max(min(EACH, tiles), ceil_div(tiles, PROGRAMS * processors(x.device)))
    programs = ceil_div(tiles, each)
    dparams = torch.empty((programs, count, size), dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(programs,)](
            dout,
            dtotal,
            x,
            weight.contiguous(),
            dx,
            dbranch,
            dparams,
            rows,
            size,
            each,
            dout.stride(0),
            0 if dtotal is None else dtotal.stride(0),
            x.stride(0),
            eps,
            HAS_TOTAL=dtotal is not None,
            HAS_BRANCH=apart,
            HAS_BIAS=has_bias,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return dx, dbranch, dparams.sum(0)
