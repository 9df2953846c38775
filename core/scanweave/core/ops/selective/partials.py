"""Adds what the gradient's programs found in part: one launch for all sums of a direction.

PyTorch would take five launches, and two more to round the gradients of B and C to their dtype.

Letters: D channels, G groups, N state.
"""
# Triton's own language: launch options
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, on_device, power_of_2

# of the many slots of packed graphs PyTorch's sums run on more processors
MOST_SLOTS = 1024
# elements of a program's tile, and channels of a program that adds slots
TILE = 2048
COLUMNS = 64


@triton.jit
def _add_blocks(
    part_ptr,  # (rows, blocks, N)
    sum_ptr,  # (rows, N)
    pid,
    rows,
    blocks,
    N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    r = pid.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, blocks, BLOCK_K):
        mask = (r < rows)[:, None, None] & (first + k < blocks)[None, :, None]
        mask = mask & (n < N)[None, None, :]
        at = (r[:, None, None] * blocks + (first + k)[None, :, None]) * N + n[None, None, :]
        total += tl.sum(tl.load(part_ptr + at, mask=mask, other=0.0), 1)
    mask_r = (r < rows)[:, None] & (n < N)[None, :]
    at_sum = sum_ptr + r[:, None] * N + n[None, :]
    tl.store(at_sum, total.to(sum_ptr.dtype.element_ty), mask=mask_r)


@triton.jit
def _add_slots(
    part_ptr,  # (slots, columns)
    sum_ptr,  # (columns,)
    pid,
    slots,
    columns,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, slots, BLOCK_S):
        mask = (first + s < slots)[:, None] & (c < columns)[None, :]
        at = (first + s).to(tl.int64)[:, None] * columns + c[None, :]
        total += tl.load(part_ptr + at, mask=mask, other=0.0)
    tl.store(sum_ptr + c, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=c < columns)


@triton.jit(do_not_specialize=["rows", "row_programs", "slots"])
def partials_kernel(
    dB_ptr,
    dC_ptr,
    dA_ptr,
    dD_ptr,
    dbias_ptr,
    sum_B_ptr,
    sum_C_ptr,
    sum_A_ptr,
    sum_D_ptr,
    sum_bias_ptr,
    rows,
    row_programs,
    blocks,
    slots,
    dim,
    N: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs of B's rows, then of C's, of A's columns, of D's and of the bias's."""
    pid = tl.program_id(0)
    columns = dim * N
    of_A = 2 * row_programs
    of_D = of_A + tl.cdiv(columns, BLOCK_C)
    of_bias = of_D
    if HAS_D:
        of_bias += tl.cdiv(dim, BLOCK_C)
    if pid < row_programs:
        _add_blocks(dB_ptr, sum_B_ptr, pid, rows, blocks, N, BLOCK_R, BLOCK_K, BLOCK_N)
    elif pid < of_A:
        at = pid - row_programs
        _add_blocks(dC_ptr, sum_C_ptr, at, rows, blocks, N, BLOCK_R, BLOCK_K, BLOCK_N)
    elif pid < of_D:
        _add_slots(dA_ptr, sum_A_ptr, pid - of_A, slots, columns, BLOCK_S, BLOCK_C)
    elif pid < of_bias:
        if HAS_D:
            _add_slots(dD_ptr, sum_D_ptr, pid - of_D, slots, dim, BLOCK_S, BLOCK_C)
    elif HAS_BIAS:
        _add_slots(dbias_ptr, sum_bias_ptr, pid - of_bias, slots, dim, BLOCK_S, BLOCK_C)


def add_partials(
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
    dD: Tensor | None,
    dbias: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of A, B, C, D and the time steps' bias.

    Args:
        dA: (slots, D, N) float32.
        dB: (B, L, G, blocks, N) float32.
        dC: As dB.
        dD: (slots, D) float32.
        dbias: (slots, D) float32.
        dtypes: Of the gradients of A, B and C; the others are float32.

    Returns:
        (D, N), twice (B, L, G, N), twice (D,).
    """
    slots, dim, state = dA.shape
    blocks = dB.shape[3]
    if slots > MOST_SLOTS or dA.numel() == 0 or dB.numel() == 0:
        of_A, of_B, of_C = dtypes
        sum_D, sum_bias = (None if v is None else v.sum(0) for v in (dD, dbias))
        return dA.sum(0).to(of_A), dB.sum(3).to(of_B), dC.sum(3).to(of_C), sum_D, sum_bias
    sum_A = dA.new_empty((dim, state), dtype=dtypes[0])
    sum_B, sum_C = (
        v.new_empty((*v.shape[:3], state), dtype=dtype)
        for v, dtype in zip((dB, dC), dtypes[1:], strict=True)
    )
    sum_D, sum_bias = (None if v is None else v.new_empty(dim) for v in (dD, dbias))
    rows = sum_B.numel() // state
    block_n = power_of_2(state)
    block_k = min(power_of_2(blocks), max(1, 256 // block_n))
    block_r = min(max(1, TILE // (block_n * block_k)), power_of_2(rows))
    row_programs = ceil_div(rows, block_r)
    channels = ceil_div(dim, COLUMNS)
    programs = 2 * row_programs + ceil_div(dim * state, COLUMNS)
    programs += channels * ((dD is not None) + (dbias is not None))
    with on_device(dA):
        partials_kernel[(programs,)](
            dB,
            dC,
            dA,
            dD,
            dbias,
            sum_B,
            sum_C,
            sum_A,
            sum_D,
            sum_bias,
            rows,
            row_programs,
            blocks,
            slots,
            dim,
            N=state,
            HAS_D=dD is not None,
            HAS_BIAS=dbias is not None,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            BLOCK_N=block_n,
            BLOCK_S=min(32, power_of_2(slots)),
            BLOCK_C=COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sum_A, sum_B, sum_C, sum_D, sum_bias
