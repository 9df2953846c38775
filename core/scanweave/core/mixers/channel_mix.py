"""The channel mix of RWKV: its feed-forward, which sees the neighbouring token as well.

    k, r = key(x share_k + near (1 - share_k)), receptance(x share_r + near (1 - share_r))
    out  = sigmoid(r) value(relu(k)^2)

`near` is the token before (`rwkv_shift.py`), so unlike other feed-forwards it has a state, of one
token, and is built and called as a mixer is: `ChannelMix(d_model)(x, state=, cu_seqlens=, mask=,
return_state=)`, `step`, `init_state` and `state_spec` of `Mixer`. It is no mixer by name, as
`create_mixer` mixes along the sequence.

Letters: B batch, L length, D model channels, F = expand D hidden channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from .base import Mixer, MixerInfo, State
from .matrix_state import check_sizes, keep_from_decay
from .rwkv_shift import (
    check_layer,
    depths,
    fill_shares,
    mixed,
    renamed,
    token_before,
    tokens_around,
)

# of the versions 4 and 5, and of version 6, which has the other token's share
NAMES = {
    "time_mix_k": "time_mix_key",
    "time_mix_r": "time_mix_receptance",
    "time_maa_k": "1 - time_mix_key",
    "time_maa_r": "1 - time_mix_receptance",
}


class ChannelMix(Mixer):
    """RWKV's feed-forward, of the versions 4, 5 and 6: causal, its state is the last token.

    Parameter names are those of transformers' `RwkvFeedForward`; state dicts with the names of
    RWKV-LM's `RWKV_ChannelMix`, `RWKV_CMix_x052` and `RWKV_CMix_x060` load strictly too.

    Args:
        d_model: Channels D of the sequence.
        expand: Hidden channels F = expand * d_model; version 5 and 6 have 3.5.
        layer: Number of the layer, from 0: initial shares depend on how deep it lies.
        num_layers: Layers of the model.
        zero_init: Start value and receptance at 0, as published models do. Nothing but value then
            has a gradient in the first step.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size is not positive, or there is no such layer.
    """

    causal = True
    recurrent = True
    info = MixerInfo(
        "channel_mix",
        primitive="token shift",
        causal=True,
        recurrent=True,
        paper="Peng et al. 2023, arXiv 2305.13048",
        reference="transformers RwkvFeedForward",
    )

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 4,
        layer: int = 0,
        num_layers: int = 1,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(expand * d_model)
        check_sizes({"d_model": d_model, "expand * d_model": hidden})
        check_layer(layer, num_layers)
        self.d_model, self.d_hidden = d_model, hidden
        self.layer, self.num_layers, self.zero_init = layer, num_layers, zero_init
        dd = {"device": device, "dtype": dtype}
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, d_model, **dd))
        self.key = nn.Linear(d_model, hidden, bias=False, **dd)
        self.receptance = nn.Linear(d_model, d_model, bias=False, **dd)
        self.value = nn.Linear(hidden, d_model, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: shares rise with the channel, less steeply in deep layers."""
        shares = (self.time_mix_key, self.time_mix_receptance)
        keep_from_decay(*shares)
        for share in shares:
            fill_shares(share, depths(self.layer, self.num_layers)[1])
        for linear in (self.key, self.receptance, self.value):
            linear.reset_parameters()
        if self.zero_init:
            nn.init.zeros_(self.receptance.weight)
            nn.init.zeros_(self.value.weight)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        renamed(state_dict, prefix, NAMES)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`shift`, the last token."""
        return {"shift": ((self.d_model,), computing_dtype(self.key.weight))}

    def _out(self, x: Tensor, near: Tensor) -> Tensor:
        xk, xr = mixed(x, near, (self.time_mix_key, self.time_mix_receptance))
        value = self.value(F.relu(self.key(xk)).square())
        return torch.sigmoid(self.receptance(xr)) * value

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state["shift"]
        near, last = token_before(x, before, cu_seqlens)
        y = self._out(x, near)
        return y, {"shift": last.to(computing_dtype(self.key.weight))} if return_state else None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        y = self._out(x, state["shift"].to(x.dtype))
        state["shift"].copy_(x)
        return y, state


class BidirectionalChannelMix(ChannelMix):
    """The channel mix with both neighbours, for models that are not causal: no state.

    Half of the channels see the token before, the rest the one after; arguments as `ChannelMix`.
    """

    causal = False
    recurrent = False
    info = MixerInfo(
        "channel_mix_bidirectional",
        primitive="token shift",
        causal=False,
        recurrent=False,
        paper="Duan et al. 2024, arXiv 2403.02308",
    )

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Raise: there is no state."""
        return Mixer.step(self, x, state)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        return self._out(x, tokens_around(x, cu_seqlens)), None
