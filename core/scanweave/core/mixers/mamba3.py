"""Mamba-3: trapezoidal writes and a state that turns by angles which the input chooses.

    z, v, B, C, dt, a, trap, angle = in_proj(x)    E + E + G N + G N + 3 H + R channels
    delta  = softplus(dt + dt_bias)                alpha = exp(-delta rate(a)), rate > 0
    lambda = sigmoid(trap)                         theta[t] = theta[t-1] + delta pi tanh(angle)
    k, q   = turned(norm(B) + B_bias, norm(C) + C_bias), both by theta
    h[t]   = alpha (h[t-1] + (1 - lambda) delta k[t-1] v[t-1]^T) + lambda delta k[t] v[t]^T
    y[t]   = q[t] h[t] + D v[t]
    out    = out_proj(y silu(z))                   or out_proj(norm(y) silu(z)), a group a head

Token s is written with lambda[s] delta[s] at step s and with (1 - lambda) delta of step s + 1, so
one matrix-state scan does it, with both as its write factor and an exclusive reading of alpha q:
all later tokens read the sum, and token s itself, which reads the first one only, by the skip
lambda delta (q . k) + D (turning q and k by one angle does not change q . k).

Letters: B batch, L length, D model channels, E = expand D inner channels, H heads of P channels,
N state, R angles, G groups of heads that share B and C, S packed sequences. Parameter names are
those of mamba_ssm's `Mamba3` with a single input and output (`is_mimo=False`).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.gated import gated_linear_scan, gated_linear_scan_step
from ..ops.linear import linear_scan
from ..ops.norm import rms_norm_gated
from ..ops.rotate import rotate_both
from .base import Mixer, State, register_mixer
from .matrix_state import (
    GatedRMSNorm,
    check_sizes,
    check_steps,
    draw_dt_bias,
    head_width,
    keep_from_decay,
    scan_matrix,
)


class _StateNorm(nn.Module):
    """RMS norm over the state's N channels."""

    def __init__(self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_gated(x, self.weight)


class _Tokens(NamedTuple):
    """What the tokens of a sequence, or one token, bring; without a length axis for one."""

    z: Tensor  # (B, L, E)
    v: Tensor  # (B, L, H, P)
    k: Tensor  # (B, L, H, N), not turned
    q: Tensor
    g: Tensor  # (B, L, H), log decay
    now: Tensor  # (B, L, H), lambda delta
    again: Tensor  # (B, L, H), (1 - lambda) delta: how the last token is written once more
    turn: Tensor  # (B, L, H, R), what is added to the angles

    def reading(self, q: Tensor) -> Tensor:
        """`q` decayed by its own step, for a scan that reads the state before it."""
        return (q * torch.exp(self.g).unsqueeze(-1)).to(self.v.dtype)


def wrapped(angles: Tensor) -> Tensor:
    """The same angles between 0 and 2 pi."""
    return torch.remainder(angles, 2 * math.pi)


@register_mixer(
    "mamba3",
    primitive="gated_linear_scan",
    paper="Lahoti et al. 2026, arXiv 2603.15569",
    reference="mamba_ssm Mamba3 (single input)",
    parity="2e-14 (float64; equations)",
)
class Mamba3(Mixer):
    """The Mamba-3 block with a single input and output: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: State N a channel, even.
        expand: Inner channels E = expand * d_model.
        headdim: Channels P of a head; by default the largest divisor of E up to 64.
        ngroups: Groups G of heads that share B and C before their biases and angles.
        rope_fraction: Share of the state's channels that turn, up to 1.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        dt_init_floor: Time steps are clamped to at least this.
        A_floor: Smallest decay rate.
        is_outproj_norm: Normalise the output of every head before the gate.
        device: Of the parameters.
        dtype: Of the parameters; dt_bias, B_bias, C_bias and D keep at least float32.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_floor: float = 1e-4,
        is_outproj_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        sizes = {"d_model": d_model, "d_state": d_state, "expand * d_model": inner}
        check_sizes(sizes | {"ngroups": ngroups})
        check_steps(dt_min, dt_max)
        angles = int(d_state * rope_fraction) // 2
        if d_state % 2:
            raise ValueError(f"d_state must be even, its channels turn in pairs, got {d_state}")
        if not 1 <= angles <= d_state // 2:
            raise ValueError(
                f"rope_fraction must turn 1 to {d_state // 2} pairs of channels, "
                f"got {rope_fraction}"
            )
        if A_floor < 0:
            raise ValueError(f"A_floor must be at least 0, got {A_floor}")
        self.headdim = head_width(inner, headdim)
        self.nheads = inner // self.headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        self.d_model, self.d_inner, self.d_state = d_model, inner, d_state
        self.ngroups, self.num_angles, self.A_floor = ngroups, angles, A_floor
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        dd = {"device": device, "dtype": dtype}
        self.widths = [inner, inner, *[ngroups * d_state] * 2, *[self.nheads] * 3, angles]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False, **dd)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, device=device, dtype=full))
        # the axis of length 1 counts inputs
        bias = torch.empty(self.nheads, 1, d_state, device=device, dtype=full)
        self.B_bias, self.C_bias = nn.Parameter(bias), nn.Parameter(bias.clone())
        self.B_norm, self.C_norm = (_StateNorm(d_state, device, dtype) for _ in range(2))
        self.D = nn.Parameter(torch.empty_like(self.dt_bias))
        self.norm = GatedRMSNorm(inner, self.headdim, True, **dd) if is_outproj_norm else None
        self.out_proj = nn.Linear(inner, d_model, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: biases of B and C and D are 1, time steps log-uniform."""
        for linear in (self.in_proj, self.out_proj):
            linear.reset_parameters()
        draw_dt_bias(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor)
        ones = [self.B_bias, self.C_bias, self.B_norm.weight, self.C_norm.weight, self.D]
        for p in ones if self.norm is None else [*ones, self.norm.weight]:
            nn.init.ones_(p)
        keep_from_decay(self.dt_bias, self.D)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`angle`, how far the state has turned, `h`, the scan's state, and the last `k`, `v`."""
        dtype = computing_dtype(self.in_proj.weight)
        return {
            "angle": ((self.nheads, self.num_angles), dtype),
            "h": ((self.nheads, self.d_state, self.headdim), dtype),
            "k": ((self.nheads, self.d_state), dtype),
            "v": ((self.nheads, self.headdim), dtype),
        }

    def _tokens(self, x: Tensor) -> _Tokens:
        """Everything that does not look at other tokens."""
        z, v, B, C, dt, a, trap, angle = self.in_proj(x).split(self.widths, -1)
        dtype = computing_dtype(self.dt_bias)
        q, k = (
            # groups are repeated, then every head adds its own bias
            norm(u.unflatten(-1, (self.ngroups, -1)))
            .to(dtype)
            .repeat_interleave(self.nheads // self.ngroups, -2)
            + bias.squeeze(1)
            for u, norm, bias in ((C, self.C_norm, self.C_bias), (B, self.B_norm, self.B_bias))
        )
        a = a.to(dtype)
        # 1 + a above 0, 1 / (1 - a) below: positive, with heavy tails
        rate = a.clamp(min=0) + torch.reciprocal(1 - a.clamp(max=0))
        delta = F.softplus(dt.to(dtype) + self.dt_bias)
        share = torch.sigmoid(trap.to(dtype))
        turn = delta.unsqueeze(-1) * (math.pi * torch.tanh(angle.to(dtype))).unsqueeze(-2)
        heads = v.unflatten(-1, (self.nheads, self.headdim))
        g = -delta * rate.clamp(min=self.A_floor)
        return _Tokens(z, heads, k, q, g, share * delta, (1 - share) * delta, turn)

    def _out(self, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        return self.out_proj(y * F.silu(z) if self.norm is None else self.norm(y, z))

    def _scanned(
        self, t: _Tokens, angle: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Turned q and k, write factors, skip weights, and the last angle."""
        still = torch.zeros_like(self.dt_bias).unsqueeze(-1).expand(-1, self.num_angles)
        angles, last = linear_scan(
            t.turn,
            still.to(t.turn.dtype),
            initial_state=angle,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        q, k = rotate_both(t.q, t.k, angles)
        # the next token's share; slices of one token less would tell a compiler about sizes
        if cu_seqlens is None:
            place = torch.arange(1, t.again.shape[1] + 1, device=t.again.device)
            goes_on = place < t.again.shape[1]
        else:
            inner = torch.ones(t.again.shape[1] + 1, dtype=torch.bool, device=t.again.device)
            goes_on = inner.index_fill(0, cu_seqlens.long(), False)[1:]
        later = torch.where(goes_on.unsqueeze(-1), t.again.roll(-1, 1), 0)
        skip = self.D + t.now * (t.q * t.k).sum(-1)
        return q, k, t.now + later, skip, wrapped(last)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        t = self._tokens(x)
        before = None if state is None else state["angle"].to(t.turn.dtype)
        q, k, write, skip, angle = self._scanned(t, before, cu_seqlens)
        ends = None
        if state is not None or return_state:
            ends = _Ends(x, cu_seqlens)
        h = None
        if state is not None and ends is not None:
            last = state["k"].unsqueeze(-1) * state["v"].unsqueeze(-2)
            h = state["h"] + ends.first(t.again)[..., None, None] * last
        y, h = gated_linear_scan(
            *(t.reading(q), k.to(t.v.dtype), t.v, t.g, write, skip),
            exclusive=True,
            initial_state=h,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        out = self._out(y, t.z)
        if not return_state or ends is None:
            return out, None
        before = self.init_state(ends.rows, device=x.device) if state is None else state
        after = {name: ends.last(u, before[name]) for name, u in (("k", k), ("v", t.v))}
        return out, {"angle": angle, "h": h, **after}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        t = self._tokens(x)
        state["angle"].copy_(wrapped(state["angle"] + t.turn))
        q, k = rotate_both(t.q, t.k, state["angle"])
        last = state["k"].unsqueeze(-1) * state["v"].unsqueeze(-2)
        state["h"].add_(t.again[..., None, None] * last)
        state["k"].copy_(k)
        state["v"].copy_(t.v)
        half = t.v.dtype
        skip = self.D.expand(t.v.shape[:2])
        y = gated_linear_scan_step(state["h"], q.to(half), k.to(half), t.v, t.g, t.now, skip)
        return self._out(y, t.z), state

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values of every head and the scan's outputs."""
        t = self._tokens(x)
        q, k, write, skip, _ = self._scanned(t, None, None)
        k = k.to(t.v.dtype)
        y = gated_linear_scan(t.reading(q), k, t.v, t.g, write, skip, exclusive=True)
        return t.v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self._out(outputs.transpose(1, 2), self._tokens(x).z)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: q[t] . k[s] exp(sum g(s, t]) write[s], and skip; a head each."""
        t = self._tokens(x)
        q, k, write, skip, _ = self._scanned(t, None, None)
        earlier = scan_matrix(q, k, t.g, write).tril(-1)
        return earlier + torch.diag_embed(skip.transpose(1, 2))


class _Ends:
    """First and last tokens of sequences, which may be empty; no size depends on values."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        self.length = x.shape[1]
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
        self.rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def first(self, u: Tensor) -> Tensor:
        """`u` (B, L, ...) at the first token of every sequence, 0 where there is none."""
        if self.length == 0:
            return u.new_zeros(self.rows, *u.shape[2:])
        if self.cu_seqlens is None:
            return u[:, 0]
        starts, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        found = u[0].index_select(0, starts.clamp(max=self.length - 1))
        return torch.where(_as(ends > starts, found), found, 0)

    def last(self, u: Tensor, otherwise: Tensor) -> Tensor:
        """`u` at the last token of every sequence in the dtype of `otherwise`, used if none."""
        if self.length == 0:
            return otherwise.clone()
        if self.cu_seqlens is None:
            return u[:, -1].to(otherwise.dtype)
        starts, ends = self.cu_seqlens[:-1], self.cu_seqlens[1:]
        found = u[0].index_select(0, (ends - 1).clamp(min=0)).to(otherwise.dtype)
        return torch.where(_as(ends > starts, found), found, otherwise)


def _as(condition: Tensor, like: Tensor) -> Tensor:
    return condition.reshape(-1, *(1,) * (like.ndim - 1))
