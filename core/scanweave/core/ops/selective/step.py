"""One token of the selective scan, for decoding and acting. Equations: `reference.py`.

On a GPU one kernel does all of it, state included, and on a CPU one C function: a roll-out is many
small calls.
"""

# Triton's own language: constant branches, launch options
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_tensor, computing_dtype, on_kernels
from ..launch import LOG2_E, adjacent, ceil_div, on_device, power_of_2, processors, sigmoid
from . import compiled_step
from .kernels import load_row, softplus

# programs a multiprocessor below which smaller ones are made
PROGRAMS = 4

_lib = torch.library.Library("scanweave", "FRAGMENT")
_lib.define(
    "selective_scan_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor"
)
_step_op = torch.ops.scanweave.selective_scan_step.default


@triton.jit
def _step_kernel(
    h_ptr,  # (B, D, N), updated
    x_ptr,
    dt_ptr,
    A_ptr,  # (D, N)
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,  # (B, D)
    dim,
    per_group,
    blocks,
    stride_hb,
    stride_hd,
    stride_hn,
    stride_xb,
    stride_dtb,
    stride_Bb,
    stride_Bg,
    stride_Cb,
    stride_Cg,
    stride_zb,
    STATE: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid_b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_d = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask_d = offs_d < dim
    mask = mask_d[:, None] & (offs_n < STATE)[None, :]
    group = offs_d // per_group
    state = h_ptr + pid_b * stride_hb + offs_d[:, None] * stride_hd + offs_n[None, :] * stride_hn
    h = tl.load(state, mask=mask, other=0.0).to(tl.float32)
    A = tl.load(A_ptr + offs_d[:, None] * STATE + offs_n[None, :], mask=mask, other=0.0)
    B = tl.load(
        B_ptr + pid_b * stride_Bb + group[:, None] * stride_Bg + offs_n[None, :],
        mask=mask,
        other=0.0,
    )
    C = tl.load(
        C_ptr + pid_b * stride_Cb + group[:, None] * stride_Cg + offs_n[None, :],
        mask=mask,
        other=0.0,
    )
    x = load_row(x_ptr + pid_b * stride_xb + offs_d, mask_d, EVEN_D).to(tl.float32)
    delta = load_row(dt_ptr + pid_b * stride_dtb + offs_d, mask_d, EVEN_D).to(tl.float32)
    if HAS_BIAS:
        delta += load_row(bias_ptr + offs_d, mask_d, EVEN_D).to(tl.float32)
    if SOFTPLUS:
        delta = softplus(delta)
    decay = tl.exp2(A.to(tl.float32) * (delta * LOG2_E)[:, None])
    h = decay * h + (delta * x)[:, None] * B.to(tl.float32)
    tl.store(state, h.to(h_ptr.dtype.element_ty), mask=mask)
    y = tl.sum(h * C.to(tl.float32), 1)
    if HAS_D:
        y += load_row(D_ptr + offs_d, mask_d, EVEN_D).to(tl.float32) * x
    if HAS_Z:
        z = load_row(z_ptr + pid_b * stride_zb + offs_d, mask_d, EVEN_D).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + pid_b * dim + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@functools.lru_cache(maxsize=256)
def _channels(batch: int, dim: int, block_n: int, processors: int) -> int:
    """Channels of a program; few where rows are few: its own time is all that counts then."""
    block_d = max(1, min(64, 1024 // block_n, power_of_2(dim)))
    while block_d > 4 and batch * ceil_div(dim, block_d) < PROGRAMS * processors:
        block_d //= 2
    return block_d


def _step_fused(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    batch, dim = x.shape
    y = torch.empty((batch, dim), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, dt, B, C = (adjacent(v) for v in (x, dt, B, C))
    D, z, dt_bias = (None if v is None else adjacent(v) for v in (D, z, dt_bias))
    block_n = power_of_2(A.shape[1])
    block_d = _channels(batch, dim, block_n, processors(x.device))
    blocks = ceil_div(dim, block_d)
    with on_device(x):
        _step_kernel[(batch * blocks,)](
            state,
            x,
            dt,
            A.contiguous(),
            B,
            C,
            D,
            z,
            dt_bias,
            y,
            dim,
            dim // B.shape[1],
            blocks,
            *state.stride(),
            x.stride(0),
            dt.stride(0),
            B.stride(0),
            B.stride(1),
            C.stride(0),
            C.stride(1),
            0 if z is None else z.stride(0),
            STATE=A.shape[1],
            HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None,
            SOFTPLUS=dt_softplus,
            EVEN_D=dim % block_d == 0,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            num_warps=2 if block_d * block_n > 256 else 1,
            enable_fp_fusion=True,
        )
    return y


@torch.library.impl(_lib, "selective_scan_step", "CPU")
@torch.library.impl(_lib, "selective_scan_step", "CUDA")
def _(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    if on_kernels(x, dt, A, B, C, D, z, dt_bias, state):
        return _step_fused(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    if compiled_step.takes(state, x, dt, A, B, C, D, z, dt_bias):
        return compiled_step.step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    dtype = computing_dtype(x, dt, A, B, C, D, z, dt_bias, state)
    xs, delta = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    # (B, D, N) each; a group's row serves all of its channels
    Bs, Cs = (v.to(dtype).repeat_interleave(x.shape[1] // v.shape[1], 1) for v in (B, C))
    decay = torch.exp(delta.unsqueeze(-1) * A.to(dtype))
    h = decay.mul_(state).addcmul_((delta * xs).unsqueeze(-1), Bs)
    state.copy_(h)
    y = (h * Cs).sum(-1)
    if D is not None:
        y = y + D.to(dtype) * xs
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype)


@torch.library.register_fake("scanweave::selective_scan_step", lib=_lib)
def _(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """Advance `selective_scan` by one token; `state` is updated in place.

    No gradient: for inference. `selective_scan` with L = 1 and the same state has one.

    Args:
        state: State before the token, (B, D, N) float32 or float64; updated.
        x: Input, (B, D).
        dt: Time step before bias and softplus, (B, D).
        A: Decay rates, (D, N).
        B: Input vector, (B, N) or (B, G, N).
        C: Read-out vector, as B.
        D: Skip weights, (D,).
        z: Gate, (B, D).
        dt_bias: Added to dt, (D,).
        dt_softplus: delta = softplus(dt + dt_bias).

    Returns:
        Output, (B, D), in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if not isinstance(x, Tensor) or x.ndim != 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, D), got {got}")
    if not isinstance(A, Tensor) or A.ndim != 2:
        got = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f"A must be (D, N), got {got}")
    (batch, dim), width = x.shape, A.shape[1]
    check_tensor("dt", dt, (batch, dim), x, "(B, D)")
    check_tensor("A", A, (dim, width), x, "(D, N)")
    check_tensor("state", state, (batch, dim, width), x, "(B, D, N)")
    if not isinstance(B, Tensor) or B.ndim not in (2, 3):
        got = tuple(B.shape) if isinstance(B, Tensor) else type(B).__name__
        raise ValueError(f"B must be (B, N) or (B, G, N), got {got}")
    groups = B.shape[1:-1]
    letters = "(B, G, N)" if groups else "(B, N)"
    check_tensor("B", B, (batch, *groups, width), x, letters)
    check_tensor("C", C, (batch, *groups, width), x, letters)
    if groups and (groups[0] < 1 or dim % groups[0]):
        raise ValueError(f"B must have groups that divide the {dim} channels, got {groups[0]}")
    for name, v in (("D", D), ("dt_bias", dt_bias)):
        if v is not None:
            check_tensor(name, v, (dim,), x, "(D,)")
    if z is not None:
        check_tensor("z", z, (batch, dim), x, "(B, D)")
    if not groups:
        B, C = B.unsqueeze(1), C.unsqueeze(1)
    with torch.no_grad():
        return _step_op(state, x, dt, A, B, C, D, z, dt_bias, bool(dt_softplus))
