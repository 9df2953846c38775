"""Softmax attention as a mixer: the control that state-space mixers are compared with.

    q, k, v = in_proj(x) ;  y = softmax(q k^T / sqrt(P)) v ;  out = out_proj(y)

`sequence_attention` does the work. Letters: B batch, L length, D model channels, H heads, G heads
of keys and values, P channels a head, S packed sequences.

Source: Vaswani et al. 2017, arXiv 1706.03762.
"""

import torch
from torch import Tensor, nn

from ..ops.attention import sequence_attention, visible
from ..ops.checks import check_cu_seqlens_values
from .base import Mixer, State, register_mixer


@register_mixer(
    "attention",
    primitive="sequence_attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
)
class Attention(Mixer):
    """Causal softmax attention. Its state is the cache of keys and values, which grows.

    Args:
        d_model: Channels D of the sequence.
        num_heads: Heads H; D must be a multiple. None takes heads of 64 channels, or one head.
        num_kv_heads: Heads G of keys and values, dividing H; None is H.
        window: Tokens that one sees, itself included (to both sides if not causal); None is all.
        bias: Biases in the projections.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    causal = True

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        window: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = d_model // 64 if d_model >= 64 and d_model % 64 == 0 else 1
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model {d_model}, got {num_heads}")
        if num_kv_heads is None:
            num_kv_heads = num_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.window, self.head_dim = window, d_model // num_heads
        dd = {"device": device, "dtype": dtype}
        width = (num_heads + 2 * num_kv_heads) * self.head_dim
        self.in_proj = nn.Linear(d_model, width, bias=bias, **dd)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """An empty cache: `k` and `v` (B, 0, G, P), and `real` (B, 0), False at padding."""
        if not self.causal:
            return super().init_state(batch, device=device)
        weight = self.in_proj.weight
        empty = torch.zeros(
            batch,
            0,
            self.num_kv_heads,
            self.head_dim,
            device=device or weight.device,
            dtype=weight.dtype,
        )
        return {"k": empty, "v": empty.clone(), "real": empty.new_zeros(batch, 0, dtype=torch.bool)}

    def _check_state(self, state: State, x: Tensor, cu_seqlens: Tensor | None) -> None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state.keys() != {"k", "v", "real"}:
            raise ValueError(f"state must hold ['k', 'real', 'v'], got {sorted(state)}")
        past = state["real"].shape[-1]
        shape = (rows, past, self.num_kv_heads, self.head_dim)
        for name, expected in (("real", (rows, past)), ("k", shape), ("v", shape)):
            if state[name].shape != expected:
                raise ValueError(
                    f"state[{name!r}] must be {expected}, got {tuple(state[name].shape)}"
                )

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of q, (B, L, H, P), of k and of v, (B, L, G, P)."""
        groups = self.num_kv_heads
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, groups, groups], 2)
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, real: Tensor | None
    ) -> tuple[Tensor, State]:
        """Outputs (B, L, H, P) and the grown cache; `real` (B, L) is False at padding."""
        mask = real
        if real is None:
            real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        if state is not None:
            k = torch.cat([state["k"].to(k.dtype), k], 1)
            v = torch.cat([state["v"].to(v.dtype), v], 1)
            mask = real = torch.cat([state["real"], real], 1)
        y = sequence_attention(q, k, v, causal=self.causal, window=self.window, mask=mask)
        return y, {"k": k, "v": v, "real": real}

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        q, k, v = self._heads(x)
        if cu_seqlens is None:
            y, after = self._attend(q, k, v, state, None)
            return self.out_proj(y.flatten(2)), after
        check_cu_seqlens_values(cu_seqlens, x.shape[1])
        if x.shape[1] == 0:
            if state is None and self.causal:
                state = self.init_state(cu_seqlens.shape[0] - 1, device=x.device)
            return x, state
        if state is None and not return_state:
            y = sequence_attention(
                q, k, v, causal=self.causal, window=self.window, cu_seqlens=cu_seqlens
            )
            return self.out_proj(y.flatten(2)), None
        # caches are rows of one length: what a cache holds of shorter sequences is not real
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        place = torch.arange(int(lengths.max()), device=x.device)
        real = place < lengths.unsqueeze(1)
        token = (starts.unsqueeze(1) + place).clamp(max=x.shape[1] - 1)
        y, after = self._attend(q[0, token], k[0, token], v[0, token], state, real)
        return self.out_proj(y[real].flatten(1)).unsqueeze(0), after

    def _mix_masked(
        self, x: Tensor, state: State | None, mask: Tensor, return_state: bool
    ) -> tuple[Tensor, State | None]:
        y, after = self._attend(*self._heads(x), state, mask)
        return self.out_proj(y.flatten(2)).masked_fill(~mask.unsqueeze(-1), 0), after

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: values v and outputs before out_proj, a channel being a head."""
        q, k, v = self._heads(x)
        y, _ = self._attend(q, k, v, None, None)
        return self._repeated(v).transpose(1, 2), y.transpose(1, 2)

    def _repeated(self, v: Tensor) -> Tensor:
        """Keys or values, (B, L, H, P): a head for every query head."""
        return v.repeat_interleave(self.num_heads // self.num_kv_heads, 2)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the softmax weights, (B, H, L, L)."""
        q, k, _ = self._heads(x)
        scores = q.transpose(1, 2) @ self._repeated(k).permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        length = x.shape[1]
        seen = visible(length, length, self.causal, self.window, 0, None, x.device)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)


@register_mixer(
    "attention_bidirectional",
    primitive="sequence_attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
)
class BidirectionalAttention(Attention):
    """Softmax attention to the whole sequence; arguments as `Attention`."""

    causal = False
