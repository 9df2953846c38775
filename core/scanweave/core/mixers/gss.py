"""GSS, gated state spaces: a narrow diagonal state-space model in a gated unit.

    u    = gelu(to_u(x))                           E = expand D channels
    v    = norm(gelu(to_v(x)))                     H channels, fewer than D
    rate = -exp(Lambda_real) + i exp(Lambda_imag)  N of them, for all channels
    a, B = zero-order hold, a step of 1
    h[t] = a h[t-1] + B v[t]
    y[t] = Re(C h[t]) + param_D v[t]
    out  = to_out(to_gate(y) u)

Letters: B batch, L length, D model channels, E inner channels, H channels of the state-space model,
N its complex states, S packed sequences. Parameter names are those of GSS in
lucidrains/gated-state-spaces-pytorch, which norms its input (`norm=True`) and adds it to the
output; blocks around mixers do both.
"""

from typing import get_args

import torch
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from .base import register_mixer
from .diagonal import DiagonalSSM, Mode, Terms, own_rate, zero_order_hold
from .matrix_state import check_sizes


class SharedRates(nn.Module):
    """The state-space model of GSS and the norm before it.

    Args:
        dim: Channels H.
        d_state: Complex states N of a channel.
        device: Of the parameters.
        dtype: Of the parameters; rates and param_D keep at least float32.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.norm = nn.LayerNorm(dim, **dd)
        self.Lambda_real = nn.Parameter(torch.empty(d_state, device=device, dtype=full))
        self.Lambda_imag = nn.Parameter(torch.empty_like(self.Lambda_real))
        self.C_real = nn.Parameter(torch.empty(dim, d_state, **dd))
        self.C_imag = nn.Parameter(torch.empty(dim, d_state, **dd))
        self.param_D = nn.Parameter(torch.empty(dim, device=device, dtype=full))

    def reset_parameters(self) -> None:
        """Draw every parameter anew, all normal but the norm's."""
        own_rate(self.Lambda_real, self.Lambda_imag)
        self.norm.reset_parameters()
        for p in (self.Lambda_real, self.Lambda_imag, self.C_real, self.C_imag, self.param_D):
            nn.init.normal_(p)

    def forward(self) -> Terms:
        """The discrete model."""
        dtype = computing_dtype(self.Lambda_real)
        re, im = (torch.exp(p.to(dtype)) for p in (self.Lambda_real, self.Lambda_imag))
        rates = torch.complex(-re, im)
        log_a, B = (v.expand(self.C_real.shape) for v in zero_order_hold(rates, rates))
        # states are no pairs, where `diagonal_ssm` reads twice the real part
        return Terms(log_a, B, torch.complex(self.C_real.to(dtype), self.C_imag.to(dtype)) / 2)


@register_mixer(
    "gss",
    primitive="diagonal_ssm",
    paper="Mehta et al. 2022, arXiv 2206.13947",
    reference="lucidrains GSS, with norm=True",
    parity="1e-7 (float32), 2e-13 (float64)",
)
class GSS(DiagonalSSM):
    """Gated state spaces: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: Complex states N of a channel of the state-space model; 512 in the paper.
        d_ssm: Channels H of the state-space model; by default a quarter of D.
        expand: Inner channels E = expand * d_model.
        norm: Norm the input here too, as the reference does.
        mode: "conv", "scan" or "auto", which convolves from 64 tokens on and runs
            shorter sequences in chunks of matrix products; packed ones are never convolved.
        device: Of the parameters.
        dtype: Of the parameters; rates and param_D keep at least float32.

    Raises:
        ValueError: a size is not positive, or the mode is unknown.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_ssm: int | None = None,
        expand: float = 4,
        norm: bool = False,
        mode: Mode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner, narrow = int(expand * d_model), max(d_model // 4, 1) if d_ssm is None else d_ssm
        check_sizes(
            {"d_model": d_model, "d_state": d_state, "d_ssm": narrow, "expand * d_model": inner}
        )
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode}")
        self.d_model, self.d_state, self.d_ssm, self.mode = d_model, d_state, narrow, mode
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(d_model, **dd) if norm else None
        self.to_u = nn.Sequential(nn.Linear(d_model, inner, bias=False, **dd), nn.GELU())
        self.to_v = nn.Sequential(nn.Linear(d_model, narrow, bias=False, **dd), nn.GELU())
        self.dss = SharedRates(narrow, d_state, **dd)
        self.to_gate = nn.Linear(narrow, inner, bias=False, **dd)
        self.to_out = nn.Linear(inner, d_model, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in (self.norm, self.to_u[0], self.to_v[0], self.to_gate, self.to_out):
            if isinstance(module, nn.LayerNorm | nn.Linear):
                module.reset_parameters()
        self.dss.reset_parameters()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the complex states."""
        double = computing_dtype(self.dss.param_D) == torch.float64
        dtype = torch.complex128 if double else torch.complex64
        return {"h": ((self.d_ssm, self.d_state), dtype)}

    def _terms(self) -> Terms:
        return self.dss()

    def _skip(self) -> Tensor:
        return self.dss.param_D

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.norm is None else self.norm(x)
        return self.dss.norm(self.to_v(x)), self.to_u(x)

    def _join(self, y: Tensor, rest: Tensor) -> Tensor:
        return self.to_out(self.to_gate(y) * rest)
