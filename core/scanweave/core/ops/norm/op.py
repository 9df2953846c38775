"""Gated RMS norm as a torch operator. Equations: `reference.py`; why so: `selective/op.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_tensor, computing_dtype, on_kernels
from ..inputs import told_apart
from . import kernels

# the widest row that a program of the kernel holds
MAX_KERNEL_SIZE = 8192

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = "Tensor x, Tensor weight, Tensor? z, float eps, int group_size, bool norm_before_gate"
_lib.define(f"rms_norm_gated({_INPUTS}) -> Tensor")
_lib.define(f"rms_norm_gated_backward(Tensor dout, {_INPUTS}) -> Tensor[]")
_forward_op = torch.ops.scanweave.rms_norm_gated.default
_backward_op = torch.ops.scanweave.rms_norm_gated_backward.default


def _fused(x: Tensor, weight: Tensor, z: Tensor | None, size: int) -> bool:
    return on_kernels(x, weight, z) and size <= MAX_KERNEL_SIZE


def _forward(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    if _fused(x, weight, z, group_size):
        rows = None if z is None else z.reshape(-1, z.shape[-1])
        out = kernels.forward(
            x.reshape(-1, x.shape[-1]), weight, rows, eps, group_size, norm_before_gate
        )
        return out.reshape(x.shape)
    dtype = computing_dtype(x, weight, z)
    u = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        u = u * gate
    parts = u.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    out = (parts * scale).flatten(-2).mul_(weight.to(dtype))
    if gate is not None and norm_before_gate:
        out.mul_(gate)
    return out.to(x.dtype)


def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> list[Tensor]:
    if _fused(x, weight, z, group_size):
        dim = x.shape[-1]
        dx, dw, dz = kernels.backward(
            dout.reshape(-1, dim),
            x.reshape(-1, dim),
            weight,
            None if z is None else z.reshape(-1, dim),
            eps,
            group_size,
            norm_before_gate,
        )
        grads = [dx.reshape(x.shape), dw.to(weight.dtype)]
        return grads if dz is None else [*grads, dz.reshape(x.shape)]
    # normed = u scale: d scale / d u = -scale^3 u / size
    dtype = computing_dtype(x, weight, z)
    u, dnormed, dz, gate, slope = x.to(dtype), dout.to(dtype), None, None, None
    if z is not None:
        zs = z.to(dtype)
        s = torch.sigmoid(zs)
        gate, slope = zs * s, s * (1 + zs * (1 - s))
        if not norm_before_gate:
            u = u * gate
    parts = u.unflatten(-1, (-1, group_size))
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    normed = (parts * scale).flatten(-2)
    if gate is not None and slope is not None and norm_before_gate:
        dz = dnormed * normed * weight.to(dtype) * slope
        dnormed = dnormed * gate
    dw = (dnormed * normed).flatten(0, -2).sum(0)
    dparts = (dnormed * weight.to(dtype)).unflatten(-1, (-1, group_size))
    normed = normed.unflatten(-1, (-1, group_size))
    du = (scale * (dparts - normed * (dparts * normed).mean(-1, keepdim=True))).flatten(-2)
    if gate is not None and slope is not None and not norm_before_gate:
        dz = du * x.to(dtype) * slope
        du = du * gate
    grads = [du.to(x.dtype), dw.to(weight.dtype)]
    return grads if z is None or dz is None else [*grads, dz.to(z.dtype)]


for _device in ("CPU", "CUDA"):
    _lib.impl("rms_norm_gated", _forward, _device)
    _lib.impl("rms_norm_gated_backward", _backward, _device)


@torch.library.register_fake("scanweave::rms_norm_gated", lib=_lib)
def _(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("scanweave::rms_norm_gated_backward", lib=_lib)
def _(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> list[Tensor]:
    return [v.new_empty(v.shape) for v in (x, weight, z) if v is not None]


class _RmsNormGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, z, eps, group_size, norm_before_gate):
        ctx.save_for_backward(x, weight, z)
        ctx.config = (eps, group_size, norm_before_gate)
        return _forward_op(x, weight, z, eps, group_size, norm_before_gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, z = ctx.saved_tensors
        grads = list(_backward_op(dout, x, weight, z, *ctx.config))
        return (*grads, *([None] if z is None else []), None, None, None)


@torch.library.impl(_lib, "rms_norm_gated", "Autograd")
def _(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    tensors = (x, weight, z)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        return _RmsNormGated.apply(*tensors, eps, group_size, norm_before_gate)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*tensors, eps, group_size, norm_before_gate)


def rms_norm_gated(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """Normalise x silu(z) by its root mean square: u / sqrt(mean(u^2) + eps) * weight.

    Every floating input has a gradient. Sums are float32 (float64 if an input is).

    Args:
        x: Inputs, (..., D).
        weight: Factor of every channel, (D,).
        z: Gate, as x; none when absent.
        eps: Added to the mean square.
        group_size: Channels of a group that is normalised on its own; all of them by default.
        norm_before_gate: Normalise x and then gate: norm(x) weight silu(z).

    Returns:
        (..., D), in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Dao & Gu 2024 (Mamba-2), arXiv 2405.21060, section 7; Zhang & Sennrich 2019,
        arXiv 1910.07467.
    """
    if not isinstance(x, Tensor) or x.ndim < 1:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (..., D), got {got}")
    check_tensor("x", x, tuple(x.shape), x, "(..., D)")
    dim = x.shape[-1]
    check_tensor("weight", weight, (dim,), x, "(D,)")
    if z is not None:
        check_tensor("z", z, tuple(x.shape), x, "(..., D)")
    size = dim if group_size is None else group_size
    if size < 1 or dim % size:
        raise ValueError(f"group_size must divide the {dim} channels, got {size}")
    return _RmsNormGated.apply(*told_apart((x, weight, z)), float(eps), size, norm_before_gate)
