"""Tiles of short sequences: what the tokens of one chunk read of each other, backward.

With W[i, j] = dout[i] . v[j] and D[i, j] the decays after j, up to i, on the pairs that are seen,

    E = sum_heads D write[j] W        dq = E k        dk = E^T q
    F = (q k^T) D W                   dwrite[j] = sum_i F[i, j]        dskip[i] = W[i, i]

and the gradient of the log decay of step t is the sum of F[i, j] write[j] over i >= t > j (i > t if
exclusive). A program stores E of one chunk and the sums of F over its rows and columns, head after
head; the second direction fills the tile above the diagonal. `short_cross_kernel.py` does pairs of
chunks, `short_spread_kernel.py` and `short_gather_kernel.py` the rest. Pairs whose weight no decay
scales (i = j, when exclusive also neighbours) are left out of the sums of the decay's gradient,
where they would cancel. Letters and flags: `kernels.py`.
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
from .short_tiles import Tiles, between, stages
from .sums_kernel import Sums
from .tiles import pair_products


@triton.jit
def _near_and_far(products, steps, i, j):
    """Products of decayed pairs, and by row those of pairs without a decay."""
    far = tl.where(steps > 0, products, 0.0)
    return far, tl.sum(tl.where(steps == 0, products, 0.0), 1)


@triton.jit
def _at_column(banded, offs, column, CHUNK: tl.constexpr):
    """W[i, column[i]] of the diagonal's band, (Q,), which holds column j at j modulo 8."""
    place = tl.arange(0, 8)[None, :]
    # 8 a row, of which neighbours differ
    wanted = place == ((column + CHUNK) % 8)[:, None]
    return tl.sum(tl.where(wanted, banded, 0.0), 1)


