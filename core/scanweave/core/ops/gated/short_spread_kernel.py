"""Gradients of q and k of short sequences: products of E, which the heads have added up.

    dq[chunk] = sum over chunks scanned up to it of E k
    dk[chunk] = sum over chunks scanned from it on of E^T q

Tiles of E: `short_own_kernel.py`. Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from ..launch import on_device
from .kernels import Direction, Frame, Precision, dot, plan_of, strides, token_rows
from .short_tiles import Tiles


@triton.jit
def _spread(
    q_ptr,
    k_ptr,
    dq_ptr,
    dk_ptr,
    e_ptr,
    c,
    chunks,
    size,
    parts,
    offs_k,
    stride_ql,
    stride_kl,
    stride_d,  # from a token's gradient to the next
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one chunk's q and k in one direction, a block of keys."""
    offs = tl.arange(0, CHUNK)
    square = offs[:, None] * CHUNK + offs[None, :]
    mask_k = offs_k < KEYS
    size_e = chunks * (chunks + 1) * (CHUNK * CHUNK)
    dq = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    dk = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for step in range(0, chunks * parts):
        other, part = step // parts, step % parts
        place = other * CHUNK + offs
        if (other >= c) if REVERSE else (other <= c):
            x = other + 1 if REVERSE else other
            e = tl.load(e_ptr + part * size_e + (c * (chunks + 1) + x) * (CHUNK * CHUNK) + square)
            k = tl.load(
                k_ptr + place[:, None] * stride_kl + offs_k[None, :],
                mask=(place < size)[:, None] & mask_k[None, :],
                other=0.0,
            )
            dq += dot(e, k, DOT, PRECISION)
        if (other <= c) if REVERSE else (other >= c):
            x = c + 1 if REVERSE else c
            e = tl.load(
                e_ptr + part * size_e + (other * (chunks + 1) + x) * (CHUNK * CHUNK) + square
            )
            read, valid = token_rows(place, size, SHIFT, REVERSE)
            q = tl.load(
                q_ptr + read[:, None] * stride_ql + offs_k[None, :],
                mask=valid[:, None] & mask_k[None, :],
                other=0.0,
            )
            dk += dot(tl.trans(e), q, DOT, PRECISION)
    place = c * CHUNK + offs
    read, valid = token_rows(place, size, SHIFT, REVERSE)
    tl.store(
        dq_ptr + read[:, None] * stride_d + offs_k[None, :],
        dq.to(dq_ptr.dtype.element_ty),
        mask=valid[:, None] & mask_k[None, :],
    )
    if SHIFT:
        # the token that is scanned last is never read
        end = 0 if REVERSE else size - 1
        if c == end // CHUNK:
            zero = tl.zeros([BLOCK_K], dq_ptr.dtype.element_ty)
            tl.store(dq_ptr + end * stride_d + offs_k, zero, mask=mask_k)
    tl.store(
        dk_ptr + place[:, None] * stride_d + offs_k[None, :],
        dk.to(dk_ptr.dtype.element_ty),
        mask=(place < size)[:, None] & mask_k[None, :],
    )


@triton.jit
def _short_spread_kernel(
    q0_ptr,
    k0_ptr,
    dq0_ptr,  # (B, L, G, K)
    dk0_ptr,
    q1_ptr,
    k1_ptr,
    dq1_ptr,
    dk1_ptr,
    e_ptr,
    size,
    chunks,
    groups,
    parts,
    stride_q0b,
    stride_q0l,
    stride_q0g,
    stride_k0b,
    stride_k0l,
    stride_k0g,
    stride_q1b,
    stride_q1l,
    stride_q1g,
    stride_k1b,
    stride_k1l,
    stride_k1g,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    SHIFT: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    group = (tl.program_id(1) // DIRECTIONS).to(tl.int64)
    offs_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    d_at = (batch * size * groups + group) * KEYS
    e_ptr += (batch * groups + group) * parts * chunks * (chunks + 1) * (CHUNK * CHUNK)
    if tl.program_id(1) % DIRECTIONS == 0:
        _spread(
            q0_ptr + batch * stride_q0b + group * stride_q0g,
            k0_ptr + batch * stride_k0b + group * stride_k0g,
            dq0_ptr + d_at,
            dk0_ptr + d_at,
            e_ptr,
            c,
            chunks,
            size,
            parts,
            offs_k,
            stride_q0l,
            stride_k0l,
            groups * KEYS,
            REVERSE,
            SHIFT,
            KEYS,
            CHUNK,
            BLOCK_K,
            DOT,
            PRECISION,
        )
    else:
        _spread(
            q1_ptr + batch * stride_q1b + group * stride_q1g,
            k1_ptr + batch * stride_k1b + group * stride_k1g,
            dq1_ptr + d_at,
            dk1_ptr + d_at,
            e_ptr,
            c,
            chunks,
            size,
            parts,
            offs_k,
            stride_q1l,
            stride_k1l,
            groups * KEYS,
            True,
            SHIFT,
            KEYS,
            CHUNK,
            BLOCK_K,
            DOT,
            PRECISION,
        )


Pairs = list[tuple[Tensor, Tensor]]


def spread(
    frame: Frame, directions: list[Direction], tiles: Tiles, precision: Precision, *, shift: bool
) -> Pairs:
    """Gradients of q and k of every direction."""
    first, last = directions[0], directions[-1]
    _, length, groups, keys = first.q.shape
    plan = plan_of(first.q, first.q, precision, 64, 64)
    found = [(d.q.new_empty(d.q.shape), d.k.new_empty(d.k.shape)) for d in directions]
    with on_device(first.q):
        _short_spread_kernel[(frame.slots, groups * len(directions), plan.key_blocks)](
            first.q,
            first.k,
            *found[0],
            last.q,
            last.k,
            *found[-1],
            tiles.products,
            length,
            frame.chunks,
            groups,
            tiles.products.shape[2],
            *strides(first.q, 3),
            *strides(first.k, 3),
            *strides(last.q, 3),
            *strides(last.k, 3),
            DIRECTIONS=len(directions),
            REVERSE=first.reverse,
            SHIFT=shift,
            KEYS=keys,
            CHUNK=frame.chunk,
            BLOCK_K=plan.block_k,
            DOT=precision.operand,
            PRECISION=precision.name,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return found
