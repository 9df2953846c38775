"""Gated RMS norm on a GPU: one pass over the rows forward, one backward.

A program holds whole groups of some rows in registers. The weight's gradient is summed over a
program's rows and then, by PyTorch, over programs: no atomics.

Letters: R rows, D channels in groups of `size`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, ceil_div, on_device, power_of_2, processors, sigmoid

# elements of a program's tile, and programs a multiprocessor in the backward
TILE = 2048
PROGRAMS = 12


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr,
    z_ptr,
    w_ptr,
    out_ptr,
    rows,
    size,
    stride_x,
    stride_z,
    stride_out,
    eps,
    HAS_Z: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * size
    mask_d = offs_d < size
    mask = (offs_r < rows)[:, None] & mask_d[None, :]
    channel = (first + offs_d)[None, :]
    u = tl.load(x_ptr + offs_r[:, None] * stride_x + channel, mask=mask, other=0.0)
    u = u.to(tl.float32)
    w = tl.load(w_ptr + first + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_Z:
        z = tl.load(z_ptr + offs_r[:, None] * stride_z + channel, mask=mask, other=0.0)
        z = z.to(tl.float32)
        gate = z * sigmoid(z)
        if not NORM_FIRST:
            u *= gate
    scale = tl.rsqrt(tl.sum(u * u, 1) / size + eps)
    out = u * scale[:, None] * w[None, :]
    if HAS_Z and NORM_FIRST:
        out *= gate
    out_at = out_ptr + offs_r[:, None] * stride_out + channel
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dout_ptr,
    x_ptr,
    z_ptr,
    w_ptr,
    dx_ptr,
    dz_ptr,
    dw_ptr,  # (programs, D)
    rows,
    size,
    dim,
    each,  # tiles of a program
    stride_dout,
    stride_x,
    stride_z,
    eps,
    HAS_Z: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    first = tl.program_id(1) * size
    mask_d = offs_d < size
    channel = (first + offs_d)[None, :]
    w = tl.load(w_ptr + first + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(0, each):
        offs_r = (pid.to(tl.int64) * each + tile) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (offs_r < rows)[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs_r[:, None] * stride_x + channel, mask=mask, other=0.0)
        x = x.to(tl.float32)
        dout = tl.load(dout_ptr + offs_r[:, None] * stride_dout + channel, mask=mask, other=0.0)
        dout = dout.to(tl.float32)
        u = x
        if HAS_Z:
            z = tl.load(z_ptr + offs_r[:, None] * stride_z + channel, mask=mask, other=0.0)
            z = z.to(tl.float32)
            s = sigmoid(z)
            gate = z * s
            slope = s * (1.0 + z * (1.0 - s))
            if not NORM_FIRST:
                u = x * gate
        scale = tl.rsqrt(tl.sum(u * u, 1) / size + eps)
        normed = u * scale[:, None]
        dnormed = dout
        if HAS_Z and NORM_FIRST:
            dz = dout * normed * w[None, :] * slope
            dnormed = dout * gate
        dw += tl.sum(dnormed * normed, 0)
        dnormed *= w[None, :]
        mean = tl.sum(dnormed * normed, 1) / size
        du = scale[:, None] * (dnormed - normed * mean[:, None])
        if HAS_Z:
            if not NORM_FIRST:
                dz = du * x * slope
                du = du * gate
            dz_at = dz_ptr + offs_r[:, None] * dim + channel
            tl.store(dz_at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        dx_at = dx_ptr + offs_r[:, None] * dim + channel
        tl.store(dx_at, du.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dw_ptr + pid.to(tl.int64) * dim + first + offs_d, dw, mask=mask_d)


def _tile(rows: int, size: int) -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_D and warps."""
    block_d = power_of_2(size)
    block_r = max(1, min(TILE // block_d, power_of_2(rows)))
    return block_r, block_d, min(8, max(1, block_r * block_d // 512))


def forward(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    size: int,
    norm_first: bool,
) -> Tensor:
    """`x` and `z` (R, D); the result has the dtype of x."""
    rows, dim = x.shape
    out = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, z = adjacent(x), None if z is None else adjacent(z)
    block_r, block_d, warps = _tile(rows, size)
    with on_device(x):
        _forward_kernel[(ceil_div(rows, block_r), dim // size)](
            x,
            z,
            weight.contiguous(),
            out,
            rows,
            size,
            x.stride(0),
            0 if z is None else z.stride(0),
            dim,
            eps,
            HAS_Z=z is not None,
            NORM_FIRST=norm_first,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    size: int,
    norm_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, weight and z."""
    rows, dim = x.shape
    dx = torch.empty((rows, dim), dtype=x.dtype, device=x.device)
    dz = None if z is None else torch.empty((rows, dim), dtype=z.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, torch.zeros_like(weight, dtype=torch.float32), dz
    dout, x, z = adjacent(dout), adjacent(x), None if z is None else adjacent(z)
    block_r, block_d, warps = _tile(rows, size)
    tiles = ceil_div(rows, block_r)
    each = ceil_div(tiles, PROGRAMS * processors(x.device))
    programs = ceil_div(tiles, each)
    dw = torch.empty((programs, dim), dtype=torch.float32, device=x.device)
    with on_device(x):
        _backward_kernel[(programs, dim // size)](
            dout,
            x,
            z,
            weight.contiguous(),
            dx,
            dz,
            dw,
            rows,
            size,
            dim,
            each,
            dout.stride(0),
            x.stride(0),
            0 if z is None else z.stride(0),
            eps,
            HAS_Z=z is not None,
            NORM_FIRST=norm_first,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return dx, dw.sum(0), dz
