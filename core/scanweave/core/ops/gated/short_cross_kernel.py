"""Tiles of short sequences: what the tokens of two chunks read of each other, backward.

As `short_own_kernel.py`, which has the equations. Here the decay of a pair is a product of three:
of what the row reads by, of the chunks between, and of what follows the column in its chunk. The
direction is a number, so that one code serves both. Sums over columns lack the last of the three.
Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .kernels import Direction, Frame, Precision, dot, plan_of, strides
from .short_tiles import Tiles, stages
from .sums_kernel import Sums
from .tiles import pair_products


@triton.jit
def _short_cross_kernel(
    dout_ptr,
    q0_ptr,
    k0_ptr,
    q1_ptr,
    k1_ptr,
    v_ptr,
    enter_ptr,  # (D, M, H, Q)
    leave_ptr,
    reach_ptr,  # (D, M, H, chunks)
    e_ptr,  # (B, G, parts, chunks, chunks + 1, Q, Q)
    rows_ptr,  # (chunks + 1, M, H, Q)
    columns_ptr,
    size,  # L
    chunks,
    span,  # M H Q
    heads,
    groups,
    parts,
    stride_q0b,
    stride_q0l,
    stride_q0g,
    stride_k0b,
    stride_k0l,
    stride_k0g,
    stride_q1b,
    stride_q1l,
    stride_q1g,
    stride_k1b,
    stride_k1l,
    stride_k1g,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_ob,
    stride_ol,
    stride_oh,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # below the diagonal of both directions' chunks the forward one reads, above it the reverse one;
    # tiles of a sequence run side by side, and so find each other's rows in the cache
    tiles = chunks * (chunks - 1)
    tile = tl.program_id(0) % tiles
    row_chunk = tile // (chunks - 1)
    column_chunk = tile % (chunks - 1)
    column_chunk += (column_chunk >= row_chunk).to(tl.int32)
    back = column_chunk > row_chunk
    if DIRECTIONS == 1 and back != REVERSE:
        return
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    part = tl.program_id(1)
    group = (part // parts).to(tl.int64)
    head0 = part * HEADS
    offs = tl.arange(0, CHUNK)
    row_place = row_chunk * CHUNK + offs
    column_place = column_chunk * CHUNK + offs
    q_at = q0_ptr + batch * stride_q0b + group * stride_q0g
    k_at = k0_ptr + batch * stride_k0b + group * stride_k0g
    second = 0
    if DIRECTIONS == 2:
        second = back.to(tl.int64)
        if back:
            products = pair_products(
                q1_ptr + batch * stride_q1b + group * stride_q1g,
                k1_ptr + batch * stride_k1b + group * stride_k1g,
                0,
                row_place,
                column_place,
                size,
                stride_q1l,
                stride_k1l,
                True,
                SHIFT,
                False,
                KEYS,
                CHUNK,
                BLOCK_K,
                KEY_BLOCKS,
                DOT,
                PRECISION,
            )
        else:
            products = pair_products(
                q_at,
                k_at,
                0,
                row_place,
                column_place,
                size,
                stride_q0l,
                stride_k0l,
                False,
                SHIFT,
                False,
                KEYS,
                CHUNK,
                BLOCK_K,
                KEY_BLOCKS,
                DOT,
                PRECISION,
            )
    else:
        products = pair_products(
            q_at,
            k_at,
            0,
            row_place,
            column_place,
            size,
            stride_q0l,
            stride_k0l,
            REVERSE,
            SHIFT,
            False,
            KEYS,
            CHUNK,
            BLOCK_K,
            KEY_BLOCKS,
            DOT,
            PRECISION,
        )
    span = span.to(tl.int64)
    chunk0_at = (batch * chunks * heads + head0) * CHUNK
    row_at = chunk0_at + row_chunk * heads * CHUNK + offs
    column_at = chunk0_at + column_chunk * heads * CHUNK + offs
    enter_ptr += second * span + row_at
    leave_ptr += second * span + column_at
    reach_at = (batch * chunks + row_chunk) * heads + head0
    reach_ptr += (second * (span // CHUNK) + reach_at) * chunks + column_chunk
    x = column_chunk + back.to(tl.int32)
    rows_ptr += x * span + row_at
    columns_ptr += (row_chunk + 1 - back.to(tl.int32)) * span + column_at
    v_ptr += batch * stride_vb + head0.to(tl.int64) * stride_vh
    dout_ptr += batch * stride_ob + head0.to(tl.int64) * stride_oh
    of_heads = tl.zeros([CHUNK, CHUNK], tl.float32)
    # the next head's scales are on their way while a head is computed
    if HAS_G:
        next_row = tl.load(enter_ptr)
        next_reach = tl.load(reach_ptr)
    if HAS_G or HAS_W:
        next_column = tl.load(leave_ptr)
    for turn in range(0, HEADS):
        to = turn * CHUNK
        ahead = tl.minimum(turn + 1, HEADS - 1)
        if HAS_G:
            row = next_row * next_reach
            next_row = tl.load(enter_ptr + ahead * CHUNK)
            next_reach = tl.load(reach_ptr + ahead * chunks)
        if HAS_G or HAS_W:
            column = next_column[None, :]
            next_column = tl.load(leave_ptr + ahead * CHUNK)
        w = tl.zeros([CHUNK, CHUNK], tl.float32)
        for value_block in tl.static_range(VALUE_BLOCKS):
            offs_v = value_block * BLOCK_V + tl.arange(0, BLOCK_V)
            dout = tl.load(
                dout_ptr + turn * stride_oh + row_place[:, None] * stride_ol + offs_v[None, :],
                mask=(row_place < size)[:, None] & (offs_v < WIDTH)[None, :],
                other=0.0,
            )
            v = tl.load(
                v_ptr + turn * stride_vh + column_place[:, None] * stride_vl + offs_v[None, :],
                mask=(column_place < size)[:, None] & (offs_v < WIDTH)[None, :],
                other=0.0,
            )
            w += dot(dout, tl.trans(v), DOT, PRECISION)
        if HAS_G:
            w *= row[:, None]
        if HAS_G or HAS_W:
            pairs = w * products
            tl.store(columns_ptr + to, tl.sum(pairs, 0))
            if HAS_G:
                tl.store(rows_ptr + to, tl.sum(pairs * column, 1))
            w *= column
        of_heads += w
    e_at = (batch * groups * parts + part) * chunks * (chunks + 1) + row_chunk * (chunks + 1) + x
    e_ptr += e_at * (CHUNK * CHUNK) + offs[:, None] * CHUNK + offs[None, :]
    tl.store(e_ptr, of_heads.to(e_ptr.dtype.element_ty))


def cross_tiles(
    frame: Frame,
    directions: list[Direction],
    sums: Sums,
    tiles: Tiles,
    dout: Tensor,
    v: Tensor,
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
) -> None:
    """Fill the tiles of every pair of two chunks."""
    first, last = directions[0], directions[-1]
    heads, groups, parts = v.shape[2], first.q.shape[2], tiles.products.shape[2]
    plan = plan_of(first.q, v, precision, 128, 64)
    rows = (first.q, first.k, last.q, last.k)
    given = (sums.enter, sums.leave, sums.reach, *tiles[:3])
    with on_device(v):
        _short_cross_kernel[(frame.sequences * frame.chunks * (frame.chunks - 1), groups * parts)](
            dout,
            *rows,
            v,
            # absent tensors are never read, but pointers are moved
            *(v if p is None else p for p in given),
            v.shape[1],
            frame.chunks,
            frame.slots * heads * frame.chunk,
            heads,
            groups,
            parts,
            *(stride for p in (*rows, v, dout) for stride in strides(p, 3)),
            DIRECTIONS=len(directions),
            REVERSE=first.reverse,
            EXCLUSIVE=exclusive,
            SHIFT=shift,
            HAS_G=sums.decays is not None,
            HAS_W=sums.factors is not None,
            KEYS=first.q.shape[3],
            WIDTH=v.shape[3],
            CHUNK=frame.chunk,
            BLOCK_K=plan.block_k,
            BLOCK_V=plan.block_v,
            KEY_BLOCKS=plan.key_blocks,
            VALUE_BLOCKS=plan.value_blocks,
            HEADS=heads // groups // parts,
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=4,
            num_stages=stages(plan.value_blocks),
            enable_fp_fusion=True,
        )
