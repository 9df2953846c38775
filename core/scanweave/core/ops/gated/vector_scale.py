"""Decays of every key channel, taken out of the scan: q and k of a chunk scaled by their sums.

With S the sums of a chunk's log2 decays at its tokens, R the sums that reading uses (S, or those
of the token scanned before when it is exclusive) and T the whole chunk's,

    q'[i] = q[i] 2^(R[i] - T / 2)        k'[j] = write[j] k[j] 2^(T / 2 - S[j])

so that q'[i] . k'[j] is a pair's weight with its decay, and what is left is a scan without decays
inside of a chunk (`vector_walk.py`, `vector_mix.py`, `vector_pair.py`). The exponents are at most
T / 2 in size. Chunks in which a channel decays so fast that they would leave the range of float32
are steep: there q' = 2^R q reads the state and k' = 2^(T - S) k is left in it, both at most 1
times what they were, and weights of pairs come from `vector_steep.py`.

Letters: M chunks of Q tokens, H heads, K keys.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, on_device, power_of_2, register_limit
from .kernels import Frame, Precision, chunk_of, strides, token_rows

# exponents of gentle chunks: room for values up to 2^40 on either side of float32's 2^126
REACH = tl.constexpr(80.0)
# a decay this strong leaves nothing of a float32
STRONGEST = tl.constexpr(-152.0)


class Vector(NamedTuple):
    """One direction's inputs, as given and scaled."""

    q: Tensor  # (B, L, G, K)
    k: Tensor
    g: Tensor  # (B, L, H, K)
    write: Tensor | None  # (B, L, H)
    bonus: Tensor | None  # (H, K)
    reverse: bool
    queries: Tensor  # q', (H, B L, K), in the dtype of matrix products
    keys: Tensor  # k'
    totals: Tensor  # T, (M, H, K)
    steep: Tensor  # (M, H), 0 or 1
    own: Tensor | None  # q . (bonus k), (B, L, H)


