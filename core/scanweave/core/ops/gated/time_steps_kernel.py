"""Time steps and log decays of heads, one launch each way: `named.time_steps` of real tensors.

    raw   = dt + bias
    delta = clamp(softplus(raw))         g = delta A,  A given or -exp(A_log)
    ddelta += dg A;   ddt = ddelta softplus'(raw) inside the limits;   dA = sum dg delta

Of PyTorch's operators these are 5 forward and 9 backward, a sum over all tokens each for A and
the bias. Sums are partial results that PyTorch adds, so runs repeat bit by bit.

Letters: T tokens, R sets of heads (directions) that share A and bias, H heads, P programs.
"""
# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ..launch import adjacent, ceil_div, on_device, power_of_2, processors, sigmoid
from ..selective.kernels import softplus

# elements of a program's tile, and programs a processor: what follows adds the programs' sums
TILE, PROGRAMS = 1024, 2


class Form(NamedTuple):
    """What steps are made of: `sets` R, softplus, the limits, and whether A is A_log."""

    sets: int
    softplus: bool
    low: float
    high: float
    limited: bool
    log: bool


@triton.jit
def _raw_steps(dt_ptr, at, mask, bias, low, high, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    """Steps, and how they change with dt."""
    raw = tl.load(dt_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    delta = raw
    slope = tl.full(raw.shape, 1.0, tl.float32)
    if SOFTPLUS:
        delta = softplus(raw)
        slope = sigmoid(raw)
    if LIMITED:
        slope = tl.where((delta >= low) & (delta <= high), slope, 0.0)
        # selected, so that what is no number stays so
        delta = tl.where(delta < low, low, tl.where(delta > high, high, delta))
    return delta, slope


@triton.jit
def _of_heads(a_ptr, bias_ptr, h, heads, LOG: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Rates and biases of a block of heads."""
    rate = tl.load(a_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
    if LOG:
        rate = -tl.exp(rate)
    bias = tl.zeros(h.shape, tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
    return rate, bias


@triton.jit(do_not_specialize=["tokens"])
def _steps_kernel(
    dt_ptr,  # (T, R H)
    a_ptr,  # (H,)
    bias_ptr,  # (H,)
    out_ptr,  # (2, R, T, H): delta, g
    tokens,
    heads,
    stride_dt,
    low,
    high,
    SETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (t < tokens) & (h < heads)[None, :]
    rate, bias = _of_heads(a_ptr, bias_ptr, h, heads, LOG, HAS_BIAS)
    count = tl.cast(tokens, tl.int64) * heads
    for r in tl.static_range(SETS):
        at = t * stride_dt + (r * heads + h)[None, :]
        delta, _ = _raw_steps(dt_ptr, at, mask, bias, low, high, SOFTPLUS, LIMITED)
        into = out_ptr + r * count + t * heads + h[None, :]
        tl.store(into, delta, mask=mask)
        tl.store(into + SETS * count, delta * rate[None, :], mask=mask)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _steps_backward_kernel(
    dt_ptr,  # (T, R H)
    a_ptr,  # (H,)
    bias_ptr,  # (H,)
    ddelta_ptr,  # (T, H), of the first set
    dg_ptr,
    ddelta_last_ptr,  # of the last set
    dg_last_ptr,
    ddt_ptr,  # (T, R H)
    partial_ptr,  # (P, 2, H): of A or A_log, and of the bias
    tokens,
    heads,
    blocks,  # of tokens, a program
    stride_dt,
    low,
    high,
    SETS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rate, bias = _of_heads(a_ptr, bias_ptr, h, heads, LOG, HAS_BIAS)
    of_rate = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    of_bias = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for block in range(0, blocks):
        t = (program * blocks + block) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        mask = (t < tokens) & (h < heads)[None, :]
        here = t * heads + h[None, :]
        for r in tl.static_range(SETS):
            at = t * stride_dt + (r * heads + h)[None, :]
            delta, slope = _raw_steps(dt_ptr, at, mask, bias, low, high, SOFTPLUS, LIMITED)
            ddelta = tl.load((ddelta_ptr if r == 0 else ddelta_last_ptr) + here, mask=mask, other=0)
            dg = tl.load((dg_ptr if r == 0 else dg_last_ptr) + here, mask=mask, other=0)
            ddt = (ddelta + dg * rate[None, :]) * slope
            of_rate += dg * delta
            of_bias += ddt
            into = ddt_ptr + t * (SETS * heads) + (r * heads + h)[None, :]
            tl.store(into, ddt.to(ddt_ptr.dtype.element_ty), mask=mask)
    sums = partial_ptr + program * 2 * heads + h
    total = tl.sum(of_rate, 0)
    if LOG:
        total *= rate
    tl.store(sums, total, mask=h < heads)
    tl.store(sums + heads, tl.sum(of_bias, 0), mask=h < heads)


def _blocks(heads: int) -> tuple[int, int]:
    block_h = min(power_of_2(heads), 256)
    return TILE // block_h, block_h


class HeadSteps(torch.autograd.Function):
    """`apply(dt (..., R H), A (H,), bias, form)` -> R steps and R log decays, (..., H) float32."""

    @staticmethod
    def forward(ctx, dt, A, bias, form):  # noqa: D102
        ctx.save_for_backward(dt, A, bias)
        ctx.form = form
        heads = A.shape[0]
        rows = adjacent(dt.reshape(-1, dt.shape[-1]))
        tokens = rows.shape[0]
        shape = (2 * form.sets, *dt.shape[:-1], heads)
        out = torch.empty(shape, dtype=torch.float32, device=dt.device)
        block_t, block_h = _blocks(heads)
        if tokens:
            with on_device(dt):
                _steps_kernel[(ceil_div(tokens, block_t), ceil_div(heads, block_h))](
                    rows,
                    A.contiguous(),
                    None if bias is None else bias.contiguous(),
                    out,
                    tokens,
                    heads,
                    rows.stride(0),
                    form.low,
                    form.high,
                    SETS=form.sets,
                    HAS_BIAS=bias is not None,
                    SOFTPLUS=form.softplus,
                    LIMITED=form.limited,
                    LOG=form.log,
                    BLOCK_T=block_t,
                    BLOCK_H=block_h,
                    num_warps=4,
                    enable_fp_fusion=True,
                )
        return tuple(out.unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        dt, A, bias = ctx.saved_tensors
        form, heads = ctx.form, A.shape[0]
        rows = adjacent(dt.reshape(-1, dt.shape[-1]))
        tokens = rows.shape[0]
        ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
        block_t, block_h = _blocks(heads)
        blocks = max(ceil_div(ceil_div(tokens, block_t), PROGRAMS * processors(dt.device)), 1)
        programs = ceil_div(ceil_div(tokens, block_t), blocks)
        partial = torch.empty((programs, 2, heads), dtype=torch.float32, device=dt.device)
        ddelta, dg = grads[: form.sets], grads[form.sets :]
        if tokens:
            with on_device(dt):
                _steps_backward_kernel[(programs, ceil_div(heads, block_h))](
                    rows,
                    A.contiguous(),
                    None if bias is None else bias.contiguous(),
                    *(v.contiguous() for d in (0, -1) for v in (ddelta[d], dg[d])),
                    ddt,
                    partial,
                    tokens,
                    heads,
                    blocks,
                    rows.stride(0),
                    form.low,
                    form.high,
                    SETS=form.sets,
                    HAS_BIAS=bias is not None,
                    SOFTPLUS=form.softplus,
                    LIMITED=form.limited,
                    LOG=form.log,
                    BLOCK_T=block_t,
                    BLOCK_H=block_h,
                    num_warps=4,
                    enable_fp_fusion=True,
                )
        dA, dbias = partial.sum(0).unbind(0)
        return ddt, dA.to(A.dtype), None if bias is None else dbias.to(bias.dtype), None
