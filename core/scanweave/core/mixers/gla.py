"""Gated linear attention: a matrix state whose key channels decay by gates of the input.

    q, k, v = q_proj(x), k_proj(x), v_proj(x)
    g       = log_sigmoid(gk_proj(x)) / normalizer         of low rank, a gate a key channel
    S[t]    = diag(exp(g[t])) S[t-1] + k[t] v[t]^T         (K, P) a head
    y[t]    = S[t]^T q[t] / sqrt(K)
    out     = o_proj(norm(y) silu(g_proj(x)))              RMS norm of heads

Both directions share all but the gates, of which gk_proj makes one set each; y is their mean.

Letters: B batch, L length, D model channels, H heads of K = expand_k D / H key channels and
P = expand_v D / H value channels, S packed sequences. Parameter names are those of
flash-linear-attention's `GatedLinearAttention` (without convolutions, all heads with keys of their
own), so its weights load strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.gated import (
    bidirectional_gated_linear_scan,
    gated_linear_attention,
    gated_linear_scan_step,
)
from .base import Mixer, State, register_mixer, with_state
from .matrix_state import GatedRMSNorm, check_sizes

MAX_WIDTH = 256


def common_heads(keys: int, values: int) -> int:
    """The fewest heads of at most 64 key and 128 value channels, or else the most there can be."""
    split = [h for h in range(1, min(keys, values) + 1) if keys % h == 0 and values % h == 0]
    return next((h for h in split if keys <= 64 * h and values <= 128 * h), split[-1])


class ChannelDecayAttention(Mixer):
    """What mixers whose key channels decay share: all but the projections.

    Subclasses set the attributes below and write `_heads`, queries (..., H, K), values (..., H, P)
    and, of each direction, keys and log decays (..., H, K), and `_out`, outputs for x of what was
    read (..., H, P).
    """

    causal = True
    recurrent = True

    num_heads: int
    key_dim: int
    head_dim: int

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        raise NotImplementedError

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_widths(self) -> None:
        if max(self.key_dim, self.head_dim) > MAX_WIDTH:
            raise ValueError(
                f"num_heads must leave at most {MAX_WIDTH} key and value channels a head, "
                f"got {self.key_dim} and {self.head_dim}"
            )

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the scan's state."""
        if not self.causal:
            return super().state_spec()
        dtype = computing_dtype(next(self.parameters()))
        return {"h": ((self.num_heads, self.key_dim, self.head_dim), dtype)}

    def _scale(self) -> float:
        """Of queries; two directions are averaged."""
        return self.key_dim**-0.5 * (1.0 if self.causal else 0.5)

    def _scanned(
        self, x: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values and what was read (B, L, H, P), and the last state if asked."""
        q, v, ways = self._heads(x)
        if self.causal:
            k, g = ways[0]
            result = gated_linear_attention(
                *(q, k, v, g),
                scale=self._scale(),
                initial_state=h,
                cu_seqlens=cu_seqlens,
                return_final_state=final,
            )
            y, h = with_state(result)
            return v, y, h
        q = q * self._scale()
        (k, g), (k_back, g_back) = ways
        y = bidirectional_gated_linear_scan(
            (q, q), (k, k_back), v, (g, g_back), cu_seqlens=cu_seqlens
        )
        return v, y, None

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state["h"]
        _, y, h = self._scanned(x, before, cu_seqlens, return_state)
        return self._out(y, x), None if h is None else {"h": h}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled() or not self.causal:
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        q, v, ((k, g),) = self._heads(x)
        y = gated_linear_scan_step(state["h"], q * self._scale(), k, v, g)
        return self._out(y, x), state

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values of every head and the scan's outputs."""
        v, y, _ = self._scanned(x, None, None, False)
        return v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self._out(outputs.transpose(1, 2), x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: sum of q[t] k[s] exp(g(s, t]) over K / sqrt(K); (L, L, K) in memory.

        Source: Yang et al. 2023, arXiv 2312.06635, section 4.
        """
        q, _, ways = self._heads(x)
        both = [_decayed(q, k, g, reverse=d == 1) for d, (k, g) in enumerate(ways)]
        return torch.stack(both).sum(0) * self._scale()


def _decayed(q: Tensor, k: Tensor, g: Tensor, *, reverse: bool) -> Tensor:
    """Weights (B, H, L, L) of one direction."""
    total = g.flip(1).cumsum(1).flip(1) if reverse else g.cumsum(1)
    total, q, k = (u.to(g.dtype).transpose(1, 2) for u in (total, q, k))
    span = total.unsqueeze(3) - total.unsqueeze(2)  # (B, H, L, L, K)
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device)
    seen = (seen.triu() if reverse else seen.tril()).unsqueeze(-1)
    decay = torch.exp(span.masked_fill(~seen, float("-inf")))
    return torch.einsum("bhtk,bhsk,bhtsk->bhts", q, k, decay)


@register_mixer(
    "gla",
    primitive="gated_linear_attention",
    paper="Yang et al. 2023, arXiv 2312.06635",
    reference="flash-linear-attention GatedLinearAttention",
    parity="9e-7 (float32)",
)
class GLA(ChannelDecayAttention):
    """Gated linear attention: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        num_heads: Heads H; by default the fewest of at most 64 key and 128 value channels.
        expand_k: Key channels, expand_k * d_model.
        expand_v: Value channels, expand_v * d_model.
        gate_low_rank_dim: Channels between the two halves of the gates' projection.
        gate_logit_normalizer: Divides log gates; larger ones forget more slowly.
        eps: Added to the mean square of a head's outputs.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size is not positive, the heads do not divide the channels or are too wide.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        keys, values = int(expand_k * d_model), int(expand_v * d_model)
        check_sizes(
            {
                "d_model": d_model,
                "expand_k * d_model": keys,
                "expand_v * d_model": values,
                "gate_low_rank_dim": gate_low_rank_dim,
            }
        )
        if gate_logit_normalizer <= 0:
            raise ValueError(f"gate_logit_normalizer must be above 0, got {gate_logit_normalizer}")
        heads = common_heads(keys, values) if num_heads is None else num_heads
        if heads < 1 or keys % heads or values % heads:
            raise ValueError(
                f"num_heads must divide {keys} key and {values} value channels, got {heads}"
            )
        self.d_model, self.num_heads = d_model, heads
        self.key_dim, self.head_dim = keys // heads, values // heads
        self.gate_logit_normalizer = gate_logit_normalizer
        self._check_widths()
        dd = {"device": device, "dtype": dtype}
        gates = keys if self.causal else 2 * keys
        self.q_proj = nn.Linear(d_model, keys, bias=False, **dd)
        self.k_proj = nn.Linear(d_model, keys, bias=False, **dd)
        self.v_proj = nn.Linear(d_model, values, bias=False, **dd)
        self.g_proj = nn.Linear(d_model, values, bias=False, **dd)
        self.gk_proj = nn.Sequential(
            nn.Linear(d_model, gate_low_rank_dim, bias=False, **dd),
            nn.Linear(gate_low_rank_dim, gates, **dd),
        )
        self.o_proj = nn.Linear(values, d_model, bias=False, **dd)
        self.g_norm_swish_gate = GatedRMSNorm(self.head_dim, norm_before_gate=True, eps=eps, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew: Xavier-uniform with a gain of 2^-2.5, no biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.g_norm_swish_gate.reset_parameters()

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1))
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        logits = self.gk_proj(x)
        g = F.logsigmoid(logits.to(computing_dtype(logits))) / self.gate_logit_normalizer
        gates = g.chunk(1 if self.causal else 2, -1)
        return q, v, [(k, gate.unflatten(-1, (self.num_heads, self.key_dim))) for gate in gates]

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        z = self.g_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        return self.o_proj(self.g_norm_swish_gate(y, z).flatten(-2))


@register_mixer(
    "gla_bidirectional",
    primitive="bidirectional_gated_linear_scan",
    paper="Liao et al. 2024, arXiv 2405.18425",
    parity="4e-16 (float64; equations)",
)
class BidirectionalGLA(GLA):
    """Gated linear attention in both directions, with gates of its own each; arguments as `GLA`."""

    causal = False
    recurrent = False
