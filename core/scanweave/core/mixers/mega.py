"""Mega: gated attention of one head inside chunks, whose queries and keys have seen the past.

    v          = silu(v_proj(x))                       E = expand D channels
    h[t]       = (1 - p alpha) h[t-1] + p beta x[t]    p, alpha: sigmoids; N averages a channel
    m[t]       = silu(gamma h[t] / sqrt(N) + omega x[t])
    u, z, r, c = mx_proj(m)                            sigmoid of u; silu of z (Z channels) and r
    q, k       = z gamma_q + beta_q, z gamma_k + beta_k
    s[i, j]    = q[i] k[j] / sqrt(Z) + bias[j - i]     softmax of it; or for Laplace's function
                 q[i] k[j] / n[i] + bias[j - i]        n[i] visible tokens, (1 + erf(...)) / 2
    o[i]       = sum_j weights[i, j] v[j]              over tokens j of the chunk of i
    out        = u (silu(c + h_proj(r o)) - x)

Sequences are cut into chunks of fixed size from their first token on; the averages alone reach
across. Both directions: averages with parameters of their own in reverse, the token itself in
both, and no mask inside a chunk.

Letters: B batch, L length, D model channels, N averages a channel, Z and E channels of keys and
values, Q tokens of a chunk, G chunks, S packed sequences. Parameter names are those of fairseq's
`MovingAverageGatedAttention` in facebookresearch/mega, which norms what v and the averages read
(`norm=True`) and adds its input to the output; blocks around mixers do both.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype, exporting
from ..ops.long_conv import diagonal_ssm, diagonal_ssm_step
from .base import Mixer, State, register_mixer
from .diagonal import Mode, Terms, both_directions, path
from .matrix_state import check_sizes, keep_from_decay
from .retention import places

Attention = Literal["softmax", "laplace"]
# the mean and the deviation that bring Laplace's function closest to a squared ReLU
LAPLACE_MEAN = 0.707107
LAPLACE_WIDTH = 0.282095 * math.sqrt(2)


class MovingAverage(nn.Module):
    """Damped exponential moving averages of every channel, N a direction.

    Args:
        dim: Channels D.
        averages: Averages N of a channel.
        directions: 1 or 2.
        device: Of the parameters.
        dtype: Of the parameters; delta and alpha keep at least float32.
    """

    def __init__(
        self,
        dim: int,
        averages: int,
        directions: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.directions = directions
        shape = (directions * dim, averages)
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.delta = nn.Parameter(torch.empty(*shape, 1, device=device, dtype=full))
        self.alpha = nn.Parameter(torch.empty(*shape, 1, device=device, dtype=full))
        self.beta = nn.Parameter(torch.empty(*shape, 1, **dd))
        self.gamma = nn.Parameter(torch.empty(*shape, **dd))
        self.omega = nn.Parameter(torch.empty(dim, **dd))

    def reset_parameters(self) -> None:
        """Draw every parameter anew: beta about 1 and -1 by turns."""
        keep_from_decay(*self.parameters())
        for p in (self.delta, self.alpha):
            nn.init.normal_(p, std=0.2)
        for p in (self.gamma, self.omega):
            nn.init.normal_(p)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta[:, ::2] += 1
            self.beta[:, 1::2] -= 1

    def forward(self) -> list[Terms]:
        """The discrete model of every direction."""
        dtype = computing_dtype(self.delta)
        p, alpha = (torch.sigmoid(v.to(dtype).squeeze(-1)) for v in (self.delta, self.alpha))
        B = p * self.beta.to(dtype).squeeze(-1)
        C = self.gamma.to(dtype) * self.gamma.shape[1] ** -0.5
        ways = (v.chunk(self.directions) for v in (torch.log1p(-p * alpha), B, C))
        return [Terms(*terms) for terms in zip(*ways, strict=True)]


@register_mixer(
    "mega",
    primitive="diagonal_ssm",
    paper="Ma et al. 2022, arXiv 2209.10655",
    reference="fairseq MovingAverageGatedAttention, with norm=True",
    parity="1e-7 (float32), 1e-13 (float64)",
)
class Mega(Mixer):
    """Moving averages and gated attention in chunks: causal, with a state of fixed size.

    The state holds the averages and the keys and values of the chunk that is not yet full. With
    sequences of at most `chunk_size` tokens this is Mega without chunks.

    Args:
        d_model: Channels D of the sequence.
        d_attn: Channels Z of queries and keys; by default half of D.
        expand: Value channels E = expand * d_model.
        d_state: Averages N of a channel.
        chunk_size: Tokens Q of a chunk, and so the reach of the bias of positions.
        attention: "softmax", or "laplace", whose weights do not compete.
        norm: Norm what v and the averages read here too, as the reference does.
        mode: Of the averages: "conv", "scan" or "auto", which convolves from 64 tokens on and
            else takes chunks of matrix products; packed sequences are never convolved.
        device: Of the parameters.
        dtype: Of the parameters; delta and alpha keep at least float32.

    Raises:
        ValueError: a size is not positive, or a name is unknown.
    """

    causal = True
    recurrent = True
    directions = 1

    def __init__(
        self,
        d_model: int,
        *,
        d_attn: int | None = None,
        expand: float = 2,
        d_state: int = 16,
        chunk_size: int = 128,
        attention: Attention = "softmax",
        norm: bool = False,
        mode: Mode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner, narrow = int(expand * d_model), max(d_model // 2, 1) if d_attn is None else d_attn
        sizes = {"d_model": d_model, "d_attn": narrow, "d_state": d_state}
        check_sizes({**sizes, "chunk_size": chunk_size, "expand * d_model": inner})
        for name, value, kind in (("attention", attention, Attention), ("mode", mode, Mode)):
            if value not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value}")
        self.d_model, self.d_attn, self.d_inner, self.d_state = d_model, narrow, inner, d_state
        self.chunk_size = chunk_size
        self.mode: Mode = mode
        self.attention: Attention = attention
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.ModuleDict({"norm": nn.LayerNorm(d_model, **dd)}) if norm else None
        self.move = MovingAverage(d_model, d_state, self.directions, **dd)
        self.v_proj = nn.Linear(d_model, inner, **dd)
        self.mx_proj = nn.Linear(d_model, narrow + inner + 2 * d_model, **dd)
        self.h_proj = nn.Linear(inner, d_model, **dd)
        self.gamma = nn.Parameter(torch.empty(2, narrow, **dd))
        self.beta = nn.Parameter(torch.empty(2, narrow, **dd))
        self.rel_pos_bias = nn.ParameterDict(
            {"rel_pos_bias": nn.Parameter(torch.empty(2 * chunk_size - 1, **dd))}
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        keep_from_decay(self.gamma, self.beta)
        if self.norm is not None:
            self._normed().reset_parameters()
        self.move.reset_parameters()
        for linear in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)
        nn.init.normal_(self.rel_pos_bias["rel_pos_bias"], std=0.02)

    def _normed(self) -> nn.LayerNorm:
        assert self.norm is not None
        norm = self.norm["norm"]
        assert isinstance(norm, nn.LayerNorm)
        return norm

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the averages; `k` and `v` of the chunk that is not full, and `filled`, how many."""
        dtype = computing_dtype(self.v_proj.weight)
        return {
            "h": ((self.d_model, self.d_state), dtype),
            "k": ((self.chunk_size, self.d_attn), dtype),
            "v": ((self.chunk_size, self.d_inner), dtype),
            "filled": ((1,), dtype),
        }

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the averages read, and values (..., E)."""
        x = x if self.norm is None else self._normed()(x)
        return x, F.silu(self.v_proj(x))

    def _gates(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u, r and c, and queries and keys (..., Z), of averages (..., D) before their silu."""
        widths = [self.d_model, self.d_attn, self.d_inner, self.d_model]
        u, z, r, c = self.mx_proj(F.silu(m)).split(widths, -1)
        z = F.silu(z)
        q, k = (z.unsqueeze(-2) * self.gamma.to(z.dtype) + self.beta.to(z.dtype)).unbind(-2)
        return torch.sigmoid(u), F.silu(r), c, q, k

    def _out(self, x: Tensor, o: Tensor, u: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return u * (F.silu(c + self.h_proj(r * o)) - x.to(u.dtype))

    def _averages(
        self, x: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Averages read out, with omega x, and the last ones."""
        given = (x, *self.move()[0], self.move.omega)
        way = path(self.mode, x.shape[1], cu_seqlens is not None)
        if not final:
            return diagonal_ssm(*given, initial_state=h, cu_seqlens=cu_seqlens, mode=way), None
        return diagonal_ssm(
            *given, initial_state=h, cu_seqlens=cu_seqlens, return_final_state=True, mode=way
        )

    def _bias(self, size: int) -> Tensor:
        """bias[j - i] of a chunk's first `size` tokens, (size, size)."""
        place = torch.arange(size, device=self.v_proj.weight.device)
        lag = place - place.unsqueeze(1)
        return self.rel_pos_bias["rel_pos_bias"][lag + self.chunk_size - 1]

    def _weights(self, q: Tensor, k: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """Weights (..., T, J) of keys (..., J, Z) for queries (..., T, Z), 0 unless `seen`."""
        scores = (q @ k.transpose(-1, -2)).to(computing_dtype(q))
        if self.attention == "softmax":
            scores = scores * self.d_attn**-0.5 + bias.to(scores.dtype)
            return scores.masked_fill(~seen, float("-inf")).softmax(-1)
        count = seen.sum(-1, keepdim=True).clamp(min=1)
        scores = (scores / count + bias.to(scores.dtype) - LAPLACE_MEAN) / LAPLACE_WIDTH
        return (0.5 * (1 + torch.erf(scores))).masked_fill(~seen, 0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor) -> Tensor:
        """Outputs of chunks (B, G, Q, E); `real` (G, Q) is False at places without a token."""
        size = q.shape[-2]
        seen = real.unsqueeze(-2).expand(*real.shape, size)
        if self.causal:
            seen = seen.tril()
        # places without a token see themselves, so that no row is empty
        seen = seen | torch.eye(size, dtype=torch.bool, device=q.device)
        bias = self._bias(size)
        if self.attention == "laplace":
            return self._weights(q, k, bias, seen).to(v.dtype) @ v
        mask = bias.to(q.dtype).masked_fill(~seen, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of whole sequences, (B, L, E)."""
        length, size = q.shape[1], self.chunk_size
        if exporting():
            # gathered: views would hold for some lengths only, and so would a single chunk
            place = torch.arange(length, device=q.device)
            first = torch.arange(length // size + 2, device=q.device) * size
            slot = first.unsqueeze(1) + torch.arange(size, device=q.device)
            q, k, v = (t[:, slot.clamp(max=length - 1)] for t in (q, k, v))
            return self._attend(q, k, v, slot < length)[:, place // size, place % size]
        size = min(size, max(length, 1))
        chunks = (length + size - 1) // size
        room = chunks * size - length
        q, k, v = (F.pad(t, (0, 0, 0, room)).unflatten(1, (chunks, size)) for t in (q, k, v))
        real = (torch.arange(chunks * size, device=q.device) < length).view(chunks, size)
        return self._attend(q, k, v, real).flatten(1, 2)[:, :length]

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: State | None, cu_seqlens: Tensor
    ) -> tuple[Tensor, State]:
        """Attention of packed sequences (1, T, E), and the state but for its averages.

        Every sequence gets chunks of its own, the first of which begins with what the state holds;
        how many there are in all is bounded by shapes alone.
        """
        tokens, size = q.shape[1], self.chunk_size
        lengths = cu_seqlens.diff().long()
        rows = lengths.shape[0]
        filled = torch.zeros_like(lengths)
        if state is not None:
            filled = state["filled"].detach().squeeze(-1).round().long()
        total = filled + lengths
        own = (total + size - 1) // size
        first = (own.cumsum(0) - own) * size  # a sequence's first slot
        chunks = tokens // size + (1 if state is None else 2) * rows
        place, row = places(tokens, cu_seqlens, q.device)
        assert row is not None
        # borders that end too early are refused by the scan of the averages
        row = row.clamp(max=rows - 1)
        slot = ((first + filled).index_select(0, row) + place.long()).clamp(0, chunks * size - 1)
        held = torch.arange(size, device=q.device)
        old = (first.unsqueeze(1) + held).clamp(max=chunks * size - 1)
        kept = (held < filled.unsqueeze(1)).unsqueeze(-1)

        def laid_out(t: Tensor, before: Tensor | None) -> Tensor:
            grid = t.new_zeros(chunks * size, t.shape[-1]).index_copy(0, slot, t[0])
            if before is not None:
                before = before.to(t.dtype).masked_fill(~kept, 0)
                grid = grid.index_add(0, old.flatten(), before.flatten(0, 1))
            return grid.unflatten(0, (chunks, size))

        ks = laid_out(k, None if state is None else state["k"])
        vs = laid_out(v, None if state is None else state["v"])
        real = laid_out(torch.ones_like(place, dtype=q.dtype)[None, :, None], None)
        if state is not None:
            real = real + laid_out(torch.zeros_like(q[..., :1]), kept)
        o = self._attend(laid_out(q, None)[None], ks[None], vs[None], real.squeeze(-1) > 0)
        o = o[0].flatten(0, 1).index_select(0, slot).unsqueeze(0)
        left = total % size
        last = (first // size + total // size).clamp(max=chunks - 1)
        rest = (held < left.unsqueeze(1)).unsqueeze(-1)
        dtype = computing_dtype(self.v_proj.weight)
        k_left, v_left = (t.index_select(0, last).to(dtype).masked_fill(~rest, 0) for t in (ks, vs))
        return o, {"k": k_left, "v": v_left, "filled": left.to(dtype).unsqueeze(1)}

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        a, v = self._project(x)
        m, h = self._averages(a, None if state is None else state["h"], cu_seqlens, return_state)
        u, r, c, q, k = self._gates(m)
        if cu_seqlens is None and state is None and not return_state:
            return self._out(x, self._dense(q, k, v), u, r, c), None
        if cu_seqlens is None:
            borders = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
        else:
            borders = cu_seqlens
        q, k, v = (t.flatten(0, 1).unsqueeze(0) for t in (q, k, v))
        o, after = self._packed(q, k, v, state, borders)
        y = self._out(x, o.view(*x.shape[:2], self.d_inner), u, r, c)
        return y, None if h is None else {"h": h, **after}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled() or not self.recurrent:
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        a, v = self._project(x)
        log_a, B, C = self.move()[0]
        m = diagonal_ssm_step(state["h"], a, log_a, B, C, self.move.omega)
        u, r, c, q, k = self._gates(m)
        place = state["filled"].long()
        for held, t in ((state["k"], k), (state["v"], v)):
            at = place.unsqueeze(-1).expand(-1, 1, t.shape[-1])
            held.scatter_(1, at, t.unsqueeze(1).to(held.dtype))
        slot = torch.arange(self.chunk_size, device=x.device)
        # what is stored behind the present token is of the chunk before
        seen = slot <= place
        bias = self.rel_pos_bias["rel_pos_bias"][(slot - place).clamp(max=0) + self.chunk_size - 1]
        weights = self._weights(
            *(q.unsqueeze(1), state["k"].to(q.dtype), bias.unsqueeze(1), seen.unsqueeze(1))
        )
        o = (weights.to(v.dtype) @ state["v"].to(v.dtype)).squeeze(1)
        state["filled"].copy_((place + 1) % self.chunk_size)
        return self._out(x, o, u, r, c), state

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, L, ...)."""
        a, v = self._project(x)
        m, _ = self._averages(a, None, None, False)
        _, _, _, q, k = self._gates(m)
        return q, k, v

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values and what attention makes of them, one head."""
        q, k, v = self._read(x)
        return v.unsqueeze(1), self._dense(q, k, v).unsqueeze(1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        a, _ = self._project(x)
        u, r, c, _, _ = self._gates(self._averages(a, None, None, False)[0])
        return self._out(x, outputs.squeeze(1), u, r, c)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the weights, (B, 1, L, L), 0 between chunks."""
        q, k, _ = self._read(x)
        place = torch.arange(x.shape[1], device=x.device)
        chunk, lag = place // self.chunk_size, place - place.unsqueeze(1)
        seen = chunk == chunk.unsqueeze(1)
        seen = seen.tril() if self.causal else seen
        most = self.chunk_size - 1
        bias = self.rel_pos_bias["rel_pos_bias"][lag.clamp(-most, most) + most]
        return self._weights(q, k, bias, seen).unsqueeze(1)


@register_mixer(
    "mega_bidirectional",
    primitive="diagonal_ssm",
    paper="Ma et al. 2022, arXiv 2209.10655",
    reference="fairseq MovingAverageGatedAttention, bidirectional, with norm=True",
    parity="1e-7 (float32), 1e-13 (float64)",
)
class BidirectionalMega(Mega):
    """Mega that averages both ways and sees whole chunks; not causal; arguments as `Mega`."""

    causal = False
    recurrent = False
    directions = 2

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def _averages(
        self, x: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        forward, reverse = self.move()
        y = both_directions(
            *(x, forward, reverse, self.move.omega), lag=0, mode=self.mode, cu_seqlens=cu_seqlens
        )
        return y, None
