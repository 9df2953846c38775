"""Hydra: both directions of Mamba-2 as one quasi-separable matrix.

    z, u, BC, dt = in_proj(x)                     two sets of B, C and dt: forward and reverse
    u, BC        = silu(conv1d(u, BC))            depthwise, centred, W taps
    y[t]         = forward[t-1] + reverse[t+1] + (fc_D(u[t]) + D) u[t]
    out          = out_proj(norm(y) silu(z))      RMS norm before the gate

The directions share u, A and dt_bias; `forward` and `reverse` are the outputs of `ssd` over u, and
what they weigh the token itself by moves on to its neighbours: fc_D(u) + D is its only weight.

Letters: B batch, L length, D model channels, E = expand D inner channels, H heads, P head
channels, N state, G groups of heads that share B and C, W taps. Parameter names are those of the
official `Hydra`, so its weights load strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv import symmetric_conv1d
from ..ops.gated import bidirectional_gated_linear_scan, head_steps
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

Pair = tuple[Tensor, Tensor]


@register_mixer(
    "hydra",
    primitive="bidirectional_gated_linear_scan",
    paper="Hwang et al. 2024, arXiv 2407.09941",
    reference="goombalab Hydra",
    parity="2e-7 (float32)",
)
class Hydra(Mixer):
    """The Hydra block: not causal, no state.

    Args:
        d_model: Channels D of the sequence.
        d_state: State N a channel and direction.
        d_conv: Taps W of the convolution, odd.
        expand: Inner channels E = expand * d_model.
        headdim: Channels P of a head; by default the largest divisor of E up to 64.
        ngroups: Groups G of heads that share B and C.
        A_init_range: Decay rates -A are drawn uniformly from this range.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        dt_init_floor: Time steps are clamped to at least this.
        dt_limit: Smallest and largest time step, always.
        bias: Biases in in_proj and out_proj.
        conv_bias: Bias in the convolution.
        device: Of the parameters.
        dtype: Of the parameters; A_log, D and dt_bias keep at least float32.
    """

    causal = False
    recurrent = False

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1.0, 1.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
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
        if d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, got {d_conv}")
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
        self.conv_dim = inner + 4 * ngroups * d_state
        width = inner + self.conv_dim + 2 * self.nheads
        self.in_proj = nn.Linear(d_model, width, bias=bias, **dd)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim, bias=conv_bias, **dd
        )
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, device=device, dtype=full))
        self.A_log = nn.Parameter(torch.empty_like(self.dt_bias))
        self.D = nn.Parameter(torch.empty_like(self.dt_bias))
        self.fc_D = nn.Linear(inner, self.nheads, bias=False, **dd)
        self.norm = GatedRMSNorm(inner, None, True, **dd)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: A uniform, D = 1, time steps log-uniform."""
        for part in (self.in_proj, self.conv1d, self.fc_D, self.norm, self.out_proj):
            part.reset_parameters()
        draw_dt_bias(self.dt_bias, self.dt_min, self.dt_max, self.dt_init_floor)
        with torch.no_grad():
            self.A_log.uniform_(*self.A_init_range).log_()
            self.D.fill_(1)
        keep_from_decay(self.A_log, self.D, self.dt_bias)

    def _scan_inputs(
        self, x: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Pair, Pair, Pair, Pair, Tensor]:
        """Gate z; values (B, L, H, P); pairs C, B, log decay and time step; the diagonal."""
        z, u, dt = self.in_proj(x).split([self.d_inner, self.conv_dim, 2 * self.nheads], -1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        u = symmetric_conv1d(u, weight, bias, "silu", cu_seqlens=cu_seqlens)
        shared = self.ngroups * self.d_state
        u, *vectors = u.split([self.d_inner, *(shared,) * 4], -1)
        groups = (self.ngroups, self.d_state)
        B, C, B_reverse, C_reverse = (b.unflatten(-1, groups) for b in vectors)
        # both directions have one A and one bias
        delta, g = head_steps(dt, self.A_log, self.dt_bias, True, self.dt_limit, sets=2, log=True)
        diagonal = F.linear(u, self.fc_D.weight) + self.D
        v = u.unflatten(-1, (self.nheads, self.headdim))
        pairs = ((C, C_reverse), (B, B_reverse), g, delta)
        return z, v, *pairs, diagonal  # type: ignore[return-value]

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        z, v, C, B, g, delta, diagonal = self._scan_inputs(x, cu_seqlens)
        y = bidirectional_gated_linear_scan(
            *(C, B, v, g, delta, diagonal), form="quasi_separable", cu_seqlens=cu_seqlens
        )
        return self.out_proj(self.norm(y.flatten(2), z)), None

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the convolved values of every head and the mixed ones."""
        _, v, C, B, g, delta, diagonal = self._scan_inputs(x, None)
        y = bidirectional_gated_linear_scan(C, B, v, g, delta, diagonal, form="quasi_separable")
        return v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        z = self._scan_inputs(x, None)[0]
        return self.out_proj(self.norm(outputs.transpose(1, 2).flatten(2), z))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the quasi-separable matrix, one a head.

        Source: Hwang et al. 2024, arXiv 2407.09941, section 3.
        """
        _, _, C, B, g, delta, diagonal = self._scan_inputs(x, None)
        lower = scan_matrix(C[0], B[0], g[0], delta[0], shift=True)
        flipped = (v[1].flip(1) for v in (C, B, g, delta))
        upper = scan_matrix(*flipped, shift=True).flip(-1, -2)
        return lower + upper + torch.diag_embed(diagonal.to(lower.dtype).transpose(1, 2))
