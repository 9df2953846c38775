"""S5: one complex diagonal system over all channels at once, initialised by HiPPO.

    x'(t) = Lambda x(t) + B u(t)                       P / 2 states and their conjugates
    h[t]  = exp(log_a) h[t-1] + factor (B u[t])        zoh or bilinear, a time step per state
    y[t]  = 2 Re(C h[t]) + D u[t]                      C (D, P / 2) complex
    both directions: h and its reverse, with a C each; both read the token itself

after which `activation` gates y, or leaves it. Names and shapes of the parameters are those of
the published code, so its arrays load as they are (the gate's weights transposed).

Letters: B batch, L length, D channels, P states (real ones), J blocks.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.linear import linear_scan, linear_scan_step
from .base import Mixer, State, register_mixer
from .hippo import nplr
from .matrix_state import check_sizes, check_steps, keep_from_decay
from .time_invariant import (
    Discretisation,
    check_discretisation,
    discretise,
    draw_log_steps,
    keep_slow,
    lags,
)

Activation = Literal["half_glu1", "half_glu2", "full_glu", "gelu", "none"]
# states must decay, however the rates are learned
SLOWEST = -1e-4
# a normal distribution cut at two standard deviations has this one
CUT_STD = 0.87962566


@register_mixer(
    "s5",
    primitive="linear_scan",
    paper="Smith et al. 2022, arXiv 2208.04933",
    reference="lindermanlab S5SSM",
    parity="1e-7 (float32)",
)
class S5(Mixer):
    """The S5 layer with its gate: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: States P, even; by default about as many as channels.
        blocks: HiPPO matrices J that the states start from, each of P / J states.
        discretisation: "zoh" or "bilinear".
        activation: What follows y, with a = gelu(y): "half_glu1" a sigmoid(out2 a), "half_glu2"
            y sigmoid(out2 a), "full_glu" (out1 a) sigmoid(out2 a), "gelu" a, "none" y itself.
        c_init: "truncated" draws C for the HiPPO states and turns it, "normal" for the diagonal.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        rate: Multiplies all time steps: 0.5 for inputs sampled twice as finely as in training.
        device: Of the parameters.
        dtype: Of the parameters; Lambda_re, Lambda_im, log_step and D keep at least float32.

    Raises:
        ValueError: a size is not positive, P is not 2 J times a number, or an option is unknown.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        blocks: int = 1,
        discretisation: Discretisation = "zoh",
        activation: Activation = "half_glu1",
        c_init: Literal["truncated", "normal"] = "truncated",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        rate: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"d_model": d_model, "blocks": blocks})
        unit = 2 * blocks
        states = -(-d_model // unit) * unit if d_state is None else d_state
        if states < 1 or states % unit:
            raise ValueError(f"d_state must be a multiple of 2 * blocks = {unit}, got {states}")
        check_steps(dt_min, dt_max)
        check_discretisation(discretisation)
        if activation not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise ValueError(f"activation must be one of {known}, got {activation!r}")
        if c_init not in ("truncated", "normal"):
            raise ValueError(f"c_init must be 'truncated' or 'normal', got {c_init!r}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        self.d_model, self.d_state, self.blocks = d_model, states, blocks
        self.discretisation: Discretisation = discretisation
        self.activation, self.c_init = activation, c_init
        self.dt_min, self.dt_max, self.rate = dt_min, dt_max, rate
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        half = states // 2
        self.Lambda_re = nn.Parameter(torch.empty(half, device=device, dtype=full))
        self.Lambda_im = nn.Parameter(torch.empty_like(self.Lambda_re))
        self.log_step = nn.Parameter(torch.empty(half, 1, device=device, dtype=full))
        self.B = nn.Parameter(torch.empty(half, d_model, 2, **dd))
        for name in self._readouts():
            self.register_parameter(name, nn.Parameter(torch.empty(d_model, half, 2, **dd)))
        self.D = nn.Parameter(torch.empty(d_model, device=device, dtype=full))
        self.out1 = nn.Linear(d_model, d_model, **dd) if activation == "full_glu" else None
        self.out2 = nn.Linear(d_model, d_model, **dd) if "glu" in activation else None
        self.reset_parameters()

    def _readouts(self) -> tuple[str, ...]:
        """Names of the matrices C, one a direction."""
        return ("C",) if self.causal else ("C1", "C2")

    def reset_parameters(self) -> None:
        """Draw every parameter anew: rates of the normal part of HiPPO, J times."""
        keep_slow(self.Lambda_re, self.Lambda_im, self.log_step, self.B)
        keep_from_decay(self.D)
        size = self.d_state // self.blocks
        rates, _, _, V = nplr("legs", size)
        V = V.to(self.B.device)
        with torch.no_grad():
            self.Lambda_re.copy_(rates.real.repeat(self.blocks))
            self.Lambda_im.copy_(rates.imag.repeat(self.blocks))
            draw_log_steps(self.log_step, self.dt_min, self.dt_max)
            into = self._cut_normal(self.blocks, size, self.d_model)
            into = (V.mH @ into.to(V.dtype)).flatten(0, 1)
            self.B.copy_(torch.view_as_real(into.resolve_conj()))
            for name in self._readouts():
                C = self.get_parameter(name)
                if self.c_init == "normal":
                    C.normal_(std=0.5**0.5)
                    continue
                parts = self._cut_normal(2, self.d_model, self.blocks, size)
                out = (torch.complex(parts[0], parts[1]) @ V).flatten(1)
                C.copy_(torch.view_as_real(out))
            self.D.normal_()
        for linear in (self.out1, self.out2):
            if linear is not None:
                linear.reset_parameters()

    def _cut_normal(self, *shape: int) -> Tensor:
        """Draws of variance 1 / P, none beyond two standard deviations, in float64."""
        std = self.d_state**-0.5 / CUT_STD
        v = torch.empty(*shape, device=self.B.device, dtype=torch.float64)
        return nn.init.trunc_normal_(v, std=std, a=-2 * std, b=2 * std)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the complex states, one of each conjugate pair."""
        double = computing_dtype(self.B) == torch.float64
        return {"h": ((self.d_state // 2,), torch.complex128 if double else torch.complex64)}

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """log_a and the factors of B u, complex, (P / 2,)."""
        dtype = computing_dtype(self.Lambda_re)
        slow = self.Lambda_re.to(dtype).clamp(max=SLOWEST)
        dt = self.rate * self.log_step.to(dtype).exp().squeeze(1)
        return discretise(torch.complex(slow, self.Lambda_im.to(dtype)), dt, self.discretisation)

    def _project(self, x: Tensor) -> Tensor:
        """B x, complex: (..., P / 2)."""
        u = F.linear(x, torch.cat(self.B.unbind(-1)))
        return torch.complex(*u.to(computing_dtype(x, self.B)).chunk(2, -1))

    def _read(self, states: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """Outputs of the states of every direction, (..., P / 2) each."""
        parts = torch.cat([part for h in states for part in (h.real, h.imag)], -1)
        C = [self.get_parameter(name) for name in self._readouts()]
        weight = 2 * torch.cat([part for c in C for part in (c[..., 0], -c[..., 1])], -1)
        y = F.linear(parts.to(weight.dtype), weight)
        y = y + (self.D * x).to(y.dtype)
        if self.activation == "none":
            return y
        a = F.gelu(y, approximate="tanh")
        if self.out2 is None:
            return a
        kept = y if self.activation == "half_glu2" else a if self.out1 is None else self.out1(a)
        return kept * torch.sigmoid(self.out2(a))

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        log_a, factor = self._discrete()
        h, last = linear_scan(
            self._project(x) * factor,
            log_a,
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return self._read((h,), x), {"h": last} if return_state else None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        log_a, factor = self._discrete()
        h = linear_scan_step(state["h"], self._project(x) * factor, log_a)
        return self._read((h,), x), state

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: B x and the states, complex, a state each."""
        u = self._project(x)
        log_a, factor = self._discrete()
        h = linear_scan(u * factor, log_a)
        return u.transpose(1, 2).unsqueeze(-1), h.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        h = outputs.squeeze(-1).transpose(1, 2)
        return self._read(h.chunk(len(self._readouts()), -1), x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: factor exp((t - s) log_a), complex, a state each; for all x."""
        log_a, factor = self._discrete()
        powers = torch.exp(log_a[:, None, None] * lags(x.shape[1], x.device).clamp(min=0))
        matrix = (factor[:, None, None] * powers).tril()
        return matrix.expand(x.shape[0], -1, -1, -1)


@register_mixer(
    "s5_bidirectional",
    primitive="linear_scan",
    paper="Smith et al. 2022, arXiv 2208.04933",
    reference="lindermanlab S5SSM, bidirectional",
    parity="1e-7 (float32)",
)
class BidirectionalS5(S5):
    """S5 with a second readout, of the states from the end; not causal; arguments as `S5`."""

    causal = False
    recurrent = False

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Raise: there is no state."""
        return Mixer.step(self, x, state)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        log_a, factor = self._discrete()
        u = self._project(x) * factor
        forward = linear_scan(u, log_a, cu_seqlens=cu_seqlens)
        backward = linear_scan(u, log_a, reverse=True, cu_seqlens=cu_seqlens)
        return self._read((forward, backward), x), None

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: B x twice, and the states of both directions."""
        u = self._project(x)
        log_a, factor = self._discrete()
        both = [linear_scan(u * factor, log_a, reverse=back) for back in (False, True)]
        values, outputs = torch.cat([u, u], -1), torch.cat(both, -1)
        return values.transpose(1, 2).unsqueeze(-1), outputs.transpose(1, 2).unsqueeze(-1)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: S5's, and its transpose for the states from the end."""
        forward = super().matrix(x)
        return torch.cat([forward, forward.transpose(-1, -2)], 1)
