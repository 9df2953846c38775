"""RG-LRU: the recurrent block of Hawk and Griffin, a diagonal recurrence with gated decays.

    y      = gelu(linear_y(x))                     E channels, tanh form
    w      = conv1d(linear_x(x))                   depthwise, causal, W taps, no activation
    i, r   = sigmoid(w W_i + b_i), sigmoid(w W_r + b_r)      block-diagonal, H blocks
    log a  = -8 softplus(recurrent_param) r
    h[t]   = a[t] h[t-1] + sqrt(1 - a[t]^2) i[t] w[t]        at the first token 1 for the root
    out    = linear_out(h y)

Letters: B batch, L length, D model channels, E = expand D inner channels, H blocks of P channels,
W taps, S packed sequences. Parameter names are those of transformers' RecurrentGemma, so its
blocks load strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.conv import causal_conv1d, causal_conv1d_step
from ..ops.linear import linear_scan, linear_scan_step
from .base import Mixer, State, register_mixer, with_state
from .matrix_state import check_sizes, head_width, keep_from_decay

DECAY_SCALE = 8.0
# the root's slope is bounded by 1000: it is infinite for a decay of 1
FLAT_BELOW = 2.5e-7


class RGLRU(nn.Module):
    """The gates of the recurrence: log decays, and what is written into the state.

    Args:
        dim: Channels E.
        block: Channels P of a block of the gates.
        decay_range: Decays of a fully open recurrence gate to the power 1 / 8, at initialisation.
        device: Of the parameters.
        dtype: Of the parameters; recurrent_param keeps at least float32.
    """

    def __init__(
        self,
        dim: int,
        block: int,
        decay_range: tuple[float, float],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.decay_range = decay_range
        blocks = dim // block
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.recurrent_param = nn.Parameter(torch.empty(dim, device=device, dtype=full))
        self.input_gate_weight = nn.Parameter(torch.empty(blocks, block, block, **dd))
        self.input_gate_bias = nn.Parameter(torch.empty(blocks, block, **dd))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(blocks, block, block, **dd))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(blocks, block, **dd))

    def reset_parameters(self) -> None:
        """Draw every parameter anew: squared decays uniform, gates of unit variance."""
        keep_from_decay(self.recurrent_param, self.input_gate_bias, self.recurrent_gate_bias)
        low, high = self.decay_range
        std = self.input_gate_weight.shape[-1] ** -0.5
        with torch.no_grad():
            # softplus(recurrent_param) = -log(u) / 2 for u uniform in [low^2, high^2]
            u = torch.empty_like(self.recurrent_param).uniform_(low**2, high**2)
            self.recurrent_param.copy_(torch.expm1(-0.5 * torch.log(u)).log())
            for weight in (self.input_gate_weight, self.recurrent_gate_weight):
                nn.init.normal_(weight, std=std)
            for bias in (self.input_gate_bias, self.recurrent_gate_bias):
                nn.init.zeros_(bias)

    def forward(self, w: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Log decays and factors of `w`.

        Args:
            w: Inputs of the recurrence, (..., E).
            first: True at first tokens of sequences, broadcastable to (..., 1).

        Returns:
            log a (..., E) and the input's factor (..., E), in float32 or float64.
        """
        dtype = computing_dtype(w, self.recurrent_param)
        weight = torch.cat([self.input_gate_weight, self.recurrent_gate_weight], -1)
        bias = torch.cat([self.input_gate_bias, self.recurrent_gate_bias], -1)
        # a product for every block; einsum would bind the batch's size when exported
        blocks = w.flatten(0, -2).unflatten(-1, (weight.shape[0], weight.shape[1])).transpose(0, 1)
        gates = torch.bmm(blocks, weight).transpose(0, 1).to(dtype) + bias.to(dtype)
        gates = gates.unflatten(0, w.shape[:-1])
        i, r = (gate.flatten(-2) for gate in torch.sigmoid(gates).chunk(2, -1))
        log_a = -DECAY_SCALE * F.softplus(self.recurrent_param.to(dtype)) * r
        rest = -torch.expm1(2 * log_a)
        slope = 0.5 * FLAT_BELOW**-0.5
        bounded = rest.detach().sqrt() + slope * (rest - rest.detach())
        root = torch.where(rest < FLAT_BELOW, bounded, rest.clamp(min=FLAT_BELOW).sqrt())
        return log_a, torch.where(first, 1.0, root) * i


def first_tokens(x: Tensor, started: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """True where a sequence begins that no state continues: (B or 1, L, 1).

    Args:
        x: Inputs, (B, L, D).
        started: Not 0 for sequences that have begun before, (B, 1), or (S, 1) when packed.
        cu_seqlens: Starts of packed sequences, (S + 1,).
    """
    places = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        first = (places == 0)[None, :, None]
        return first if started is None else first & (started == 0)[:, None]
    # sequences without tokens own no place, so that no size depends on values
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), places.to(cu_seqlens.dtype), right=True)
    first = (places == cu_seqlens[owner])[None, :, None]
    return first if started is None else first & (started == 0)[owner][None]


