"""RWKV-4's time mix: an exponentially weighted average of values, gated, with a token shift.

    k, v, r = key(x share_k + near (1 - share_k)), value(...), receptance(...)
    y[t]    = average of v[s], s <= t, by weights exp(k[s] + (t - 1 - s) w), and exp(u + k[t])
    out     = output(sigmoid(r) y)                        w = -exp(time_decay), u = time_first

`near` is the token before (`rwkv_shift.py`). Both directions: the mean of what the average is from
either end, with one w and one u; `near` is then of both neighbours.

The state of an average is the average and the logarithm of its weights' sum: the next token moves
both by a sigmoid, without numerators, denominators and maxima apart.

Letters: B batch, L length, D model channels, E = expand D inner channels, S packed sequences.
Parameter names are those of transformers' `RwkvSelfAttention`, so its weights load strictly;
those of RWKV-LM's `RWKV_TimeMix` (version 4) do too.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.wkv import wkv
from ..ops.wkv.reference import ratio
from .base import Mixer, State, register_mixer
from .matrix_state import check_sizes, keep_from_decay
from .rwkv_shift import (
    check_layer,
    depths,
    fill_decays,
    fill_shares,
    learn_faster,
    mixed,
    renamed,
    token_before,
    tokens_around,
    zigzag_of,
)

NAMES = {
    "time_mix_k": "time_mix_key",
    "time_mix_v": "time_mix_value",
    "time_mix_r": "time_mix_receptance",
}


@register_mixer(
    "rwkv4",
    primitive="wkv",
    paper="Peng et al. 2023, arXiv 2305.13048",
    reference="transformers RwkvSelfAttention",
    parity="2e-7 (float32)",
)
class RWKV4(Mixer):
    """RWKV-4's time mix: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        expand: Averaged channels E = expand * d_model.
        layer: Number of the layer, from 0: initial values depend on how deep it lies.
        num_layers: Layers of the model.
        zero_init: Start output at 0, as published models do. Nothing but output then has a
            gradient in the first step.
        device: Of the parameters.
        dtype: Of the parameters; time_decay and time_first keep at least float32.

    Raises:
        ValueError: a size is not positive, or there is no such layer.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1,
        layer: int = 0,
        num_layers: int = 1,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        check_sizes({"d_model": d_model, "expand * d_model": inner})
        check_layer(layer, num_layers)
        self.d_model, self.d_inner = d_model, inner
        self.layer, self.num_layers, self.zero_init = layer, num_layers, zero_init
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.time_decay = nn.Parameter(torch.empty(inner, device=device, dtype=full))
        self.time_first = nn.Parameter(torch.empty_like(self.time_decay))
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_mix_value = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.key = nn.Linear(d_model, inner, bias=False, **dd)
        self.value = nn.Linear(d_model, inner, bias=False, **dd)
        self.receptance = nn.Linear(d_model, inner, bias=False, **dd)
        self.output = nn.Linear(inner, d_model, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: decays and shares by channel and depth, as in the paper."""
        keep_from_decay(self.time_decay, self.time_first, *self._shares())
        learn_faster((self.time_decay, 2.0), (self.time_first, 3.0))
        depth, rest = depths(self.layer, self.num_layers)
        fill_decays(self.time_decay, -5, 8, depth)
        fill_shares(self.time_mix_key, rest)
        fill_shares(self.time_mix_value, rest, 0.3 * depth)
        fill_shares(self.time_mix_receptance, 0.5 * rest)
        with torch.no_grad():
            self.time_first.copy_(math.log(0.3) + 0.5 * zigzag_of(self.time_first))
        for linear in (self.key, self.value, self.receptance, self.output):
            linear.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.output.weight)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        renamed(state_dict, prefix, NAMES)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`shift`, the last token, `average`, and `log_weight`, of its weights' sum."""
        dtype = computing_dtype(self.key.weight)
        return {
            "shift": ((self.d_model,), dtype),
            "average": ((self.d_inner,), dtype),
            "log_weight": ((self.d_inner,), dtype),
        }

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """See `Mixer.init_state`; what has seen nothing weighs exp(-inf)."""
        state = super().init_state(batch, device=device)
        state["log_weight"].fill_(-math.inf)
        return state

    def _shares(self) -> tuple[nn.Parameter, ...]:
        return self.time_mix_key, self.time_mix_value, self.time_mix_receptance

    def _rates(self) -> tuple[Tensor, Tensor]:
        """Log decay w and bonus u, (E,)."""
        dtype = computing_dtype(self.time_decay)
        return -torch.exp(self.time_decay.to(dtype)), self.time_first.to(dtype)

    def _projected(self, x: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and the gate, (..., E)."""
        xk, xv, xr = mixed(x, near, self._shares())
        return self.key(xk), self.value(xv), torch.sigmoid(self.receptance(xr))

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        near, last = token_before(x, None if state is None else state["shift"], cu_seqlens)
        k, v, r = self._projected(x, near)
        first = None
        if state is not None:
            average = state["average"]
            parts = (average, torch.ones_like(average), state["log_weight"])
            first = torch.stack(parts, 1)
        y, sums = wkv(
            *(k, v, *self._rates()),
            initial_state=first,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        out = self.output(r * y)
        if not return_state:
            return out, None
        n, d, m = sums.unbind(1)
        log_weight = m + torch.log(torch.where(d == 0, 1, d))
        log_weight = torch.where(d == 0, -math.inf, log_weight)
        shift = last.to(sums.dtype)
        return out, {"shift": shift, "average": ratio(n, d), "log_weight": log_weight}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        k, v, r = self._projected(x, state["shift"].to(x.dtype))
        (w, u), average, log_weight = self._rates(), state["average"], state["log_weight"]
        keys, values = k.to(average.dtype), v.to(average.dtype)
        # a token's part of the sum is the sigmoid of the difference of logarithms
        y = torch.lerp(average, values, torch.sigmoid(u + keys - log_weight))
        moved = log_weight + w
        average.copy_(torch.lerp(average, values, torch.sigmoid(keys - moved)))
        log_weight.copy_(torch.logaddexp(moved, keys))
        state["shift"].copy_(x)
        return self.output(r * y.to(v.dtype)), state

    def _near(self, x: Tensor) -> Tensor:
        """The tokens that are mixed in, of a dense batch."""
        return token_before(x, None, None)[0]

    def _averaged(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and averages of a dense batch."""
        k, v, _ = self._projected(x, self._near(x))
        return k, v, wkv(k, v, *self._rates())

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: values and averages, a channel each."""
        _, v, y = self._averaged(x)
        return v.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        r = self._projected(x, self._near(x))[2]
        return self.output(r * outputs.squeeze(-1).transpose(1, 2))

    def _weights(self, k: Tensor) -> Tensor:
        """Weights of the tokens from the first one on, (B, E, L, L); rows sum to 1."""
        w, u = (rate[:, None, None] for rate in self._rates())
        place = torch.arange(k.shape[1], device=k.device)
        span = place.unsqueeze(-1) - place
        own = torch.where(span == 0, u, (span - 1).clamp(min=0) * w)
        logits = k.to(w.dtype).transpose(1, 2).unsqueeze(-2) + own
        return logits.masked_fill(span < 0, -math.inf).softmax(-1)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the weights of every average, a channel each."""
        return self._weights(self._averaged(x)[0])


@register_mixer(
    "rwkv4_bidirectional",
    primitive="wkv",
    paper="Peng et al. 2023, arXiv 2305.13048",
    parity="3e-16 (float64; equations)",
)
class BidirectionalRWKV4(RWKV4):
    """RWKV-4's average from both ends, their mean; not causal; arguments as `RWKV4`.

    Neighbours of both sides as in Vision-RWKV (arXiv 2403.02308), which instead takes one average
    over all tokens.
    """

    causal = False
    recurrent = False

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """Raise: there is no state."""
        return Mixer.init_state(self, batch, device=device)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Raise: there is no state."""
        return Mixer.step(self, x, state)

    def _both(self, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        rates = self._rates()
        y = wkv(k, v, *rates, cu_seqlens=cu_seqlens)
        return 0.5 * (y + wkv(k, v, *rates, reverse=True, cu_seqlens=cu_seqlens))

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        k, v, r = self._projected(x, tokens_around(x, cu_seqlens))
        return self.output(r * self._both(k, v, cu_seqlens)), None

    def _near(self, x: Tensor) -> Tensor:
        return tokens_around(x, None)

    def _averaged(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v, _ = self._projected(x, self._near(x))
        return k, v, self._both(k, v, None)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the mean of both directions' weights, a channel each."""
        k = self._averaged(x)[0]
        return 0.5 * (self._weights(k) + self._weights(k.flip(1)).flip(-1, -2))
