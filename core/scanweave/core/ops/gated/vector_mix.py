"""Outputs of a chunk, or gradients of v, when every key channel decays on its own.

    forward   out[i] = sum_j q'[i] . k'[j] v[j] + q'[i] h' + skip[i] v[i]
    back      dv[j] = sum_i k'[j] . q'[i] dout[i] + k'[j] dh' + skip[j] dout[j]

over the pairs that are seen, with q', k' of `vector_scale.py` and states of `vector_walk.py`.
Weights of pairs in steep chunks are read from memory. Two directions add theirs before one matrix
product. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .kernels import Frame, Precision, chunk_of, dot, plan_of, strides
from .vector_scale import Vector


@triton.jit
def _weights_and_carried(
    read_ptr,  # of the chunk's first token
    written_ptr,
    state_ptr,
    pairs_ptr,
    steep,
    valid,
    offs_v,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BACK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weight of every pair, (Q, Q), and what rows read of the state, (Q, V)."""
    offs = tl.arange(0, CHUNK)
    weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    carried = tl.zeros([CHUNK, BLOCK_V], tl.float32)
    for block in range(0, KEY_BLOCKS):
        offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < KEYS
        r = tl.load(
            read_ptr + offs[:, None] * KEYS + offs_k[None, :],
            mask=valid[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            written_ptr + offs[None, :] * KEYS + offs_k[:, None],
            mask=valid[None, :] & mask_k[:, None],
            other=0.0,
        )
        weights += dot(r, w, DOT, PRECISION)
        if HAS_STATE:
            h = tl.load(
                state_ptr + offs_k[:, None] * WIDTH + offs_v[None, :],
                mask=mask_k[:, None] & (offs_v < WIDTH)[None, :],
                other=0.0,
            )
            carried += dot(r, h, DOT, PRECISION)
    i, j = offs[:, None], offs[None, :]
    # steps from a column to the row that reads it
    steps = (i - j) if REVERSE == BACK else (j - i)
    # selected, not multiplied: what is not seen may be infinite
    weights = tl.where(steps > 0 if EXCLUSIVE else steps >= 0, weights, 0.0)
    if steep != 0:
        pair = (j * CHUNK + i) if BACK else (i * CHUNK + j)
        weights = tl.load(pairs_ptr + pair).to(tl.float32)
    return weights, carried


@triton.jit(do_not_specialize=["chunks", "length", "rows"])
def _vector_mix_kernel(
    read0_ptr,  # q', or k' going back: (H, B L, K)
    written0_ptr,
    steep0_ptr,  # (M, H)
    pairs0_ptr,  # (M, H, Q, Q), of steep chunks
    states0_ptr,  # (M, H, K, V)
    read1_ptr,
    written1_ptr,
    steep1_ptr,
    pairs1_ptr,
    states1_ptr,
    v_ptr,  # v, or dout
    skip_ptr,
    out_ptr,  # (B, L, H, V)
    cu_ptr,
    table_ptr,
    chunks,
    length,
    heads,
    rows,  # B L
    stride_vb,
    stride_vl,
    stride_vh,
    stride_sb,
    stride_sl,
    stride_sh,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    BACK: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    offs_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    _, batch, first, size, c = chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK, PACKED)
    if c * CHUNK >= size:
        return
    place = c * CHUNK + tl.arange(0, CHUNK)
    valid = place < size
    token = first + place
    mask = valid[:, None] & (offs_v < WIDTH)[None, :]
    at = slot * heads + head
    rows_at = (head * rows + batch * length + first + c * CHUNK) * KEYS
    weights, carried = _weights_and_carried(
        read0_ptr + rows_at,
        written0_ptr + rows_at,
        states0_ptr + at * (KEYS * WIDTH),
        pairs0_ptr + at * (CHUNK * CHUNK),
        tl.load(steep0_ptr + at),
        valid,
        offs_v,
        REVERSE,
        EXCLUSIVE,
        BACK,
        HAS_STATE,
        KEYS,
        WIDTH,
        CHUNK,
        BLOCK_K,
        BLOCK_V,
        KEY_BLOCKS,
        DOT,
        PRECISION,
    )
    if DIRECTIONS == 2:
        weights1, carried1 = _weights_and_carried(
            read1_ptr + rows_at,
            written1_ptr + rows_at,
            states1_ptr + at * (KEYS * WIDTH),
            pairs1_ptr + at * (CHUNK * CHUNK),
            tl.load(steep1_ptr + at),
            valid,
            offs_v,
            True,
            EXCLUSIVE,
            BACK,
            HAS_STATE,
            KEYS,
            WIDTH,
            CHUNK,
            BLOCK_K,
            BLOCK_V,
            KEY_BLOCKS,
            DOT,
            PRECISION,
        )
        weights += weights1
        carried += carried1
    v = tl.load(
        v_ptr + batch * stride_vb + head * stride_vh + token[:, None] * stride_vl + offs_v[None, :],
        mask=mask,
        other=0.0,
    )
    out = carried + dot(weights, v, DOT, PRECISION)
    if HAS_SKIP:
        skip = tl.load(
            skip_ptr + batch * stride_sb + token * stride_sl + head * stride_sh,
            mask=valid,
            other=0.0,
        )
        out += skip.to(tl.float32)[:, None] * v.to(tl.float32)
    out_at = ((batch * length + token) * heads + head)[:, None] * WIDTH + offs_v[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def vector_mix(
    frame: Frame,
    directions: list[Vector],
    pairs: list[Tensor],
    v: Tensor,
    skip: Tensor | None,
    states: list[Tensor] | None,
    precision: Precision,
    *,
    exclusive: bool,
    back: bool,
) -> Tensor:
    """Outputs of all directions added, (B, L, H, V); going back the gradient of v."""
    batch, length, heads, width = v.shape
    out = torch.empty((batch, length, heads, width), dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out
    plan = plan_of(directions[0].q, v, precision, 64, 128)
    pointers = []
    for d in (0, len(directions) - 1):
        x = directions[d]
        read = (x.keys, x.queries) if back else (x.queries, x.keys)
        pointers += [*read, x.steep, pairs[d], None if states is None else states[d]]
    with on_device(v):
        _vector_mix_kernel[(frame.slots, heads, plan.value_blocks)](
            # absent tensors are never read, but pointers are moved
            *(v if p is None else p for p in pointers),
            v,
            v if skip is None else skip,
            out,
            *frame.arguments(),
            heads,
            batch * length,
            *strides(v, 3),
            *strides(skip, 3),
            DIRECTIONS=len(directions),
            REVERSE=directions[0].reverse,
            EXCLUSIVE=exclusive,
            BACK=back,
            HAS_SKIP=skip is not None,
            HAS_STATE=states is not None,
            PACKED=frame.cu_seqlens is not None,
            KEYS=directions[0].q.shape[3],
            WIDTH=width,
            CHUNK=frame.chunk,
            BLOCK_K=plan.block_k,
            BLOCK_V=plan.block_v,
            KEY_BLOCKS=plan.key_blocks,
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return out
