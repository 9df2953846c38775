"""Triton kernel of the rotation of channel pairs, and its launches.

A program turns a tile of rows, a row being one head of one token, in one tensor or in two that
share the angles: cosines and sines are computed once for both, and the gradient of an angle is
their sum, written once. Strides are arguments, so nothing is copied; angles that several rows
share have a stride of 0, and their gradient is summed afterwards, in a fixed order.

Letters: B batch, L length, H heads, P channels, R pairs that turn.
"""
# Triton's launch options
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, on_device, power_of_2

# elements of a program's tile
TILE = 1024

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# pi / 2 as a sum of two float32
HALF_PI = tl.constexpr(1.5707963705062866)
HALF_PI_REST = tl.constexpr(-4.371138828673793e-08)


@triton.jit
def cos_sin(angle):
    """Both to 2e-7 for angles up to 1e7, whose float32 is off by 0.5; of some turn beyond.

    One reduction serves both, and takes no stack, as the libraries' cosine and sine each do.
    """
    # angle = turns pi / 2 + r, r up to pi / 4; polynomials are minimax fits there
    turns = tl.floor(angle * TWO_OVER_PI + 0.5)
    r = tl.fma(-turns, HALF_PI, angle)
    r = tl.fma(-turns, HALF_PI_REST, r)
    # from 1e6 on the product above is too coarse to find the nearest quarter
    more = tl.floor(r * TWO_OVER_PI + 0.5)
    r = tl.fma(-more, HALF_PI, r)
    turns += more
    r = tl.where(tl.abs(r) > 1.0, 0.0, r)
    z = r * r
    sine = r + r * z * (-1.6666654944e-01 + z * (8.3321781452e-03 - z * 1.9517298882e-04))
    tail = 4.1666646866e-02 + z * (-1.3887367514e-03 + z * 2.4438451421e-05)
    cosine = 1.0 + z * (-0.5 + z * tail)
    quarter = turns - 4.0 * tl.floor(turns * 0.25)
    odd = (quarter == 1.0) | (quarter == 3.0)
    cos = tl.where(odd, sine, cosine)
    sin = tl.where(odd, cosine, sine)
    cos = tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos)
    return cos, tl.where(quarter >= 2.0, -sin, sin)


@triton.jit
def _load_pairs(ptr, row, stride, valid, count, offs_j, HALVES: tl.constexpr):
    """Both channels of every pair, (rows, pairs) each, float32; `row` is where rows start."""
    if HALVES:
        at = ptr + row[:, None] + offs_j[None, :] * stride
        mask = valid[:, None] & (offs_j < count)[None, :]
        first = tl.load(at, mask=mask, other=0.0)
        second = tl.load(at + count * stride, mask=mask, other=0.0)
    else:
        # neighbours in one load, then told apart in registers
        offs_c = tl.arange(0, 2 * offs_j.shape[0])
        mask = valid[:, None] & (offs_c < 2 * count)[None, :]
        both = tl.load(ptr + row[:, None] + offs_c[None, :] * stride, mask=mask, other=0.0)
        both = tl.reshape(both, [row.shape[0], offs_j.shape[0], 2])
        first, second = tl.split(both)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _turn_rows(
    u_ptr,  # (B, L, H, P), what is turned
    x_ptr,  # (B, L, H, P), read for the angles' gradient only
    out_ptr,  # (B, L, H, P), contiguous
    b,
    t,
    h,
    valid,
    cos,
    sin,
    offs_j,
    length,
    heads,
    dim,
    count,
    stride_ub,
    stride_ut,
    stride_uh,
    stride_up,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xp,
    HALVES: tl.constexpr,
    SLOPES: tl.constexpr,
):
    """Write the rows `u`, turned; their part of the angles' gradient, or 0."""
    valid = valid & (h < heads)
    row = b * stride_ub + t * stride_ut + h * stride_uh
    first, second = _load_pairs(u_ptr, row, stride_up, valid, count, offs_j, HALVES)
    to_first = first * cos - second * sin
    to_second = first * sin + second * cos
    to = ((b * length + t) * heads + h) * dim
    dtype = out_ptr.dtype.element_ty
    offs_c = tl.arange(0, 2 * offs_j.shape[0])
    if HALVES:
        at = out_ptr + to[:, None] + offs_j[None, :]
        mask = valid[:, None] & (offs_j < count)[None, :]
        tl.store(at, to_first.to(dtype), mask=mask)
        tl.store(at + count, to_second.to(dtype), mask=mask)
    else:
        both = tl.join(to_first.to(dtype), to_second.to(dtype))
        both = tl.reshape(both, [row.shape[0], 2 * offs_j.shape[0]])
        mask = valid[:, None] & (offs_c < 2 * count)[None, :]
        tl.store(out_ptr + to[:, None] + offs_c[None, :], both, mask=mask)
    # channels that stay
    for start in range(2 * count, dim, 2 * offs_j.shape[0]):
        channel = start + offs_c
        stays = valid[:, None] & (channel < dim)[None, :]
        rest = tl.load(u_ptr + row[:, None] + channel[None, :] * stride_up, mask=stays)
        tl.store(out_ptr + to[:, None] + channel[None, :], rest.to(dtype), mask=stays)
    slopes = tl.zeros_like(to_first)
    if SLOPES:
        x_row = b * stride_xb + t * stride_xt + h * stride_xh
        first, second = _load_pairs(x_ptr, x_row, stride_xp, valid, count, offs_j, HALVES)
        slopes = first * to_second - second * to_first
    return slopes


