"""Gradients of q, k, log decays, factors and skip, a chunk at a time.

With W[i, j] = dout[i] . v[j], F = (q k^T) exp(R[i] - S[j]) W on the pairs that are seen, h the
state that enters the chunk and dh the gradient that leaves it,

    E         = exp(R[i] - S[j]) write[j] W[i, j]
    dq[i]     = sum_heads sum_j E[i, j] k[j] + exp(R[i]) h dout[i]
    dk[j]     = sum_heads sum_i E[i, j] q[i] + exp(S_Q - S[j]) write[j] dh v[j]
    dwrite[j] = sum_i F[i, j] + exp(S_Q - S[j]) k[j] . dh v[j]
    dskip[i]  = W[i, i]

and the gradient of the log decay of step t is, all sums inside the chunk,

    sum_{i >= t} (sum_{j < i} F[i, j] write[j] + exp(R[i]) q[i] . h dout[i])
    - sum_{j >= t} sum_{i > j} F[i, j] write[j]
    + sum_{j < t} write[j] exp(S_Q - S[j]) k[j] . dh v[j] + exp(S_Q) <h, dh>

One program does a block of keys of one group, head after head, so that the sums over heads stay
in registers; sums over blocks of keys and parts of a group are left to PyTorch. Pairs whose
weight no decay scales (i = j, when exclusive also neighbours) are left out of the sums of the
decay's gradient, where they would cancel. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device, processors
from .kernels import (
    Direction,
    Frame,
    Precision,
    chunk_of,
    dot,
    load_sums,
    load_total,
    plan_of,
    strides,
    token_rows,
)


@triton.jit
def _pair_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    s_ptr,
    f_ptr,
    states_ptr,  # (M, H, K, V)
    dstates_ptr,
    dq_ptr,  # (parts, B, L, G, K)
    dk_ptr,
    dg_ptr,  # (blocks of keys, B, L, H)
    dw_ptr,
    dskip_ptr,  # (B, L, H)
    cu_ptr,
    table_ptr,
    chunks,
    length,
    heads,
    groups,
    per_group,
    parts,
    rows,  # B L
    stride_qb,
    stride_ql,
    stride_qg,
    stride_kb,
    stride_kl,
    stride_kg,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_ob,
    stride_ol,
    stride_oh,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VALUE_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    group, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    block = tl.program_id(2)
    _, batch, first, size, c = chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK, PACKED)
    if c * CHUNK >= size:
        return
    offs = tl.arange(0, CHUNK)
    i, j = offs[:, None], offs[None, :]
    place = c * CHUNK + offs
    valid = place < size
    read, valid_q = token_rows(place, size, SHIFT, REVERSE)
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < KEYS
    mask_qk = valid_q[:, None] & mask_k[None, :]
    mask_kk = valid[:, None] & mask_k[None, :]
    q_at = q_ptr + batch * stride_qb + group.to(tl.int64) * stride_qg
    k_at = k_ptr + batch * stride_kb + group.to(tl.int64) * stride_kg
    q = tl.load(
        q_at + (first + read)[:, None] * stride_ql + offs_k[None, :], mask=mask_qk, other=0.0
    )
    k = tl.load(
        k_at + (first + place)[:, None] * stride_kl + offs_k[None, :], mask=mask_kk, other=0.0
    )
    products = dot(q, tl.trans(k), DOT, PRECISION)
    # steps between a pair, in scan order, that decay what the later one reads of the earlier
    steps = (j - i) if REVERSE else (i - j)
    if EXCLUSIVE:
        steps -= 1
    dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    of_heads = tl.zeros([CHUNK, CHUNK], tl.float32)
    head0 = group * per_group + part * HEADS
    for turn in range(0, HEADS):
        head = (head0 + turn).to(tl.int64)
        at = slot * heads + head
        w = tl.zeros([CHUNK, CHUNK], tl.float32)
        if HAS_STATE:
            from_h = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            from_dh = tl.zeros([CHUNK, BLOCK_K], tl.float32)
            across = tl.zeros([1], tl.float32)
        for value_block in range(0, VALUE_BLOCKS):
            offs_v = value_block * BLOCK_V + tl.arange(0, BLOCK_V)
            mask_v = offs_v < WIDTH
            token = (first + place)[:, None]
            mask = valid[:, None] & mask_v[None, :]
            head_v, head_o = head * stride_vh, head * stride_oh
            v_at = v_ptr + batch * stride_vb + head_v + token * stride_vl + offs_v[None, :]
            o_at = dout_ptr + batch * stride_ob + head_o + token * stride_ol + offs_v[None, :]
            v = tl.load(v_at, mask=mask, other=0.0)
            dout = tl.load(o_at, mask=mask, other=0.0)
            w += dot(dout, tl.trans(v), DOT, PRECISION)
            if HAS_STATE:
                tile = at * (KEYS * WIDTH) + offs_k[:, None] * WIDTH + offs_v[None, :]
                mask_h = mask_k[:, None] & mask_v[None, :]
                h = tl.load(states_ptr + tile, mask=mask_h, other=0.0)
                dh = tl.load(dstates_ptr + tile, mask=mask_h, other=0.0)
                from_h += dot(dout, tl.trans(h), DOT, PRECISION)
                from_dh += dot(v, tl.trans(dh), DOT, PRECISION)
                if HAS_G:
                    shared = tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1)
                    across += tl.sum(shared, 0)
        target = (batch * length + first + place) * heads + head
        if HAS_SKIP:
            own = tl.sum(tl.where(i == j, w, 0.0), 1)
            # every block of keys finds the same
            tl.store(dskip_ptr + target, own, mask=tl.where(valid, block == 0, False))
        if HAS_G:
            of_q = load_sums(s_ptr + at * CHUNK, offs, CHUNK, REVERSE, EXCLUSIVE)
            of_k = tl.load(s_ptr + at * CHUNK + offs)
            w *= tl.exp2(tl.minimum(of_q[:, None] - of_k[None, :], 0.0))
        w = tl.where(steps >= 0, w, 0.0)
        pairs = w * products
        if HAS_W:
            factor = tl.load(f_ptr + at * CHUNK + offs)
            dw = tl.sum(pairs, 0)
            w *= factor[None, :]
            pairs *= factor[None, :]
        of_heads += w
        if HAS_G:
            pairs = tl.where(steps > 0, pairs, 0.0)
            later = tl.sum(pairs, 1)
            sooner = tl.sum(pairs, 0)
            left = tl.zeros([CHUNK], tl.float32)
        if HAS_STATE:
            if HAS_G:
                total = load_total(s_ptr + at * CHUNK, CHUNK, REVERSE)
                from_h *= tl.exp2(of_q)[:, None]
                from_dh *= tl.exp2(tl.minimum(total - of_k, 0.0))[:, None]
                later += tl.sum(from_h * q.to(tl.float32), 1)
            left = tl.sum(from_dh * k.to(tl.float32), 1)
            if HAS_W:
                dw += left
                left *= factor
                from_dh *= factor[:, None]
            dq += from_h
            dk += from_dh
        at_block = block.to(tl.int64) * rows * heads + target
        if HAS_W:
            tl.store(dw_ptr + at_block, dw, mask=valid)
        if HAS_G:
            # row t gathers: a step's decay scales what is read after it of what is before it
            after = (j <= i) if REVERSE else (j >= i)
            if EXCLUSIVE:
                strictly = (j < i) if REVERSE else (j > i)
                dg = tl.sum(tl.where(strictly, later[None, :], 0.0), 1)
                dg += tl.sum(tl.where(after, -sooner[None, :], left[None, :]), 1)
            else:
                dg = tl.sum(tl.where(after, (later - sooner)[None, :], left[None, :]), 1)
            if HAS_STATE:
                dg += tl.exp2(total) * across
            tl.store(dg_ptr + at_block, dg, mask=valid)
    dq += dot(of_heads, k, DOT, PRECISION)
    dk += dot(tl.trans(of_heads), q, DOT, PRECISION)
    at_part = (part.to(tl.int64) * rows + batch * length + first) * groups + group
    dq_at = dq_ptr + (at_part + read * groups)[:, None] * KEYS + offs_k[None, :]
    dk_at = dk_ptr + (at_part + place * groups)[:, None] * KEYS + offs_k[None, :]
    tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=mask_qk)
    tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=mask_kk)


def parts_of_group(per_group: int, programs: int, device: torch.device) -> int:
    """Programs a group: one sums over all of its heads if there are enough programs without."""
    parts = 1
    while per_group % (2 * parts) == 0 and programs * parts < 2 * processors(device):
        parts *= 2
    return parts


def pair(
    frame: Frame,
    direction: Direction,
    dout: Tensor,
    v: Tensor,
    states: Tensor | None,
    dstates: Tensor | None,
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
    skip: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, g, write and skip; None of what there is not."""
    q, k, sums, factors, reverse = direction
    batch, length, heads, width = v.shape
    groups, keys = q.shape[2:]
    plan = plan_of(q, v, precision, 64, 64)
    per_group = heads // groups
    parts = parts_of_group(per_group, frame.slots * groups * plan.key_blocks, v.device)

    def vectors(blocks: int) -> Tensor:
        shape = (blocks, batch, length, heads)
        return torch.empty(shape, dtype=torch.float32, device=v.device)

    # of a shifted q the last token of a sequence is never read
    make = torch.zeros if shift else torch.empty
    shape = (parts, batch, length, groups, keys)
    partial = torch.float32 if parts > 1 else q.dtype
    dq = make(shape, dtype=partial, device=v.device)
    dk = torch.empty(shape, dtype=torch.float32 if parts > 1 else k.dtype, device=v.device)
    dg = None if sums is None else vectors(plan.key_blocks)
    dw = None if factors is None else vectors(plan.key_blocks)
    dskip = vectors(1) if skip else None
    given = (sums, factors, states, dstates)
    if v.numel():
        with on_device(v):
            _pair_kernel[(frame.slots, groups * parts, plan.key_blocks)](
                dout,
                q,
                k,
                v,
                # absent tensors are never read, but pointers are moved
                *(v if p is None else p for p in given),
                dq,
                dk,
                *(v if p is None else p for p in (dg, dw, dskip)),
                *frame.arguments()[:2],
                frame.chunks,
                frame.length,
                heads,
                groups,
                per_group,
                parts,
                batch * length,
                *strides(q, 3),
                *strides(k, 3),
                *strides(v, 3),
                *strides(dout, 3),
                REVERSE=reverse,
                EXCLUSIVE=exclusive,
                SHIFT=shift,
                HAS_G=sums is not None,
                HAS_W=factors is not None,
                HAS_SKIP=skip,
                HAS_STATE=states is not None,
                PACKED=frame.cu_seqlens is not None,
                KEYS=keys,
                WIDTH=width,
                CHUNK=frame.chunk,
                BLOCK_K=plan.block_k,
                BLOCK_V=plan.block_v,
                VALUE_BLOCKS=plan.value_blocks,
                HEADS=per_group // parts,
                DOT=precision.operand,
                PRECISION=precision.name,
                num_warps=8,
                num_stages=2,
                enable_fp_fusion=True,
            )

    def added(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.sum(0) if x.shape[0] > 1 else x[0]

    q_grad, k_grad = added(dq), added(dk)
    assert q_grad is not None
    assert k_grad is not None
    return q_grad, k_grad, added(dg), added(dw), added(dskip)
