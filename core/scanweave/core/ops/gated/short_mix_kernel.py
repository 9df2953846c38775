"""Outputs of short sequences: chunks read each other directly, without states.

    forward   out[i] = sum_j q[i] . k[j] exp(decays after j, up to i) write[j] v[j] + skip[i] v[i]
    back      dv[j] = write[j] sum_i k[j] . q[i] exp(decays after j, up to i) dout[i]
                      + skip[j] dout[j]

Quadratic in the number of chunks, which saves the walk and its states. A program does one chunk of
rows for a few heads of a group, whose q k^T is computed once for all of them. The decay of a pair
in two chunks is a product of what follows the column in its chunk, of the chunks between and of
what the row reads by (`sums_kernel.py`): no exponential of a pair. Inside a chunk one exponential
serves both directions, below and above the diagonal. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device, processors, register_limit
from .kernels import (
    Direction,
    Frame,
    Precision,
    dot,
    plan_of,
    strides,
)
from .short_tiles import between
from .sums_kernel import Sums
from .tiles import pair_products

# heads of a program, whose outputs are in registers together: 3 take as long, 1 and 4 longer
MOST_HEADS = 2
# of a thread, so that three programs fit where two would: 12 % less time on an H200, B128 L197 H24
MOST_REGISTERS = 168


@triton.jit
def _add_others(
    outs,  # of every head, (Q, V)
    read_ptr,
    written_ptr,
    v_ptr,
    row_ptr,  # of the chunk of rows
    column_ptr,  # of the first chunk
    reach_ptr,
    c,
    size,
    offs_v,
    stride_rl,
    stride_wl,
    stride_vl,
    stride_vh,
    stride_s,  # from a chunk to the next
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    BACK: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_W: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Outputs with what the chunks add that one direction scans before the rows' own."""
    offs = tl.arange(0, CHUNK)
    mask_v = (offs_v < WIDTH)[None, :]
    count = c if REVERSE == BACK else CHUNKS - 1 - c
    for step in range(0, count):
        other = c - 1 - step if REVERSE == BACK else c + 1 + step
        place = other * CHUNK + offs
        products = pair_products(
            read_ptr,
            written_ptr,
            0,
            c * CHUNK + offs,
            place,
            size,
            stride_rl,
            stride_wl,
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
        added = ()
        for turn in tl.static_range(HEADS):
            weights = products
            if HAS_G or (HAS_W and BACK):
                row = tl.load(row_ptr + turn * CHUNK)
                if HAS_G:
                    row *= tl.load(reach_ptr + turn * CHUNKS + other)
                weights = weights * row[:, None]
            if HAS_G or (HAS_W and not BACK):
                column = tl.load(column_ptr + other * stride_s + turn * CHUNK)
                weights = weights * column[None, :]
            v = tl.load(
                v_ptr + turn * stride_vh + place[:, None] * stride_vl + offs_v[None, :],
                mask=(place < size)[:, None] & mask_v,
                other=0.0,
            )
            added += (outs[turn] + dot(weights, v, DOT, PRECISION),)
        outs = added
    return outs


@triton.jit
def _short_mix_kernel(
    read0_ptr,  # q, or k going back
    written0_ptr,
    read1_ptr,
    written1_ptr,
    s_ptr,  # (D, M, H, Q)
    r_ptr,
    f_ptr,
    row_ptr,  # enter, or leave going back
    column_ptr,
    reach_ptr,  # (D, M, H, chunks)
    v_ptr,  # v, or dout
    skip_ptr,
    out_ptr,
    size,  # L
    heads,
    per_group,
    span,  # M H Q
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
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    HEADS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # chunks of a sequence run side by side, and so find each other's rows in the cache
    c = tl.program_id(0) % CHUNKS
    parts = heads // HEADS
    head0 = ((tl.program_id(0) // CHUNKS) % parts) * HEADS
    batch = (tl.program_id(0) // (CHUNKS * parts)).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs = tl.arange(0, CHUNK)
    place = c * CHUNK + offs
    mask = (place < size)[:, None] & (offs_v < WIDTH)[None, :]
    group = (head0 // per_group).to(tl.int64)
    read0 = read0_ptr + batch * stride_r0b + group * stride_r0g
    written0 = written0_ptr + batch * stride_w0b + group * stride_w0g
    products = pair_products(
        read0,
        written0,
        0,
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
    # rows that read columns in the first direction: below the diagonal, or above
    first = (offs[:, None] > offs[None, :]) if REVERSE == BACK else (offs[:, None] < offs[None, :])
    diagonal = offs[:, None] == offs[None, :]
    if not EXCLUSIVE:
        own0 = tl.sum(tl.where(diagonal, products, 0.0), 1)
    if DIRECTIONS == 2:
        read1 = read1_ptr + batch * stride_r1b + group * stride_r1g
        written1 = written1_ptr + batch * stride_w1b + group * stride_w1g
        products1 = pair_products(
            read1,
            written1,
            0,
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
        if not EXCLUSIVE:
            own1 = tl.sum(tl.where(diagonal, products1, 0.0), 1)
        products = tl.where(first, products, tl.where(diagonal, 0.0, products1))
    else:
        products = tl.where(first, products, 0.0)
    span = span.to(tl.int64)
    at0 = (batch * CHUNKS * heads + head0) * CHUNK + offs
    own_at = at0 + c * (heads * CHUNK)
    reach_ptr += ((batch * CHUNKS + c) * heads + head0) * CHUNKS
    v_ptr += batch * stride_vb + head0.to(tl.int64) * stride_vh
    out_ptr += batch * stride_ob + head0 * WIDTH + place[:, None] * stride_ol + offs_v[None, :]
    skip_ptr += batch * stride_sb + place * stride_sl + head0 * stride_sh
    outs = ()
    for turn in tl.static_range(HEADS):
        at = own_at + turn * CHUNK
        v = tl.load(
            v_ptr + turn * stride_vh + place[:, None] * stride_vl + offs_v[None, :],
            mask=mask,
            other=0.0,
        )
        weights = products
        if HAS_G:
            decays = between(tl.load(r_ptr + at), tl.load(s_ptr + at), BACK)
            if DIRECTIONS == 2:
                # one exponential serves both directions
                second = between(tl.load(r_ptr + span + at), tl.load(s_ptr + span + at), BACK)
                decays = tl.where(first, decays, second)
            weights *= tl.exp2(tl.minimum(decays, 0.0))
        if HAS_W:
            factor0 = tl.load(f_ptr + at)
            factor = factor0[:, None] if BACK else factor0[None, :]
            if DIRECTIONS == 2:
                factor1 = tl.load(f_ptr + span + at)
                factor = tl.where(first, factor, factor1[:, None] if BACK else factor1[None, :])
            weights *= factor
        out = dot(weights, v, DOT, PRECISION)
        if HAS_SKIP or not EXCLUSIVE:
            own = tl.zeros([CHUNK], tl.float32)
            if HAS_SKIP:
                skip = tl.load(skip_ptr + turn * stride_sh, mask=place < size, other=0.0)
                own += skip.to(tl.float32)
            if not EXCLUSIVE:
                own += (own0 * factor0) if HAS_W else own0
                if DIRECTIONS == 2:
                    own += (own1 * factor1) if HAS_W else own1
            out += own[:, None] * v.to(tl.float32)
        outs += (out,)
    outs = _add_others(
        outs,
        read0,
        written0,
        v_ptr,
        row_ptr + own_at,
        column_ptr + at0,
        reach_ptr,
        c,
        size,
        offs_v,
        stride_r0l,
        stride_w0l,
        stride_vl,
        stride_vh,
        heads * CHUNK,
        REVERSE,
        SHIFT,
        BACK,
        HAS_G,
        HAS_W,
        KEYS,
        WIDTH,
        CHUNK,
        CHUNKS,
        BLOCK_K,
        KEY_BLOCKS,
        HEADS,
        DOT,
        PRECISION,
    )
    if DIRECTIONS == 2:
        outs = _add_others(
            outs,
            read1,
            written1,
            v_ptr,
            row_ptr + span + own_at,
            column_ptr + span + at0,
            reach_ptr + span // CHUNK * CHUNKS,
            c,
            size,
            offs_v,
            stride_r1l,
            stride_w1l,
            stride_vl,
            stride_vh,
            heads * CHUNK,
            True,
            SHIFT,
            BACK,
            HAS_G,
            HAS_W,
            KEYS,
            WIDTH,
            CHUNK,
            CHUNKS,
            BLOCK_K,
            KEY_BLOCKS,
            HEADS,
            DOT,
            PRECISION,
        )
    for turn in tl.static_range(HEADS):
        tl.store(out_ptr + turn * WIDTH, outs[turn].to(out_ptr.dtype.element_ty), mask=mask)


def heads_of_program(per_group: int, programs: int, v: Tensor) -> int:
    """Heads of one group that share q k^T in a program: few where programs are few."""
    for count in range(MOST_HEADS, 1, -1):
        if per_group % count == 0 and programs // count >= 4 * processors(v.device):
            return count
    return 1


def short_mix(
    frame: Frame,
    directions: list[Direction],
    sums: Sums,
    v: Tensor,
    skip: Tensor | None,
    precision: Precision,
    *,
    exclusive: bool,
    shift: bool,
    back: bool,
) -> Tensor:
    """Outputs of all directions added, (B, L, H, V); going back the gradient of v."""
    (batch, length, heads, width), dtype = v.shape, v.dtype
    out = v.new_empty((batch, length, heads, width), dtype=dtype)
    if out.numel() == 0:
        return out
    count, per_group = len(directions), heads // directions[0].q.shape[2]
    plan = plan_of(directions[0].q, v, precision, 128, 64)
    together = heads_of_program(per_group, frame.slots * heads * plan.value_blocks, v)
    rows = []
    for d in (0, -1):
        q, k = directions[d][:2]
        rows += [k, q] if back else [q, k]
    scales = (sums.leave, sums.enter) if back else (sums.enter, sums.leave)
    given = (sums.decays, sums.reads, sums.factors, *scales, sums.reach, v, skip)
    with on_device(v):
        _short_mix_kernel[(frame.slots * heads // together, plan.value_blocks)](
            *rows,
            # absent tensors are never read, but pointers are moved
            *(v if p is None else p for p in given),
            out,
            length,
            heads,
            per_group,
            frame.slots * heads * frame.chunk,
            *(stride for p in (*rows, v, skip) for stride in strides(p, 3)),
            length * heads * width,
            heads * width,
            DIRECTIONS=count,
            REVERSE=directions[0].reverse,
            EXCLUSIVE=exclusive,
            SHIFT=shift,
            BACK=back,
            HAS_G=sums.decays is not None,
            HAS_W=sums.factors is not None,
            HAS_SKIP=skip is not None,
            KEYS=directions[0].q.shape[3],
            WIDTH=width,
            CHUNK=frame.chunk,
            CHUNKS=frame.chunks,
            BLOCK_K=plan.block_k,
            BLOCK_V=plan.block_v,
            KEY_BLOCKS=plan.key_blocks,
            HEADS=together,
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
            **register_limit(MOST_REGISTERS),
        )
    return out
