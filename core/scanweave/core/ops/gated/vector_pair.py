"""Gradients of q, k, log decays and factors when every key channel decays on its own.

With W[i, j] = dout[i] . v[j] on pairs that a decay scales, and what `vector_scale.py` made,

    dq'[i] = sum_j W[i, j] k'[j] + dout[i] h'^T         dk'[j] = sum_i W[i, j] q'[i] + v[j] dh'^T

which their factors turn into those of q and k, once what pairs without a decay have is added
(i = j, or neighbours when exclusive). The gradient of the log decay of step t is, a channel,

    sum_{i >= t} q'[i] dq'[i] - sum_{j >= t} k'[j] sum_i W[i, j] q'[i]
    + sum_{j < t} k'[j] (v[j] dh'^T) + 2^T <h, dh>                        all inside the chunk

Both of the first sums hold the same products of the same rounded numbers, so that pairs on one
side of t cancel to float32's rounding, whatever the inputs were rounded to. Nothing is summed
over the sequence and subtracted. Rows are tokens in scan order. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, on_device
from .kernels import Frame, Precision, chunk_of, dot, plan_of, strides, token_rows
from .vector_scale import STRONGEST, Vector
from .vector_steep import add_rows


@triton.jit
def _load_rows(x_ptr, token, valid, offs_k, stride_xl, KEYS: tl.constexpr):
    """Vectors (Q, K) of tokens in float32, 0 where there is none."""
    at = x_ptr + token[:, None] * stride_xl + offs_k[None, :]
    mask = valid[:, None] & (offs_k < KEYS)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["chunks", "length", "rows"])
def _vector_pair_kernel(
    dout_ptr,
    v_ptr,
    q_ptr,
    k_ptr,
    g_ptr,
    write_ptr,
    bonus_ptr,  # (H, K)
    queries_ptr,  # (H, B L, K)
    keys_ptr,
    totals_ptr,  # (M, H, K)
    steep_ptr,  # (M, H)
    states_ptr,  # (M, H, K, V)
    dstates_ptr,
    dq_ptr,  # (B, L, H, K), of steep chunks what their pairs have
    dk_ptr,
    dg_ptr,
    dw_ptr,  # (blocks of keys, B, L, H)
    dskip_ptr,  # (B, L, H)
    dbonus_ptr,  # (M, H, K)
    cu_ptr,
    table_ptr,
    chunks,
    length,
    heads,
    per_group,
    rows,  # B L
    stride_ob,
    stride_ol,
    stride_oh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_qb,
    stride_ql,
    stride_qg,
    stride_kb,
    stride_kl,
    stride_kg,
    stride_gb,
    stride_gl,
    stride_gh,
    stride_gk,
    stride_wb,
    stride_wl,
    stride_wh,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_BONUS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    _, batch, first, size, c = chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK, PACKED)
    if c * CHUNK >= size:
        return
    step = tl.arange(0, CHUNK)
    place = c * CHUNK + (CHUNK - 1 - step if REVERSE else step)
    valid = place < size
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < KEYS
    mask = valid[:, None] & mask_k[None, :]
    at = slot * heads + head
    rows_at = (head * rows + batch * length + first + place)[:, None] * KEYS + offs_k[None, :]
    queries = tl.load(queries_ptr + rows_at, mask=mask, other=0.0)
    keys = tl.load(keys_ptr + rows_at, mask=mask, other=0.0)
    weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    dqueries = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    dleft = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    across = tl.zeros([BLOCK_K], tl.float32)
    token = (first + place)[:, None]
    for value_block in range(0, VALUE_BLOCKS):
        offs_v = value_block * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < WIDTH
        v_at = v_ptr + batch * stride_vb + head * stride_vh + token * stride_vl + offs_v[None, :]
        o_at = dout_ptr + batch * stride_ob + head * stride_oh + token * stride_ol
        v = tl.load(v_at, mask=valid[:, None] & mask_v[None, :], other=0.0)
        dout = tl.load(o_at + offs_v[None, :], mask=valid[:, None] & mask_v[None, :], other=0.0)
        weights += dot(dout, tl.trans(v), DOT, PRECISION)
        if HAS_STATE:
            tile = at * (KEYS * WIDTH) + offs_k[:, None] * WIDTH + offs_v[None, :]
            mask_h = mask_k[:, None] & mask_v[None, :]
            h = tl.load(states_ptr + tile, mask=mask_h, other=0.0)
            dh = tl.load(dstates_ptr + tile, mask=mask_h, other=0.0)
            dqueries += dot(dout, tl.trans(h), DOT, PRECISION)
            dleft += dot(v, tl.trans(dh), DOT, PRECISION)
            across += tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1)
    # steps between a pair that decay what the later token reads of the earlier
    i, j = step[:, None], step[None, :]
    steps = i - j - 1 if EXCLUSIVE else i - j
    target = (batch * length + first + place) * heads + head
    if HAS_SKIP or HAS_BONUS:
        own = tl.sum(tl.where(i == j, weights, 0.0), 1)
    if HAS_SKIP:
        # every block of keys finds the same
        tl.store(dskip_ptr + target, own, mask=tl.where(valid, block == 0, False))
    steep = tl.load(steep_ptr + at) != 0
    # pairs of steep chunks are in `dq_ptr` and its like already
    weights = tl.where(steep, 0.0, weights)
    undecayed = tl.where(steps == 0, weights, 0.0)
    of_reader, of_read = tl.sum(undecayed, 1)[:, None], tl.sum(undecayed, 0)[:, None]
    weights = tl.where(steps > 0, weights, 0.0)
    dqueries += dot(weights, keys, DOT, PRECISION)
    dkeys = dot(tl.trans(weights), queries, DOT, PRECISION)
    if EXCLUSIVE:
        back = KEYS if REVERSE else -KEYS
        # in reverse, the token scanned before the last one is not there
        inside = valid & ((place + 1 if REVERSE else place) < size) & (step > 0)
        near_keys = tl.load(
            keys_ptr + rows_at + back, mask=inside[:, None] & mask_k[None, :], other=0.0
        )
        after = place - 1 if REVERSE else place + 1
        inside = (after < size) & (step < CHUNK - 1)
        near_queries = tl.load(
            queries_ptr + rows_at - back, mask=inside[:, None] & mask_k[None, :], other=0.0
        )
    else:
        near_keys, near_queries = keys, queries
    queries, keys = queries.to(tl.float32), keys.to(tl.float32)
    later, sooner = dqueries * queries, dkeys * keys
    # row t gathers: its decay scales what is read from t on of what is before t
    t, other = i, j
    if EXCLUSIVE:
        dg = add_rows(other > t, later, DOT, PRECISION)
        dg -= add_rows(other >= t, sooner, DOT, PRECISION)
    else:
        dg = add_rows(other >= t, later - sooner, DOT, PRECISION)
    total = tl.load(totals_ptr + at * KEYS + offs_k, mask=mask_k, other=0.0)
    if HAS_STATE:
        dg += add_rows(other < t, dleft * keys, DOT, PRECISION)
        dkeys += dleft
        dg += (across * tl.where(steep, tl.exp2(total), 1.0))[None, :]
    wide = target[:, None] * KEYS + offs_k[None, :]
    if steep:
        dg += tl.load(dg_ptr + wide, mask=mask, other=0.0).to(tl.float32)
    tl.store(dg_ptr + wide, dg.to(dg_ptr.dtype.element_ty), mask=mask)
    dqueries += of_reader * near_keys.to(tl.float32)
    dkeys += of_read * near_queries.to(tl.float32)

    g_ptr += batch * stride_gb + head * stride_gh
    g_at = g_ptr + (first + place)[:, None] * stride_gl + offs_k[None, :] * stride_gk
    g = tl.load(g_at, mask=mask, other=0.0)
    g = tl.where(g.to(tl.float32) * LOG2_E < STRONGEST, STRONGEST / LOG2_E, g)
    middle = 0.5 * total[None, :]
    sums = LOG2_E * add_rows(other <= t, g, DOT, PRECISION)
    of_k = middle - sums
    if EXCLUSIVE:
        sums = LOG2_E * add_rows(other < t, g, DOT, PRECISION)
    of_q = sums - middle
    if steep:
        of_q = sums
        of_k = LOG2_E * add_rows(other > t, g, DOT, PRECISION)
    dq, dk = dqueries * tl.exp2(of_q), dkeys * tl.exp2(of_k)
    group = head // per_group
    q_at = q_ptr + batch * stride_qb + group * stride_qg
    k_at = k_ptr + batch * stride_kb + group * stride_kg
    read, valid_q = token_rows(place, size, SHIFT, REVERSE)
    dq_at = ((batch * length + first + read) * heads + head)[:, None] * KEYS + offs_k[None, :]
    mask_q = valid_q[:, None] & mask_k[None, :]
    if steep:
        dq += tl.load(dq_ptr + dq_at, mask=mask_q, other=0.0).to(tl.float32)
        dk += tl.load(dk_ptr + wide, mask=mask, other=0.0).to(tl.float32)
    if HAS_W or HAS_BONUS:
        k = _load_rows(k_at, first + place, valid, offs_k, stride_kl, KEYS)
    if HAS_W:
        w_at = write_ptr + batch * stride_wb + head * stride_wh
        dw_at = dw_ptr + block.to(tl.int64) * rows * heads + target
        tl.store(dw_at, tl.sum(dk * k, 1), mask=valid)
        write = tl.load(w_at + (first + place) * stride_wl, mask=valid, other=0.0)
        dk *= write.to(tl.float32)[:, None]
    if HAS_BONUS:
        bonus = tl.load(bonus_ptr + head * KEYS + offs_k, mask=mask_k, other=0.0)
        bonus = own[:, None] * bonus.to(tl.float32)[None, :]
        q = _load_rows(q_at, first + place, valid, offs_k, stride_ql, KEYS)
        dq += bonus * k
        dk += bonus * q
        dbonus = tl.sum(own[:, None] * q * k, 0)
        tl.store(dbonus_ptr + at * KEYS + offs_k, dbonus, mask=mask_k)
    tl.store(dq_ptr + dq_at, dq.to(dq_ptr.dtype.element_ty), mask=mask_q)
    tl.store(dk_ptr + wide, dk.to(dk_ptr.dtype.element_ty), mask=mask)


class Gradients(NamedTuple):
    """Of one direction: q and k (B, L, H, K), a head each; factors by block of keys."""

    q: Tensor
    k: Tensor
    g: Tensor
    write: Tensor | None
    skip: Tensor | None
    bonus: Tensor | None  # by chunk, (M, H, K)


def gradients(
    frame: Frame, direction: Vector, v: Tensor, precision: Precision, *, shift: bool, skip: bool
) -> Gradients:
    """Memory for the gradients of a direction; heads of a group are added in float32."""
    q, k, g = direction.q, direction.k, direction.g
    (batch, length, heads, keys), groups = g.shape, q.shape[2]
    blocks = plan_of(q, v, precision, 64, 64).key_blocks

    def make(x: Tensor, zero: bool = False) -> Tensor:
        dtype = x.dtype if groups == heads or x is g else torch.float32
        create = torch.zeros if zero else torch.empty
        return create((batch, length, heads, keys), dtype=dtype, device=v.device)

    def vectors(count: int) -> Tensor:
        shape = (count, batch, length, heads)
        return torch.empty(shape, dtype=torch.float32, device=v.device)

    return Gradients(
        # of a shifted q the last token of a sequence is never read
        make(q, shift),
        make(k),
        make(g),
        None if direction.write is None else vectors(blocks),
        vectors(1)[0] if skip else None,
        # some chunks of packed sequences do not exist
        None if direction.bonus is None else torch.zeros_like(direction.totals),
    )


def vector_pair(
    frame: Frame,
    direction: Vector,
    dout: Tensor,
    v: Tensor,
    states: Tensor | None,
    dstates: Tensor | None,
    grads: Gradients,
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
) -> None:
    """Fill `grads`, in which steep chunks have what their pairs have."""
    q, k, g, write = direction.q, direction.k, direction.g, direction.write
    batch, length, heads, width = v.shape
    plan = plan_of(q, v, precision, 64, 64)
    if v.numel() == 0:
        return
    with on_device(v):
        _vector_pair_kernel[(frame.slots, heads, plan.key_blocks)](
            dout,
            v,
            q,
            k,
            g,
            # absent tensors are never read, but pointers are moved
            *(v if p is None else p for p in (write, direction.bonus)),
            direction.queries,
            direction.keys,
            direction.totals,
            direction.steep,
            *(v if p is None else p for p in (states, dstates)),
            grads.q,
            grads.k,
            grads.g,
            *(v if p is None else p for p in (grads.write, grads.skip, grads.bonus)),
            *frame.arguments(),
            heads,
            heads // q.shape[2],
            batch * length,
            *strides(dout, 3),
            *strides(v, 3),
            *strides(q, 3),
            *strides(k, 3),
            *strides(g, 4),
            *strides(write, 3),
            REVERSE=direction.reverse,
            EXCLUSIVE=exclusive,
            SHIFT=shift,
            HAS_W=write is not None,
            HAS_SKIP=grads.skip is not None,
            HAS_BONUS=direction.bonus is not None,
            HAS_STATE=states is not None,
            PACKED=frame.cu_seqlens is not None,
            KEYS=q.shape[3],
            WIDTH=width,
            CHUNK=frame.chunk,
            BLOCK_K=plan.block_k,
            BLOCK_V=plan.block_v,
            VALUE_BLOCKS=plan.value_blocks,
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
