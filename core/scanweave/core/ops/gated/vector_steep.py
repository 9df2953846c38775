"""Pairs of chunks in which a key channel decays too fast for scaled matrices, one by one.

    P[i, j] = write[j] sum_k q[i] k[j] 2^(decays of the steps between j and i)

and their gradients. Decays are added up step by step from the later token of a pair to the
earlier one, so that no exponent is the difference of two sums: a pair whose decays are weak keeps
its digits beside any that are strong. Other chunks (`vector_scale.py`) end at once.

Rows are tokens in scan order. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, ceil_div, on_device, power_of_2, processors
from .kernels import Frame, Precision, chunk_of, strides, token_rows
from .vector_scale import STRONGEST, Vector, operand_of

# heads that one program looks at where programs are many
HEADS = 8


@triton.jit
def add_rows(chosen, x, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over rows of x (Q, K) as a matrix (Q, Q) of booleans chooses them, nearly float32."""
    ones = tl.where(chosen, 1.0, 0.0)
    if tl.bfloat16 == DOT:
        ones = ones.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        if x.dtype == tl.bfloat16:
            return tl.dot(ones, high)
        else:
            low = (x - high.to(tl.float32)).to(tl.bfloat16)
            return tl.dot(ones, low, tl.dot(ones, high))
    else:
        x = x.to(tl.float32)
        return tl.dot(ones, x, input_precision="ieee" if PRECISION == "ieee" else "tf32x3")


