"""What the matrix-state mixers share: the gated norm, initial values, and who reads whom.

Letters: B batch, L length, H heads, G groups, N state, P head channels.
"""

import math

import torch
from torch import Tensor, nn

from ..ops.norm import rms_norm_gated


class GatedRMSNorm(nn.Module):
    """RMS norm over groups of channels, gated before or after: see `rms_norm_gated`.

    Args:
        dim: Channels D.
        group_size: Channels of a group that is normalised on its own.
        norm_before_gate: Gate the normalised values instead of normalising the gated ones.
        eps: Added to the mean square.
        device: Of the weight.
        dtype: Of the weight.
    """

    def __init__(
        self,
        dim: int,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.group_size, self.norm_before_gate, self.eps = group_size, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set every weight to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise `x` (..., D) and gate it by `z`, if given."""
        return rms_norm_gated(
            x,
            self.weight,
            z,
            eps=self.eps,
            group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )


def head_width(inner: int, headdim: int | None) -> int:
    """`headdim`, or the largest divisor of `inner` up to 64.

    Raises:
        ValueError: the heads do not divide the inner channels.
    """
    if headdim is None:
        return max(width for width in range(1, min(inner, 64) + 1) if inner % width == 0)
    if headdim < 1 or inner % headdim:
        raise ValueError(f"headdim must divide the {inner} inner channels, got {headdim}")
    return headdim


def check_sizes(sizes: dict[str, int]) -> None:
    """Raise unless every size is at least 1."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_steps(dt_min: float, dt_max: float) -> None:
    """Raise unless the bounds of initial time steps make sense."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min must be in (0, dt_max], got {dt_min} and {dt_max}")


def draw_dt_bias(bias: Tensor, dt_min: float, dt_max: float, floor: float) -> None:
    """Fill with values whose softplus is log-uniform in [dt_min, dt_max], at least `floor`."""
    with torch.no_grad():
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.empty_like(bias, dtype=torch.float32).uniform_(low, high).exp()
        dt.clamp_(min=floor)
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def keep_from_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that weight decay would pull to meaningless values."""
    for p in parameters:
        p._no_weight_decay = True  # type: ignore[attr-defined]


def scan_matrix(q: Tensor, k: Tensor, g: Tensor, write: Tensor, shift: bool = False) -> Tensor:
    """Weights of an inclusive forward scan, (B, H, L, L): q[t] . k[s] exp(g(s, t]) write[s].

    Args:
        q: Read-out vectors, (B, L, G, N).
        k: Write vectors, as q.
        g: Log decays, (B, L, H).
        write: Factors of what is written, (B, L, H).
        shift: Move every row one token on, as the quasi-separable form does.
    """
    heads, groups = g.shape[2], q.shape[2]
    total = g.transpose(1, 2).cumsum(-1)
    span = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
    dtype = span.dtype
    pairs = torch.einsum("btgn,bsgn->bgts", q.to(dtype), k.to(dtype))
    matrix = (pairs.repeat_interleave(heads // groups, 1) * torch.exp(span)).tril()
    matrix = matrix * write.to(dtype).transpose(1, 2).unsqueeze(-2)
    if not shift:
        return matrix
    return torch.cat([torch.zeros_like(matrix[:, :, :1]), matrix[:, :, :-1]], 2)
