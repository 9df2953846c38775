"""Y silu(z) in one pass over memory: what the backward of a Mamba block needs once more.

Letters: T tokens, E channels.
"""
# Triton's launch options
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import adjacent, ceil_div, on_device, power_of_2, sigmoid

# elements a program: enough loads in flight to reach the memory's rate
TILE = 2048


@triton.jit(do_not_specialize=["tokens"])
def _gate_kernel(
    y_ptr,  # (T, E)
    z_ptr,  # (T, E)
    out_ptr,  # (T, E)
    tokens,
    dim,
    stride_y,
    stride_z,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    mask = (t < tokens) & (e < dim)
    y = tl.load(y_ptr + t * stride_y + e, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + t * stride_z + e, mask=mask, other=0.0).to(tl.float32)
    out = y * z * sigmoid(z)
    tl.store(out_ptr + t * dim + e, out.to(out_ptr.dtype.element_ty), mask=mask)


def gate(y: Tensor, z: Tensor) -> Tensor:
    """(B, L, E), in the dtype of z."""
    batch, length, dim = y.shape
    out = torch.empty((batch, length, dim), dtype=z.dtype, device=z.device)
    if out.numel() == 0:
        return out
    tokens = batch * length
    y, z = (adjacent(v.reshape(tokens, dim)) for v in (y, z))
    block_e = min(power_of_2(dim), 512)
    block_t = TILE // block_e
    with on_device(y):
        _gate_kernel[(ceil_div(tokens, block_t), ceil_div(dim, block_e))](
            y,
            z,
            out,
            tokens,
            dim,
            y.stride(0),
            z.stride(0),
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
