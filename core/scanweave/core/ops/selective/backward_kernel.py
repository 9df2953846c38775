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

import triton
import triton.language as tl

from ..launch import LN_2, LOG2_E, sigmoid
from .kernels import load_row, softplus, span_of, token_at


@triton.jit(do_not_specialize=["length", "tokens", "sequences", "span"])
def backward_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,  # (D, N)
    B_ptr,
    C_ptr,
    D_ptr,
    bias_ptr,
    z_ptr,
    cu_ptr,
    path_ptr,  # (K, tokens)
    y_ptr,  # (B, L, D): the sum of directions before the gate
    dout_ptr,
    dh_ptr,  # (S, D, N): gradient of the final state, or with SPLIT (slots, N, D)
    keep_ptr,  # (chunks * EACH, N, D)
    scratch_ptr,  # (slots, programs, chunk / WINDOW, BLOCK_D, BLOCK_N)
    dx_ptr,
    ddt_ptr,
    dA_ptr,  # (slots, D, N)
    dB_ptr,  # (B, L, programs, N)
    dC_ptr,  # (B, L, programs, N)
    dD_ptr,  # (slots, D)
    dbias_ptr,  # (slots, D)
    dz_ptr,
    dh0_ptr,  # (S, D, N)
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
    SPLIT: tl.constexpr,
    PATH: tl.constexpr,
    WIDE: tl.constexpr,
    REVERSE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EACH: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    DEEP: tl.constexpr,
):
    """Run one span of one sequence backwards, for a block of channels."""
    slot = (tl.program_id(0) // programs).to(tl.int64)
    pid_d = tl.program_id(0) % programs
    pid_s, pid_b, first, total, begin, steps, kept = span_of(
        tl.program_id(0) // programs, cu_ptr, length, sequences, span, chunk, PACKED, SPLIT
    )
    group = pid_d // blocks
    offs_b = tl.arange(0, BLOCK_D)
    offs_g = (pid_d % blocks) * BLOCK_D + offs_b
    mask_d = offs_g < per_group
    offs_d = group * per_group + offs_g
    offs_x = offs_d
    if PATH:
        # every direction has its own path and channels, and all share those of x and the output
        direction = group // groups_each
        offs_x -= direction * groups_each * per_group
        path_ptr += direction.to(tl.int64) * tokens
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < STATE
    EVEN_N: tl.constexpr = BLOCK_N == STATE
    tile = offs_d[:, None] * STATE + offs_n[None, :]
    state = pid_s * dim * STATE + tile
    partial = slot * dim * STATE + tile
    across = offs_n[None, :] * dim + offs_d[:, None]
    mask = mask_d[:, None] & mask_n[None, :]
    A = tl.load(A_ptr + tile, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    skip = tl.zeros([BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if HAS_D:
        skip = load_row(D_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    if HAS_BIAS:
        bias = load_row(bias_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    carry = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    if SPLIT:
        carry = tl.load(dh_ptr + slot * dim * STATE + across, mask=mask, other=0.0)
    elif HAS_DH:
        carry = tl.load(dh_ptr + state, mask=mask, other=0.0).to(tl.float32)
    dA = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dD = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    ahead: tl.constexpr = -1 if REVERSE else 1
    origin = first + total - 1 - begin if REVERSE else first + begin
    next_part = programs * STATE
    parked = BLOCK_D * BLOCK_N
    scratch_ptr += (slot * programs + pid_d) * (chunk // WINDOW) * parked
    scratch_ptr += offs_b[:, None] * BLOCK_N + offs_n[None, :]
    chunks = tl.cdiv(steps, chunk)
    for ci in range(chunks):
        c = chunks - 1 - ci
        start = c * chunk
        count = tl.minimum(chunk, steps - start)
        windows = tl.cdiv(count, WINDOW)
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
        o_chunk = dout_ptr + pid_b * stride_ob + row * stride_ol
        here = (pid_b * tokens + row) * dim
        part = ((pid_b * tokens + row) * programs + pid_d) * STATE
        if HAS_Z:
            z_chunk = z_ptr + pid_b * stride_zb + row * stride_zl
        keep_chunk = keep_ptr + (kept + c) * EACH * STATE * dim + across
        # the rows of the last window, so that they are there after the states
        x_rows = ()
        dt_rows = ()
        B_rows = ()
        C_rows = ()
        g_rows = ()
        z_rows = ()
        y_rows = ()
        at_rows = ()
        at_before = ()
        for i in tl.static_range(WINDOW):
            at = token_at(
                path, tl.minimum((windows - 1) * WINDOW + i, count - 1), ahead, PATH, WIDE
            )
            if PATH:
                at_rows = at_rows + (at,)
                before = tl.maximum((windows - 2) * WINDOW + i, 0)
                at_before = at_before + (token_at(path, before, ahead, PATH, WIDE),)
            x_rows = x_rows + (load_row(x_chunk + (at * stride_xl + offs_x), mask_d, EVEN_D),)
            dt_rows = dt_rows + (load_row(dt_chunk + (at * stride_dtl + offs_d), mask_d, EVEN_D),)
            B_rows = B_rows + (load_row(B_chunk + (at * stride_Bl + offs_n), mask_n, EVEN_N),)
            C_rows = C_rows + (load_row(C_chunk + (at * stride_Cl + offs_n), mask_n, EVEN_N),)
            g_rows = g_rows + (load_row(o_chunk + (at * stride_ol + offs_x), mask_d, EVEN_D),)
            if HAS_Z:
                z_rows = z_rows + (load_row(z_chunk + (at * stride_zl + offs_d), mask_d, EVEN_D),)
            if WRITE_DZ:
                y_rows = y_rows + (load_row(y_ptr + here + (at * dim + offs_d), mask_d, EVEN_D),)
        if EACH > 1:
            # every window's first state was kept
            h = tl.load(keep_chunk + (windows - 1) * STATE * dim, mask=mask, other=0.0)
        else:
            h = tl.load(keep_chunk, mask=mask, other=0.0)
            # 1. recompute the chunk's states up to its last window, and park the one before each
            recomputed = (windows - 1) * WINDOW
            for w in range(tl.cdiv(recomputed, DEEP)):
                x_now = ()
                dt_now = ()
                B_now = ()
                for i in tl.static_range(DEEP):
                    t = tl.minimum(w * DEEP + i, count - 1)
                    at = token_at(path, t, ahead, PATH, WIDE)
                    x_now = x_now + (load_row(x_chunk + (at * stride_xl + offs_x), mask_d, EVEN_D),)
                    dt_now = dt_now + (
                        load_row(dt_chunk + (at * stride_dtl + offs_d), mask_d, EVEN_D),
                    )
                    B_now = B_now + (load_row(B_chunk + (at * stride_Bl + offs_n), mask_n, EVEN_N),)
                for i in tl.static_range(DEEP):
                    if i % WINDOW == 0:
                        tl.store(scratch_ptr + (w * DEEP + i) // WINDOW * parked, h)
                    delta = dt_now[i].to(tl.float32) + bias
                    if SOFTPLUS:
                        delta = softplus(delta)
                    delta = tl.where(w * DEEP + i < recomputed, delta, 0.0)
                    u = delta * x_now[i].to(tl.float32)
                    B = B_now[i].to(tl.float32)
                    h = tl.exp2(A * delta[:, None]) * h + u[:, None] * B[None, :]
            tl.debug_barrier()

        # 2. walk the windows back, one window of rows and states ahead
        h_ahead = h
        for wi in range(windows):
            w = windows - 1 - wi
            h = h_ahead
            if EACH > 1:
                earlier = keep_chunk + tl.maximum(w - 1, 0) * STATE * dim
                h_ahead = tl.load(earlier, mask=mask, other=0.0)
            else:
                h_ahead = tl.load(scratch_ptr + tl.maximum(w - 1, 0) * parked)
            x_now = x_rows
            dt_now = dt_rows
            B_now = B_rows
            C_now = C_rows
            g_now = g_rows
            z_now = z_rows
            y_now = y_rows
            at_now = at_rows
            at_ahead = at_before
            at_rows = ()
            at_before = ()
            x_rows = ()
            dt_rows = ()
            B_rows = ()
            C_rows = ()
            g_rows = ()
            z_rows = ()
            y_rows = ()
            for i in tl.static_range(WINDOW):
                if PATH:
                    before = tl.maximum((w - 2) * WINDOW + i, 0)
                    at_before = at_before + (token_at(path, before, ahead, PATH, WIDE),)
                    at = at_ahead[i]
                    at_rows = at_rows + (at,)
                else:
                    at = token_at(path, tl.maximum((w - 1) * WINDOW + i, 0), ahead, PATH, WIDE)
                x_rows = x_rows + (load_row(x_chunk + (at * stride_xl + offs_x), mask_d, EVEN_D),)
                dt_rows = dt_rows + (
                    load_row(dt_chunk + (at * stride_dtl + offs_d), mask_d, EVEN_D),
                )
                B_rows = B_rows + (load_row(B_chunk + (at * stride_Bl + offs_n), mask_n, EVEN_N),)
                C_rows = C_rows + (load_row(C_chunk + (at * stride_Cl + offs_n), mask_n, EVEN_N),)
                g_rows = g_rows + (load_row(o_chunk + (at * stride_ol + offs_x), mask_d, EVEN_D),)
                if HAS_Z:
                    z_rows = z_rows + (
                        load_row(z_chunk + (at * stride_zl + offs_d), mask_d, EVEN_D),
                    )
                if WRITE_DZ:
                    y_rows = y_rows + (
                        load_row(y_ptr + here + (at * dim + offs_d), mask_d, EVEN_D),
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
                at = at_now[WINDOW - 1 - j] if PATH else t * ahead
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
                        dz_row = dz_ptr + here + (at * dim + offs_d)
                        tl.store(dz_row, dz.to(dz_ptr.dtype.element_ty), mask=mask_t)
                    g = g * z * gate
                g = tl.where(valid, g, 0.0)
                s = g[:, None] * C[None, :] + carry
                carry = decays[WINDOW - 1 - j] * s
                dC = tl.sum(states[WINDOW - j] * g[:, None], 0)
                dB = tl.sum(s * (delta * x)[:, None], 0)
                tl.store(dC_ptr + part + (at * next_part + offs_n), dC, mask=mask_p)
                tl.store(dB_ptr + part + (at * next_part + offs_n), dB, mask=mask_p)
                into = tl.sum(s * B[None, :], 1)
                q = carry * states[WINDOW - 1 - j]
                ddt = into * x + tl.sum(q * A, 1) * LN_2
                if SOFTPLUS:
                    raw = dt_now[WINDOW - 1 - j].to(tl.float32) + bias
                    ddt = tl.where(raw > 20.0, ddt, ddt * sigmoid(raw))
                dx = into * delta + skip * g
                dx_row = dx_ptr + here + (at * dim + offs_d)
                ddt_row = ddt_ptr + here + (at * dim + offs_d)
                tl.store(dx_row, dx.to(dx_ptr.dtype.element_ty), mask=mask_t)
                tl.store(ddt_row, ddt.to(ddt_ptr.dtype.element_ty), mask=mask_t)
                dA += q * delta[:, None]
                dD += g * x
                dbias += tl.where(valid, ddt, 0.0)
    tl.store(dA_ptr + partial, dA, mask=mask)
    if HAS_D:
        tl.store(dD_ptr + slot * dim + offs_d, dD, mask=mask_d)
    if HAS_BIAS:
        tl.store(dbias_ptr + slot * dim + offs_d, dbias, mask=mask_d)
    if HAS_H0:
        tl.store(dh0_ptr + state, carry, mask=tl.where(begin == 0, mask, False))
