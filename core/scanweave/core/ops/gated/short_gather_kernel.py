"""Gradients of log decays and factors of short sequences: sums over the tiles of a chunk.

Tiles hold sums of F over their rows and columns (`short_own_kernel.py`). With rows of all tiles of
a chunk of rows, own columns of the chunk's own tile and later columns of the others, the gradient
of the log decay of step t is

    sum_{i >= t} rows[i] - sum_{j >= t} write[j] own[j] + sum_{j < t} leave[j] later[j]
    + all rows of the tiles of a later and an earlier chunk

where rows are i > t if exclusive. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ceil_div, on_device
from .kernels import Direction, Frame
from .short_tiles import Tiles
from .sums_kernel import Sums

# heads of one program of the sums
GATHER_HEADS = 16


@triton.jit
def _gather(
    rows_ptr,
    columns_ptr,
    near_ptr,
    f_ptr,
    fade_ptr,
    leave_ptr,
    dg_ptr,
    dw_ptr,
    slot0,
    c,
    chunks,
    size,
    heads,
    token0,
    offs_h,
    span,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of one chunk's log decays and factors in one direction, a block of heads."""
    offs = tl.arange(0, CHUNK)
    mask_h = (offs_h < heads)[None, :]
    one_before = offs + 1 if REVERSE else offs - 1
    one_after = offs - 1 if REVERSE else offs + 1
    has_before = (one_before >= 0) & (one_before < CHUNK)
    read_by = one_after if EXCLUSIVE else offs
    mask_rows = ((read_by >= 0) & (read_by < CHUNK))[:, None] & mask_h
    mask_left = has_before[:, None] & mask_h
    at = ((slot0 + c) * heads + offs_h)[None, :] * CHUNK
    # chunks that are scanned before this one, and after it
    before, after = (c + 1, 0) if REVERSE else (0, c + 1)
    before_end, after_end = (chunks, c) if REVERSE else (c, chunks)
    own_x, own_y = (c + 1, c) if REVERSE else (c, c + 1)
    own = tl.load(columns_ptr + own_y * span + at + offs[:, None], mask=mask_h, other=0.0)
    later = tl.zeros([CHUNK, BLOCK_H], tl.float32)
    left = tl.zeros([CHUNK, BLOCK_H], tl.float32)
    later_columns = tl.zeros([CHUNK, BLOCK_H], tl.float32)
    across = tl.zeros([BLOCK_H], tl.float32)
    if HAS_G:
        rows_at = rows_ptr + at + read_by[:, None]
        later += tl.load(rows_at + own_x * span, mask=mask_rows, other=0.0)
        for other in range(before, before_end):
            x = other + 1 if REVERSE else other
            later += tl.load(rows_at + x * span, mask=mask_rows, other=0.0)
    for other in range(after, after_end):
        y = other if REVERSE else other + 1
        column_at = columns_ptr + y * span + at
        if HAS_G:
            left += tl.load(column_at + one_before[:, None], mask=mask_left, other=0.0)
            row_at = ((slot0 + other) * heads + offs_h)[None, :] * CHUNK + offs[:, None]
            for earlier in range(before, before_end):
                x = earlier + 1 if REVERSE else earlier
                tile = tl.load(rows_ptr + x * span + row_at, mask=mask_h, other=0.0)
                across += tl.sum(tile, 0)
        if HAS_W:
            later_columns += tl.load(column_at + offs[:, None], mask=mask_h, other=0.0)
    token = (token0 + c * CHUNK + offs)[:, None] * heads + offs_h[None, :]
    mask = (c * CHUNK + offs < size)[:, None] & mask_h
    if HAS_W:
        near = tl.load(near_ptr + at + offs[:, None], mask=mask_h, other=0.0)
        if HAS_G:
            later_columns *= tl.load(fade_ptr + at + offs[:, None], mask=mask_h, other=0.0)
        tl.store(dw_ptr + token, own + near + later_columns, mask=mask)
    if HAS_G:
        if HAS_W:
            own *= tl.load(f_ptr + at + offs[:, None], mask=mask_h, other=0.0)
        left *= tl.load(leave_ptr + at + one_before[:, None], mask=mask_left, other=0.0)
        dg = tl.cumsum(later - own, 0, reverse=not REVERSE)
        dg += tl.cumsum(left, 0, reverse=REVERSE) + across[None, :]
        tl.store(dg_ptr + token, dg, mask=mask)


@triton.jit
def _short_gather_kernel(
    rows_ptr,
    columns_ptr,
    near_ptr,
    f_ptr,
    fade_ptr,
    leave_ptr,
    dg_ptr,  # (D, B, L, H)
    dw_ptr,
    size,
    chunks,
    heads,
    span,  # M H Q
    tokens,  # B L H
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    c = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    offs_h = (tl.program_id(1) // DIRECTIONS) * BLOCK_H + tl.arange(0, BLOCK_H)
    span, tokens = span.to(tl.int64), tokens.to(tl.int64)
    if tl.program_id(1) % DIRECTIONS == 0:
        _gather(
            rows_ptr,
            columns_ptr,
            near_ptr,
            f_ptr,
            fade_ptr,
            leave_ptr,
            dg_ptr,
            dw_ptr,
            batch * chunks,
            c,
            chunks,
            size,
            heads,
            batch * size,
            offs_h,
            span,
            REVERSE,
            EXCLUSIVE,
            HAS_G,
            HAS_W,
            CHUNK,
            BLOCK_H,
        )
    else:
        _gather(
            rows_ptr,
            columns_ptr,
            near_ptr + span,
            f_ptr + span,
            fade_ptr + span,
            leave_ptr + span,
            dg_ptr + tokens,
            dw_ptr + tokens,
            batch * chunks,
            c,
            chunks,
            size,
            heads,
            batch * size,
            offs_h,
            span,
            True,
            EXCLUSIVE,
            HAS_G,
            HAS_W,
            CHUNK,
            BLOCK_H,
        )


def gather(
    frame: Frame, directions: list[Direction], sums: Sums, tiles: Tiles, *, exclusive: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the log decays and of the factors, a list of directions or an empty one."""
    if tiles.columns is None:
        return [], []
    count, batch, length = len(directions), *directions[0].q.shape[:2]
    _, slots, heads, chunk = tiles.columns.shape

    def tokens(wanted: bool) -> Tensor | None:
        shape = (count, batch, length, heads)
        return tiles.columns.new_empty(shape) if wanted and tiles.columns is not None else None

    dg, dw = tokens(tiles.rows is not None), tokens(tiles.near is not None)
    given = (tiles.rows, tiles.columns, tiles.near, sums.factors, sums.fade, sums.leave, dg, dw)
    with on_device(tiles.columns):
        _short_gather_kernel[(slots, ceil_div(heads, GATHER_HEADS) * count)](
            # absent tensors are never read, but pointers are moved
            *(tiles.columns if p is None else p for p in given),
            length,
            frame.chunks,
            heads,
            slots * heads * chunk,
            batch * length * heads,
            DIRECTIONS=count,
            REVERSE=directions[0].reverse,
            EXCLUSIVE=exclusive,
            HAS_G=dg is not None,
            HAS_W=dw is not None,
            CHUNK=chunk,
            BLOCK_H=GATHER_HEADS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return [] if dg is None else list(dg.unbind(0)), [] if dw is None else list(dw.unbind(0))