@triton.jit
def load_decays(g_ptr, token, mask, stride_gl, stride_gk, offs_k):
    """Log2 decays (Q, K) of tokens, the strongest ones weakened, NaN kept."""
    at = g_ptr + token[:, None] * stride_gl + offs_k[None, :] * stride_gk
    g = tl.load(at, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    return tl.where(g < STRONGEST, STRONGEST, g)


@triton.jit
def sums_of_decays(
    g_ptr,
    first,
    place,
    size,
    step,
    offs_k,
    stride_gl,
    stride_gk,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Sums R that reading uses and S, (Q, K) each, rows in scan order."""
    mask_k = (offs_k < KEYS)[None, :]
    g = load_decays(
        g_ptr, first + place, (place < size)[:, None] & mask_k, stride_gl, stride_gk, offs_k
    )
    if EXCLUSIVE:
        # rows after the last token as well, so that the last row is the sum of all
        before = place + 1 if REVERSE else place - 1
        mask = ((before < size) & (step > 0))[:, None] & mask_k
        reading = tl.cumsum(
            load_decays(g_ptr, first + before, mask, stride_gl, stride_gk, offs_k), 0
        )
        return reading, reading + g
    else:
        sums = tl.cumsum(g, 0)
        return sums, sums


@triton.jit
def rounded(x, TF32: tl.constexpr):
    """`x` with as many digits as TF32 has: tensor cores cut off the others."""
    if TF32:
        bits = x.to(tl.int32, bitcast=True) + 0x1000
        return (bits & -0x2000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def exponents(
    reading,
    sums,
    total,
    steep,
    g_ptr,
    first,
    place,
    size,
    step,
    offs_k,
    stride_gl,
    stride_gk,
    REVERSE: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Log2 of the factors of q and k, (Q, K) each."""
    middle = 0.5 * total[None, :]
    of_q, of_k = reading - middle, middle - sums
    if steep:
        of_q = reading
        # summed up, as a difference of sums has no digits beside strong decays
        after = place - 1 if REVERSE else place + 1
        mask = ((after < size) & (step < CHUNK - 1))[:, None] & (offs_k < KEYS)[None, :]
        g = load_decays(g_ptr, first + after, mask, stride_gl, stride_gk, offs_k)
        of_k = tl.cumsum(g, 0, reverse=True)
    return of_q, of_k


@triton.jit(do_not_specialize=["chunks", "length", "rows"])
def _vector_scale_kernel(
    q_ptr,
    k_ptr,
    g_ptr,
    write_ptr,
    bonus_ptr,  # (H, K)
    queries_ptr,
    keys_ptr,
    totals_ptr,
    steep_ptr,
    own_ptr,  # (B, L, H)
    cu_ptr,
    table_ptr,
    chunks,
    length,
    heads,
    per_group,
    rows,  # B L
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
    HAS_BONUS: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    _, batch, first, size, c = chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK, PACKED)
    if c * CHUNK >= size:
        return
    step = tl.arange(0, CHUNK)
    place = c * CHUNK + (CHUNK - 1 - step if REVERSE else step)
    valid = place < size
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < KEYS
    group = head // per_group
    g_ptr += batch * stride_gb + head * stride_gh
    reading, sums = sums_of_decays(
        g_ptr,
        first,
        place,
        size,
        step,
        offs_k,
        stride_gl,
        stride_gk,
        REVERSE,
        EXCLUSIVE,
        KEYS,
    )
    # the last row; padding does not decay
    total = tl.sum(tl.where((step == CHUNK - 1)[:, None], sums, 0.0), 0)
    steep = tl.min(total, 0) < -2.0 * REACH
    at = slot * heads + head
    tl.store(totals_ptr + at * KEYS + offs_k, total, mask=mask_k)
    tl.store(steep_ptr + at, steep.to(tl.int32))
    of_q, of_k = exponents(
        reading,
        sums,
        total,
        steep,
        g_ptr,
        first,
        place,
        size,
        step,
        offs_k,
        stride_gl,
        stride_gk,
        REVERSE,
        KEYS,
        CHUNK,
    )

    target = (head * rows + batch * length + first + place)[:, None] * KEYS + offs_k[None, :]
    mask = valid[:, None] & mask_k[None, :]
    read, valid_q = token_rows(place, size, SHIFT, REVERSE)
    q_at = q_ptr + batch * stride_qb + group * stride_qg
    q = tl.load(
        q_at + (first + read)[:, None] * stride_ql + offs_k[None, :],
        mask=valid_q[:, None] & mask_k[None, :],
        other=0.0,
    )
    scaled_q = rounded(q.to(tl.float32) * tl.exp2(of_q), TF32)
    tl.store(queries_ptr + target, scaled_q.to(queries_ptr.dtype.element_ty), mask=mask)

    k_at = k_ptr + batch * stride_kb + group * stride_kg
    k = tl.load(k_at + (first + place)[:, None] * stride_kl + offs_k[None, :], mask=mask, other=0.0)
    if HAS_BONUS:
        bonus = tl.load(bonus_ptr + head * KEYS + offs_k, mask=mask_k, other=0.0)
        own = tl.sum(q.to(tl.float32) * k.to(tl.float32) * bonus.to(tl.float32)[None, :], 1)
        tl.store(own_ptr + (batch * length + first + place) * heads + head, own, mask=valid)
    k = k.to(tl.float32) * tl.exp2(of_k)
    if HAS_W:
        w_at = write_ptr + batch * stride_wb + head * stride_wh
        write = tl.load(w_at + (first + place) * stride_wl, mask=valid, other=0.0)
        k *= write.to(tl.float32)[:, None]
    k = rounded(k, TF32)
    tl.store(keys_ptr + target, k.to(keys_ptr.dtype.element_ty), mask=mask)


def operand_of(precision: Precision) -> torch.dtype:
    """The dtype in memory of what matrix products multiply."""
    return torch.bfloat16 if precision.operand == tl.bfloat16 else torch.float32


def scaled(
    frame: Frame,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    write: Tensor | None,
    reverse: bool,
    bonus: Tensor | None,
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
) -> Vector:
    """Scale q and k of one direction."""
    batch, length, heads, keys = g.shape
    block_k = max(16, power_of_2(keys))
    elements = frame.chunk * block_k
    warps = 8 if elements > 4096 else 4
    like = {"device": g.device}
    operand = operand_of(precision)
    queries, keyed = (
        torch.empty((heads, batch * length, keys), dtype=operand, **like) for _ in range(2)
    )
    totals = torch.empty((frame.slots, heads, keys), dtype=torch.float32, **like)
    steep = torch.empty((frame.slots, heads), dtype=torch.int32, **like)
    own = None
    if bonus is not None:
        bonus = bonus.contiguous()
        own = torch.empty((batch, length, heads), dtype=torch.float32, **like)
    if g.numel():
        with on_device(g):
            _vector_scale_kernel[(frame.slots, heads)](
                q,
                k,
                g,
                g if write is None else write,
                bonus,
                queries,
                keyed,
                totals,
                steep,
                own,
                *frame.arguments(),
                heads,
                heads // q.shape[2],
                batch * length,
                *strides(q, 3),
                *strides(k, 3),
                *strides(g, 4),
                *strides(write, 3),
                REVERSE=reverse,
                EXCLUSIVE=exclusive,
                SHIFT=shift,
                HAS_W=write is not None,
                HAS_BONUS=bonus is not None,
                PACKED=frame.cu_seqlens is not None,
                KEYS=keys,
                CHUNK=frame.chunk,
                BLOCK_K=block_k,
                TF32=precision.name == "tf32" and operand == torch.float32,
                num_warps=warps,
                enable_fp_fusion=True,
                # so that a processor holds two programs; nothing spills
                **register_limit(128 if elements == 8192 else None),
            )
    return Vector(q, k, g, write, bonus, reverse, queries, keyed, totals, steep, own)
