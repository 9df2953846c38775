"""Long sequences cut into spans that run side by side, for when there are few of them.

A scan is sequential, so a program per sequence leaves a GPU idle if sequences are few and long.
Three launches instead: every span from a zero state, giving its last state and its decay; one walk
over the spans of a sequence, giving the state that enters each; the scan itself with a program per
span. The first costs about half a scan. The backward does the same with the state's gradient,
which walks the other way.

Letters: S sequences, D channels, N state, slots: spans of all sequences. Equations: `reference.py`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import (
    adjacent,
    batch_stride,
    ceil_div,
    on_device,
    power_of_2,
    processors,
    sigmoid,
)
from .kernels import (
    Direction,
    block_d,
    chunk_of,
    load_row,
    softplus,
    span_of,
    strides_and_flags,
    token_at,
)

# within a span offsets must fit 32 bits; shorter ones cost more than they save
LONGEST, SHORTEST = 8192, 256
# spans whose states are read together
AT_ONCE = 8


class Spans(NamedTuple):
    """How sequences are cut: steps a span, in whole chunks, and number of spans."""

    steps: int
    slots: int


def split(x: Tensor, groups: int, state: int, sequences: int, packed: bool) -> Spans | None:
    """Cut sequences if a GPU has too few programs without; None where it is not worth it.

    Packed sequences are cut by their mean length and number: their lengths are on the GPU.
    """
    batch, length, dim = x.shape
    if length < 2 * SHORTEST or sequences == 0 or dim == 0:
        return None
    per_group, units = dim // groups, processors(x.device)
    wide = groups * ceil_div(per_group, block_d(per_group, 64, 1024 // power_of_2(state)))
    narrow = groups * ceil_div(per_group, block_d(per_group, 32, 512 // power_of_2(state)))
    if sequences * narrow >= 4 * units and (not packed or length < SHORTEST * sequences):
        return None
    if packed:
        steps = length * wide // (12 * units)
    else:
        steps = ceil_div(length, max(2, 12 * units // (batch * wide)))
    steps = min(max(steps, SHORTEST), LONGEST)
    grain, _ = chunk_of(state)
    steps = ceil_div(steps, grain) * grain
    if steps >= length:
        return None
    slots = length // steps + sequences if packed else batch * ceil_div(length, steps)
    return Spans(steps, slots)


@triton.jit(do_not_specialize=["length", "sequences", "span"])
def _span_kernel(
    row_ptr,  # (B, L, D): x, or in the backward the gradient of the output
    dt_ptr,
    A_ptr,  # (N, D), times log2(e)
    V_ptr,  # (B, L, G, N): B, or C
    bias_ptr,
    z_ptr,
    cu_ptr,
    path_ptr,  # (K, tokens)
    end_ptr,  # (slots, N, D)
    sum_ptr,  # (slots, D): the sum of delta
    length,
    dim,
    per_group,
    blocks,
    groups_each,
    programs,
    sequences,
    span,
    stride_rb,
    stride_rl,
    stride_dtb,
    stride_dtl,
    stride_Vb,
    stride_Vl,
    stride_Vg,
    stride_zb,
    stride_zl,
    STATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    PACKED: tl.constexpr,
    PATH: tl.constexpr,
    WIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BACKWARD: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANE_D: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Last state of a span that starts from zero; in the backward, gradient of its first state."""
    slot = tl.program_id(0) // programs
    pid_d = tl.program_id(0) % programs
    _, pid_b, first, total, begin, steps, _ = span_of(
        slot, cu_ptr, length, sequences, span, span, PACKED, True
    )
    # nothing follows the last span, and nothing precedes the first
    idle = begin == 0 if BACKWARD else begin + steps >= total
    count = tl.where(idle, 0, steps)
    group = pid_d // blocks
    offs_g = (pid_d % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_g < per_group
    offs_d = group * per_group + offs_g
    offs_x = offs_d
    if PATH:
        direction = group // groups_each
        offs_x -= direction * groups_each * per_group
        path_ptr += direction.to(tl.int64) * length
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < STATE
    EVEN_N: tl.constexpr = BLOCK_N == STATE
    tile = offs_n[:, None] * dim + tl.max_contiguous(offs_d, LANE_D)[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    A = tl.load(A_ptr + tile, mask=mask, other=0.0)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = load_row(bias_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    walk: tl.constexpr = -1 if REVERSE else 1
    row = first + total - 1 - begin if REVERSE else first + begin
    ahead: tl.constexpr = -walk if BACKWARD else walk
    if BACKWARD:
        row += walk * (steps - 1)
    path = path_ptr
    if PATH:
        path += row
        row = first * 0
    row_ptr += pid_b * stride_rb + row * stride_rl
    dt_ptr += pid_b * stride_dtb + row * stride_dtl
    V_ptr += pid_b * stride_Vb + row * stride_Vl + group * stride_Vg
    if HAS_Z:
        z_ptr += pid_b * stride_zb + row * stride_zl
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_delta = tl.zeros([BLOCK_D], tl.float32)
    # once, or never: nothing may be read for an empty span
    for _ in range(tl.minimum(count, 1)):
        rows = ()
        dt_rows = ()
        V_rows = ()
        z_rows = ()
        for i in tl.static_range(WINDOW):
            at = token_at(path, tl.minimum(i, count - 1), ahead, PATH, WIDE)
            rows = rows + (load_row(row_ptr + (at * stride_rl + offs_x), mask_d, EVEN_D),)
            dt_rows = dt_rows + (load_row(dt_ptr + (at * stride_dtl + offs_d), mask_d, EVEN_D),)
            V_rows = V_rows + (load_row(V_ptr + (at * stride_Vl + offs_n), mask_n, EVEN_N),)
            if HAS_Z:
                z_rows = z_rows + (load_row(z_ptr + (at * stride_zl + offs_d), mask_d, EVEN_D),)
        for w in range(tl.cdiv(count, WINDOW)):
            now = rows
            dt_now = dt_rows
            V_now = V_rows
            z_now = z_rows
            rows = ()
            dt_rows = ()
            V_rows = ()
            z_rows = ()
            for i in tl.static_range(WINDOW):
                at = token_at(path, tl.minimum((w + 1) * WINDOW + i, count - 1), ahead, PATH, WIDE)
                rows = rows + (load_row(row_ptr + (at * stride_rl + offs_x), mask_d, EVEN_D),)
                dt_rows = dt_rows + (load_row(dt_ptr + (at * stride_dtl + offs_d), mask_d, EVEN_D),)
                V_rows = V_rows + (load_row(V_ptr + (at * stride_Vl + offs_n), mask_n, EVEN_N),)
                if HAS_Z:
                    z_rows = z_rows + (load_row(z_ptr + (at * stride_zl + offs_d), mask_d, EVEN_D),)
            for i in tl.static_range(WINDOW):
                delta = dt_now[i].to(tl.float32) + bias
                if SOFTPLUS:
                    delta = softplus(delta)
                valid = w * WINDOW + i < count
                delta = tl.where(valid, delta, 0.0)
                sum_delta += delta
                value = now[i].to(tl.float32)
                decay = tl.exp2(A * delta[None, :])
                V = V_now[i].to(tl.float32)[:, None]
                if BACKWARD:
                    if HAS_Z:
                        z = z_now[i].to(tl.float32)
                        value *= z * sigmoid(z)
                    value = tl.where(valid, value, 0.0)
                    h = decay * (h + value[None, :] * V)
                else:
                    h = decay * h + (delta * value)[None, :] * V
    tl.store(end_ptr + slot.to(tl.int64) * STATE * dim + tile, h, mask=mask)
    tl.store(sum_ptr + slot.to(tl.int64) * dim + offs_d, sum_delta, mask=mask_d)


@triton.jit(do_not_specialize=["length", "span"])
def _combine_kernel(
    A_ptr,  # (N, D), times log2(e)
    h0_ptr,  # (S, D, N)
    cu_ptr,
    end_ptr,  # (slots, N, D): what `_span_kernel` wrote
    sum_ptr,  # (slots, D)
    enter_ptr,  # (slots, N, D): the state that enters a span
    length,
    dim,
    span,
    programs,
    STATE: tl.constexpr,
    HAS_H0: tl.constexpr,
    PACKED: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    pid_s = (tl.program_id(0) // programs).to(tl.int64)
    offs = (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    size = STATE * dim
    mask = offs < size
    offs_d = offs % dim
    if PACKED:
        first = tl.load(cu_ptr + pid_s)
        slot = first // span + pid_s
        spans = tl.maximum(tl.cdiv(tl.load(cu_ptr + pid_s + 1) - first, span), 1)
    else:
        spans = tl.cdiv(length, span)
        slot = pid_s * spans
    A = tl.load(A_ptr + offs, mask=mask, other=0.0)
    h = tl.zeros([BLOCK], tl.float32)
    if HAS_H0:
        h0_row = h0_ptr + (pid_s * dim + offs_d) * STATE + offs // dim
        h = tl.load(h0_row, mask=mask, other=0.0).to(tl.float32)
    for w in range(tl.cdiv(spans, AT_ONCE)):
        ends = ()
        sums = ()
        for i in tl.static_range(AT_ONCE):
            k = tl.minimum(w * AT_ONCE + i, spans - 1)
            at = slot + (spans - 1 - k if BACKWARD else k)
            ends = ends + (tl.load(end_ptr + at * size + offs, mask=mask, other=0.0),)
            sums = sums + (tl.load(sum_ptr + at * dim + offs_d, mask=mask, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            k = w * AT_ONCE + i
            at = slot + (spans - 1 - k if BACKWARD else k)
            tl.store(enter_ptr + at * size + offs, h, mask=tl.where(k < spans, mask, False))
            h = tl.exp2(A * sums[i]) * h + ends[i]


def entering(
    inputs: Direction,
    rows: Tensor,
    rates: Tensor,
    start: Tensor | None,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    paths: Tensor | None,
    reverse: bool,
    softplus: bool,
    spans: Spans,
    backward: bool,
) -> Tensor:
    """State that enters every span, (slots, N, D) float32; its gradient in the backward.

    Args:
        inputs: What `prepare` made of one direction.
        rows: x, or in the backward the gradient of the output, (B, L, D).
        rates: A times log2(e), (N, D) float32.
        start: Initial state, or gradient of the final one, (S, D, N); None is zero.
        z: In the backward, the gate.
        cu_seqlens: Starts of packed sequences.
        paths: Token of every step, (K, L) int32, K scans that share `rows`.
        reverse: From the end to the start.
        softplus: delta is softplus(dt + bias).
        spans: How sequences are cut.
        backward: Walk back from `start` instead.
    """
    _, dt, _, B, C, _, bias = inputs
    V = C if backward else B
    batch, length, dim = dt.shape
    state, groups = rates.shape[0], B.shape[2]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    per_group = dim // groups
    block_n = power_of_2(state)
    width = block_d(per_group, 64, 1024 // block_n)
    programs = groups * ceil_div(per_group, width)
    strides, flags = strides_and_flags(inputs, z, cu_seqlens, paths, reverse, softplus)
    named = ("stride_dtb", "stride_dtl", "stride_zb", "stride_zl")
    chosen = ("HAS_BIAS", "HAS_Z", "PACKED", "PATH", "WIDE", "REVERSE", "SOFTPLUS")
    end = rows.new_empty(spans.slots, state, dim, dtype=torch.float32)
    total = rows.new_empty(spans.slots, dim, dtype=torch.float32)
    enter = torch.empty_like(end)
    cu = None if cu_seqlens is None else adjacent(cu_seqlens)
    block = 128
    across = ceil_div(state * dim, block)
    with on_device(rows):
        _span_kernel[(spans.slots * programs,)](
            rows,
            dt,
            rates,
            V,
            bias,
            z,
            cu,
            paths,
            end,
            total,
            length,
            dim,
            per_group,
            programs // groups,
            groups if paths is None else groups // paths.shape[0],
            programs,
            sequences,
            spans.steps,
            batch_stride(rows),
            rows.stride(1),
            stride_Vb=batch_stride(V),
            stride_Vl=V.stride(1),
            stride_Vg=V.stride(2),
            **{name: strides[name] for name in named},
            STATE=state,
            **{name: flags[name] for name in chosen},
            BACKWARD=backward,
            EVEN_D=per_group % width == 0,
            BLOCK_N=block_n,
            BLOCK_D=width,
            LANE_D=max(1, width // 32),
            WINDOW=4 if block_n > 2 else 8,
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=True,
        )
        _combine_kernel[(sequences * across,)](
            rates,
            None if start is None else start.contiguous(),
            cu,
            end,
            total,
            enter,
            length,
            dim,
            spans.steps,
            across,
            STATE=state,
            HAS_H0=start is not None,
            PACKED=cu is not None,
            BACKWARD=backward,
            BLOCK=block,
            AT_ONCE=AT_ONCE,
            num_warps=1,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return enter