@triton.jit
def _steep_chunk(
    q_ptr,
    k_ptr,
    g_ptr,
    write_ptr,
    v_ptr,
    dout_ptr,
    pairs_ptr,  # (M, H, Q, Q)
    dq_ptr,  # (B, L, H, K)
    dk_ptr,
    dg_ptr,
    at,
    batch,
    head,
    group,
    heads,
    target,
    first,
    c,
    size,
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
    stride_vb,
    stride_vl,
    stride_vh,
    stride_ob,
    stride_ol,
    stride_oh,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_W: tl.constexpr,
    GRADIENTS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weights of the pairs of one chunk and head, and what these have of gradients."""
    step = tl.arange(0, CHUNK)
    row = CHUNK - 1 - step if REVERSE else step
    place = c * CHUNK + row
    valid = place < size
    offs_k, offs_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < KEYS, offs_v < WIDTH
    read, valid_q = token_rows(place, size, SHIFT, REVERSE)
    mask_q = valid_q[:, None] & mask_k[None, :]
    q = tl.load(
        q_ptr
        + batch * stride_qb
        + group * stride_qg
        + (first + read)[:, None] * stride_ql
        + offs_k[None, :],
        mask=mask_q,
        other=0.0,
    ).to(tl.float32)
    between = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    if GRADIENTS:
        v_at = v_ptr + batch * stride_vb + head * stride_vh + offs_v
        dout = tl.load(
            dout_ptr
            + batch * stride_ob
            + head * stride_oh
            + (first + place)[:, None] * stride_ol
            + offs_v[None, :],
            mask=valid[:, None] & mask_v[None, :],
            other=0.0,
        ).to(tl.float32)
        dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        sooner = tl.zeros([CHUNK, BLOCK_K], tl.float32)
        near = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for turn in range(0, CHUNK):
        j = CHUNK - 1 - turn
        row_j = turn if REVERSE else j
        token_j = first + c * CHUNK + row_j
        there = c * CHUNK + row_j < size
        mask_j = tl.where(mask_k, there, False)
        k_at = k_ptr + batch * stride_kb + group * stride_kg + token_j * stride_kl + offs_k
        k = tl.load(k_at, mask=mask_j, other=0.0).to(tl.float32)
        if HAS_W:
            w_at = write_ptr + batch * stride_wb + head * stride_wh + token_j * stride_wl
            k *= tl.load(w_at, mask=there, other=0.0).to(tl.float32)
        scaled = q * tl.exp2(between)
        seen = step > j if EXCLUSIVE else step >= j
        pair = tl.where(seen, tl.sum(scaled * k[None, :], 1), 0.0)
        pair_at = pairs_ptr + at * (CHUNK * CHUNK) + row * CHUNK + row_j
        tl.store(pair_at, pair.to(pairs_ptr.dtype.element_ty))
        if GRADIENTS:
            v = tl.load(v_at + token_j * stride_vl, mask=tl.where(mask_v, there, False), other=0.0)
            dpair = tl.sum(dout * v.to(tl.float32)[None, :], 1)
            # a pair that no decay scales is not in the sums of the decay's gradient
            own = step == j + 1 if EXCLUSIVE else step == j
            near = tl.where(own[:, None], dpair[:, None] * k[None, :], near)
            dk_near = tl.sum(tl.where(own, dpair, 0.0)[:, None] * q, 0)
            dpair = tl.where(step > j + 1 if EXCLUSIVE else step > j, dpair, 0.0)[:, None]
            dq += dpair * tl.exp2(between) * k[None, :]
            dk = tl.sum(dpair * scaled, 0)
            sooner = tl.where((step == j)[:, None], (dk * k)[None, :], sooner)
            dk += dk_near
            dk_at = dk_ptr + ((target + c * CHUNK + row_j) * heads + head) * KEYS + offs_k
            tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=mask_j)
        g_at = g_ptr + batch * stride_gb + head * stride_gh + token_j * stride_gl
        g = tl.load(g_at + offs_k * stride_gk, mask=mask_j, other=0.0).to(tl.float32) * LOG2_E
        g = tl.where(g < STRONGEST, STRONGEST, g)
        between += tl.where(seen[:, None], g[None, :], 0.0)
    if GRADIENTS:
        later = dq * q
        i, t = step[None, :], step[:, None]
        if EXCLUSIVE:
            dg = add_rows(i > t, later, DOT, PRECISION) - add_rows(i >= t, sooner, DOT, PRECISION)
        else:
            dg = add_rows(i >= t, later - sooner, DOT, PRECISION)
        dq_at = ((target + read) * heads + head)[:, None] * KEYS + offs_k[None, :]
        dg_at = ((target + place) * heads + head)[:, None] * KEYS + offs_k[None, :]
        tl.store(dq_ptr + dq_at, (dq + near).to(dq_ptr.dtype.element_ty), mask=mask_q)
        mask = valid[:, None] & mask_k[None, :]
        tl.store(dg_ptr + dg_at, dg.to(dg_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["chunks", "length"])
def _vector_steep_kernel(
    steep_ptr,
    q_ptr,
    k_ptr,
    g_ptr,
    write_ptr,
    v_ptr,
    dout_ptr,
    pairs_ptr,  # (M, H, Q, Q)
    dq_ptr,  # (B, L, H, K)
    dk_ptr,
    dg_ptr,
    cu_ptr,
    table_ptr,
    chunks,
    length,
    heads,
    per_group,
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
    stride_vb,
    stride_vl,
    stride_vh,
    stride_ob,
    stride_ol,
    stride_oh,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_W: tl.constexpr,
    GRADIENTS: tl.constexpr,
    HEADS: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    _, batch, first, size, c = chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK, PACKED)
    if c * CHUNK >= size:
        return
    target = batch * length + first
    # most chunks are not steep: one program looks at several heads
    for turn in range(0, HEADS):
        head = tl.program_id(1).to(tl.int64) * HEADS + turn
        at = slot * heads + head
        group = head // per_group
        if tl.load(steep_ptr + at, mask=head < heads, other=0) != 0:
            _steep_chunk(
                q_ptr,
                k_ptr,
                g_ptr,
                write_ptr,
                v_ptr,
                dout_ptr,
                pairs_ptr,
                dq_ptr,
                dk_ptr,
                dg_ptr,
                at,
                batch,
                head,
                group,
                heads,
                target,
                first,
                c,
                size,
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
                stride_vb,
                stride_vl,
                stride_vh,
                stride_ob,
                stride_ol,
                stride_oh,
                REVERSE,
                EXCLUSIVE,
                SHIFT,
                HAS_W,
                GRADIENTS,
                KEYS,
                WIDTH,
                CHUNK,
                BLOCK_K,
                BLOCK_V,
                DOT,
                PRECISION,
            )


def steep_pairs(
    frame: Frame,
    direction: Vector,
    v: Tensor,
    dout: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor] | None,
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
) -> Tensor:
    """Weights of pairs (M, H, Q, Q), only those of steep chunks set.

    With `grads`, (B, L, H, K) of q, k write and g, what these pairs have of them is set as well.
    """
    q, k, g, write = direction.q, direction.k, direction.g, direction.write
    heads, width = v.shape[2:]
    keys = q.shape[3]
    pairs = torch.empty(
        (frame.slots, heads, frame.chunk, frame.chunk),
        dtype=operand_of(precision),
        device=v.device,
    )
    if v.numel() == 0:
        return pairs
    many = frame.slots * heads >= 4 * HEADS * processors(v.device)
    looked_at = HEADS if many else 1
    with on_device(v):
        _vector_steep_kernel[(frame.slots, ceil_div(heads, looked_at))](
            direction.steep,
            q,
            k,
            g,
            g if write is None else write,
            v,
            dout,
            pairs,
            *(grads or (None, None, None)),
            *frame.arguments(),
            heads,
            heads // q.shape[2],
            *strides(q, 3),
            *strides(k, 3),
            *strides(g, 4),
            *strides(write, 3),
            *strides(v, 3),
            *strides(dout, 3),
            REVERSE=direction.reverse,
            EXCLUSIVE=exclusive,
            SHIFT=shift,
            HAS_W=write is not None,
            GRADIENTS=grads is not None,
            HEADS=looked_at,
            PACKED=frame.cu_seqlens is not None,
            KEYS=keys,
            WIDTH=width,
            CHUNK=frame.chunk,
            BLOCK_K=max(16, power_of_2(keys)),
            BLOCK_V=max(16, power_of_2(width)),
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return pairs
