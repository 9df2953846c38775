"""RetNet's multi-scale retention: linear attention with one fixed decay a head and turned keys.

    q, k, v, z = q_proj(x), k_proj(x) / sqrt(K), v_proj(x), g_proj(x)
    y[t]       = sum_s decay^(t - s) (turned(q[t], t) . turned(k[s], s)) v[s]    over s <= t
    scale[t]   = decay scale[t-1] + 1
    out        = out_proj(norm(y / sqrt(scale)) silu(z))     RMS norm of heads, without weights

Head i decays by 1 - 2^(-5 - i) a token; pair j of its key channels turns by 10000^(-j / (K/2 - 1))
a token. Both directions: decay^|t - s| over all s, and no scale.

A product of turned vectors depends on t - s only, so positions may be counted from anywhere: the
state is kept turned back, as if its next token had position 0. It needs no counter, and angles
stay as small as a piece is long.

Letters: B batch, L length, D model channels, E = expand D value channels, H heads of K = D / H key
and P = E / H value channels, S packed sequences. Parameter names are those of torchscale's
`MultiScaleRetention`, so its weights load strictly. Its parallel form (not its recurrent one) also
divides y by the sum of a row of weights where that is over 1, which cancels in the norm but for
eps.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.gated import (
    bidirectional_gated_linear_scan,
    gated_linear_scan,
    gated_linear_scan_step,
)
from ..ops.norm import rms_norm_gated
from ..ops.rotate import rotate_both, rotate_pairs
from .base import Mixer, State, register_mixer, with_state
from .matrix_state import check_sizes

MAX_WIDTH = 256


def places(
    length: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions (L,) of tokens in their packed sequences, and the sequences' numbers (L,)."""
    if cu_seqlens is None:
        return torch.arange(length, device=device), None
    token = torch.arange(length, device=device, dtype=cu_seqlens.dtype)
    # the sequence of a token is the number of sequences that end at or before it
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    return token - cu_seqlens.index_select(0, row), row


def even_heads(d_model: int) -> int:
    """The fewest heads of an even number of channels up to 64."""
    return min(h for h in range(1, d_model + 1) if d_model % (2 * h) == 0 and d_model <= 64 * h)


