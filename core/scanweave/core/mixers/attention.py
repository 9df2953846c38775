"""Softmax attention as a mixer: the control that state-space mixers are compared with.

    q, k, v = in_proj(x) ;  y = softmax(scale q k^T) v ;  out = out_proj(y)

Optionally local (a window, and first tokens that all later ones see), with fewer heads of keys and
values, and with rotary positions on the first channels of every head, counted from the start of
each sequence over its real tokens. `sequence_attention` does the work; `local_attention.py` has the
form whose state does not grow.

Letters: B batch, L length, D model channels, H heads, G heads of keys and values, P channels a
head, E = H P, S packed sequences.

Source: Vaswani et al. 2017, arXiv 1706.03762; Su et al. 2021, arXiv 2104.09864 (rotary positions).
"""

import torch
from torch import Tensor, nn

from ..ops.attention import sequence_attention, visible
from ..ops.checks import check_cu_seqlens_values, computing_dtype
from ..ops.rotate import rotate_both
from .base import Mixer, State, register_mixer


def place_angles(place: Tensor, width: int, base: float, dtype: torch.dtype) -> Tensor:
    """Angles place * base ** (-2 i / width) of rotary positions, that of pair i of `width` / 2.

    Args:
        place: Places in the sequence, (B, L) or (1, L).
        width: Even number of channels that rotate, at least 2.
        base: Ratio of the fastest to the slowest frequency, nearly.
        dtype: Of the angles, float32 or wider.

    Returns:
        (B, L, 1, width / 2) or (1, L, 1, width / 2).
    """
    steps = torch.arange(0, width, 2, device=place.device, dtype=dtype)
    return place.to(dtype)[..., None, None] * base ** (-steps / width)


