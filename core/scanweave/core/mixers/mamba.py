"""Mamba-1: the causal block, and the bidirectional block of Vision Mamba.

    u, z     = in_proj(x)                                  E channels each
    u        = silu(conv1d(u))                             depthwise, causal, W taps
    r, B, C  = x_proj(u)                                   R + N + N channels
    y        = selective_scan(u, dt_proj(r), A, B, C, D) * silu(z)
    out      = out_proj(y)

The bidirectional block shares in_proj, z and out_proj; everything between exists twice, the
reverse set under names with `_b`, and its convolution and scan run from the end to the start.

Letters: B batch, L length, D model channels, E = expand D inner channels, N state, W taps,
R rank of dt. Parameter names are those of mamba_ssm's `Mamba` and of Vim's, so both load strictly.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import autocast_dtype, computing_dtype
from ..ops.conv import causal_conv1d, causal_conv1d_step
from ..ops.mamba import mamba_block
from ..ops.mamba.weights import Weights, fits, prepared
from ..ops.selective import bidirectional_selective_scan, selective_scan, selective_scan_step
from .base import Mixer, State, register_mixer, with_state


class _MambaBase(Mixer):
    """Projections, sizes and initialisation that both blocks share."""

    _directions: tuple[str, ...] = ("",)

    def __init__(
        self,
        d_model: int,
        *,
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
        super().__init__()
        inner = int(expand * d_model)
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        for name, value in (
            ("d_model", d_model),
            ("d_state", d_state),
            ("d_conv", d_conv),
            ("dt_rank", rank),
            ("expand * d_model", inner),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min must be in (0, dt_max], got {dt_min} and {dt_max}")
        self.d_model, self.d_inner, self.d_state, self.d_conv = d_model, inner, d_state, d_conv
        self.dt_rank, self.dt_min, self.dt_max = rank, dt_min, dt_max
        self.dt_init_floor = dt_init_floor
        # decays keep float32 in a half precision model: log(16) in bfloat16 is off by 0.4 %
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        dd = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **dd)
        for suffix in self._directions:
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias, **dd)
            x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", x_proj)
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner, bias=True, **dd))
            a_log = nn.Parameter(torch.empty(inner, d_state, device=device, dtype=full))
            self.register_parameter(f"A{suffix}_log", a_log)
            skip = nn.Parameter(torch.empty(inner, device=device, dtype=full))
            self.register_parameter(f"D{suffix}", skip)
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: A = -(1 .. N), D = 1, time steps log-uniform."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        for suffix in self._directions:
            conv, x_proj, dt_proj, a_log, skip = self._direction(suffix)
            conv.reset_parameters()
            x_proj.reset_parameters()
            with torch.no_grad():
                nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
                low, high = math.log(self.dt_min), math.log(self.dt_max)
                dt = torch.empty_like(dt_proj.bias, dtype=torch.float32).uniform_(low, high).exp()
                dt.clamp_(min=self.dt_init_floor)
                # softplus of this bias is dt
                dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
                rates = torch.arange(1, self.d_state + 1, device=a_log.device, dtype=a_log.dtype)
                a_log.copy_(rates.log().expand_as(a_log))
                skip.fill_(1)
            for p in (a_log, skip, dt_proj.bias):
                p._no_weight_decay = True  # type: ignore[attr-defined]

    def _direction(
        self, suffix: str
    ) -> tuple[nn.Conv1d, nn.Linear, nn.Linear, nn.Parameter, nn.Parameter]:
        """conv1d, x_proj, dt_proj, A_log and D of one direction."""
        names = (f"conv1d{suffix}", f"x_proj{suffix}", f"dt_proj{suffix}")
        return (*(getattr(self, n) for n in names), *self._decay(suffix))  # type: ignore[return-value]

    def _decay(self, suffix: str) -> tuple[nn.Parameter, nn.Parameter]:
        return getattr(self, f"A{suffix}_log"), getattr(self, f"D{suffix}")

    def _scan_inputs(
        self, u: Tensor, suffix: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """dt, A, B, C, D and the bias of dt for the convolved inputs `u` (..., E)."""
        _, x_proj, dt_proj, a_log, skip = self._direction(suffix)
        r, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = -torch.exp(a_log.to(computing_dtype(a_log)))
        return F.linear(r, dt_proj.weight), A, B, C, skip, dt_proj.bias

    def _taps(self, suffix: str) -> tuple[Tensor, Tensor | None]:
        conv = self._direction(suffix)[0]
        return conv.weight.squeeze(1), conv.bias

    def _whole(self, x: Tensor) -> bool:
        """Whether to run as one operator: in training, and on a GPU, where it takes fewer launches.

        Not if somebody has replaced a projection, or watches it.
        """
        suffixes = self._directions
        linears = [self.in_proj, self.out_proj]
        linears += [getattr(self, f"x_proj{s}") for s in suffixes]
        linears += [getattr(self, f"dt_proj{s}") for s in suffixes]
        plain = all(
            type(m) is nn.Linear and not m._forward_hooks and not m._forward_pre_hooks
            for m in linears
        )
        trains = x.requires_grad or any(p.requires_grad for p in self.parameters())
        return plain and (x.is_cuda or (torch.is_grad_enabled() and trains))

    def _block(self, x: Tensor, cu_seqlens: Tensor | None, scale: float) -> Tensor:
        """All directions as one operator, which keeps less for the backward than its parts do."""
        wanted = autocast_dtype(x)

        def cast(v: Tensor) -> Tensor:
            return v if wanted is None else v.to(wanted)

        parts = [self._direction(suffix) for suffix in self._directions]
        convs, x_projs, dt_projs, a_logs, skips = (list(v) for v in zip(*parts, strict=True))
        inner, outer = self.in_proj, self.out_proj
        x_weights, dt_weights = ([m.weight for m in found] for found in (x_projs, dt_projs))
        weights = Weights(inner.weight, x_weights, dt_weights, outer.weight, a_logs)
        # halving the weight is exact, cheaper than halving y, and leaves the bias alone
        if fits(weights, wanted):
            weights = prepared(weights, scale, wanted)
        else:
            weights = Weights(
                cast(inner.weight),
                [cast(v) for v in x_weights],
                [cast(v) for v in dt_weights],
                cast(outer.weight if scale == 1.0 else scale * outer.weight),
                [-torch.exp(v.to(computing_dtype(v))) for v in a_logs],
            )
        return mamba_block(
            cast(x),
            weights.inner,
            None if inner.bias is None else cast(inner.bias),
            [conv.weight.squeeze(1) for conv in convs],
            [conv.bias for conv in convs if conv.bias is not None],
            weights.x,
            weights.dt,
            weights.A,
            skips,
            [linear.bias for linear in dt_projs],
            weights.outer,
            None if outer.bias is None else cast(outer.bias),
            cu_seqlens,
            [suffix != "" for suffix in self._directions],
        )

    def _core(self, x: Tensor, suffix: str, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Values u, outputs (B, E, L, 1) and matrix (B, E, L, L) of one direction."""
        u = self.in_proj(x).chunk(2, -1)[0]
        u = causal_conv1d(u, *self._taps(suffix), "silu", reverse=reverse)
        dt, A, B, C, D, bias = self._scan_inputs(u, suffix)
        y = selective_scan(u, dt, A, B, C, D, dt_bias=bias, reverse=reverse)
        delta = F.softplus((dt + bias).to(A.dtype)).transpose(1, 2)  # (B, E, L)
        if reverse:
            delta, B, C = delta.flip(-1), B.flip(1), C.flip(1)
        total = delta.cumsum(-1)
        # log decay between s and t, at most 0 where s <= t
        span = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
        matrix = torch.zeros_like(span)
        for n in range(self.d_state):
            pair = C[..., n].unsqueeze(-1) * B[..., n].unsqueeze(-2)
            matrix += torch.exp(span * A[:, n, None, None]) * pair.unsqueeze(1)
        matrix = (matrix * delta.unsqueeze(-2)).tril() + torch.diag_embed(
            D.to(A.dtype).unsqueeze(-1).expand(-1, x.shape[1])
        )
        if reverse:
            matrix = matrix.flip(-1, -2)
        return u.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1), matrix

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the convolved inputs and the scan's outputs before the gate."""
        parts = [self._core(x, s, s != "")[:2] for s in self._directions]
        values, outputs = zip(*parts, strict=True)
        return torch.cat(values, 1), torch.cat(outputs, 1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        z = self.in_proj(x).chunk(2, -1)[1]
        y = outputs.squeeze(-1).unflatten(1, (len(self._directions), -1)).sum(1)
        return self.out_proj(y.transpose(1, 2) * F.silu(z))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: sum_n C[t, n] exp(A[n] sum delta(s, t]) delta[s] B[s, n], and D.

        Source: Ali, Zimerman & Wolf 2024, arXiv 2403.01590, section 3.
        """
        return torch.cat([self._core(x, s, s != "")[2] for s in self._directions], 1)


@register_mixer(
    "mamba",
    primitive="selective_scan",
    paper="Gu & Dao 2023, arXiv 2312.00752",
    reference="mamba_ssm Mamba",
    parity="5e-7 (float32)",
)
class Mamba(_MambaBase):
    """The Mamba block: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
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
    """

    causal = True
    recurrent = True

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the last W - 1 inputs of the convolution, and `h`, the scan's state."""
        dtype = computing_dtype(self.in_proj.weight)
        return {
            "conv": ((self.d_conv - 1, self.d_inner), dtype),
            "h": ((self.d_inner, self.d_state), dtype),
        }

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        u, z = self.in_proj(x).chunk(2, -1)
        convolved = causal_conv1d(
            u,
            *self._taps(""),
            "silu",
            initial_state=None if state is None else state["conv"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        u, conv = with_state(convolved)
        dt, A, B, C, D, bias = self._scan_inputs(u, "")
        y, h = selective_scan(
            u,
            dt,
            A,
            B,
            C,
            D,
            z,
            bias,
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        after = None if conv is None else {"conv": conv.to(h.dtype), "h": h}
        return self.out_proj(y), after

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        u, z = self.in_proj(x).chunk(2, -1)
        u = causal_conv1d_step(u, state["conv"], *self._taps(""), "silu")
        dt, A, B, C, D, bias = self._scan_inputs(u, "")
        return self.out_proj(selective_scan_step(state["h"], u, dt, A, B, C, D, z, bias)), state

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.advance`; on a CPU the states of a few tokens are updated in place."""
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.ndim != 3 or x.shape[1] > 4:
            return super().advance(x, state)
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, L, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        u, z = self.in_proj(x).chunk(2, -1)
        u, conv = causal_conv1d(
            u, *self._taps(""), "silu", initial_state=state["conv"], return_final_state=True
        )
        state["conv"].copy_(conv)
        dt, A, B, C, D, bias = self._scan_inputs(u, "")
        # a scan reads and writes all states anew: 1.0 ms for 64 x 3 tokens, single steps 0.5
        y = [
            selective_scan_step(
                state["h"], u[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], bias
            )
            for t in range(x.shape[1])
        ]
        return self.out_proj(torch.stack(y, 1)), state


@register_mixer(
    "bimamba",
    primitive="bidirectional_selective_scan",
    paper="Zhu et al. 2024, arXiv 2401.09417",
    reference="Vim Mamba, bimamba_type='v2'",
    parity="2e-7 (float32)",
)
class BiMamba(_MambaBase):
    """The bidirectional block of Vision Mamba ("v2"): not causal, no state.

    Args:
        d_model: Channels D of the sequence.
        d_state: State N a channel.
        d_conv: Taps W of the convolutions.
        expand: Inner channels E = expand * d_model.
        dt_rank: Rank R of the time step's projection, "auto" is ceil(d_model / 16).
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        dt_init_floor: Time steps are clamped to at least this.
        bias: Biases in in_proj and out_proj.
        conv_bias: Biases in the convolutions.
        average: Halve the sum of both directions, as Vim's released models do.
        device: Of the parameters.
        dtype: Of the parameters; A_log and D keep at least float32.
    """

    causal = False
    recurrent = False
    _directions = ("", "_b")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        average: bool = True,
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
        self.average = average

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return super().finish(x, 0.5 * outputs if self.average else outputs)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if self._whole(x):
            return self._block(x, cu_seqlens, 0.5 if self.average else 1.0), None
        u, z = self.in_proj(x).chunk(2, -1)
        forth = causal_conv1d(u, *self._taps(""), "silu", cu_seqlens=cu_seqlens)
        back = causal_conv1d(u, *self._taps("_b"), "silu", cu_seqlens=cu_seqlens, reverse=True)
        pairs = zip(self._scan_inputs(forth, ""), self._scan_inputs(back, "_b"), strict=True)
        dt, A, B, C, D, bias = pairs
        y = bidirectional_selective_scan(
            (forth, back), dt, A, B, C, D, z, bias, cu_seqlens=cu_seqlens
        )
        if not self.average:
            return self.out_proj(y), None
        # halving the weight is exact, cheaper than halving y, and leaves the bias alone
        return F.linear(y, 0.5 * self.out_proj.weight, self.out_proj.bias), None
