"""The selective scan in Triton.

The state tile is (N, BLOCK_D) and the next window's rows are loaded before the present window is
computed. Directions are launched one after another; each later one adds its output to what the
earlier ones wrote, the last one gates. A training step also keeps the state
every few steps.

Letters: S sequences, T tokens, D channels, G groups, N state. Equations: `reference.py`.
"""
# Triton's own language: constant branches, static ranges, launch options
# pyright: reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, adjacent, on_device, register_limit, sigmoid
from .kernels import (
    Direction,
    checkpoints_shape,
    chunk_of,
    forward_plan,
    load_row,
    prepare,
    softplus,
    span_of,
    strides_and_flags,
    token_at,
)
from .spans import entering, split

# without kept states a chunk only bounds 32-bit offsets
UNBOUNDED = 1 << 16


@triton.jit(do_not_specialize=["length", "tokens", "sequences", "span"])
def _forward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,  # (N, D), times log2(e)
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    z_ptr,
    h0_ptr,  # (S, D, N), or with SPLIT (slots, N, D)
    cu_ptr,
    path_ptr,  # (K, tokens)
    y_ptr,  # (B, L, D): the sum of directions before the gate
    out_ptr,  # (B, L, D)
    h_ptr,  # (S, D, N): the final state
    keep_ptr,  # (chunks * EACH, N, D)
    length,
    tokens,
    dim,
    per_group,
    blocks,
    groups_each,
    programs,
    sequences,
    span,
    chunk,
    stride_xb,
    stride_xl,
    stride_dtb,
    stride_dtl,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_Cb,
    stride_Cl,
    stride_Cg,
    stride_zb,
    stride_zl,
    STATE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_H0: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    PATH: tl.constexpr,
    WIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ADD: tl.constexpr,
    SAVE_Y: tl.constexpr,
    KEEP: tl.constexpr,
    EACH: tl.constexpr,
    EVERY: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LANE_D: tl.constexpr,
    WINDOW: tl.constexpr,
):
    slot = tl.program_id(0) // programs
    pid_d = tl.program_id(0) % programs
    pid_s, pid_b, first, total, begin, steps, kept = span_of(
        slot, cu_ptr, length, sequences, span, chunk, PACKED, SPLIT
    )
    group = pid_d // blocks
    offs_g = (pid_d % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_g < per_group
    offs_d = group * per_group + offs_g
    offs_x = offs_d
    if PATH:
        # every direction has its own path and channels, and all share those of x
        direction = group // groups_each
        offs_x -= direction * groups_each * per_group
        path_ptr += direction.to(tl.int64) * tokens
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < STATE
    EVEN_N: tl.constexpr = BLOCK_N == STATE
    # the hint gives every thread whole columns, so that the sum over N needs no other thread
    tile = offs_n[:, None] * dim + tl.max_contiguous(offs_d, LANE_D)[None, :]
    state = (pid_s * dim + offs_d[None, :]) * STATE + offs_n[:, None]
    mask = mask_n[:, None] & mask_d[None, :]
    A = tl.load(A_ptr + tile, mask=mask, other=0.0)
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if SPLIT:
        h = tl.load(h0_ptr + slot.to(tl.int64) * STATE * dim + tile, mask=mask, other=0.0)
    elif HAS_H0:
        h = tl.load(h0_ptr + state, mask=mask, other=0.0).to(tl.float32)
    skip = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = load_row(D_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    if HAS_BIAS:
        bias = load_row(bias_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    ahead: tl.constexpr = -1 if REVERSE else 1
    origin = first + total - 1 - begin if REVERSE else first + begin
    for c in range(tl.cdiv(steps, chunk)):
        start = c * chunk
        count = tl.minimum(chunk, steps - start)
        # tokens are counted from the chunk's first, so that offsets fit 32 bits; those of a path
        # from the first of the batch row
        path = path_ptr
        row = origin + ahead * start
        if PATH:
            path += row
            row = first * 0
        x_chunk = x_ptr + pid_b * stride_xb + row * stride_xl
        dt_chunk = dt_ptr + pid_b * stride_dtb + row * stride_dtl
        B_chunk = B_ptr + pid_b * stride_Bb + row * stride_Bl + group * stride_Bg
        C_chunk = C_ptr + pid_b * stride_Cb + row * stride_Cl + group * stride_Cg
        here = (pid_b * tokens + row) * dim
        if HAS_Z:
            z_chunk = z_ptr + pid_b * stride_zb + row * stride_zl
        if KEEP:
            keep_chunk = keep_ptr + (kept + c) * EACH * STATE * dim
            if EACH == 1:
                tl.store(keep_chunk + tile, h, mask=mask)
        at_rows = ()
        at_beyond = ()
        x_rows = ()
        dt_rows = ()
        B_rows = ()
        C_rows = ()
        z_rows = ()
        y_rows = ()
        for i in tl.static_range(WINDOW):
            at = token_at(path, tl.minimum(i, count - 1), ahead, PATH, WIDE)
            if PATH:
                at_rows = at_rows + (at,)
                beyond = tl.minimum(WINDOW + i, count - 1)
                at_beyond = at_beyond + (token_at(path, beyond, ahead, PATH, WIDE),)
            x_rows = x_rows + (load_row(x_chunk + (at * stride_xl + offs_x), mask_d, EVEN_D),)
            dt_rows = dt_rows + (load_row(dt_chunk + (at * stride_dtl + offs_d), mask_d, EVEN_D),)
            B_rows = B_rows + (load_row(B_chunk + (at * stride_Bl + offs_n), mask_n, EVEN_N),)
            C_rows = C_rows + (load_row(C_chunk + (at * stride_Cl + offs_n), mask_n, EVEN_N),)
            if HAS_Z:
                z_rows = z_rows + (load_row(z_chunk + (at * stride_zl + offs_d), mask_d, EVEN_D),)
            if ADD:
                y_rows = y_rows + (load_row(y_ptr + here + (at * dim + offs_d), mask_d, EVEN_D),)
        for w in range(tl.cdiv(count, WINDOW)):
            x_now = x_rows
            dt_now = dt_rows
            B_now = B_rows
            C_now = C_rows
            z_now = z_rows
            y_now = y_rows
            at_now = at_rows
            at_ahead = at_beyond
            at_rows = ()
            at_beyond = ()
            x_rows = ()
            dt_rows = ()
            B_rows = ()
            C_rows = ()
            z_rows = ()
            y_rows = ()
            for i in tl.static_range(WINDOW):
                if PATH:
                    beyond = tl.minimum((w + 2) * WINDOW + i, count - 1)
                    at_beyond = at_beyond + (token_at(path, beyond, ahead, PATH, WIDE),)
                    at = at_ahead[i]
                    at_rows = at_rows + (at,)
                else:
                    at = token_at(
                        path, tl.minimum((w + 1) * WINDOW + i, count - 1), ahead, PATH, WIDE
                    )
                x_rows = x_rows + (load_row(x_chunk + (at * stride_xl + offs_x), mask_d, EVEN_D),)
                dt_rows = dt_rows + (
                    load_row(dt_chunk + (at * stride_dtl + offs_d), mask_d, EVEN_D),
                )
                B_rows = B_rows + (load_row(B_chunk + (at * stride_Bl + offs_n), mask_n, EVEN_N),)
                C_rows = C_rows + (load_row(C_chunk + (at * stride_Cl + offs_n), mask_n, EVEN_N),)
                if HAS_Z:
                    z_rows = z_rows + (
                        load_row(z_chunk + (at * stride_zl + offs_d), mask_d, EVEN_D),
                    )
                if ADD:
                    y_rows = y_rows + (
                        load_row(y_ptr + here + (at * dim + offs_d), mask_d, EVEN_D),
                    )
            for i in tl.static_range(WINDOW):
                t = w * WINDOW + i
                valid = t < count
                if KEEP and EACH > 1 and i % EVERY == 0:
                    within = tl.where(valid, mask, False)
                    tl.store(keep_chunk + t // EVERY * STATE * dim + tile, h, mask=within)
                x = x_now[i].to(tl.float32)
                delta = dt_now[i].to(tl.float32) + bias
                if SOFTPLUS:
                    delta = softplus(delta)
                # past the end: no decay, no input
                delta = tl.where(valid, delta, 0.0)
                u = delta * x
                h = tl.exp2(A * delta[None, :]) * h + u[None, :] * B_now[i].to(tl.float32)[:, None]
                y = tl.sum(h * C_now[i].to(tl.float32)[:, None], 0) + skip * x
                if ADD:
                    y += y_now[i].to(tl.float32)
                at = at_now[i] if PATH else t * ahead
                into = here + (at * dim + offs_d)
                mask_t = tl.where(valid, mask_d, False)
                if SAVE_Y:
                    tl.store(y_ptr + into, y.to(y_ptr.dtype.element_ty), mask=mask_t)
                if HAS_Z:
                    z = z_now[i].to(tl.float32)
                    y *= z * sigmoid(z)
                tl.store(out_ptr + into, y.to(out_ptr.dtype.element_ty), mask=mask_t)
    ends = begin + steps == total
    tl.store(h_ptr + state, h, mask=tl.where(ends, mask, False))


def forward(
    directions: Sequence[Direction],
    initial_state: Sequence[Tensor | None],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: Sequence[bool],
    softplus: bool,
    keep_states: bool,
    paths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add the directions, then gate. B and C are (B, L, G, N).

    With `paths` there is one direction of K D channels and K G groups, K scans of D channels each
    that share x, (B, L, D): nothing is added, and the output is (B, L, K D).

    Returns:
        out (B, L, D); the sum before the gate, empty unless `keep_states` and `z`; the final
        states (K, S, D, N) float32; the kept states, empty unless `keep_states`.
    """
    x, dt, A = directions[0][:3]
    batch, length, dim = dt.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = x.new_empty(dt.shape)
    save_y = keep_states and z is not None
    # without a gate, and in inference, directions add up in the output itself
    y = torch.empty_like(out) if save_y else out
    final = x.new_empty(len(directions), sequences, dim, A.shape[1], dtype=torch.float32)
    shape = checkpoints_shape(len(directions), dt, A, cu_seqlens) if keep_states else (0,)
    # packed sequences rarely fill every chunk; what is left over must not be random
    kept = (x.new_empty if cu_seqlens is None else x.new_zeros)(shape, dtype=torch.float32)
    if z is not None:
        z = adjacent(z)
    for k, (given, h0) in enumerate(zip(directions, initial_state, strict=True)):
        if dim == 0 or sequences == 0:
            break
        inputs = prepare(given)
        chunk, each = chunk_of(A.shape[1])
        xk, dt, A, B, C, D, bias = inputs
        last = k == len(directions) - 1
        groups = B.shape[2]
        spans = split(dt, groups, A.shape[1], sequences, cu_seqlens is not None)
        slots = sequences if spans is None else spans.slots
        plan = forward_plan(dt, groups, A.shape[1], slots)
        gate = z if last else None
        strides, flags = strides_and_flags(inputs, gate, cu_seqlens, paths, reverse[k], softplus)
        programs = groups * plan.blocks
        rates = torch.empty(A.shape[::-1], dtype=torch.float32, device=x.device)
        torch.mul(A.t().float(), LOG2_E.value, out=rates)
        if spans is not None:
            h0 = entering(
                inputs, xk, rates, h0, None, cu_seqlens, paths, reverse[k], softplus, spans, False
            )
        with on_device(x):
            _forward_kernel[(slots * programs,)](
                xk,
                dt,
                rates,
                B,
                C,
                D,
                bias,
                gate,
                None if h0 is None else h0.contiguous(),
                None if cu_seqlens is None else adjacent(cu_seqlens),
                paths,
                y,
                out if last else y,
                final[k],
                kept[k] if keep_states else None,
                length,
                length,
                dim,
                dim // groups,
                plan.blocks,
                groups if paths is None else groups // paths.shape[0],
                programs,
                sequences,
                0 if spans is None else spans.steps,
                chunk if keep_states else UNBOUNDED,
                **strides,
                **flags,
                HAS_H0=h0 is not None,
                SPLIT=spans is not None,
                ADD=k > 0,
                SAVE_Y=save_y and last,
                KEEP=keep_states,
                EACH=each,
                EVERY=chunk // each,
                EVEN_D=(dim // groups) % plan.block_d == 0,
                BLOCK_N=plan.block_n,
                BLOCK_D=plan.block_d,
                LANE_D=max(1, plan.block_d // 32),
                WINDOW=plan.window,
                num_warps=1,
                num_stages=1,
                enable_fp_fusion=True,
                **register_limit(plan.registers),
            )
    empty = x.new_empty(0)
    return out, y if save_y else empty, final, kept
