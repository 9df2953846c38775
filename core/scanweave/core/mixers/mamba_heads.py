"""Mamba-1 as hybrids have it: norms on dt, B and C, and heads with projections of their own.

    u, z     = in_proj(x)                                  E channels each
    u        = silu(conv1d(u))                             depthwise, causal, W taps
    r, B, C  = x_proj[h] u[h]                              for each of H heads of E / H channels
    r, B, C  = norm(r), norm(B), norm(C)                   RMS norms with weights, or none
    y        = selective_scan(u, dt_proj[h] r, A, B, C, D) * silu(z)
    out      = out_proj(y)

Jamba and Hymba have one head and norms, Zamba two heads and none. Letters: B batch, L length, D
model channels, E inner channels, H heads, N state, R rank of dt, W taps.

Source: Lieber et al. 2024 (Jamba), arXiv 2403.19887, section 3.4; Glorioso et al. 2024 (Zamba),
arXiv 2405.16712, and its code for the heads.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.conv import causal_conv1d
from ..ops.selective import selective_scan
from .base import register_mixer
from .mamba import Mamba
from .rms_norm import RMSNorm


class HeadLinear(nn.Module):
    """A linear map for every head: (..., H, I) to (..., H, O).

    Args:
        heads: Heads H.
        fan_in: Channels I a head.
        fan_out: Channels O a head.
        bias: Hold a bias (H * O,), which `forward` leaves to the caller.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        heads: int,
        fan_in: int,
        fan_out: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(heads, fan_out, fan_in, **dd))
        self.bias = nn.Parameter(torch.empty(heads * fan_out, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as `nn.Linear` does, and set the bias to 0."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., H, I), without the bias."""
        if self.weight.shape[0] == 1:
            return F.linear(x, self.weight[0])
        rows = x.flatten(0, -3).transpose(0, 1)
        y = torch.bmm(rows, self.weight.transpose(1, 2)).transpose(0, 1)
        return y.unflatten(0, x.shape[:-2])


@register_mixer(
    "mamba_heads",
    primitive="selective_scan",
    paper="Lieber et al. 2024, arXiv 2403.19887",
    parity="3e-7 (float32), transformers' JambaMambaMixer and ZambaMambaMixer",
)
class MambaHeads(Mamba):
    """Mamba with norms on dt, B and C, and with heads; state and step are Mamba's.

    Args:
        d_model: Channels D of the sequence.
        n_heads: Heads H, dividing E; each has its own B, C and time steps.
        bcdt_norm: Normalise dt, B and C before they are used.
        norm_eps: Added to the mean square in those norms.
        d_state: State N a channel.
        d_conv: Taps W of the convolution.
        expand: Inner channels E = expand * d_model.
        dt_rank: Rank R of the time step's projection, "auto" is ceil(d_model / 16).
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        dt_init_floor: Time steps are clamped to at least this.
        bias: Biases in in_proj and out_proj.
        conv_bias: Bias in the convolution.
        device: Of the parameters.
        dtype: Of the parameters; A_log and D keep at least float32.

    Raises:
        ValueError: `n_heads` does not divide E, or a size is not positive.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 1,
        bcdt_norm: bool = True,
        norm_eps: float = 1e-6,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            bias=bias,
            conv_bias=conv_bias,
            device=device,
            dtype=dtype,
        )
        if n_heads < 1 or self.d_inner % n_heads:
            raise ValueError(f"n_heads must divide expand * d_model {self.d_inner}, got {n_heads}")
        self.n_heads, self.bcdt_norm = n_heads, bcdt_norm
        dd = {"device": device, "dtype": dtype}
        width, rank = self.d_inner // n_heads, self.dt_rank
        self.x_proj = HeadLinear(n_heads, width, rank + 2 * d_state, **dd)
        self.dt_proj = HeadLinear(n_heads, rank, width, bias=True, **dd)
        if bcdt_norm:
            self.dt_norm = RMSNorm(rank, eps=norm_eps, **dd)
            self.b_norm = RMSNorm(d_state, eps=norm_eps, **dd)
            self.c_norm = RMSNorm(d_state, eps=norm_eps, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as Mamba does; norms start at 1."""
        super().reset_parameters()
        # Mamba's constructor calls this before there are norms
        for name in ("dt_norm", "b_norm", "c_norm"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters()

    def _scan_inputs(
        self, u: Tensor, suffix: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        heads = u.unflatten(-1, (self.n_heads, -1))
        r, B, C = self.x_proj(heads).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if self.bcdt_norm:
            r, B, C = self.dt_norm(r), self.b_norm(B), self.c_norm(C)
        dt = self.dt_proj(r).flatten(-2)
        a_log, skip = self._decay("")
        bias = self.dt_proj.bias
        assert bias is not None
        return dt, -torch.exp(a_log.to(computing_dtype(a_log))), B, C, skip, bias

    def _core(self, x: Tensor, suffix: str, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        u = self.in_proj(x).chunk(2, -1)[0]
        u = causal_conv1d(u, *self._taps(""), "silu")
        dt, A, B, C, D, bias = self._scan_inputs(u, "")
        y = selective_scan(u, dt, A, B, C, D, dt_bias=bias)
        delta = F.softplus((dt + bias).to(A.dtype)).transpose(1, 2)  # (B, E, L)
        total = delta.cumsum(-1)
        span = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
        # read and write vectors of every head, (B, H, L, N)
        B, C = (v.to(A.dtype).transpose(1, 2) for v in (B, C))
        matrix = torch.zeros_like(span)
        for n in range(self.d_state):
            pair = C[..., n].unsqueeze(-1) * B[..., n].unsqueeze(-2)  # (B, H, L, L)
            pair = pair.repeat_interleave(self.d_inner // self.n_heads, 1)
            matrix += torch.exp(span * A[:, n, None, None]) * pair
        matrix = (matrix * delta.unsqueeze(-2)).tril() + torch.diag_embed(
            D.to(A.dtype).unsqueeze(-1).expand(-1, x.shape[1])
        )
        return u.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1), matrix