@register_mixer(
    "rg_lru",
    primitive="linear_scan",
    paper="De et al. 2024, arXiv 2402.19427",
    reference="transformers RecurrentGemmaRecurrentBlock",
    parity="3e-7 (float32)",
)
class RGLRUBlock(Mixer):
    """The recurrent block of Hawk and Griffin: causal, with a state of fixed size.

    The first token of a sequence is written as it is, later ones scaled by sqrt(1 - a^2); the
    state knows whether its sequence has begun.

    Args:
        d_model: Channels D of the sequence.
        d_conv: Taps W of the convolution.
        expand: Inner channels E = expand * d_model; RecurrentGemma's lru_width.
        headdim: Channels P of a block of the gates; by default the largest divisor of E up to 64.
        decay_range: Decays of a fully open recurrence gate to the power 1 / 8, at initialisation.
        device: Of the parameters.
        dtype: Of the parameters; recurrent_param keeps at least float32.

    Raises:
        ValueError: a size is not positive, the blocks do not divide E, or decay_range is not
            within (0, 1).
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_conv: int = 4,
        expand: float = 1,
        headdim: int | None = None,
        decay_range: tuple[float, float] = (0.9, 0.999),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        check_sizes({"d_model": d_model, "d_conv": d_conv, "expand * d_model": inner})
        if not 0 < decay_range[0] <= decay_range[1] < 1:
            raise ValueError(f"decay_range must be (low, high) within (0, 1), got {decay_range}")
        self.d_model, self.d_inner, self.d_conv = d_model, inner, d_conv
        self.headdim = head_width(inner, headdim)
        dd = {"device": device, "dtype": dtype}
        self.linear_y = nn.Linear(d_model, inner, **dd)
        self.linear_x = nn.Linear(d_model, inner, **dd)
        self.linear_out = nn.Linear(inner, d_model, **dd)
        self.conv_1d = nn.Conv1d(inner, inner, d_conv, groups=inner, **dd)
        self.rg_lru = RGLRU(inner, self.headdim, decay_range, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: biases 0, projections of unit variance, small taps."""
        for linear in (self.linear_y, self.linear_x, self.linear_out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.conv_1d.weight, std=(0.01 / self.d_conv) ** 0.5)
        assert self.conv_1d.bias is not None
        nn.init.zeros_(self.conv_1d.bias)
        self.rg_lru.reset_parameters()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the convolution's last W - 1 inputs, `h`, and `started`, 1 after a token."""
        dtype = computing_dtype(self.linear_x.weight)
        return {
            "conv": ((self.d_conv - 1, self.d_inner), dtype),
            "h": ((self.d_inner,), dtype),
            "started": ((1,), dtype),
        }

    def _taps(self) -> tuple[Tensor, Tensor | None]:
        return self.conv_1d.weight.squeeze(1), self.conv_1d.bias

    def _gate(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear_y(x), approximate="tanh")

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        convolved = causal_conv1d(
            self.linear_x(x),
            *self._taps(),
            initial_state=None if state is None else state["conv"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        w, conv = with_state(convolved)
        started = None if state is None else state["started"]
        log_a, factor = self.rg_lru(w, first_tokens(x, started, cu_seqlens))
        h, last = linear_scan(
            (w * factor).to(w.dtype),
            log_a,
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        y = self.linear_out(h * self._gate(x))
        if conv is None:
            return y, None
        if cu_seqlens is None:
            begun = last.new_full((x.shape[0], 1), float(x.shape[1] > 0))
        else:
            begun = (cu_seqlens.diff() > 0).to(last.dtype).unsqueeze(1)
        if started is not None:
            begun = torch.maximum(begun, started.detach().to(begun.dtype))
        return y, {"conv": conv.to(last.dtype), "h": last, "started": begun}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        w = causal_conv1d_step(self.linear_x(x), state["conv"], *self._taps())
        log_a, factor = self.rg_lru(w, state["started"] == 0)
        h = linear_scan_step(state["h"], (w * factor).to(w.dtype), log_a)
        state["started"].fill_(1)
        return self.linear_out(h * self._gate(x)), state

    def _scanned(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = causal_conv1d(self.linear_x(x), *self._taps())
        return w, *self.rg_lru(w, first_tokens(x, None, None))

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the convolved inputs and the states, a channel each."""
        w, log_a, factor = self._scanned(x)
        h = linear_scan((w * factor).to(w.dtype), log_a)
        return w.transpose(1, 2).unsqueeze(-1), h.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self.linear_out(outputs.squeeze(-1).transpose(1, 2) * self._gate(x))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: exp(sum log a(s, t]) sqrt(1 - a[s]^2) i[s], a channel each."""
        _, log_a, factor = self._scanned(x)
        total = log_a.transpose(1, 2).cumsum(-1)
        span = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
        return (torch.exp(span) * factor.transpose(1, 2).unsqueeze(-2)).tril()