@triton.jit
def _short_own_kernel(
    dout_ptr,
    q0_ptr,
    k0_ptr,
    q1_ptr,
    k1_ptr,
    v_ptr,
    s_ptr,  # (D, M, H, Q)
    r_ptr,
    f_ptr,
    e_ptr,  # (B, G, parts, chunks, chunks + 1, Q, Q)
    rows_ptr,  # (chunks + 1, M, H, Q)
    columns_ptr,
    near_ptr,  # (D, M, H, Q)
    dskip_ptr,  # (B, L, H)
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
    HAS_SKIP: tl.constexpr,
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
    c = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    part = tl.program_id(1)
    group = (part // parts).to(tl.int64)
    head0 = part * HEADS
    offs = tl.arange(0, CHUNK)
    i, j = offs[:, None], offs[None, :]
    place = c * CHUNK + offs
    q0_ptr += batch * stride_q0b + group * stride_q0g
    k0_ptr += batch * stride_k0b + group * stride_k0g
    products = pair_products(
        q0_ptr,
        k0_ptr,
        0,
        place,
        place,
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
    first = (i < j) if REVERSE else (i > j)
    # steps between a pair that decay what the later one reads of the earlier
    steps = (j - i) if REVERSE else (i - j)
    if EXCLUSIVE:
        steps -= 1
    far0, near0 = _near_and_far(products, steps, i, j)
    if DIRECTIONS == 2:
        q1_ptr += batch * stride_q1b + group * stride_q1g
        k1_ptr += batch * stride_k1b + group * stride_k1g
        products = pair_products(
            q1_ptr,
            k1_ptr,
            0,
            place,
            place,
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
        steps = (j - i - 1) if EXCLUSIVE else (j - i)
        far1, near1 = _near_and_far(products, steps, i, j)
    # the column of a pair without a decay
    apart = 1 if EXCLUSIVE else 0
    near_column0 = offs + apart if REVERSE else offs - apart
    near_column1 = offs + apart
    span = span.to(tl.int64)
    at = ((batch * chunks + c) * heads + head0) * CHUNK + offs
    s_ptr += at
    r_ptr += at
    f_ptr += at
    near_ptr += at - offs
    # places of the chunk's own tiles
    x0 = c + 1 if REVERSE else c
    y0 = c if REVERSE else c + 1
    dskip_ptr += (batch * size + place) * heads + head0
    v_ptr += batch * stride_vb + head0.to(tl.int64) * stride_vh
    dout_ptr += batch * stride_ob + head0.to(tl.int64) * stride_oh
    of_heads = tl.zeros([CHUNK, CHUNK], tl.float32)
    if not EXCLUSIVE:
        own0 = tl.zeros([CHUNK], tl.float32)
        own1 = tl.zeros([CHUNK], tl.float32)
    # the next head's scales are on their way while a head is computed
    if HAS_G:
        next_q0, next_k0 = tl.load(r_ptr), tl.load(s_ptr)
        if DIRECTIONS == 2:
            next_q1, next_k1 = tl.load(r_ptr + span), tl.load(s_ptr + span)
    if HAS_W:
        next_factor0 = tl.load(f_ptr)
        if DIRECTIONS == 2:
            next_factor1 = tl.load(f_ptr + span)
    for turn in range(0, HEADS):
        to = turn * CHUNK
        ahead = tl.minimum(turn + 1, HEADS - 1) * CHUNK
        if HAS_G:
            of_q0, of_k0 = next_q0, next_k0
            next_q0, next_k0 = tl.load(r_ptr + ahead), tl.load(s_ptr + ahead)
            if DIRECTIONS == 2:
                of_q1, of_k1 = next_q1, next_k1
                next_q1 = tl.load(r_ptr + span + ahead)
                next_k1 = tl.load(s_ptr + span + ahead)
        if HAS_W:
            factor0 = next_factor0
            next_factor0 = tl.load(f_ptr + ahead)
            if DIRECTIONS == 2:
                factor1 = next_factor1
                next_factor1 = tl.load(f_ptr + span + ahead)
        w = tl.zeros([CHUNK, CHUNK], tl.float32)
        for value_block in tl.static_range(VALUE_BLOCKS):
            offs_v = value_block * BLOCK_V + tl.arange(0, BLOCK_V)
            dout = tl.load(
                dout_ptr + turn * stride_oh + place[:, None] * stride_ol + offs_v[None, :],
                mask=(place < size)[:, None] & (offs_v < WIDTH)[None, :],
                other=0.0,
            )
            v = tl.load(
                v_ptr + turn * stride_vh + place[:, None] * stride_vl + offs_v[None, :],
                mask=(place < size)[:, None] & (offs_v < WIDTH)[None, :],
                other=0.0,
            )
            w += dot(dout, tl.trans(v), DOT, PRECISION)
        if HAS_SKIP or HAS_W or not EXCLUSIVE:
            # the band's columns differ modulo 8: summed so, no row has two in one place
            band = tl.where((i - j <= 1) & (j - i <= 1), w, 0.0)
            band = tl.sum(tl.reshape(band, [CHUNK, CHUNK // 8, 8]), 1)
            diagonal = _at_column(band, offs, offs, CHUNK)
        if HAS_SKIP:
            tl.store(dskip_ptr + turn, diagonal, mask=place < size)
        if HAS_W:
            near = near0 * _at_column(band, offs, near_column0, CHUNK)
            # rows at the chunk's edge have none: they write the zero of the other edge
            tl.store(near_ptr + to + (near_column0 + CHUNK) % CHUNK, near)
            if DIRECTIONS == 2:
                near = near1 * _at_column(band, offs, near_column1, CHUNK)
                tl.store(near_ptr + span + to + (near_column1 + CHUNK) % CHUNK, near)
        if not EXCLUSIVE:
            own0 += diagonal * factor0 if HAS_W else diagonal
            if DIRECTIONS == 2:
                own1 += diagonal * factor1 if HAS_W else diagonal
        if HAS_G:
            decays = between(of_q0, of_k0, False)
            if DIRECTIONS == 2:
                # one exponential serves both directions
                decays = tl.where(first, decays, between(of_q1, of_k1, False))
            w *= tl.exp2(tl.minimum(decays, 0.0))
        if HAS_G or HAS_W:
            pairs = w * far0
            tl.store(columns_ptr + y0 * span + at + to, tl.sum(pairs, 0))
            if HAS_G:
                if HAS_W:
                    pairs *= factor0[None, :]
                tl.store(rows_ptr + x0 * span + at + to, tl.sum(pairs, 1))
            if DIRECTIONS == 2:
                pairs = w * far1
                tl.store(columns_ptr + c * span + at + to, tl.sum(pairs, 0))
                if HAS_G:
                    if HAS_W:
                        pairs *= factor1[None, :]
                    tl.store(rows_ptr + (c + 1) * span + at + to, tl.sum(pairs, 1))
        if HAS_W:
            factor = factor0[None, :]
            if DIRECTIONS == 2:
                factor = tl.where(first, factor, factor1[None, :])
            w *= factor
        of_heads += w
    # selected, not multiplied: what is not seen may be infinite
    e_at = (batch * groups * parts + part) * chunks * (chunks + 1) + c * (chunks + 1)
    e_ptr += e_at * (CHUNK * CHUNK) + i * CHUNK + j
    e = tl.where(first, of_heads, 0.0)
    if not EXCLUSIVE:
        e = tl.where(i == j, own0[:, None], e)
    tl.store(e_ptr + x0 * (CHUNK * CHUNK), e.to(e_ptr.dtype.element_ty))
    if DIRECTIONS == 2:
        e = tl.where(i < j, of_heads, 0.0)
        if not EXCLUSIVE:
            e = tl.where(i == j, own1[:, None], e)
        tl.store(e_ptr + (c + 1) * (CHUNK * CHUNK), e.to(e_ptr.dtype.element_ty))


def own_tiles(
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
    """Fill the tiles of every chunk with itself."""
    first, last = directions[0], directions[-1]
    heads, groups, parts = v.shape[2], first.q.shape[2], tiles.products.shape[2]
    plan = plan_of(first.q, v, precision, 128, 64)
    rows = (first.q, first.k, last.q, last.k)
    given = (sums.decays, sums.reads, sums.factors, *tiles)
    with on_device(v):
        _short_own_kernel[(frame.slots, groups * parts)](
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
            HAS_SKIP=tiles.dskip is not None,
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
            num_warps=8,
            num_stages=stages(plan.value_blocks),
            enable_fp_fusion=True,
        )
