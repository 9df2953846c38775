"""Mamba-2: the block on the matrix-state scan with one decay a head (SSD).

    z, u, B, C, dt = in_proj(x)                    E + E + G N + G N + H channels
    u, B, C        = silu(conv1d(u, B, C))         depthwise, causal, W taps, over all three
    y              = ssd(u, dt, A, B, C, D)        H heads of P = E / H channels
    out            = out_proj(norm(y, z))          RMS norm gated by z, a group for each of G

Letters: B batch, L length, D model channels, E = expand D inner channels, H heads, P head
channels, N state, G groups of heads that share B and C, W taps. Parameter names are those of
mamba_ssm's `Mamba2` and of transformers' `Mamba2Mixer`, so both load strictly.
"""

import math

import torch
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.conv import causal_conv1d, causal_conv1d_step
from ..ops.gated import gated_linear_scan, gated_linear_scan_step, head_steps
from .base import Mixer, State, register_mixer, with_state
from .matrix_state import (
    GatedRMSNorm,
    check_sizes,
    check_steps,
    draw_dt_bias,
    head_width,
    keep_from_decay,
    scan_matrix,
)


@register_mixer(
    "mamba2",
    primitive="ssd",
    paper="Dao & Gu 2024, arXiv 2405.21060",
    reference="mamba_ssm Mamba2, transformers Mamba2Mixer",
    parity="2e-7 (float32)",
)
class Mamba2(Mixer):
    """The Mamba-2 block: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: State N a channel.
        d_conv: Taps W of the convolution.
        expand: Inner channels E = expand * d_model.
        headdim: Channels P of a head; by default the largest divisor of E up to 64.
        ngroups: Groups G of heads that share B and C, and of channels that are normalised.
        A_init_range: Decay rates -A are drawn uniformly from this range.
        norm_before_gate: Gate the normalised output instead of normalising the gated one.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        dt_init_floor: Time steps are clamped to at least this.
        dt_limit: Smallest and largest time step, always.
        bias: Biases in in_proj and out_proj.
        conv_bias: Bias in the convolution.
        device: Of the parameters.
        dtype: Of the parameters; A_log, D and dt_bias keep at least float32.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        norm_before_gate: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        check_sizes(
            {
                "d_model": d_model,
                "d_state": d_state,
                "d_conv": d_conv,
                "expand * d_model": inner,
                "ngroups": ngroups,
            }
        )
        check_steps(dt_min, dt_max)
        if not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"A_init_range must be (low, high) above 0, got {A_init_range}")
        self.headdim = head_width(inner, headdim)
        self.nheads = inner // self.headdim
        if self.nheads % ngroups:
            raise ValueError(f"ngroups must divide the {self.nheads} heads, got {ngroups}")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, inner, d_state, d_conv
        self.ngroups, self.A_init_range, self.dt_limit = ngroups, A_init_range, dt_limit
        self.dt_min, self.dt_max, self.dt_init_floor = dt_min, dt_max, dt_init_floor
        # decays keep float32 in a half precision model: log(16) in bfloat16 is off by 0.4 %
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        dd = {"device": device, "dtype": dtype}
        self.conv_dim = inner + 2 * ngroups * d_state
        width = inner + self.conv_dim + self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, **dd)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias, **dd
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, device=device, dtype=full))
        self.A_log = nn.Parameter(torch.empty_like(self.dt_bias))
        self.D = nn.Parameter(torch.empty_like(self.dt_bias))
        self.norm = GatedRMSNorm(inner, inner // ngroups, norm_before_gate, **dd)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: A uniform, D = 1, time steps log-uniform."""
        for part in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            part.reset_parameters()
        draw_dt_bias(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor)
        with torch.no_grad():
            self.A_log.uniform_(*self.A_init_range).log_()
            self.D.fill_(1)
        keep_from_decay(self.A_log, self.D, self.dt_bias)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the last W - 1 inputs of the convolution, and `h`, the scan's state."""
        dtype = computing_dtype(self.in_proj.weight)
        return {
            "conv": ((self.d_conv - 1, self.conv_dim), dtype),
            "h": ((self.nheads, self.d_state, self.headdim), dtype),
        }

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z, what is convolved, and raw time steps."""
        return self.in_proj(x).split([self.d_inner, self.conv_dim, self.nheads], -1)  # type: ignore[return-value]

    def _heads(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (..., H, P), B and C (..., G, N) of what was convolved."""
        shared = self.ngroups * self.d_state
        v, B, C = u.split([self.d_inner, shared, shared], -1)
        groups = (self.ngroups, self.d_state)
        return v.unflatten(-1, (self.nheads, self.headdim)), *(
            b.unflatten(-1, groups) for b in (B, C)
        )  # type: ignore[return-value]

    def _steps(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Time steps and log decays, (..., H)."""
        steps, decays = head_steps(dt, self.A_log, self.dt_bias, True, self.dt_limit, log=True)
        return steps[0], decays[0]

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        z, u, dt = self._split(x)
        convolved = causal_conv1d(
            u,
            *self._taps(),
            "silu",
            initial_state=None if state is None else state["conv"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        u, conv = with_state(convolved)
        v, B, C = self._heads(u)
        delta, g = self._steps(dt)
        # `ssd` from A_log: its rates are made where the steps are
        result = gated_linear_scan(
            *(C, B, v, g, delta, self.D),
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        y, h = with_state(result)
        after = None if conv is None or h is None else {"conv": conv.to(h.dtype), "h": h}
        return self.out_proj(self.norm(y.flatten(2), z)), after

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        z, u, dt = self._split(x)
        v, B, C = self._heads(causal_conv1d_step(u, state["conv"], *self._taps(), "silu"))
        delta, g = self._steps(dt)
        skip = self.D.expand(v.shape[:2])
        y = gated_linear_scan_step(state["h"], C, B, v, g, delta, skip)
        return self.out_proj(self.norm(y.flatten(1), z)), state

    def _scanned(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, u, dt = self._split(x)
        return *self._heads(causal_conv1d(u, *self._taps(), "silu")), dt

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the convolved values of every head and the scan's outputs."""
        v, B, C, dt = self._scanned(x)
        delta, g = self._steps(dt)
        y = gated_linear_scan(C, B, v, g, delta, self.D)
        return v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        z = self._split(x)[0]
        return self.out_proj(self.norm(outputs.transpose(1, 2).flatten(2), z))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: C[t] . B[s] exp(A sum delta(s, t]) delta[s], and D; a head each.

        Source: Dao & Gu 2024, arXiv 2405.21060, section 3.
        """
        _, B, C, dt = self._scanned(x)
        delta, g = self._steps(dt)
        matrix = scan_matrix(C, B, g, delta)
        eye = torch.eye(x.shape[1], dtype=matrix.dtype, device=x.device)
        return matrix + self.D.to(matrix.dtype)[:, None, None] * eye
