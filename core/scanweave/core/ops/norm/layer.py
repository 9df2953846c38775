"""Layer norm that rounds to another dtype as it writes, and that adds a residual branch first.

Sum, norm and cast are one pass over memory, and gradients come back in the dtypes of the stream
and the branch. Compilers fuse these by themselves, so they see PyTorch's own operators.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import without_autocast
from . import layer_kernels
from .cast import runs_kernels


class _AddLayerNormCast(torch.autograd.Function):
    """(x + branch, its norm); without a branch the first is None."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, dtype):
        total, out = _launched(x, branch, weight, bias, eps, dtype)
        ctx.save_for_backward(x if total is None else total, weight)
        ctx.dtypes = (x.dtype, x.dtype if branch is None else branch.dtype, bias.dtype)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        stream, branch, of_bias = ctx.dtypes
        has_branch = ctx.needs_input_grad[1]
        if dout is None:
            dbranch = dtotal.to(branch) if has_branch else None
            return dtotal.to(stream), dbranch, None, None, None, None
        dim = x.shape[-1]
        rows = (dout.reshape(-1, dim), None if dtotal is None else dtotal.reshape(-1, dim))
        dx, dbranch, dparams = layer_kernels.backward(
            *rows, x.reshape(-1, dim), weight, ctx.eps, stream, branch
        )
        dweight, dbias = dparams.unbind()
        same = dbranch is dx
        dx = dx.view(x.shape)
        # one tensor twice and not two views of it, which autograd would take for independent
        dbranch = dx if same else dbranch.view(x.shape)
        return (
            dx,
            dbranch if has_branch else None,
            dweight.to(weight.dtype),
            dbias.to(of_bias),
            None,
            None,
        )


def _launched(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    dim = x.shape[-1]
    rows = None if branch is None else branch.reshape(-1, dim)
    total, out = layer_kernels.forward(x.reshape(-1, dim), rows, weight, bias, eps, dtype)
    return None if branch is None else total.view(x.shape), out.view(x.shape)


def _fused(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor]:
    # a Function without gradients costs a CPU more than the launch's other half; profilers see no
    # launch of no operator
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    run = _AddLayerNormCast.apply if torch.is_grad_enabled() or profiled else _launched
    return run(x, branch, weight, bias, eps, dtype)  # type: ignore[return-value]


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        y = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return y.to(dtype)


def layer_norm_cast(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Normalise the last axis by its mean and variance, in float32 or wider, and round.

    Args:
        x: Inputs, (..., D).
        weight: Factor of every channel, (D,).
        bias: Added to every channel, (D,).
        eps: Added to the variance.
        dtype: Of the result.

    Returns:
        (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, (..., D).

    Source: Ba et al. 2016, arXiv 1607.06450.
    """
    if runs_kernels(x, weight, bias):
        return _fused(x, None, weight, bias, eps, dtype)[1]
    return _in_parts(x, weight, bias, eps, dtype)


def add_layer_norm_cast(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Add a branch to a residual stream, and normalise the sum as `layer_norm_cast` does.

    Args:
        x: Stream, (..., D).
        branch: Same shape; any floating dtype.
        weight: Factor of every channel, (D,).
        bias: Added to every channel, (D,).
        eps: Added to the variance.
        dtype: Of the norm; the sum has the wider one of `x` and `branch`.

    Returns:
        The sum and its norm, (..., D).
    """
    if x.shape == branch.shape and runs_kernels(x, weight, bias, branch):
        total, out = _fused(x, branch, weight, bias, eps, dtype)
        assert total is not None
        return total, out
    total = x + branch
    return total, _in_parts(total, weight, bias, eps, dtype)
