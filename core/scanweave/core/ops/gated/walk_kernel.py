"""The states that enter the chunks, by a walk over the chunks of every sequence.

    forward   h <- exp(S_Q) h + sum_j exp(S_Q - S[j]) write[j] k[j] v[j]^T
    back      dh <- exp(S_Q) dh + sum_i exp(R[i]) q[i] dout[i]^T          from the last chunk on

A program holds a block (K, V) of one head's state in registers, float32, and stores it at every
chunk's border in the dtype that matrix products read. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .kernels import (
    Direction,
    Frame,
    Precision,
    dot,
    load_sums,
    load_total,
    plan_of,
    strides,
    token_rows,
)


@triton.jit
def _walk(
    x_ptr,  # k, or q going back
    v_ptr,  # v, or dout
    s_ptr,
    f_ptr,
    start_ptr,  # (S, H, K, V), absent: 0
    end_ptr,  # (S, H, K, V)
    states_ptr,  # (M, H, K, V)
    seq,
    first,
    size,
    slot0,
    head,
    heads,
    offs_k,
    offs_v,
    stride_xl,
    stride_vl,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    BACK: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    offs = tl.arange(0, CHUNK)
    mask_k, mask_v = offs_k < KEYS, offs_v < WIDTH
    tile = offs_k[:, None] * WIDTH + offs_v[None, :]
    mask = mask_k[:, None] & mask_v[None, :]
    edge = (seq * heads + head) * (KEYS * WIDTH) + tile
    h = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if HAS_START:
        h += tl.load(start_ptr + edge, mask=mask, other=0.0).to(tl.float32)
    count = (size + CHUNK - 1) // CHUNK
    for step in range(0, count):
        c = count - 1 - step if REVERSE != BACK else step
        at = (slot0 + c) * heads + head
        tl.store(
            states_ptr + at * (KEYS * WIDTH) + tile, h.to(states_ptr.dtype.element_ty), mask=mask
        )
        place = c * CHUNK + offs
        token, valid = token_rows(place, size, SHIFT and BACK, REVERSE)
        # transposed as it is read: keys along the rows
        x = tl.load(
            x_ptr + (first + token)[None, :] * stride_xl + offs_k[:, None],
            mask=mask_k[:, None] & valid[None, :],
            other=0.0,
        )
        values = tl.load(
            v_ptr + (first + place)[:, None] * stride_vl + offs_v[None, :],
            mask=(place < size)[:, None] & mask_v[None, :],
            other=0.0,
        )
        if HAS_G:
            total = load_total(s_ptr + at * CHUNK, CHUNK, REVERSE)
            if BACK:
                scale = tl.exp2(load_sums(s_ptr + at * CHUNK, offs, CHUNK, REVERSE, EXCLUSIVE))
            else:
                own = tl.load(s_ptr + at * CHUNK + offs)
                scale = tl.exp2(tl.minimum(total - own, 0.0))
            h *= tl.exp2(total)
        else:
            scale = tl.full([CHUNK], 1.0, tl.float32)
        if HAS_W and not BACK:
            scale *= tl.load(f_ptr + at * CHUNK + offs)
        h += dot(x, values.to(tl.float32) * scale[:, None], DOT, PRECISION)
    if HAS_END:
        tl.store(end_ptr + edge, h.to(end_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _walk_kernel(
    x0_ptr,
    s0_ptr,
    f0_ptr,
    start0_ptr,
    end0_ptr,
    states0_ptr,
    x1_ptr,
    s1_ptr,
    f1_ptr,
    start1_ptr,
    end1_ptr,
    states1_ptr,
    v_ptr,
    cu_ptr,
    length,
    chunks,
    heads,
    per_group,
    value_blocks,
    stride_x0b,
    stride_x0l,
    stride_x0g,
    stride_x1b,
    stride_x1l,
    stride_x1g,
    stride_vb,
    stride_vl,
    stride_vh,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    BACK: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
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
    head = tl.program_id(1) // DIRECTIONS
    block = tl.program_id(2)
    offs_k = (block // value_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = (block % value_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    if PACKED:
        first = tl.load(cu_ptr + seq).to(tl.int64)
        size = (tl.load(cu_ptr + seq + 1).to(tl.int64) - first).to(tl.int32)
        batch, slot0 = seq * 0, first // CHUNK + seq
    else:
        batch, first, size, slot0 = seq, seq * 0, length, seq * chunks
    group = (head // per_group).to(tl.int64)
    v_ptr += batch * stride_vb + head.to(tl.int64) * stride_vh
    if tl.program_id(1) % DIRECTIONS == 0:
        _walk(
            x0_ptr + batch * stride_x0b + group * stride_x0g,
            v_ptr,
            s0_ptr,
            f0_ptr,
            start0_ptr,
            end0_ptr,
            states0_ptr,
            seq,
            first,
            size,
            slot0,
            head,
            heads,
            offs_k,
            offs_v,
            stride_x0l,
            stride_vl,
            REVERSE,
            EXCLUSIVE,
            SHIFT,
            BACK,
            HAS_G,
            HAS_W,
            HAS_START,
            HAS_END,
            KEYS,
            WIDTH,
            CHUNK,
            BLOCK_K,
            BLOCK_V,
            DOT,
            PRECISION,
        )
    else:
        _walk(
            x1_ptr + batch * stride_x1b + group * stride_x1g,
            v_ptr,
            s1_ptr,
            f1_ptr,
            start1_ptr,
            end1_ptr,
            states1_ptr,
            seq,
            first,
            size,
            slot0,
            head,
            heads,
            offs_k,
            offs_v,
            stride_x1l,
            stride_vl,
            True,
            EXCLUSIVE,
            SHIFT,
            BACK,
            HAS_G,
            HAS_W,
            HAS_START,
            HAS_END,
            KEYS,
            WIDTH,
            CHUNK,
            BLOCK_K,
            BLOCK_V,
            DOT,
            PRECISION,
        )


def walk(
    frame: Frame,
    directions: list[Direction],
    v: Tensor,
    start: list[Tensor],
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
    back: bool,
    end: bool,
) -> tuple[Tensor, Tensor | None]:
    """States (D, M, H, K, V) at every chunk's border, and the last ones (D, S, H, K, V).

    Going back, `v` is the gradient of the output and the states are gradients.
    """
    heads, width = v.shape[2:]
    keys = directions[0].q.shape[3]
    count = len(directions)
    states = torch.empty(
        (count, frame.slots, heads, keys, width), dtype=precision.state, device=v.device
    )
    shape = (count, frame.sequences, heads, keys, width)
    last = torch.empty(shape, dtype=torch.float32, device=v.device) if end else None
    plan = plan_of(directions[0].q, v, precision, 64, 64)
    pointers = []
    for d in (0, count - 1):
        x = directions[d].q if back else directions[d].k
        pointers += [
            x,
            directions[d].sums,
            directions[d].factors,
            start[d] if start else None,
            None if last is None else last[d],
            states[d],
        ]
    grid = (frame.sequences, heads * count, plan.key_blocks * plan.value_blocks)
    cu_seqlens, _, chunks, length = frame.arguments()
    with on_device(v):
        _walk_kernel[grid](
            *pointers,
            v,
            cu_seqlens,
            length,
            chunks,
            heads,
            heads // directions[0].q.shape[2],
            plan.value_blocks,
            *strides(pointers[0], 3),
            *strides(pointers[6], 3),
            *strides(v, 3),
            DIRECTIONS=count,
            REVERSE=directions[0].reverse,
            EXCLUSIVE=exclusive,
            SHIFT=shift,
            BACK=back,
            HAS_G=directions[0].sums is not None,
            HAS_W=directions[0].factors is not None,
            HAS_START=bool(start),
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
