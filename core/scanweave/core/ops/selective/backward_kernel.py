"""Gradients of the selective scan in Triton.

The kernel walks the chunks that the forward kept a state for from the last to the first: it
recomputes a chunk's states, parking one every WINDOW steps in scratch memory, then recomputes one
window at a time into registers and walks it back.

Letters: S sequences, T tokens, D channels, G groups, N state. Equations:
`portable.scan_backward`.
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

from ..launch import LN_2, LOG2_E, adjacent, on_device, sigmoid
from .kernels import (
    CHUNK,
    Direction,
    backward_plan,
    load_row,
    prepare,
    sequence_of,
    softplus,
    strides_and_flags,
)
from .portable import ScanGradients


@triton.jit
def _backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,  # (D, N)
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    z_ptr,
    cu_ptr,
    y_ptr,  # (B, L, D): the sum of directions before the gate
    dout_ptr,
    dh_ptr,  # (S, D, N): gradient of the final state
    keep_ptr,  # (chunks, N, D)
    scratch_ptr,  # (S, programs, chunk / WINDOW, BLOCK_D, BLOCK_N)
    dx_ptr,
    ddt_ptr,
    dA_ptr,  # (S, D, N)
    dB_ptr,  # (B, L, programs, N)
    dC_ptr,  # (B, L, programs, N)
    dD_ptr,  # (S, D)
    dbias_ptr,  # (S, D)
    dz_ptr,
    dh0_ptr,  # (S, D, N)
    length,
    tokens,
    dim,
    per_group,
    blocks,
    programs,
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
    stride_ob,
    stride_ol,
    STATE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_DH: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
):
    pid_s = (tl.program_id(0) // programs).to(tl.int64)
    pid_d = tl.program_id(0) % programs
    pid_b, first, length, kept = sequence_of(pid_s, cu_ptr, length, chunk, PACKED)
    group = pid_d // blocks
    offs_b = tl.arange(0, BLOCK_D)
    offs_g = (pid_d % blocks) * BLOCK_D + offs_b
    mask_d = offs_g < per_group
    offs_d = group * per_group + offs_g
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < STATE
    EVEN_N: tl.constexpr = BLOCK_N == STATE
    tile = offs_d[:, None] * STATE + offs_n[None, :]
    state = pid_s * dim * STATE + tile
    mask = mask_d[:, None] & mask_n[None, :]
    A = tl.load(A_ptr + tile, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    skip = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = load_row(D_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    if HAS_BIAS:
        bias = load_row(bias_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    carry = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if HAS_DH:
        carry = tl.load(dh_ptr + state, mask=mask, other=0.0).to(tl.float32)
    dA = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dD = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    ahead = -1 if REVERSE else 1
    origin = first + length - 1 if REVERSE else first
    # elements from one step to the next; within a chunk they fit 32 bits
    next_x = stride_xl * ahead
    next_dt = stride_dtl * ahead
    next_B = stride_Bl * ahead
    next_C = stride_Cl * ahead
    next_z = stride_zl * ahead
    next_o = stride_ol * ahead
    next_y = dim * ahead
    next_part = programs * STATE * ahead
    slot = BLOCK_D * BLOCK_N
    scratch_ptr += (pid_s * programs + pid_d) * (chunk // WINDOW) * slot
    scratch_ptr += offs_b[:, None] * BLOCK_N + offs_n[None, :]
    chunks = tl.cdiv(length, chunk)
    for ci in range(chunks):
        c = chunks - 1 - ci
        start = c * chunk
        count = tl.minimum(chunk, length - start)
        windows = tl.cdiv(count, WINDOW)
        row = origin + ahead * start
        x_chunk = x_ptr + pid_b * stride_xb + row * stride_xl
        dt_chunk = dt_ptr + pid_b * stride_dtb + row * stride_dtl
        B_chunk = B_ptr + pid_b * stride_Bb + row * stride_Bl + group * stride_Bg
        C_chunk = C_ptr + pid_b * stride_Cb + row * stride_Cl + group * stride_Cg
        o_chunk = dout_ptr + pid_b * stride_ob + row * stride_ol
        here = (pid_b * tokens + row) * dim
        part = ((pid_b * tokens + row) * programs + pid_d) * STATE
        if HAS_Z:
            z_chunk = z_ptr + pid_b * stride_zb + row * stride_zl
        kept_tile = (kept + c) * STATE * dim + offs_n[None, :] * dim + offs_d[:, None]
        h = tl.load(keep_ptr + kept_tile, mask=mask, other=0.0)

        # 1. recompute the chunk's states, parking the one before each window but the last;
        # the rows of the next window are loaded before the present one is computed
        x_rows = ()
        dt_rows = ()
        B_rows = ()
        for i in tl.static_range(WINDOW):
            t = tl.minimum(i, count - 1)
            x_rows = x_rows + (load_row(x_chunk + (t * next_x + offs_d), mask_d, EVEN_D),)
            dt_rows = dt_rows + (load_row(dt_chunk + (t * next_dt + offs_d), mask_d, EVEN_D),)
            B_rows = B_rows + (load_row(B_chunk + (t * next_B + offs_n), mask_n, EVEN_N),)
        for w in range(windows - 1):
            tl.store(scratch_ptr + w * slot, h)
            x_now = x_rows
            dt_now = dt_rows
            B_now = B_rows
            x_rows = ()
            dt_rows = ()
            B_rows = ()
            for i in tl.static_range(WINDOW):
                t = tl.minimum((w + 1) * WINDOW + i, count - 1)
                x_rows = x_rows + (load_row(x_chunk + (t * next_x + offs_d), mask_d, EVEN_D),)
                dt_rows = dt_rows + (load_row(dt_chunk + (t * next_dt + offs_d), mask_d, EVEN_D),)
                B_rows = B_rows + (load_row(B_chunk + (t * next_B + offs_n), mask_n, EVEN_N),)
            for i in tl.static_range(WINDOW):
                delta = dt_now[i].to(tl.float32) + bias
                if SOFTPLUS:
                    delta = softplus(delta)
                u = delta * x_now[i].to(tl.float32)
                h = tl.exp2(A * delta[:, None]) * h + u[:, None] * B_now[i].to(tl.float32)[None, :]

        # 2. walk the windows back, again one window of rows and states ahead
        tl.debug_barrier()
        h_ahead = h
        x_rows = ()
        dt_rows = ()
        B_rows = ()
        C_rows = ()
        g_rows = ()
        z_rows = ()
        y_rows = ()
        for i in tl.static_range(WINDOW):
            t = tl.minimum((windows - 1) * WINDOW + i, count - 1)
            x_rows = x_rows + (load_row(x_chunk + (t * next_x + offs_d), mask_d, EVEN_D),)
            dt_rows = dt_rows + (load_row(dt_chunk + (t * next_dt + offs_d), mask_d, EVEN_D),)
            B_rows = B_rows + (load_row(B_chunk + (t * next_B + offs_n), mask_n, EVEN_N),)
            C_rows = C_rows + (load_row(C_chunk + (t * next_C + offs_n), mask_n, EVEN_N),)
            g_rows = g_rows + (load_row(o_chunk + (t * next_o + offs_d), mask_d, EVEN_D),)
            if HAS_Z:
                z_rows = z_rows + (load_row(z_chunk + (t * next_z + offs_d), mask_d, EVEN_D),)
            if WRITE_DZ:
                y_rows = y_rows + (load_row(y_ptr + here + (t * next_y + offs_d), mask_d, EVEN_D),)
        for wi in range(windows):
            w = windows - 1 - wi
            h = h_ahead
            h_ahead = tl.load(scratch_ptr + tl.maximum(w - 1, 0) * slot)
            x_now = x_rows
            dt_now = dt_rows
            B_now = B_rows
            C_now = C_rows
            g_now = g_rows
            z_now = z_rows
            y_now = y_rows
            x_rows = ()
            dt_rows = ()
            B_rows = ()
            C_rows = ()
            g_rows = ()
            z_rows = ()
            y_rows = ()
            for i in tl.static_range(WINDOW):
                t = tl.maximum((w - 1) * WINDOW + i, 0)
                x_rows = x_rows + (load_row(x_chunk + (t * next_x + offs_d), mask_d, EVEN_D),)
                dt_rows = dt_rows + (load_row(dt_chunk + (t * next_dt + offs_d), mask_d, EVEN_D),)
                B_rows = B_rows + (load_row(B_chunk + (t * next_B + offs_n), mask_n, EVEN_N),)
                C_rows = C_rows + (load_row(C_chunk + (t * next_C + offs_n), mask_n, EVEN_N),)
                g_rows = g_rows + (load_row(o_chunk + (t * next_o + offs_d), mask_d, EVEN_D),)
                if HAS_Z:
                    z_rows = z_rows + (load_row(z_chunk + (t * next_z + offs_d), mask_d, EVEN_D),)
                if WRITE_DZ:
                    y_rows = y_rows + (
                        load_row(y_ptr + here + (t * next_y + offs_d), mask_d, EVEN_D),
                    )
            states = (h,)
            decays = ()
            deltas = ()
            for i in tl.static_range(WINDOW):
                delta = dt_now[i].to(tl.float32) + bias
                if SOFTPLUS:
                    delta = softplus(delta)
                # past the end: no decay, no input
                delta = tl.where(w * WINDOW + i < count, delta, 0.0)
                decay = tl.exp2(A * delta[:, None])
                u = delta * x_now[i].to(tl.float32)
                h = decay * h + u[:, None] * B_now[i].to(tl.float32)[None, :]
                deltas = deltas + (delta,)
                decays = decays + (decay,)
                states = states + (h,)
            for j in tl.static_range(WINDOW):
                t = w * WINDOW + (WINDOW - 1 - j)
                valid = t < count
                mask_t = tl.where(valid, mask_d, False)
                mask_p = tl.where(valid, mask_n, False)
                x = x_now[WINDOW - 1 - j].to(tl.float32)
                B = B_now[WINDOW - 1 - j].to(tl.float32)
                C = C_now[WINDOW - 1 - j].to(tl.float32)
                g = g_now[WINDOW - 1 - j].to(tl.float32)
                delta = deltas[WINDOW - 1 - j]
                if HAS_Z:
                    z = z_now[WINDOW - 1 - j].to(tl.float32)
                    gate = sigmoid(z)
                    if WRITE_DZ:
                        y = y_now[WINDOW - 1 - j].to(tl.float32)
                        dz = g * y * gate * (1.0 + z * (1.0 - gate))
                        dz_row = dz_ptr + here + (t * next_y + offs_d)
                        tl.store(dz_row, dz.to(dz_ptr.dtype.element_ty), mask=mask_t)
                    g = g * z * gate
                g = tl.where(valid, g, 0.0)
                s = g[:, None] * C[None, :] + carry
                carry = decays[WINDOW - 1 - j] * s
                dC = tl.sum(states[WINDOW - j] * g[:, None], 0)
                dB = tl.sum(s * (delta * x)[:, None], 0)
                tl.store(dC_ptr + part + (t * next_part + offs_n), dC, mask=mask_p)
                tl.store(dB_ptr + part + (t * next_part + offs_n), dB, mask=mask_p)
                into = tl.sum(s * B[None, :], 1)
                q = carry * states[WINDOW - 1 - j]
                ddt = into * x + tl.sum(q * A, 1) * LN_2
                if SOFTPLUS:
                    raw = dt_now[WINDOW - 1 - j].to(tl.float32) + bias
                    ddt = tl.where(raw > 20.0, ddt, ddt * sigmoid(raw))
                dx = into * delta + skip * g
                dx_row = dx_ptr + here + (t * next_y + offs_d)
                ddt_row = ddt_ptr + here + (t * next_y + offs_d)
                tl.store(dx_row, dx.to(dx_ptr.dtype.element_ty), mask=mask_t)
                tl.store(ddt_row, ddt.to(ddt_ptr.dtype.element_ty), mask=mask_t)
                dA += q * delta[:, None]
                dD += g * x
                dbias += tl.where(valid, ddt, 0.0)
    tl.store(dA_ptr + state, dA, mask=mask)
    if HAS_D:
        tl.store(dD_ptr + pid_s * dim + offs_d, dD, mask=mask_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + pid_s * dim + offs_d, dbias, mask=mask_d)
    if HAS_H0:
        tl.store(dh0_ptr + state, carry, mask=mask)


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    directions: Sequence[Direction],
    initial_state: bool,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: Sequence[bool],
    softplus: bool,
    y: Tensor,
    kept: Tensor,
) -> tuple[list[ScanGradients], Tensor | None]:
    """Gradients of every direction, and of the gate."""
    x, A = directions[0][0], directions[0][2]
    batch, length, dim = x.shape
    state = A.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dout = adjacent(dout)
    dz = None
    if z is not None:
        dz = torch.empty_like(z, memory_format=torch.contiguous_format)
        z = adjacent(z)
    grads = []
    for k, given in enumerate(directions):
        inputs = prepare(given)
        xk, dt, A, B, C, D, bias = inputs
        groups = B.shape[2]
        plan = backward_plan(xk, groups, state)
        programs = groups * plan.blocks
        strides, flags = strides_and_flags(inputs, z, cu_seqlens, reverse[k], softplus)
        dx, ddt = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (xk, dt))
        dA, dh0 = (x.new_empty(sequences, dim, state, dtype=torch.float32) for _ in range(2))
        dD, dbias = (x.new_empty(sequences, dim, dtype=torch.float32) for _ in range(2))
        dB, dC = (
            x.new_empty(batch, length, groups, plan.blocks, state, dtype=torch.float32)
            for _ in range(2)
        )
        slots = sequences * programs * (CHUNK // plan.window)
        scratch = x.new_empty(slots, plan.block_d, plan.block_n, dtype=torch.float32)
        if dim > 0 and sequences > 0:
            with on_device(x):
                _backward_kernel[(sequences * programs,)](
                    xk,
                    dt,
                    A,
                    B,
                    C,
                    D,
                    bias,
                    z,
                    None if cu_seqlens is None else adjacent(cu_seqlens),
                    y,
                    dout,
                    None if dfinal is None else dfinal[k].contiguous(),
                    kept[k],
                    scratch,
                    dx,
                    ddt,
                    dA,
                    dB,
                    dC,
                    dD,
                    dbias,
                    dz,
                    dh0,
                    length,
                    length,
                    dim,
                    dim // groups,
                    plan.blocks,
                    programs,
                    CHUNK,
                    **strides,
                    stride_ob=dout.stride(0),
                    stride_ol=dout.stride(1),
                    **flags,
                    HAS_H0=initial_state,
                    HAS_DH=dfinal is not None,
                    WRITE_DZ=z is not None and k == 0,
                    EVEN_D=(dim // groups) % plan.block_d == 0,
                    BLOCK_N=plan.block_n,
                    BLOCK_D=plan.block_d,
                    WINDOW=plan.window,
                    num_warps=1,
                    num_stages=1,
                    enable_fp_fusion=True,
                )
        grads.append(
            ScanGradients(dx, ddt, dA.sum(0), dB.sum(3), dC.sum(3), dD.sum(0), dbias.sum(0), dh0)
        )
    return grads, dz
