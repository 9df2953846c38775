"""Tiles of one chunk and one direction: products of rows and columns, their decays, the state.

Rows read columns: rows are q and columns k, or the other way round going back. Letters and flags:
`kernels.py`.
"""
# Triton's own language: constant branches
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl

from .kernels import dot, load_sums, load_total, token_rows


@triton.jit
def pair_products(
    read_ptr,
    written_ptr,
    first,
    row_place,
    column_place,
    size,
    stride_rl,
    stride_wl,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    BACK: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of one chunk times columns of the same or another one, (Q, Q)."""
    rows, valid_r = token_rows(row_place, size, SHIFT and not BACK, REVERSE)
    columns, valid_c = token_rows(column_place, size, SHIFT and BACK, REVERSE)
    products = tl.zeros([CHUNK, CHUNK], tl.float32)
    for block in range(0, KEY_BLOCKS):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < KEYS
        r = tl.load(
            read_ptr + (first + rows)[:, None] * stride_rl + offs_k[None, :],
            mask=valid_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            written_ptr + (first + columns)[None, :] * stride_wl + offs_k[:, None],
            mask=valid_c[None, :] & mask_k[:, None],
            other=0.0,
        )
        products += dot(r, w, DOT, PRECISION)
    return products


@triton.jit
def chunk_weights(
    products,
    s_ptr,
    f_ptr,
    offs,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BACK: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weight of every pair, (Q, Q), what rows scale the state by, and the rows' own factor."""
    i, j = offs[:, None], offs[None, :]
    # steps from a column to the row that reads it
    steps = (i - j) if REVERSE == BACK else (j - i)
    seen = steps > 0 if EXCLUSIVE else steps >= 0
    reading = tl.full([CHUNK], 1.0, tl.float32)
    weights = products
    if HAS_G:
        of_q = load_sums(s_ptr, offs, CHUNK, REVERSE, EXCLUSIVE)
        of_k = tl.load(s_ptr + offs)
        if BACK:
            between = of_q[None, :] - of_k[:, None]
            total = load_total(s_ptr, CHUNK, REVERSE)
            reading = tl.exp2(tl.minimum(total - of_k, 0.0))
        else:
            between = of_q[:, None] - of_k[None, :]
            reading = tl.exp2(of_q)
        weights *= tl.exp2(tl.minimum(between, 0.0))
    if HAS_W:
        factor = tl.load(f_ptr + offs)
        if BACK:
            weights *= factor[:, None]
            reading *= factor
        else:
            weights *= factor[None, :]
    # selected, not multiplied: what is not seen may be infinite
    return tl.where(seen, weights, 0.0), reading


@triton.jit
def chunk_from_state(
    read_ptr,
    state_ptr,
    first,
    place,
    size,
    offs_v,
    stride_rl,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    BACK: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows times the state, (Q, V)."""
    rows, valid = token_rows(place, size, SHIFT and not BACK, REVERSE)
    carried = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for block in range(0, KEY_BLOCKS):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < KEYS
        r = tl.load(
            read_ptr + (first + rows)[:, None] * stride_rl + offs_k[None, :],
            mask=valid[:, None] & mask_k[None, :],
            other=0.0,
        )
        h = tl.load(
            state_ptr + offs_k[:, None] * WIDTH + offs_v[None, :],
            mask=mask_k[:, None] & (offs_v < WIDTH)[None, :],
            other=0.0,
        )
        carried += dot(r, h, DOT, PRECISION)
    return carried
