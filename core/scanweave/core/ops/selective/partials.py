"""Adds what the gradient's programs found in part: one launch for all sums of a direction.

PyTorch would take five launches, and two more to round the gradients of B and C to their dtype.

Letters: D channels, G groups, N state.
"""
# Triton's own language: static ranges, launch options
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, on_device, power_of_2

# of the many slots of packed graphs PyTorch's sums run on more processors
MOST_SLOTS = 1024
# sums of a program that adds blocks, and of one that adds slots. Vim-S's shape on an H200: 23.6 us
# with 256, 24.9 with 512, 43 by tiles of rows and blocks; its 84 MB need 18
ELEMENTS = 256
COLUMNS = 64


@triton.jit
def _add_blocks(
    part_ptr,  # (rows, blocks, N)
    sum_ptr,  # (rows, N)
    pid,
    rows,
    blocks,
    N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEEP: tl.constexpr,
):
    # a thread adds the blocks of a few neighbouring elements, DEEP loads ahead of the sum
    e = pid.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = e < rows.to(tl.int64) * N
    part_ptr += e // N * blocks * N + e % N
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, blocks, DEEP):
        for i in tl.static_range(DEEP):
            k = first + i
            mask = tl.where(k < blocks, inside, False)
            total += tl.load(part_ptr + k * N, mask=mask, other=0.0)
    tl.store(sum_ptr + e, total.to(sum_ptr.dtype.element_ty), mask=inside)


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
    BLOCK_E: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs of A's columns, which take longest, of D's and the bias's, of B's and C's rows."""
    pid = tl.program_id(0)
    columns = dim * N
    of_D = tl.cdiv(columns, BLOCK_C)
    of_bias = of_D
    if HAS_D:
        of_bias += tl.cdiv(dim, BLOCK_C)
    of_B = of_bias
    if HAS_BIAS:
        of_B += tl.cdiv(dim, BLOCK_C)
    if pid < of_D:
        _add_slots(dA_ptr, sum_A_ptr, pid, slots, columns, BLOCK_S, BLOCK_C)
    elif pid < of_bias:
        if HAS_D:
            _add_slots(dD_ptr, sum_D_ptr, pid - of_D, slots, dim, BLOCK_S, BLOCK_C)
    elif pid < of_B:
        if HAS_BIAS:
            _add_slots(dbias_ptr, sum_bias_ptr, pid - of_bias, slots, dim, BLOCK_S, BLOCK_C)
    elif pid < of_B + row_programs:
        _add_blocks(dB_ptr, sum_B_ptr, pid - of_B, rows, blocks, N, BLOCK_E, DEEP)
    else:
        at = pid - of_B - row_programs
        _add_blocks(dC_ptr, sum_C_ptr, at, rows, blocks, N, BLOCK_E, DEEP)


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
    row_programs = ceil_div(rows * state, ELEMENTS)
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
            BLOCK_E=ELEMENTS,
            DEEP=min(8, power_of_2(blocks)),
            BLOCK_S=min(32, power_of_2(slots)),
            BLOCK_C=COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sum_A, sum_B, sum_C, sum_D, sum_bias
