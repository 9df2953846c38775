"""Sums of the log decays of every chunk, and what scales reading over a chunk's border.

Everything is laid out (D, M, H, Q): a chunk of one head is adjacent for the other kernels. Decays
over a border are products of numbers up to 1, each added up on its own: no differences of sums,
which would cancel where decays are strong. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, ceil_div, on_device
from .kernels import Direction, Frame, chunk_of, strides

# heads of one program
SUM_HEADS = 16
# a logarithm to base 2 that no decay inside a chunk is taken to be under
STEEPEST = tl.constexpr(-160.0)


@triton.jit
def _sums_of(
    g_ptr,
    w_ptr,
    s_out,
    w_out,
    reads_out,
    enter_out,
    fade_out,
    leave_out,
    reach_out,
    first,
    c,
    chunks,
    size,
    at,
    offs_h,
    heads,
    stride_gl,
    stride_gh,
    stride_wl,
    stride_wh,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    BORDERS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    step = tl.arange(0, CHUNK)
    row = CHUNK - 1 - step if REVERSE else step
    place = c * CHUNK + row
    mask_h = (offs_h < heads)[None, :]
    mask = (place < size)[:, None] & mask_h
    # (M, H, Q): a chunk of one head is adjacent for the other kernels
    target = (at + offs_h)[None, :] * CHUNK + row[:, None]
    keep = mask_h & (row >= 0)[:, None]
    w_at = w_ptr + (first + place)[:, None] * stride_wl + offs_h[None, :] * stride_wh
    if HAS_W:
        w = tl.load(w_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(w_out + target, w, mask=keep)
    if HAS_G:
        g_at = g_ptr + (first + place)[:, None] * stride_gl + offs_h[None, :] * stride_gh
        g = tl.load(g_at, mask=mask, other=0.0)
        g = g.to(tl.float32) * LOG2_E
        # differences of these lose the digits of what is steep; below, float32 has 0 alike
        sums = tl.cumsum(tl.where(g < STEEPEST, STEEPEST, g), 0)
        tl.store(s_out + target, sums, mask=keep)
        if BORDERS:
            next_g = -stride_gl if REVERSE else stride_gl
            place_after = place - 1 if REVERSE else place + 1
            mask_after = ((step < CHUNK - 1) & (place_after < size))[:, None] & mask_h
            after = tl.load(g_at + next_g, mask=mask_after, other=0.0)
            # added from the other end: differences to the total would cancel
            fade = tl.exp2(tl.cumsum(after.to(tl.float32) * LOG2_E, 0, reverse=True))
            if EXCLUSIVE:
                place_before = place + 1 if REVERSE else place - 1
                mask_before = ((step > 0) & (place_before < size))[:, None] & mask_h
                before = tl.load(g_at - next_g, mask=mask_before, other=0.0)
                before = before.to(tl.float32) * LOG2_E
                sums = tl.cumsum(tl.where(before < STEEPEST, STEEPEST, before), 0)
                tl.store(reads_out + target, sums, mask=keep)
            tl.store(enter_out + target, tl.exp2(sums), mask=keep)
            tl.store(fade_out + target, fade, mask=keep)
            if HAS_W:
                tl.store(leave_out + target, fade * w, mask=keep)
            # decays of all chunks between this one and another one, on either side
            for side in tl.static_range(2):
                between = tl.zeros([BLOCK_H], tl.float32)
                for distance in range(1, (chunks - c) if side else (c + 1)):
                    other = c + distance if side else c - distance
                    reach_at = reach_out + (at + offs_h) * chunks + other
                    tl.store(reach_at, tl.exp2(between), mask=offs_h < heads)
                    moved = (other - c) * CHUNK
                    mask = (place + moved < size)[:, None] & mask_h
                    crossed = tl.load(g_at + moved * stride_gl, mask=mask, other=0.0)
                    between += tl.sum(crossed.to(tl.float32) * LOG2_E, 0)


@triton.jit
def _sums_kernel(
    g0_ptr,
    w0_ptr,
    g1_ptr,
    w1_ptr,
    s_ptr,  # (D, M, H, Q), as all that follow
    f_ptr,
    reads_ptr,
    enter_ptr,
    fade_ptr,
    leave_ptr,
    reach_ptr,  # (D, M, H, chunks)
    cu_ptr,
    table_ptr,
    chunks,
    length,
    heads,
    span,  # M H Q
    stride_g0b,
    stride_g0l,
    stride_g0h,
    stride_w0b,
    stride_w0l,
    stride_w0h,
    stride_g1b,
    stride_g1l,
    stride_g1h,
    stride_w1b,
    stride_w1l,
    stride_w1h,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    BORDERS: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    _, batch, first, size, c = chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK, PACKED)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    _sums_of(
        g0_ptr + batch * stride_g0b,
        w0_ptr + batch * stride_w0b,
        s_ptr,
        f_ptr,
        reads_ptr,
        enter_ptr,
        fade_ptr,
        leave_ptr,
        reach_ptr,
        first,
        c,
        chunks,
        size,
        slot * heads,
        offs_h,
        heads,
        stride_g0l,
        stride_g0h,
        stride_w0l,
        stride_w0h,
        REVERSE,
        EXCLUSIVE,
        HAS_G,
        HAS_W,
        BORDERS,
        CHUNK,
        BLOCK_H,
    )
    if DIRECTIONS == 2:
        span = span.to(tl.int64)
        _sums_of(
            g1_ptr + batch * stride_g1b,
            w1_ptr + batch * stride_w1b,
            s_ptr + span,
            f_ptr + span,
            reads_ptr + span,
            enter_ptr + span,
            fade_ptr + span,
            leave_ptr + span,
            reach_ptr + (span // CHUNK) * chunks,
            first,
            c,
            chunks,
            size,
            slot * heads,
            offs_h,
            heads,
            stride_g1l,
            stride_g1h,
            stride_w1l,
            stride_w1h,
            True,
            EXCLUSIVE,
            HAS_G,
            HAS_W,
            BORDERS,
            CHUNK,
            BLOCK_H,
        )


class Sums(NamedTuple):
    """What the decays of chunks add up to, (D, M, H, Q) float32; None of what there is not."""

    decays: Tensor | None  # log2 decays up to every token, itself included, in scan order
    factors: Tensor | None  # `write`, as laid out
    reads: Tensor | None  # log2 decays up to what a token reads
    enter: Tensor | None  # decay from a chunk's start to there
    fade: Tensor | None  # decay from a token to its chunk's end
    leave: Tensor | None  # fade times factor
    reach: Tensor | None  # decay of all chunks between two, (D, M, H, chunks)


def sums_of(
    frame: Frame,
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    reverse: list[bool],
    *,
    exclusive: bool,
    borders: bool,
) -> Sums:
    """Sums of every direction; with `borders` also what scales reading over a chunk's border."""
    count, heads = len(reverse), v.shape[2]
    shape = (count, frame.slots, heads, frame.chunk)

    def buffer(wanted: object) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=v.device) if wanted else None

    border = borders and bool(g)
    decays, factors = buffer(g), buffer(write)
    reads = buffer(border) if exclusive else decays
    enter, fade = buffer(border), buffer(border)
    leave = buffer(border) if write else fade
    if borders and not g:
        leave = factors
    reach = v.new_empty((*shape[:3], frame.chunks), dtype=torch.float32) if border else None
    found = Sums(decays, factors, reads, enter, fade, leave, reach)
    if frame.slots and (g or write):
        gs, ws = g or [None] * count, write or [None] * count
        inputs = [gs[0], ws[0], gs[-1], ws[-1]]
        with on_device(v):
            _sums_kernel[(frame.slots, ceil_div(heads, SUM_HEADS))](
                # absent tensors are never read, but pointers are moved
                *(v if p is None else p for p in (*inputs, *found)),
                *frame.arguments(),
                heads,
                frame.slots * heads * frame.chunk,
                *(stride for p in inputs for stride in strides(p, 3)),
                DIRECTIONS=count,
                REVERSE=reverse[0],
                EXCLUSIVE=exclusive,
                HAS_G=bool(g),
                HAS_W=bool(write),
                BORDERS=border,
                PACKED=frame.cu_seqlens is not None,
                CHUNK=frame.chunk,
                BLOCK_H=SUM_HEADS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return found


def directions_of(
    q: list[Tensor], k: list[Tensor], sums: Sums, reverse: list[bool]
) -> list[Direction]:
    """Inputs and sums direction by direction."""
    parts = [[None] * len(q) if x is None else list(x.unbind(0)) for x in sums[:2]]
    return [Direction(*d) for d in zip(q, k, *parts, reverse, strict=True)]
