"""Norms that round to another dtype as they write, and that add a residual branch first.

Sum, norm and cast are one pass over memory, and gradients come back in the dtypes of the stream
and the branch. Compilers fuse these by themselves, so they see PyTorch's own operators. The RMS
norm is here; the layer norm, in `layer.py`, shares the kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import is_real, on_kernels, without_autocast
from . import cast_kernels
from .op import MAX_KERNEL_SIZE


class _AddNormCast(torch.autograd.Function):
    """(x + branch, its norm); without a branch the first is None, without a bias it is RMS norm."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dtype):
        total, out = _launched(x, branch, weight, bias, eps, dtype)
        ctx.save_for_backward(x if total is None else total, weight)
        ctx.dtypes = (x.dtype, x.dtype if branch is None else branch.dtype)
        ctx.bias = None if bias is None else bias.dtype
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        stream, branch = ctx.dtypes
        has_branch, has_bias = ctx.needs_input_grad[1], ctx.bias is not None
        if dout is None:
            dbranch = dtotal.to(branch) if has_branch else None
            return dtotal.to(stream), dbranch, None, None, None, None
        dim = x.shape[-1]
        rows = (dout.reshape(-1, dim), None if dtotal is None else dtotal.reshape(-1, dim))
        dx, dbranch, dparams = cast_kernels.backward(
            *rows, x.reshape(-1, dim), weight, has_bias, ctx.eps, stream, branch
        )
        same = dbranch is dx
        dx = dx.view(x.shape)
        # one tensor twice and not two views of it, which autograd would take for independent
        dbranch = dx if same else dbranch.view(x.shape)
        return (
            dx,
            dbranch if has_branch else None,
            dparams[0].to(weight.dtype),
            dparams[1].to(ctx.bias) if has_bias else None,
            None,
            None,
        )


def _launched(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    dim = x.shape[-1]
    rows = None if branch is None else branch.reshape(-1, dim)
    total, out = cast_kernels.forward(x.reshape(-1, dim), rows, weight, bias, eps, dtype)
    return None if branch is None else total.view(x.shape), out.view(x.shape)


def fused(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The sum and its norm where `runs_kernels`; the sum is `x` itself without a branch."""
    # a Function without gradients costs a CPU more than the launch's other half; profilers see no
    # launch of no operator
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    run = _AddNormCast.apply if torch.is_grad_enabled() or profiled else _launched
    total, out = run(x, branch, weight, bias, eps, dtype)  # type: ignore[misc]
    return x if total is None else total, out


def runs_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether a norm of `x` (..., D) is a kernel's: not for tracers, compilers and wide rows."""
    return (
        is_real(x) and not x.is_meta and on_kernels(x, *others) and x.shape[-1] <= MAX_KERNEL_SIZE
    )


def _in_parts(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        y = F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)
    return y.to(dtype)


def rms_norm_cast(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalise the last axis by its root mean square, in float32 or wider, and round.

    Args:
        x: Inputs, (..., D).
        weight: Factor of every channel, (D,).
        eps: Added to the mean square.
        dtype: Of the result.

    Returns:
        x / sqrt(mean(x^2) + eps) * weight, (..., D).

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    if runs_kernels(x, weight):
        return fused(x, None, weight, None, eps, dtype)[1]
    return _in_parts(x, weight, eps, dtype)


def add_rms_norm_cast(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add a branch to a residual stream, and normalise the sum as `rms_norm_cast` does.

    Args:
        x: Stream, (..., D).
        branch: Same shape; any floating dtype.
        weight: Factor of every channel, (D,).
        eps: Added to the mean square.
        dtype: Of the norm; the sum has the wider one of `x` and `branch`.

    Returns:
        The sum and its norm, (..., D).
    """
    if x.shape == branch.shape and runs_kernels(x, weight, branch):
        return fused(x, branch, weight, None, eps, dtype)
    total = x + branch
    return total, _in_parts(total, weight, eps, dtype)