@register_mixer(
    "attention",
    primitive="sequence_attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    parity="6e-16 (float64), PyTorch's MultiheadAttention",
)
class Attention(Mixer):
    """Causal softmax attention. Its state is the cache of keys and values, which grows.

    Args:
        d_model: Channels D of the sequence.
        num_heads: Heads H, dividing E. None takes heads of 64 channels of D, or one head.
        num_kv_heads: Heads G of keys and values, dividing H; None is H.
        expand: Channels of all heads together, E = expand * d_model.
        window: Tokens that one sees, itself included (to both sides if not causal); None is all.
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

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        expand: float = 1,
        window: int | None = None,
        prefix: int = 0,
        rope_fraction: float = 0.0,
        rope_base: float = 1e4,
        scale: float | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = d_model // 64 if d_model >= 64 and d_model % 64 == 0 else 1
        inner = round(expand * d_model)
        if inner < 1:
            raise ValueError(f"expand * d_model must be at least 1, got {inner}")
        if num_heads < 1 or inner % num_heads:
            width = "d_model" if inner == d_model else "expand * d_model"
            raise ValueError(f"num_heads must divide {width} {inner}, got {num_heads}")
        head_dim = inner // num_heads
        if num_kv_heads is None:
            num_kv_heads = num_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads {num_heads}, got {num_kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if prefix < 0:
            raise ValueError(f"prefix must be at least 0, got {prefix}")
        rope_width = 2 * round(rope_fraction * head_dim / 2)
        if (
            not 0 <= rope_fraction <= 1
            or rope_width > head_dim
            or (rope_fraction and not rope_width)
        ):
            raise ValueError(
                f"rope_fraction must leave an even share of the {head_dim} channels of a head, "
                f"got {rope_fraction}"
            )
        self.d_model, self.num_heads, self.num_kv_heads = d_model, num_heads, num_kv_heads
        self.window, self.prefix, self.head_dim = window, prefix, head_dim
        self.rope_width, self.rope_base, self.scale = rope_width, rope_base, scale
        dd = {"device": device, "dtype": dtype}
        width = (num_heads + 2 * num_kv_heads) * head_dim
        out_bias = bias if out_bias is None else out_bias
        self.in_proj = nn.Linear(d_model, width, bias=bias, **dd)
        self.out_proj = nn.Linear(inner, d_model, bias=out_bias, **dd)

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
        """Heads of q, (B, L, H, P), of k and of v, (B, L, G, P), not rotated."""
        groups = self.num_kv_heads
        heads = self.in_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, groups, groups], 2)
        return q, k, v

    def _rotated(self, q: Tensor, k: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        if not self.rope_width:
            return q, k
        angles = place_angles(place, self.rope_width, self.rope_base, computing_dtype(q, k))
        return rotate_both(q, k, angles, halves=True)

    def _see(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Outputs (B, L, H, P) of rotated heads."""
        return sequence_attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            prefix=self.prefix,
            mask=mask,
            cu_seqlens=cu_seqlens,
            scale=self.scale,
        )

    def _count(self, state: State) -> Tensor:
        """Real tokens that the state has seen, (B,)."""
        return state["real"].sum(1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, real: Tensor | None
    ) -> tuple[Tensor, State]:
        """Outputs (B, L, H, P) and the cache after; `real` (B, L) is False at padding."""
        if self.rope_width:
            place = torch.arange(q.shape[1], device=q.device).unsqueeze(0)
            if real is not None:
                place = (real.long().cumsum(1) - 1).clamp(min=0)
            if state is not None:
                place = place + self._count(state).unsqueeze(1)
            q, k = self._rotated(q, k, place)
        mask, keys, values = real, k, v
        if state is not None:
            if real is None:
                real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
            keys = torch.cat([state["k"].to(k.dtype), k], 1)
            values = torch.cat([state["v"].to(v.dtype), v], 1)
            mask = torch.cat([self._filled(state), real], 1)
        y = self._see(q, keys, values, mask=mask)
        return y, self._cached(keys, values, mask, state, real)

    def _filled(self, state: State) -> Tensor:
        """Places of the cache that hold tokens, (B, places) bool."""
        return state["real"]

    def _cached(
        self,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        state: State | None,
        real: Tensor | None,
    ) -> State:
        """The cache after, from that before and the tokens behind it, of which `real` are."""
        if mask is None:
            mask = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        return {"k": keys, "v": values, "real": mask}

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        q, k, v = self._heads(x)
        if cu_seqlens is None:
            if state is None and not return_state:
                q, k = self._rotated(q, k, torch.arange(q.shape[1], device=q.device).unsqueeze(0))
                return self.out_proj(self._see(q, k, v).flatten(2)), None
            y, after = self._attend(q, k, v, state, None)
            return self.out_proj(y.flatten(2)), after
        check_cu_seqlens_values(cu_seqlens, x.shape[1])
        if x.shape[1] == 0:
            if state is None and self.causal:
                state = self.init_state(cu_seqlens.shape[0] - 1, device=x.device)
            return x, state
        if state is None and not return_state:
            if self.rope_width:
                token = torch.arange(x.shape[1], device=x.device)
                own = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
                q, k = self._rotated(q, k, (token - cu_seqlens[own]).unsqueeze(0))
            return self.out_proj(self._see(q, k, v, cu_seqlens=cu_seqlens).flatten(2)), None
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

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self.out_proj(outputs.transpose(1, 2).flatten(2))

    def _repeated(self, v: Tensor) -> Tensor:
        """Keys or values, (B, L, H, P): a head for every query head."""
        return v.repeat_interleave(self.num_heads // self.num_kv_heads, 2)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the softmax weights, (B, H, L, L)."""
        q, k, _ = self._heads(x)
        length = x.shape[1]
        q, k = self._rotated(q, k, torch.arange(length, device=x.device).unsqueeze(0))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = q.transpose(1, 2) @ self._repeated(k).permute(0, 2, 3, 1) * scale
        seen = visible(length, length, self.causal, self.window, self.prefix, None, x.device)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1)


@register_mixer(
    "attention_bidirectional",
    primitive="sequence_attention",
    paper="Vaswani et al. 2017, arXiv 1706.03762",
    parity="1e-15 (float64), PyTorch's MultiheadAttention",
)
class BidirectionalAttention(Attention):
    """Softmax attention to the whole sequence; arguments as `Attention`."""

    causal = False
