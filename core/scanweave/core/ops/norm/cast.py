"""RMS norm that rounds to another dtype as it writes: what a float32 stream needs under autocast.

Norm and cast are one pass over memory, and the gradient comes back in the stream's dtype. Compilers
fuse the two by themselves, so they see PyTorch's own operators.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import is_real, on_kernels, without_autocast
from . import kernels
from .op import MAX_KERNEL_SIZE


class _RmsNormCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        dim = x.shape[-1]
        out = kernels.forward(x.reshape(-1, dim), weight, None, eps, dim, False, dtype)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dim = x.shape[-1]
        rows = (dout.reshape(-1, dim), x.reshape(-1, dim))
        dx, dweight, _ = kernels.backward(*rows, weight, None, ctx.eps, dim, False)
        return dx.view(x.shape), dweight.to(weight.dtype), None, None


def runs_kernels(x: Tensor, *others: Tensor) -> bool:
    """Whether a norm of `x` (..., D) is a kernel's: not for tracers, compilers and wide rows."""
    return is_real(x) and on_kernels(x, *others) and x.shape[-1] <= MAX_KERNEL_SIZE


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
        return _RmsNormCast.apply(x, weight, eps, dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        y = F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)
    return y.to(dtype)
