"""The pre-pass of the linear scan over segments, of the forward scan and of its adjoint.

Letters and cuts: `kernels.py`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import batch_stride
from .kernels import Call, decay_of, part_of, rows_ahead, rows_before, store_pair, times


@triton.jit
def _prefix_window(
    h,
    hi,
    p,
    pi,
    rows,
    left,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    ADJOINT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """WINDOW steps, of which the first `left` are there, of a state and the product of decays."""
    xs, xis, logs, logs_i = rows
    for i in tl.static_range(WINDOW):
        b, bi = decay_of(
            *(logs[0 if CONSTANT else i], logs_i[0 if CONSTANT else i], left, i),
            CONSTANT=CONSTANT,
            COMPLEX=COMPLEX,
        )
        if ADJOINT:
            if COMPLEX:
                bi = -bi
            h, hi = times(b, bi, h + xs[i].to(tl.float32), hi + xis[i].to(tl.float32), COMPLEX)
        else:
            h, hi = times(b, bi, h, hi, COMPLEX)
            h += xs[i].to(tl.float32)
            hi += xis[i].to(tl.float32)
        p, pi = times(b, bi, p, pi, COMPLEX)
    return h, hi, p, pi


@triton.jit(do_not_specialize=["length"])
def _prefix_kernel(
    x_ptr,
    a_ptr,  # logarithms; decays themselves if complex
    cu_ptr,
    ends_ptr,  # (S, K, D): state after the segment, from zero
    products_ptr,  # (S, K, D): product of its decays
    length,
    dim,
    blocks,
    stride_xb,
    stride_xl,
    stride_ab,
    stride_al,
    CONSTANT: tl.constexpr,
    COMPLEX: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_s, segment, pid_d, row, first, steps, begin, count = part_of(
        tl.program_id(0), cu_ptr, length, blocks, PACKED, SEGMENTS, CHUNK
    )
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    offs = offs_d * PARTS
    # no segment starts from the last one, nor the adjoint from the first
    count = tl.where(segment == (0 if ADJOINT else SEGMENTS - 1), 0, count)
    start = begin + count - 1 if ADJOINT else begin
    place = first + (steps - 1 - start if REVERSE else start)
    ahead: tl.constexpr = 1 if ADJOINT == REVERSE else -1
    next_x = ahead * stride_xl
    next_a = ahead * stride_al
    x_at = x_ptr + row * stride_xb + place * stride_xl + offs
    a_at = a_ptr + row * stride_ab + place * stride_al + offs
    h = tl.zeros([BLOCK_D], tl.float32)
    hi = tl.zeros([BLOCK_D], tl.float32)
    p = h + 1.0
    pi = tl.zeros([BLOCK_D], tl.float32)
    rows = rows_before(x_ptr, a_ptr, a_at, mask_d, CONSTANT, COMPLEX, BLOCK_D, WINDOW)
    for w in range(-1, tl.cdiv(count, WINDOW)):
        now = rows
        # one window ahead
        left = count - (w + 1) * WINDOW
        rows, x_at, a_at = rows_ahead(
            *(rows, x_at, a_at, next_x, next_a, left, mask_d, CONSTANT, COMPLEX, WINDOW)
        )
        if w >= 0:
            h, hi, p, pi = _prefix_window(
                *(h, hi, p, pi, now, left + WINDOW),
                CONSTANT=CONSTANT,
                COMPLEX=COMPLEX,
                ADJOINT=ADJOINT,
                WINDOW=WINDOW,
            )
    out = (pid_s * SEGMENTS + segment) * dim * PARTS + offs
    store_pair(ends_ptr + out, h, hi, mask_d, COMPLEX)
    store_pair(products_ptr + out, p, pi, mask_d, COMPLEX)


def prefixes(
    call: Call, rows: Tensor, length: int, adjoint: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What every segment does to a state: its end from zero and the product of its decays.

    Args:
        call: The scan.
        rows: What is added at every step: x, or the gradient of h for the adjoint.
        length: L.
        adjoint: Walk from each segment's end, with conjugate decays.

    Returns:
        Two tensors (S, K, D); None where there is one segment.
    """
    if call.plan.segments == 1:
        return None, None
    shape = (call.sequences, call.plan.segments, *call.x.shape[2:])
    ends, products = (call.x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    strides = call.strides | {"stride_xb": batch_stride(rows), "stride_xl": rows.stride(1)}
    _prefix_kernel[call.grid](
        *(rows, call.a, call.cu, ends, products, length, *call.sizes),
        **strides,
        **call.options,
        ADJOINT=adjoint,
    )
    return ends, products
