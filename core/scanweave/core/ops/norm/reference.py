"""The definition of the gated RMS norm.

    norm(u) = u / sqrt(mean(u^2) + eps)                 mean over groups of channels
    out     = norm(x * silu(z)) * weight                gate first (Mamba-2)
    out     = norm(x) * weight * silu(z)                norm first (Hydra)

Sums are float32, or float64 if an input is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype


def rms_norm_gated_ref(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    *,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """The definition. Same contract as `rms_norm_gated`."""
    dtype = computing_dtype(x, weight, z)
    u = x.to(dtype)
    gate = None if z is None else F.silu(z.to(dtype))
    if gate is not None and not norm_before_gate:
        u = u * gate
    size = group_size or x.shape[-1]
    parts = u.unflatten(-1, (-1, size))
    parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    out = parts.flatten(-2) * weight.to(dtype)
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(x.dtype)
