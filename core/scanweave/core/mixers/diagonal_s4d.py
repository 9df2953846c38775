"""S4D: one small diagonal state-space model a channel, discretised from continuous time.

    A    = -exp(log_A_real) + i A_imag                  rates, one of each conjugate pair
    a, B = zero-order hold or bilinear, dt = exp(log_dt)
    h[t] = a h[t-1] + B x[t]
    y[t] = 2 Re(C h[t]) + D x[t]                        C h[t] + D x[t] of real rates
    out  = u sigmoid(v),  u, v = output_linear(gelu(y))

Both directions: y[t] also has 2 Re(C' g[t + 1]), with g[t] = a g[t + 1] + B x[t] and a read-out C'
of its own. B of the continuous model is 1; legs has one of its own, which only ever appears times
C and is drawn into it.

Letters: B batch, L length, D channels, N states of a channel (pairs, if complex), S packed
sequences. Parameter names are those of S4D in s4's models/s4/s4d.py, so its weights load strictly.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from .base import register_mixer
from .diagonal import BothDirections, DiagonalSSM, Mode, Terms, bilinear, own_rate, zero_order_hold
from .hippo import nplr
from .matrix_state import check_sizes, check_steps

Init = Literal["lin", "inv", "legs", "quad", "real"]
Discretisation = Literal["zoh", "bilinear"]


def initial_rates(init: Init, states: int) -> tuple[Tensor, Tensor]:
    """A and B of the continuous model, complex128 (N,) on the CPU, imaginary parts at least 0.

    Source: Gu et al. 2022, arXiv 2206.11893, section 4.
    """
    n = torch.arange(states, dtype=torch.float64, device="cpu")
    if init == "legs":
        normal = nplr("legs", 2 * states, clip=2.0)
        return normal.eigenvalues, normal.B
    half, size = torch.full_like(n, -0.5), 2 * states
    imaginary = {
        "lin": math.pi * n,
        "inv": size / math.pi * (size / (2 * n + 1) - 1),
        "quad": (2 * n + 1).square() / math.pi,
        "real": torch.zeros_like(n),
    }[init]
    A = torch.complex(-(n + 1) if init == "real" else half, imaginary)
    return A, torch.ones_like(A)


class S4DKernel(nn.Module):
    """Rates, time steps and read-outs of S4D.

    Args:
        dim: Channels D.
        d_state: Size of a channel's state in real numbers: 2 N, or N of real rates.
        init: Rates at initialisation.
        disc: How the rates are discretised.
        directions: Read-outs, 1 or 2.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        device: Of the parameters.
        dtype: Of the parameters; log_dt, log_A_real and A_imag keep at least float32.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        init: Init,
        disc: Discretisation,
        directions: int,
        dt_min: float,
        dt_max: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init: Init = init
        self.disc: Discretisation = disc
        self.log_range = (math.log(dt_min), math.log(dt_max))
        real = init == "real"
        shape = (dim, d_state if real else d_state // 2)
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.log_dt = nn.Parameter(torch.empty(dim, device=device, dtype=full))
        self.log_A_real = nn.Parameter(torch.empty(*shape, device=device, dtype=full))
        if not real:
            self.A_imag = nn.Parameter(torch.empty_like(self.log_A_real))
        shape = shape if directions == 1 else (directions, *shape)
        self.C = nn.Parameter(
            torch.empty(*shape, *(() if real else (2,)), device=device, dtype=dtype)
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew: log-uniform time steps, read-outs of variance 1."""
        own_rate(*(p for name, p in self.named_parameters() if name != "C"))
        A, B = initial_rates(self.init, self.log_A_real.shape[1])
        with torch.no_grad():
            self.log_dt.uniform_(*self.log_range)
            self.log_A_real.copy_(torch.log(-A.real).expand_as(self.log_A_real))
            if self.init == "real":
                self.C.normal_()
                return
            self.A_imag.copy_(A.imag.expand_as(self.A_imag))
            C = torch.empty_like(self.C, dtype=torch.float64).normal_(std=0.5**0.5)
            C = torch.view_as_complex(C) * B.to(C.device)
            self.C.copy_(torch.view_as_real(C))

    def forward(self) -> Terms:
        """The discrete model."""
        dtype = computing_dtype(self.log_dt)
        dt = torch.exp(self.log_dt.to(dtype)).unsqueeze(1)
        A, C = -torch.exp(self.log_A_real.to(dtype)), self.C.to(dtype)
        if self.init == "real":
            return Terms(*zero_order_hold(A, dt * A), C)
        A = torch.complex(A, self.A_imag.to(dtype))
        C = torch.view_as_complex(C.contiguous())
        if self.disc == "zoh":
            return Terms(*zero_order_hold(A, dt * A), C)
        return Terms(*bilinear(dt, dt * A), C)


@register_mixer(
    "s4d",
    primitive="diagonal_ssm",
    paper="Gu et al. 2022, arXiv 2206.11893",
    reference="s4 S4D (models/s4/s4d.py)",
    parity="5e-7 (float32), 6e-13 (float64)",
)
class S4D(DiagonalSSM):
    """Diagonal S4 and its gated output: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: Size of a channel's state in real numbers, even unless the rates are real.
        init: Rates at initialisation: `lin` -1/2 + i pi n, `inv`, `quad`, `legs` (of the normal
            part of HiPPO's LegS), or `real` -(n + 1), with which states stay real.
        disc: "zoh" or "bilinear"; real rates need zoh.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        mode: "conv", "scan" or "auto", which convolves from 64 tokens on and runs
            shorter sequences in chunks of matrix products; packed ones are never convolved.
        device: Of the parameters.
        dtype: Of the parameters; time steps, rates and D keep at least float32.

    Raises:
        ValueError: a size or a name does not fit.
    """

    directions = 1

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Init = "lin",
        disc: Discretisation = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        mode: Mode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"d_model": d_model, "d_state": d_state})
        check_steps(dt_min, dt_max)
        allowed = (("init", init, Init), ("disc", disc, Discretisation), ("mode", mode, Mode))
        for name, value, kind in allowed:
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value}")
        if init != "real" and d_state % 2:
            raise ValueError(f"d_state must be even, complex states are pairs, got {d_state}")
        if init == "real" and disc != "zoh":
            raise ValueError(
                f"disc must be zoh for real rates, whose bilinear decays turn negative, got {disc}"
            )
        self.d_model, self.mode = d_model, mode
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=full))
        self.kernel = S4DKernel(
            *(d_model, d_state, init, disc, self.directions, dt_min, dt_max), **dd
        )
        # a convolution of one tap, as the reference has it
        self.output_linear = nn.Sequential(nn.Conv1d(d_model, 2 * d_model, 1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        nn.init.normal_(self.D)
        self.kernel.reset_parameters()
        linear = self.output_linear[0]
        assert isinstance(linear, nn.Conv1d)
        linear.reset_parameters()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the states, complex unless the rates are real."""
        double = computing_dtype(self.D) == torch.float64
        dtype = torch.float64 if double else torch.float32
        complex_dtype = torch.complex128 if double else torch.complex64
        shape = tuple(self.kernel.log_A_real.shape)
        return {"h": (shape, dtype if self.kernel.init == "real" else complex_dtype)}

    def _terms(self) -> Terms:
        return self.kernel()

    def _skip(self) -> Tensor:
        return self.D

    def _join(self, y: Tensor, rest: Tensor) -> Tensor:
        linear = self.output_linear[0]
        assert isinstance(linear, nn.Conv1d)
        return F.glu(F.linear(F.gelu(y), linear.weight.squeeze(-1), linear.bias), -1)


@register_mixer(
    "s4d_bidirectional",
    primitive="diagonal_ssm",
    paper="Gu et al. 2022, arXiv 2206.11893",
    parity="3e-7 (float32), 6e-13 (float64)",
)
class BidirectionalS4D(BothDirections, S4D):
    """S4D over the whole sequence, a read-out a direction; not causal; arguments as `S4D`."""