@register_mixer(
    "retnet",
    primitive="gated_linear_scan",
    paper="Sun et al. 2023, arXiv 2307.08621",
    reference="torchscale MultiScaleRetention",
    parity="2e-6 (float32)",
)
class RetNet(Mixer):
    """Multi-scale retention: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence, even.
        num_heads: Heads H; by default the fewest with an even number of key channels up to 64.
        expand: Value channels E = expand * d_model.
        eps: Added to the mean square of a head's outputs.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        expand: float = 2,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        check_sizes({"d_model": d_model, "expand * d_model": inner})
        if d_model % 2:
            raise ValueError(f"d_model must be even, key channels turn in pairs, got {d_model}")
        heads = even_heads(d_model) if num_heads is None else num_heads
        if heads < 1 or d_model % (2 * heads):
            raise ValueError(f"num_heads must divide d_model / 2 = {d_model // 2}, got {heads}")
        if inner % heads or d_model > MAX_WIDTH * heads:
            raise ValueError(
                f"num_heads must divide {inner} value channels and split {d_model} key channels "
                f"into at most {MAX_WIDTH} each, got {heads}"
            )
        self.d_model, self.d_inner, self.num_heads, self.eps = d_model, inner, heads, eps
        self.key_dim, self.head_dim = d_model // heads, inner // heads
        # a wide head is several of the scan's, which share q and k
        fits = (m for m in range(1, self.head_dim + 1) if self.head_dim <= MAX_WIDTH * m)
        self.parts = next(m for m in fits if self.head_dim % m == 0)
        self.scans = heads * self.parts
        dd = {"bias": False, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d_model, d_model, **dd)
        self.k_proj = nn.Linear(d_model, d_model, **dd)
        self.v_proj = nn.Linear(d_model, inner, **dd)
        self.g_proj = nn.Linear(d_model, inner, **dd)
        self.out_proj = nn.Linear(inner, d_model, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: Xavier-uniform, inputs' with a gain of 2^-2.5."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the scan's state, turned back to the position of the next token, and `scale`."""
        dtype = computing_dtype(self.q_proj.weight)
        return {
            "h": ((self.scans, self.key_dim, self.head_dim // self.parts), dtype),
            "scale": ((self.scans,), dtype),
        }

    def _log_decays(self, device: torch.device) -> Tensor:
        """Log decays of the scan's heads; no buffer, which half precision models would round."""
        dtype = computing_dtype(self.q_proj.weight)
        head = torch.arange(self.scans, device=device) // self.parts
        return torch.log1p(-torch.exp2(-5 - head.to(dtype)))

    def _speeds(self, device: torch.device) -> Tensor:
        """By how much every pair of channels turns a token, (K / 2,)."""
        dtype = computing_dtype(self.q_proj.weight)
        return 1e4 ** -torch.linspace(0, 1, self.key_dim // 2, device=device, dtype=dtype)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, (..., H, K), keys scaled, and values (..., H, P); not turned."""
        q, k, v = (
            linear(x).unflatten(-1, (heads, -1))
            for linear, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_heads),
                (self.v_proj, self.scans),
            )
        )
        return q, k * self.key_dim**-0.5, v

    def _turned(self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both (B, L, H, K) turned by their positions, each packed sequence's from 0."""
        speeds = self._speeds(q.device)
        place, _ = places(q.shape[1], cu_seqlens, q.device)
        angles = place.to(speeds.dtype)[:, None, None] * speeds
        return rotate_both(q, k, angles)

    def _turned_back(self, h: Tensor, tokens: int | Tensor) -> Tensor:
        """The state `h` (B, H, K, P) for positions counted from `tokens` tokens later."""
        angles = -self._speeds(h.device) * tokens
        return rotate_pairs(h.transpose(-1, -2), angles).transpose(-1, -2)

    def _scale(self, tokens: Tensor, before: Tensor | None) -> Tensor:
        """The scale (..., H) after `tokens` (...) more, from `before` (..., H) or from 0."""
        g = self._log_decays(tokens.device)
        decayed = tokens.to(g.dtype).unsqueeze(-1) * g
        scale = torch.expm1(decayed) / torch.expm1(g)  # a geometric series
        return scale if before is None else scale + torch.exp(decayed) * before

    def _scaled(self, y: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """`y` (B, L, H, P) over the root of every token's scale."""
        place, row = places(y.shape[1], cu_seqlens, y.device)
        if before is not None:
            before = before.unsqueeze(1) if row is None else before.index_select(0, row)
        return (y * self._scale(place + 1, before).rsqrt().unsqueeze(-1)).to(y.dtype)

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        """Outputs of `y` (..., H, P), which the gate follows."""
        y, z = y.flatten(-2), self.g_proj(x)
        one = y.new_ones(self.d_inner)
        y = rms_norm_gated(
            *(y, one, z), eps=self.eps, group_size=self.head_dim, norm_before_gate=True
        )
        return self.out_proj(y)

    def _retained(
        self, x: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values and scanned outputs (B, L, H, P), and if asked the last state, not turned back."""
        q, k, v = self._heads(x)
        q, k = self._turned(q, k, cu_seqlens)
        scan: Callable[..., Any] = gated_linear_scan
        result = scan(
            *(q, k, v, self._log_decays(x.device)),
            initial_state=h,
            cu_seqlens=cu_seqlens,
            return_final_state=final,
        )
        y, h = with_state(result)
        return v, y, h

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state["scale"]
        h = None if state is None else state["h"]
        _, y, h = self._retained(x, h, cu_seqlens, return_state)
        out = self._out(self._scaled(y, before, cu_seqlens) if self.causal else y, x)
        if h is None:
            return out, None
        if cu_seqlens is None:
            tokens = torch.full((x.shape[0],), x.shape[1], device=x.device)
        else:
            tokens = cu_seqlens.diff()
        turned_back = self._turned_back(h, tokens[:, None, None, None])
        return out, {"h": turned_back.contiguous(), "scale": self._scale(tokens, before)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        g = self._log_decays(x.device)
        y = gated_linear_scan_step(state["h"], *self._heads(x), g.expand(x.shape[0], -1))
        state["h"].copy_(self._turned_back(state["h"], 1))
        scale = state["scale"].mul_(torch.exp(g)).add_(1)
        return self._out((y * scale.rsqrt().unsqueeze(-1)).to(y.dtype), x), state

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values of every head and the scan's outputs."""
        v, y, _ = self._retained(x, None, None, False)
        return v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        y = outputs.transpose(1, 2)
        return self._out(self._scaled(y, None, None) if self.causal else y, x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: (q[t] . k[s]) decay^|t - s|, a head each.

        Source: Sun et al. 2023, arXiv 2307.08621, equation 5.
        """
        q, k, _ = self._heads(x)
        g = self._log_decays(x.device)
        q, k = (u.to(g.dtype).transpose(1, 2) for u in self._turned(q, k, None))
        place = torch.arange(x.shape[1], device=x.device)
        span = (place.unsqueeze(-1) - place).abs().to(g.dtype)
        pairs = (q @ k.transpose(-1, -2)).repeat_interleave(self.parts, 1)
        matrix = pairs * torch.exp(g[:, None, None] * span)
        return matrix.tril() if self.causal else matrix


@register_mixer(
    "retnet_bidirectional",
    primitive="bidirectional_gated_linear_scan",
    paper="Fan et al. 2023, arXiv 2309.11523",
    parity="1e-15 (float64; equations)",
)
class BidirectionalRetNet(RetNet):
    """Retention over the whole sequence, decay^|t - s|; not causal; arguments as `RetNet`."""

    causal = False
    recurrent = False

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Raise: there is no state."""
        return Mixer.step(self, x, state)

    def _retained(
        self, x: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = self._heads(x)
        g = self._log_decays(x.device)
        # both scans read the token itself, which counts once
        skip = -(q.to(g.dtype) * k.to(g.dtype)).sum(-1).repeat_interleave(self.parts, -1)
        q, k = self._turned(q, k, cu_seqlens)
        y = bidirectional_gated_linear_scan(
            *((q, q), (k, k), v, (g, g)), skip=skip, cu_seqlens=cu_seqlens
        )
        return v, y, None