@triton.jit(do_not_specialize=["rows", "length"])
def _rotate_kernel(
    u_ptr,
    x_ptr,
    out_ptr,
    other_u_ptr,
    other_x_ptr,
    other_out_ptr,
    angles_ptr,
    dangles_ptr,  # (rows, R)
    rows,
    length,
    heads,
    other_heads,
    most_heads,
    dim,
    count,
    stride_ub,
    stride_ut,
    stride_uh,
    stride_up,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xp,
    stride_vb,  # of the other u
    stride_vt,
    stride_vh,
    stride_vp,
    stride_yb,  # of the other x
    stride_yt,
    stride_yh,
    stride_yp,
    stride_ab,
    stride_at,
    stride_ah,
    stride_aj,
    HALVES: tl.constexpr,
    BACK: tl.constexpr,
    TWO: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # 64-bit divisions once a program, 32-bit ones a row
    start = tl.program_id(0).to(tl.int64) * BLOCK_R
    token = start // most_heads
    head = (start % most_heads).to(tl.int32) + tl.arange(0, BLOCK_R)
    t = (token % length).to(tl.int32) + head // most_heads
    offs_r = start + tl.arange(0, BLOCK_R)
    valid = offs_r < rows
    h = (head % most_heads).to(tl.int64)
    b = token // length + t // length
    t = (t % length).to(tl.int64)
    offs_j = tl.arange(0, BLOCK_J)
    row = b * stride_ab + t * stride_at + h * stride_ah
    mask = valid[:, None] & (offs_j < count)[None, :]
    at = angles_ptr + row[:, None] + offs_j[None, :] * stride_aj
    angle = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    cos, sin = cos_sin(angle)
    if BACK:
        sin = -sin
    slopes = _turn_rows(
        u_ptr,
        x_ptr,
        out_ptr,
        b,
        t,
        h,
        valid,
        cos,
        sin,
        offs_j,
        length,
        heads,
        dim,
        count,
        stride_ub,
        stride_ut,
        stride_uh,
        stride_up,
        stride_xb,
        stride_xt,
        stride_xh,
        stride_xp,
        HALVES,
        SLOPES,
    )
    if TWO:
        slopes += _turn_rows(
            other_u_ptr,
            other_x_ptr,
            other_out_ptr,
            b,
            t,
            h,
            valid,
            cos,
            sin,
            offs_j,
            length,
            other_heads,
            dim,
            count,
            stride_vb,
            stride_vt,
            stride_vh,
            stride_vp,
            stride_yb,
            stride_yt,
            stride_yh,
            stride_yp,
            HALVES,
            SLOPES,
        )
    if SLOPES:
        tl.store(dangles_ptr + offs_r[:, None] * count + offs_j[None, :], slopes, mask=mask)


def _launch(
    u: list[Tensor], x: list[Tensor] | None, angles: Tensor, halves: bool, back: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Each of `u` turned, and with `x` the angles' gradient."""
    out = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in u]
    count = angles.shape[-1]
    most = max(v.shape[-2] if v.ndim > 1 else 1 for v in u)
    lead = u[0].shape[:-2] + ((most,) if u[0].ndim > 1 else ())
    dangles = None
    if x is not None:
        dangles = torch.empty((*lead, count), dtype=torch.float32, device=angles.device)
    # leading axes of length 1 up to (B, L, H, P)
    full = (None,) * (4 - u[0].ndim)
    spread = angles.expand(*lead, count)[full]
    us = [v[full] for v in u]
    xs = us if x is None else [v[full] for v in x]
    batch, length, _, dim = us[0].shape
    rows = batch * length * most
    if rows == 0 or dim == 0:
        return out, dangles
    block_j = power_of_2(count)
    block_r = max(1, min(TILE // (2 * block_j), power_of_2(rows)))
    warps = min(8, max(1, block_r * block_j // 128))
    last = len(u) - 1
    with on_device(angles):
        _rotate_kernel[(ceil_div(rows, block_r),)](
            u[0],
            xs[0],
            out[0],
            u[last],
            xs[last],
            out[last],
            angles,
            dangles,
            rows,
            length,
            us[0].shape[2],
            us[last].shape[2],
            most,
            dim,
            count,
            *us[0].stride(),
            *xs[0].stride(),
            *us[last].stride(),
            *xs[last].stride(),
            *spread.stride(),
            HALVES=halves,
            BACK=back,
            TWO=last > 0,
            SLOPES=x is not None,
            BLOCK_R=block_r,
            BLOCK_J=block_j,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return out, dangles


def forward(x: list[Tensor], angles: Tensor, halves: bool) -> list[Tensor]:
    """`x` holds one tensor (..., P) of at most 4 axes, or two; in one launch."""
    return _launch(x, None, angles, halves, False)[0]


def backward(
    dout: list[Tensor], x: list[Tensor], angles: Tensor, halves: bool, slopes: bool
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of `x`, and if asked of `angles`, in one launch and a sum."""
    grads, dangles = _launch(dout, x if slopes else None, angles, halves, True)
    if dangles is None:
        return grads, None
    return grads, dangles.sum_to_size(angles.shape).to(angles.dtype)
