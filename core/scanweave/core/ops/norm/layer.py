"""Layer norm that rounds to another dtype as it writes, and that adds a residual branch first.

On a GPU in the launch of `cast.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import without_autocast
from .cast import fused, runs_kernels


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
        return fused(x, None, weight, bias, eps, dtype)[1]
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
        return fused(x, branch, weight, bias, eps, dtype)
    total = x + branch
    return total, _in_parts(total, weight, bias, eps, dtype)
