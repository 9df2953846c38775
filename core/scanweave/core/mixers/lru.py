"""LRU: a complex diagonal recurrence over all channels at once, with decays drawn on a ring.

    lambda = exp(-exp(nu_log) + i exp(theta_log))            P of them, inside the unit circle
    h[t]   = lambda h[t-1] + exp(gamma_log) (B x[t])         B (P, D) complex
    y[t]   = Re(C h[t]) + D x[t]                             C (D, P) complex
    out    = a sigmoid(b),  a, b = glu(gelu(y))              or y itself without the GLU

Letters: B batch, L length, D channels, P states. Nothing depends on the input but linearly up to
y: the recurrence is time-invariant.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.linear import linear_scan, linear_scan_step
from .base import Mixer, State, register_mixer
from .matrix_state import check_sizes, keep_from_decay

# neither a decay of 0 or 1 nor a phase of 0 has a finite logarithm
SMALLEST = 1e-6


@register_mixer(
    "lru",
    primitive="linear_scan",
    paper="Orvieto et al. 2023, arXiv 2303.06349",
    parity="2e-7 (float32; equations)",
)
class LRU(Mixer):
    """The linear recurrent unit and its gated output: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: States P, complex; by default as many as channels.
        r_min: Smallest absolute value of lambda at initialisation.
        r_max: Largest absolute value of lambda at initialisation.
        max_phase: Largest phase of lambda at initialisation, in radians.
        glu: Gate the output after a GELU, as the paper's blocks do; without it the mixer is linear.
        device: Of the parameters.
        dtype: Of the parameters; D, nu_log, theta_log and gamma_log keep at least float32.

    Raises:
        ValueError: a size is not positive, or the ring is not within the unit circle.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        glu: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        states = d_model if d_state is None else d_state
        check_sizes({"d_model": d_model, "d_state": states})
        if not 0 <= r_min <= r_max <= 1:
            raise ValueError(f"r_min must be in [0, r_max] and r_max <= 1, got {r_min} and {r_max}")
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase must be in (0, 2 pi], got {max_phase}")
        self.d_model, self.d_state = d_model, states
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.nu_log = nn.Parameter(torch.empty(states, device=device, dtype=full))
        self.theta_log = nn.Parameter(torch.empty_like(self.nu_log))
        self.gamma_log = nn.Parameter(torch.empty_like(self.nu_log))
        self.B_re = nn.Parameter(torch.empty(states, d_model, **dd))
        self.B_im = nn.Parameter(torch.empty(states, d_model, **dd))
        self.C_re = nn.Parameter(torch.empty(d_model, states, **dd))
        self.C_im = nn.Parameter(torch.empty(d_model, states, **dd))
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=full))
        self.glu = nn.Linear(d_model, 2 * d_model, **dd) if glu else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: lambda uniform in the ring's area, states of unit variance."""
        keep_from_decay(self.nu_log, self.theta_log, self.gamma_log, self.D)
        with torch.no_grad():
            square = torch.empty_like(self.nu_log).uniform_(self.r_min**2, self.r_max**2)
            square.clamp_(SMALLEST, 1 - SMALLEST)
            self.nu_log.copy_(torch.log(-0.5 * torch.log(square)))
            self.gamma_log.copy_(0.5 * torch.log1p(-square))
            phase = torch.empty_like(square).uniform_(0, 1).clamp_(min=SMALLEST)
            self.theta_log.copy_(torch.log(self.max_phase * phase))
            for part in (self.B_re, self.B_im):
                part.normal_(std=(2 * self.d_model) ** -0.5)
            for part in (self.C_re, self.C_im):
                part.normal_(std=self.d_state**-0.5)
            self.D.normal_()
        if self.glu is not None:
            self.glu.reset_parameters()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the complex states."""
        double = computing_dtype(self.B_re) == torch.float64
        return {"h": ((self.d_state,), torch.complex128 if double else torch.complex64)}

    def _log_a(self) -> Tensor:
        dtype = computing_dtype(self.nu_log)
        return torch.complex(-self.nu_log.to(dtype).exp(), self.theta_log.to(dtype).exp())

    def _project(self, x: Tensor) -> Tensor:
        """B x, complex: (..., P)."""
        u = F.linear(x, torch.cat([self.B_re, self.B_im]))
        return torch.complex(*u.to(computing_dtype(x, self.B_re)).chunk(2, -1))

    def _gamma(self) -> Tensor:
        return self.gamma_log.to(computing_dtype(self.gamma_log)).exp()

    def _read(self, h: Tensor, x: Tensor) -> Tensor:
        parts = torch.cat([h.real, h.imag], -1).to(self.C_re.dtype)
        y = F.linear(parts, torch.cat([self.C_re, -self.C_im], -1))
        y = y + (self.D * x).to(y.dtype)
        return y if self.glu is None else F.glu(self.glu(F.gelu(y)), -1)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        h, last = linear_scan(
            self._project(x) * self._gamma(),
            self._log_a(),
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return self._read(h, x), {"h": last} if return_state else None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        h = linear_scan_step(state["h"], self._project(x) * self._gamma(), self._log_a())
        return self._read(h, x), state

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: B x and the states, complex, a state each."""
        u = self._project(x)
        h = linear_scan(u * self._gamma(), self._log_a())
        return u.transpose(1, 2).unsqueeze(-1), h.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self._read(outputs.squeeze(-1).transpose(1, 2), x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: gamma lambda^(t - s), complex, a state each; the same for all x."""
        places = torch.arange(x.shape[1], device=x.device)
        lag = (places[:, None] - places).clamp(min=0)
        powers = torch.exp(self._log_a()[:, None, None] * lag)
        matrix = (self._gamma()[:, None, None] * powers).tril()
        return matrix.expand(x.shape[0], -1, -1, -1)
