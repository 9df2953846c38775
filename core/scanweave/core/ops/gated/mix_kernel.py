"""Outputs of a chunk: what its tokens read of each other and of the state that enters it.

    forward   out[i] = sum_j q[i] . k[j] exp(R[i] - S[j]) write[j] v[j] + exp(R[i]) q[i] h
                       + skip[i] v[i]
    back      dv[j] = write[j] (sum_i k[j] . q[i] exp(R[i] - S[j]) dout[i]
                                + exp(S_Q - S[j]) k[j] dh) + skip[j] dout[j]

Both are one kernel: rows read columns, q and k in each other's place, the mask mirrored. Two
directions share values and add their weights before one matrix product. q k^T is computed once
for the heads of a program, which share a group. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

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
    plan_of,
    strides,
)
from .tiles import chunk_from_state, chunk_weights, pair_products


@triton.jit
def _mix_kernel(
    read0_ptr,  # q, or k going back
    written0_ptr,
    s0_ptr,
    f0_ptr,
    states0_ptr,
    read1_ptr,
    written1_ptr,
    s1_ptr,
    f1_ptr,
    states1_ptr,
    v_ptr,  # v, or dout
    skip_ptr,
    out_ptr,
    cu_ptr,
    table_ptr,
    chunks,
    length,
    heads,
    per_group,
    stride_r0b,
    stride_r0l,
    stride_r0g,
    stride_w0b,
    stride_w0l,
    stride_w0g,
    stride_r1b,
    stride_r1l,
    stride_r1g,
    stride_w1b,
    stride_w1l,
    stride_w1g,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_sb,
    stride_sl,
    stride_sh,
    stride_ob,
    stride_ol,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    BACK: tl.constexpr,
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
    KEY_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    head0 = tl.program_id(1) * HEADS
    offs_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    _, batch, first, size, c = chunk_of(slot, cu_ptr, table_ptr, chunks, length, CHUNK, PACKED)
    if c * CHUNK >= size:
        return
    offs = tl.arange(0, CHUNK)
    place = c * CHUNK + offs
    mask = (place < size)[:, None] & (offs_v < WIDTH)[None, :]
    group = (head0 // per_group).to(tl.int64)
    read0 = read0_ptr + batch * stride_r0b + group * stride_r0g
    written0 = written0_ptr + batch * stride_w0b + group * stride_w0g
    products0 = pair_products(
        read0,
        written0,
        first,
        place,
        place,
        size,
        stride_r0l,
        stride_w0l,
        REVERSE,
        SHIFT,
        BACK,
        KEYS,
        CHUNK,
        BLOCK_K,
        KEY_BLOCKS,
        DOT,
        PRECISION,
    )
    read1 = read1_ptr + batch * stride_r1b + group * stride_r1g
    if DIRECTIONS == 2:
        written1 = written1_ptr + batch * stride_w1b + group * stride_w1g
        products1 = pair_products(
            read1,
            written1,
            first,
            place,
            place,
            size,
            stride_r1l,
            stride_w1l,
            True,
            SHIFT,
            BACK,
            KEYS,
            CHUNK,
            BLOCK_K,
            KEY_BLOCKS,
            DOT,
            PRECISION,
        )
    for turn in range(0, HEADS):
        head = (head0 + turn).to(tl.int64)
        at = slot * heads + head
        v = tl.load(
            v_ptr
            + batch * stride_vb
            + head * stride_vh
            + (first + place)[:, None] * stride_vl
            + offs_v[None, :],
            mask=mask,
            other=0.0,
        )
        weights, reading0 = chunk_weights(
            products0,
            s0_ptr + at * CHUNK,
            f0_ptr + at * CHUNK,
            offs,
            REVERSE,
            EXCLUSIVE,
            BACK,
            HAS_G,
            HAS_W,
            CHUNK,
        )
        if DIRECTIONS == 2:
            weights1, reading1 = chunk_weights(
                products1,
                s1_ptr + at * CHUNK,
                f1_ptr + at * CHUNK,
                offs,
                True,
                EXCLUSIVE,
                BACK,
                HAS_G,
                HAS_W,
                CHUNK,
            )
            weights += weights1
        out = dot(weights, v, DOT, PRECISION)
        if HAS_STATE:
            carried = chunk_from_state(
                read0,
                states0_ptr + at * (KEYS * WIDTH),
                first,
                place,
                size,
                offs_v,
                stride_r0l,
                REVERSE,
                SHIFT,
                BACK,
                KEYS,
                WIDTH,
                CHUNK,
                BLOCK_K,
                BLOCK_V,
                KEY_BLOCKS,
                DOT,
                PRECISION,
            )
            out += reading0[:, None] * carried
            if DIRECTIONS == 2:
                carried = chunk_from_state(
                    read1,
                    states1_ptr + at * (KEYS * WIDTH),
                    first,
                    place,
                    size,
                    offs_v,
                    stride_r1l,
                    True,
                    SHIFT,
                    BACK,
                    KEYS,
                    WIDTH,
                    CHUNK,
                    BLOCK_K,
                    BLOCK_V,
                    KEY_BLOCKS,
                    DOT,
                    PRECISION,
                )
                out += reading1[:, None] * carried
        if HAS_SKIP:
            skip = tl.load(
                skip_ptr + batch * stride_sb + (first + place) * stride_sl + head * stride_sh,
                mask=place < size,
                other=0.0,
            )
            out += skip.to(tl.float32)[:, None] * v.to(tl.float32)
        out_at = (
            out_ptr
            + batch * stride_ob
            + (first + place)[:, None] * stride_ol
            + head * WIDTH
            + offs_v[None, :]
        )
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=mask)


def heads_of_program(per_group: int, programs: int, device: torch.device) -> int:
    """Heads of one group that share q k^T in a program: few where programs are few."""
    for count in (8, 4, 2):
        if per_group % count == 0 and programs // count >= 4 * processors(device):
            return count
    return 1


def mix(
    frame: Frame,
    directions: list[Direction],
    v: Tensor,
    skip: Tensor | None,
    states: Tensor | None,
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
    back: bool,
) -> Tensor:
    """Outputs of all directions added, (B, L, H, V); going back the gradient of v."""
    (batch, length, heads, width), dtype = v.shape, v.dtype
    out = torch.empty((batch, length, heads, width), dtype=dtype, device=v.device)
    if out.numel() == 0:
        return out
    count, per_group = len(directions), heads // directions[0].q.shape[2]
    plan = plan_of(directions[0].q, v, precision, 128, 64)
    # two directions' products of several heads do not fit in registers
    programs = frame.slots * heads * plan.value_blocks
    shared = 1 if count == 2 else heads_of_program(per_group, programs, v.device)
    pointers = []
    for d in (0, count - 1):
        q, k, sums, factors, _ = directions[d]
        rows = (k, q) if back else (q, k)
        pointers += [*rows, sums, factors, None if states is None else states[d]]
    with on_device(v):
        _mix_kernel[(frame.slots, heads // shared, plan.value_blocks)](
            # absent tensors are never read, but pointers are moved
            *(v if p is None else p for p in pointers),
            v,
            v if skip is None else skip,
            out,
            *frame.arguments()[:2],
            frame.chunks,
            frame.length,
            heads,
            per_group,
            *strides(pointers[0], 3),
            *strides(pointers[1], 3),
            *strides(pointers[5], 3),
            *strides(pointers[6], 3),
            *strides(v, 3),
            *strides(skip, 3),
            length * heads * width,
            heads * width,
            DIRECTIONS=count,
            REVERSE=directions[0].reverse,
            EXCLUSIVE=exclusive,
            SHIFT=shift,
            BACK=back,
            HAS_G=directions[0].sums is not None,
            HAS_W=directions[0].factors is not None,
            HAS_SKIP=skip is not None,
            HAS_STATE=states is not None,
            PACKED=frame.cu_seqlens is not None,
            KEYS=directions[0].q.shape[3],
            WIDTH=width,
            CHUNK=frame.chunk,
            BLOCK_K=plan.block_k,
            BLOCK_V=plan.block_v,
            KEY_BLOCKS=plan.key_blocks,
            HEADS=shared,
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return out
