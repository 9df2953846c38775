"""The states that enter the chunks when every key channel decays on its own.

    forward   h <- 2^T h + 2^(T / 2) sum_j k'[j] v[j]^T
    back      dh <- 2^T dh + 2^(T / 2) sum_i q'[i] dout[i]^T              from the last chunk on

k', q' and T are those of `vector_scale.py`. Stored is 2^(T / 2) times the state that enters, which
is what q' and k' read; in steep chunks both factors 2^(T / 2) are 1. A program holds a block
(K, V) of one head's state in registers, float32. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .kernels import Frame, Precision, dot, plan_of, strides
from .vector_scale import Vector


@triton.jit(do_not_specialize=["length", "chunks", "rows"])
def _vector_walk_kernel(
    x_ptr,  # k', or q' going back: (H, B L, K)
    v_ptr,  # v, or dout
    totals_ptr,  # (M, H, K)
    steep_ptr,  # (M, H)
    start_ptr,  # (S, H, K, V), absent: 0
    end_ptr,  # (S, H, K, V)
    states_ptr,  # (M, H, K, V)
    cu_ptr,
    length,
    chunks,
    heads,
    value_blocks,
    rows,  # B L
    stride_vb,
    stride_vl,
    stride_vh,
    FROM_LAST: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    PACKED: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    offs = tl.arange(0, CHUNK)
    offs_k = (block // value_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = (block % value_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_k, mask_v = offs_k < KEYS, offs_v < WIDTH
    if PACKED:
        first = tl.load(cu_ptr + seq).to(tl.int64)
        size = (tl.load(cu_ptr + seq + 1).to(tl.int64) - first).to(tl.int32)
        batch, slot0 = seq * 0, first // CHUNK + seq
    else:
        batch, first, size, slot0 = seq, seq * 0, length, seq * chunks
    x_ptr += (head * rows + batch * length + first) * KEYS
    v_ptr += batch * stride_vb + head * stride_vh + first * stride_vl
    tile = offs_k[:, None] * WIDTH + offs_v[None, :]
    mask = mask_k[:, None] & mask_v[None, :]
    edge = (seq * heads + head) * (KEYS * WIDTH) + tile
    h = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_START:
        h += tl.load(start_ptr + edge, mask=mask, other=0.0).to(tl.float32)
    count = (size + CHUNK - 1) // CHUNK
    for turn in range(0, count):
        c = count - 1 - turn if FROM_LAST else turn
        at = (slot0 + c) * heads + head
        total = tl.load(totals_ptr + at * KEYS + offs_k, mask=mask_k, other=0.0)
        steep = tl.load(steep_ptr + at)
        half = tl.where(steep != 0, 1.0, tl.exp2(0.5 * total))[:, None]
        tl.store(
            states_ptr + at * (KEYS * WIDTH) + tile,
            (h * half).to(states_ptr.dtype.element_ty),
            mask=mask,
        )
        place = (c * CHUNK + offs).to(tl.int64)
        valid = place < size
        # transposed as it is read: keys along the rows
        x = tl.load(
            x_ptr + place[None, :] * KEYS + offs_k[:, None],
            mask=mask_k[:, None] & valid[None, :],
            other=0.0,
        )
        values = tl.load(
            v_ptr + place[:, None] * stride_vl + offs_v[None, :],
            mask=valid[:, None] & mask_v[None, :],
            other=0.0,
        )
        h = h * tl.exp2(total)[:, None] + half * dot(x, values, DOT, PRECISION)
    if HAS_END:
        tl.store(end_ptr + edge, h.to(end_ptr.dtype.element_ty), mask=mask)


def vector_walk(
    frame: Frame,
    direction: Vector,
    v: Tensor,
    start: Tensor | None,
    precision: Precision,
    *,
    back: bool,
    end: bool,
) -> tuple[Tensor, Tensor | None]:
    """Scaled states (M, H, K, V) at every chunk's border, and the last ones (S, H, K, V).

    Going back, `v` is the gradient of the output and the states are gradients.
    """
    heads, width = v.shape[2:]
    keys = direction.q.shape[3]
    states = torch.empty((frame.slots, heads, keys, width), dtype=precision.state, device=v.device)
    shape = (frame.sequences, heads, keys, width)
    last = torch.empty(shape, dtype=torch.float32, device=v.device) if end else None
    plan = plan_of(direction.q, v, precision, 64, 64)
    cu_seqlens, _, chunks, length = frame.arguments()
    with on_device(v):
        _vector_walk_kernel[(frame.sequences, heads, plan.key_blocks * plan.value_blocks)](
            direction.queries if back else direction.keys,
            v,
            direction.totals,
            direction.steep,
            start,
            last,
            states,
            cu_seqlens,
            length,
            chunks,
            heads,
            plan.value_blocks,
            v.shape[0] * v.shape[1],
            *strides(v, 3),
            FROM_LAST=direction.reverse != back,
            HAS_START=start is not None,
            HAS_END=end,
            PACKED=cu_seqlens is not None,
            KEYS=keys,
            WIDTH=width,
            CHUNK=frame.chunk,
            BLOCK_K=plan.block_k,
            BLOCK_V=plan.block_v,
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return states, last
