"""Phi-Mamba's mixer: Mamba-2 as a student of attention, whose matrix it can imitate.

    u, B, C, z, a = in_proj(x)                     E + G N + G N + E + H channels
    u, B, C       = conv1d(u, B, C)                depthwise, causal, W taps, no activation
    h[t]          = sigmoid(-a[t]) h[t-1] + B[t] u[t]^T       a head: N x P
    y[t]          = C[t] h[t] + D u[t]
    out           = out_proj(y silu(z + z_bias))              no norm

Nothing scales what is written, every head has B and C of its own like keys and queries, and nothing
but the gate follows the scan: with decays of 1 and taps of 1 it is linear attention without a
denominator, so that a teacher's projections of values, keys and queries serve as u, B and C.

Letters: B batch, L length, D model channels, E = expand D inner channels, H heads of P channels, N
state, G groups of heads that share B and C, W taps. Parameter names are those of the published
code's `discrete_mamba2`, so its weights load strictly.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.conv import causal_conv1d, causal_conv1d_step
from ..ops.gated import gated_linear_scan, gated_linear_scan_step
from .base import Mixer, State, register_mixer, with_state
from .matrix_state import check_sizes, head_width, keep_from_decay, scan_matrix


@register_mixer(
    "phi_mamba",
    primitive="gated_linear_scan",
    paper="Bick et al. 2024, arXiv 2408.10189",
    reference="goombalab phi-mamba discrete_mamba2",
    parity="5e-7 (float32)",
)
class PhiMamba(Mixer):
    """The mixer of Phi-Mamba: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: State N a channel.
        d_conv: Taps W of the convolution.
        expand: Inner channels E = expand * d_model.
        headdim: Channels P of a head; by default the largest divisor of E up to 64.
        ngroups: Groups G of heads that share B and C; by default every head has its own.
        conv_bias: Bias in the convolution.
        device: Of the parameters.
        dtype: Of the parameters; D keeps at least float32.

    Raises:
        ValueError: a size is not positive, or heads or groups do not divide what they split.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 1,
        headdim: int | None = None,
        ngroups: int | None = None,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        check_sizes(
            {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand * d_model": inner}
        )
        self.headdim = head_width(inner, headdim)
        self.nheads = inner // self.headdim
        self.ngroups = self.nheads if ngroups is None else ngroups
        if self.ngroups < 1 or self.nheads % self.ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, inner, d_state, d_conv
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        dd = {"device": device, "dtype": dtype}
        self.conv_dim = inner + 2 * self.ngroups * d_state
        width = self.conv_dim + inner + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=False, **dd)
        self.z_bias = nn.Parameter(torch.empty(inner, **dd))
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias, **dd
        )
        self.D = nn.Parameter(torch.empty(self.nheads, device=device, dtype=full))
        self.out_proj = nn.Linear(inner, d_model, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: D = 1, z_bias = 0."""
        for part in (self.in_proj, self.conv1d, self.out_proj):
            part.reset_parameters()
        nn.init.zeros_(self.z_bias)
        nn.init.ones_(self.D)
        keep_from_decay(self.D, self.z_bias)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the last W - 1 inputs of the convolution, and `h`, the scan's state."""
        dtype = computing_dtype(self.in_proj.weight)
        return {
            "conv": ((self.d_conv - 1, self.conv_dim), dtype),
            "h": ((self.nheads, self.d_state, self.headdim), dtype),
        }

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is convolved, the gate, and log decays (..., H) in float32 or float64."""
        u, z, a = self.in_proj(x).split([self.conv_dim, self.d_inner, self.nheads], -1)
        return u, F.silu(z + self.z_bias.to(z.dtype)), -F.softplus(a.to(computing_dtype(a)))

    def _heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (..., H, P), B and C (..., G, N) of what was convolved."""
        shared = self.ngroups * self.d_state
        v, B, C = u.split([self.d_inner, shared, shared], -1)
        return (
            v.unflatten(-1, (self.nheads, self.headdim)),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
        )

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        u, gate, g = self._split(x)
        convolved = causal_conv1d(
            u,
            *self._taps(),
            initial_state=None if state is None else state["conv"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        u, conv = with_state(convolved)
        v, B, C = self._heads(u)
        scan: Callable[..., Any] = gated_linear_scan
        result = scan(
            *(C, B, v, g, None, self.D),
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        y, h = with_state(result)
        after = None if conv is None or h is None else {"conv": conv.to(h.dtype), "h": h}
        return self.out_proj(y.flatten(2) * gate), after

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        u, gate, g = self._split(x)
        v, B, C = self._heads(causal_conv1d_step(u, state["conv"], *self._taps()))
        skip = self.D.expand(v.shape[:2])
        y = gated_linear_scan_step(state["h"], C, B, v, g, None, skip)
        return self.out_proj(y.flatten(1) * gate), state

    def _convolved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values, B, C and log decays."""
        u, _, g = self._split(x)
        return *self._heads(causal_conv1d(u, *self._taps())), g

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the convolved values of every head and the scan's outputs."""
        v, B, C, g = self._convolved(x)
        y = gated_linear_scan(C, B, v, g, None, self.D)
        return v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self.out_proj(outputs.transpose(1, 2).flatten(2) * self._split(x)[1])

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: C[t] . B[s] exp(sum g(s, t]), and D; a head each.

        The first stage of the paper's distillation brings it near to a teacher's attention.

        Source: Bick et al. 2024, arXiv 2408.10189.
        """
        _, B, C, g = self._convolved(x)
        matrix = scan_matrix(C, B, g, torch.ones_like(g))
        eye = torch.eye(x.shape[1], dtype=matrix.dtype, device=x.device)
        return matrix + self.D.to(matrix.dtype)[:, None, None] * eye
