"""Adds what the directions of a scan along paths wrote, and gates the sum: one pass over memory.

Letters: T tokens, K directions, D channels.
"""
# Triton's own language: constant branches, launch options
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, ceil_div, on_device, power_of_2, sigmoid

# elements a program: enough loads in flight to reach the memory's rate
TILE = 2048


@triton.jit(do_not_specialize=["tokens"])
def _add_kernel(
    parts_ptr,  # (T, K, D)
    z_ptr,  # (T, D)
    sum_ptr,  # (T, D)
    out_ptr,  # (T, D)
    tokens,
    dim,
    stride_z,
    COUNT: tl.constexpr,
    HAS_Z: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (t < tokens) & (d < dim)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in tl.static_range(COUNT):
        part = tl.load(parts_ptr + (t * COUNT + k) * dim + d, mask=mask, other=0.0)
        total += part.to(tl.float32)
    tl.store(sum_ptr + t * dim + d, total.to(sum_ptr.dtype.element_ty), mask=mask)
    if HAS_Z:
        z = tl.load(z_ptr + t * stride_z + d, mask=mask, other=0.0).to(tl.float32)
        total *= z * sigmoid(z)
        tl.store(out_ptr + t * dim + d, total.to(out_ptr.dtype.element_ty), mask=mask)


def add_directions(parts: Tensor, count: int, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of (B, L, K D) over K, (B, L, D), and the sum times silu(z), itself without z."""
    batch, length, dim = parts.shape[0], parts.shape[1], parts.shape[2] // count
    total = parts.new_empty(batch, length, dim)
    out = total if z is None else torch.empty_like(total)
    tokens = batch * length
    rows = None if z is None else adjacent(z.reshape(tokens, dim))
    if total.numel() == 0:
        return total, out
    block_d = min(power_of_2(dim), 512)
    block_t = TILE // block_d
    with on_device(parts):
        _add_kernel[(ceil_div(tokens, block_t), ceil_div(dim, block_d))](
            parts,
            rows,
            total,
            out,
            tokens,
            dim,
            0 if rows is None else rows.stride(0),
            COUNT=count,
            HAS_Z=rows is not None,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return total, out
