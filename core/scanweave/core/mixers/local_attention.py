"""Causal softmax attention to the last tokens, with a state that does not grow.

    y[i] = sum_j softmax_j(scale q[i] k[j]) v[j],   i - window < j <= i, or j < prefix

The state holds keys and values of the first `prefix` tokens and of the last `window` - 1, rotated
already, and how many tokens there were. This is the attention of hybrids (Griffin, Samba, BASED,
Hymba), which keeps them as cheap to run on as their recurrent layers are.

Letters: B batch, L length, G heads of keys and values, P channels a head, W window, M prefix.

Source: Beltagy et al. 2020, arXiv 2004.05150, section 3.1, of which this is the causal form.
"""

import torch
from torch import Tensor

from ..ops.checks import computing_dtype
from .attention import Attention
from .base import Mixer, State, register_mixer


@register_mixer(
    "local_attention",
    primitive="sequence_attention",
    paper="Beltagy et al. 2020, arXiv 2004.05150",
    parity="2e-7 (float32), transformers' RecurrentGemmaAttention",
)
class LocalAttention(Attention):
    """Causal attention within a window: recurrent, its state is the window.

    Args:
        d_model: Channels D of the sequence.
        num_heads: Heads H, dividing E. None takes heads of 64 channels of D, or one head.
        num_kv_heads: Heads G of keys and values, dividing H; None is H.
        expand: Channels of all heads together, E = expand * d_model.
        window: Tokens that one sees, itself included.
        prefix: First tokens of a sequence that are seen from outside the window as well.
        rope_fraction: Share of a head's channels that rotate with the place; 0 for no positions.
        rope_base: Base of the rotations' frequencies.
        scale: Factor of the scores; None is P ** -0.5.
        bias: Biases in the projections.
        out_bias: Bias in the last projection; None is as `bias` says.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    causal = True
    recurrent = True
    window: int

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        expand: float = 1,
        window: int = 64,
        prefix: int = 0,
        rope_fraction: float = 1.0,
        rope_base: float = 1e4,
        scale: float | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            expand=expand,
            window=window,
            prefix=prefix,
            rope_fraction=rope_fraction,
            rope_base=rope_base,
            scale=scale,
            bias=bias,
            out_bias=out_bias,
            device=device,
            dtype=dtype,
        )

    init_state = Mixer.init_state
    _check_state = Mixer._check_state

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`k` and `v` (M + W - 1, G, P): first tokens, then the last ones; `count` of tokens."""
        dtype = computing_dtype(self.in_proj.weight)
        shape = (self.prefix + self.window - 1, self.num_kv_heads, self.head_dim)
        return {"k": (shape, dtype), "v": (shape, dtype), "count": ((1,), dtype)}

    def _count(self, state: State) -> Tensor:
        return state["count"].detach()[:, 0].round().long()

    def _filled(self, state: State) -> Tensor:
        """Places of the cache that hold tokens; a token in both parts counts as a first one."""
        count, device = self._count(state).unsqueeze(1), state["count"].device
        first = torch.arange(self.prefix, device=device) < count
        last = count + torch.arange(1 - self.window, 0, device=device) >= self.prefix
        return torch.cat([first, last], 1)

    def _cached(
        self,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        state: State | None,
        real: Tensor | None,
    ) -> State:
        before, slots = 0 if state is None else self._count(state).unsqueeze(1), self.window - 1
        past = 0 if state is None else self.prefix + slots
        length = keys.shape[1] - past
        dtype = computing_dtype(self.in_proj.weight)
        if real is None:
            count = torch.full((keys.shape[0], 1), length, device=keys.device)
            order = torch.arange(length, device=keys.device).expand(keys.shape[0], -1)
        else:
            count = real.sum(1, keepdim=True)
            order = torch.argsort(~real, dim=1, stable=True)
        total = count + before
        # token number of every place of the new cache, and where that token lies now
        first = torch.arange(self.prefix, device=keys.device).expand(keys.shape[0], -1)
        last = total + torch.arange(-slots, 0, device=keys.device)
        number = torch.cat([first, last], 1)
        fresh = (number - before).clamp(0, max(length - 1, 0))
        source = past + (order.gather(1, fresh) if length else fresh)
        if state is not None:
            old = torch.cat([first, number[:, self.prefix :] - before + past], 1)
            source = torch.where(number < before, old.clamp(0, max(past - 1, 0)), source)
        held = (number >= 0) & (number < total)
        source = torch.where(held, source, 0)[:, :, None, None]
        found = []
        for v in (keys, values):
            if keys.shape[1] == 0:
                kept = v.new_zeros(v.shape[0], self.prefix + slots, *v.shape[2:])
            else:
                kept = v.gather(1, source.expand(-1, -1, *v.shape[2:]))
                kept = torch.where(held[:, :, None, None], kept, 0)
            found.append(kept.to(dtype))
        return {"k": found[0], "v": found[1], "count": total.to(dtype)}
