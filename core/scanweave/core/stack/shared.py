"""One transformer block used at many places: the shared block of Zamba and Zamba2.

    t   = norm([x, x0])                                2 D channels; x0 enters the whole stack
    t   = attention(t)                                 2 D to D channels
    out = W t,  t = gated_mlp(norm(t))                 W of every place, D to D

No residuals inside. Norms, attention and feed-forward are shared by all places; what a place has
for itself is W and, with a rank, low-rank additions to the feed-forward's first map and, if asked
for, to the attention's.

Letters: B batch, L length, D model channels, H heads, P channels a head, R rank.

Source: Glorioso et al. 2024 (Zamba), arXiv 2405.16712, section 2; Glorioso et al. 2024 (Zamba2),
arXiv 2411.15242, section 2.
"""

import torch
from torch import Tensor, nn

from ..mixers import State
from ..mixers.attention import Attention, BidirectionalAttention
from ..mixers.local_attention import LocalAttention
from ..mixers.rms_norm import RMSNorm
from .feed_forward import GatedMLP


class AdaptedLinear(nn.Module):
    """A shared linear map plus a low-rank one of its own, which starts at 0.

    Args:
        base: The shared map.
        rank: Rank R.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        dd = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, bias=False, **dd)
        self.up = nn.Linear(rank, base.out_features, bias=False, **dd)
        nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> Tensor:
        """The shared weight."""
        return self.base.weight

    def reset_parameters(self) -> None:
        """Draw every parameter anew, the shared ones too."""
        self.base.reset_parameters()
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., I) to (..., O)."""
        return self.base(x) + self.up(self.down(x))


def shared_map(linear: nn.Module) -> nn.Linear:
    """The map that all places share, of `linear` or of what adapts it."""
    base = linear.base if isinstance(linear, AdaptedLinear) else linear
    assert isinstance(base, nn.Linear)
    return base


class SharedTransformer(nn.Module):
    """The block at one place of a stack.

    Args:
        d_model: Channels D.
        like: The block at another place, whose shared weights this one takes.
        num_heads: Heads H of 2 D / H channels; None takes heads of 64 channels, or one head.
        num_kv_heads: Heads of keys and values, dividing H; None is H.
        window: Tokens that one sees; None is all.
        causal: Tokens see no later ones.
        rope_fraction: Share of a head's channels that rotate with the place.
        expand: Hidden channels of the feed-forward, in units of D.
        activation: Of the feed-forward.
        lora_rank: Rank R of every place's addition to the feed-forward; 0 for none.
        lora_attention: Also add one of rank 3 R to queries, keys and values.
        norm_eps: Added to the mean square in the norms.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: `lora_rank` is negative, or an argument does not fit the attention.
    """

    def __init__(
        self,
        d_model: int,
        *,
        like: "SharedTransformer | None" = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        window: int | None = None,
        causal: bool = True,
        rope_fraction: float = 0.0,
        expand: float = 4,
        activation: str = "gelu",
        lora_rank: int = 0,
        lora_attention: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if lora_rank < 0:
            raise ValueError(f"lora_rank must be at least 0, got {lora_rank}")
        if not causal:
            kind = BidirectionalAttention
        else:
            kind = Attention if window is None else LocalAttention
        local = {} if window is None else {"window": window}
        dd = {"device": device, "dtype": dtype}
        attention: Attention = kind(
            2 * d_model,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            rope_fraction=rope_fraction,
            bias=False,
            **local,
            **dd,
        )
        # half of a head's channels come from x0
        attention.scale = (attention.head_dim / 2) ** -0.5
        attention.out_proj = nn.Linear(2 * d_model, d_model, bias=False, **dd)
        feed_forward = GatedMLP(d_model, expand=expand, activation=activation, **dd)
        self.norm = RMSNorm(2 * d_model, eps=norm_eps, **dd)
        self.norm2 = RMSNorm(d_model, eps=norm_eps, **dd)
        if like is not None:
            self.norm, self.norm2 = like.norm, like.norm2
            attention.in_proj = shared_map(like.attention.in_proj)
            attention.out_proj = like.attention.out_proj
            feed_forward.gate_up = shared_map(like.feed_forward.gate_up)
            feed_forward.down = like.feed_forward.down
        if lora_rank:
            feed_forward.gate_up = AdaptedLinear(feed_forward.gate_up, lora_rank)  # type: ignore[assignment]
            if lora_attention:
                attention.in_proj = AdaptedLinear(attention.in_proj, 3 * lora_rank)  # type: ignore[assignment]
        self.attention, self.feed_forward = attention, feed_forward
        self.linear = nn.Linear(d_model, d_model, bias=False, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, the shared ones too."""
        for module in (self.norm, self.norm2, self.attention, self.feed_forward, self.linear):
            module.reset_parameters()

    def _after(self, y: Tensor) -> Tensor:
        return self.linear(self.feed_forward(self.norm2(y)))

    def forward(
        self, x: Tensor, first: Tensor, state: State | None, keep: bool, where: dict[str, Tensor]
    ) -> tuple[Tensor, State]:
        """The block's output (B, L, D), and the attention's state after it if `keep`.

        Args:
            x: The stream, (B, L, D).
            first: The stream as it entered the stack, (B, L, D).
            state: The attention's state before, if any.
            keep: Return the state after, else an empty one.
            where: `cu_seqlens` or `mask`, as mixers take them.
        """
        inputs = self.norm(torch.cat([x, first], -1))
        if state is None and not keep:
            return self._after(self.attention(inputs, **where)), {}
        y, after = self.attention(inputs, state=state, return_state=True, **where)
        return self._after(y), after

    def step(self, x: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
        """One token (B, D), and the state after it."""
        y, after = self.attention.step(self.norm(torch.cat([x, first], -1)), state)
        return self._after(y), after
