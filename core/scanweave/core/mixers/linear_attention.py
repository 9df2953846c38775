"""Linear attention: the softmax's exponential replaced by a product of features.

    q, k, v = query_projection(x), key_projection(x), value_projection(x)
    w[t, s] = phi(q[t]) . phi(k[s])                    phi(u) = elu(u) + 1, or relu, or u
    y[t]    = sum_s w[t, s] v[s] / (sum_s w[t, s] + eps)
    out     = out_projection(y)

over s <= t, or over all s, where the order of tokens plays no role. The sum of weights is one more
column of v, always 1, so that the state is a matrix (K, P + 1) a head. Instead of that division an
RMS norm may follow, as it must for features of either sign.

Letters: B batch, L length, D model channels, H heads of K features and P values, S packed
sequences. Parameter names are those of fast-transformers' `AttentionLayer`, so its weights load
strictly.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.gated import (
    bidirectional_gated_linear_scan,
    gated_linear_scan,
    gated_linear_scan_step,
)
from .base import Mixer, State, register_mixer, with_state
from .matrix_state import GatedRMSNorm, check_sizes, head_width

# keys of a head and columns of its values, the sum of weights included
MAX_WIDTH = 256


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, exact where it is small."""
    positive = F.relu(x)
    return (positive + torch.exp(x - positive)).to(x.dtype)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "identity": lambda x: x,
}


def split_heads(d_model: int, num_heads: int | None) -> tuple[int, int]:
    """Heads and channels of each; None takes the widest heads of at most 64 channels.

    Raises:
        ValueError: the heads do not divide the channels.
    """
    check_sizes({"d_model": d_model})
    if num_heads is None:
        num_heads = d_model // head_width(d_model, None)
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"num_heads must divide d_model {d_model}, got {num_heads}")
    return num_heads, d_model // num_heads


class FeatureAttention(Mixer):
    """What kinds of linear attention share: all but the projections and the features.

    Subclasses set the attributes below and write `_heads`, features of q and k (..., H, K) and
    values (..., H, P), and `_out`, outputs of the attended values (..., H, P) in a given dtype.
    """

    causal = True
    recurrent = True

    num_heads: int
    key_dim: int
    head_dim: int
    eps: float
    divided = True  # by the sum of weights

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def _out(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _check_widths(self) -> None:
        columns = self.head_dim + self.divided
        if self.key_dim > MAX_WIDTH or columns > MAX_WIDTH:
            raise ValueError(
                f"num_heads must leave at most {MAX_WIDTH} features and {MAX_WIDTH} columns a "
                f"head, got {self.key_dim} and {columns}"
            )

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, sums of products of features and values, the last column those of features."""
        if not self.causal:
            return super().state_spec()
        dtype = computing_dtype(next(self.parameters()))
        return {"h": ((self.num_heads, self.key_dim, self.head_dim + self.divided), dtype)}

    def _columns(self, v: Tensor) -> Tensor:
        """Values, and 1 behind them: its sum is that of the weights."""
        # sums of many tokens pass float16's range
        v = v.float() if v.dtype == torch.float16 else v
        return F.pad(v, (0, 1), value=1.0) if self.divided else v

    def _divided(self, y: Tensor) -> Tensor:
        """Sums over the sums of their weights, the last column."""
        if not self.divided:
            return y
        sums = y.to(computing_dtype(y))
        return (sums[..., :-1] / (sums[..., -1:] + self.eps)).to(y.dtype)

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        h: Tensor | None,
        cu_seqlens: Tensor | None,
        final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attended values (B, L, H, P), and the last state if asked."""
        values = self._columns(v)
        if self.causal:
            scan: Callable[..., Any] = gated_linear_scan
            result = scan(
                *(q, k, values),
                initial_state=h,
                cu_seqlens=cu_seqlens,
                return_final_state=final,
            )
            y, h = with_state(result)
            return self._divided(y), h
        if cu_seqlens is None:
            return self._divided(_of_all(q, k, values)), None
        # both scans read the token itself, which counts once
        dtype = computing_dtype(q, k)
        skip = -(q.to(dtype) * k.to(dtype)).sum(-1)
        y = bidirectional_gated_linear_scan(
            (q, q), (k, k), values, skip=skip, cu_seqlens=cu_seqlens
        )
        return self._divided(y), None

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state["h"]
        q, k, v = self._heads(x)
        y, h = self._attended(q, k, v, before, cu_seqlens, return_state)
        return self._out(y, v.dtype), None if h is None else {"h": h}

    def _mix_masked(
        self, x: Tensor, state: State | None, mask: Tensor, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if self.causal:
            return super()._mix_masked(x, state, mask, return_state)
        # without an order, padding is what has no keys
        hidden = ~mask.unsqueeze(-1)
        q, k, v = self._heads(x.masked_fill(hidden, 0))
        y, _ = self._attended(q, k.masked_fill(hidden.unsqueeze(-1), 0), v, None, None, False)
        return self._out(y, v.dtype).masked_fill(hidden, 0), None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled() or not self.causal:
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        q, k, v = self._heads(x)
        y = gated_linear_scan_step(state["h"], q, k, self._columns(v))
        return self._out(self._divided(y), v.dtype), state

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values of every head and the attended ones."""
        q, k, v = self._heads(x)
        y, _ = self._attended(q, k, v, None, None, False)
        return v.transpose(1, 2), y.transpose(1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self._out(outputs.transpose(1, 2), self._heads(x)[2].dtype)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the weights w over their sum, a head each."""
        q, k, _ = self._heads(x)
        dtype = computing_dtype(q, k)
        weights = q.to(dtype).transpose(1, 2) @ k.to(dtype).permute(0, 2, 3, 1)
        if self.causal:
            weights = weights.tril()
        return weights / (weights.sum(-1, keepdim=True) + self.eps) if self.divided else weights


def _of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q[t] . (sum of k[s] v[s]^T over all s), (B, L, H, V), float32 or float64."""
    dtype = computing_dtype(q, k, v)
    q, k, v = (u.to(dtype).transpose(1, 2) for u in (q, k, v))
    # sums in full, whatever the activations are; autocast does not know the meta device
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        return (q @ (k.transpose(-1, -2) @ v)).transpose(1, 2)


@register_mixer(
    "linear_attention",
    primitive="gated_linear_scan",
    paper="Katharopoulos et al. 2020, arXiv 2006.16236",
    reference="fast-transformers AttentionLayer",
    parity="2e-7 (float32)",
)
class LinearAttention(FeatureAttention):
    """Linear attention: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        num_heads: Heads H; by default the fewest of equal width up to 64.
        feature_map: phi, "elu" (elu + 1), "relu" or "identity".
        norm: "sum" divides by the sum of weights, "rms" normalises every head's output instead;
            "identity" needs the second, as its weights may sum to 0.
        eps: Added to the sum of weights, or to mean squares.
        bias: Biases in all projections.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: the heads do not divide D or are too wide, or norm does not fit feature_map.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        feature_map: Literal["elu", "relu", "identity"] = "elu",
        norm: Literal["sum", "rms"] = "sum",
        eps: float = 1e-6,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if feature_map not in FEATURE_MAPS:
            known = ", ".join(FEATURE_MAPS)
            raise ValueError(f"feature_map must be one of {known}, got {feature_map!r}")
        if norm not in ("sum", "rms"):
            raise ValueError(f"norm must be 'sum' or 'rms', got {norm!r}")
        if norm == "sum" and feature_map == "identity":
            raise ValueError("norm must be 'rms' with feature_map 'identity', got 'sum'")
        self.num_heads, self.head_dim = split_heads(d_model, num_heads)
        self.d_model, self.key_dim, self.eps = d_model, self.head_dim, eps
        self.feature_map, self.divided = feature_map, norm == "sum"
        self._check_widths()
        dd = {"device": device, "dtype": dtype}
        self.query_projection = nn.Linear(d_model, d_model, bias=bias, **dd)
        self.key_projection = nn.Linear(d_model, d_model, bias=bias, **dd)
        self.value_projection = nn.Linear(d_model, d_model, bias=bias, **dd)
        self.out_projection = nn.Linear(d_model, d_model, bias=bias, **dd)
        self.norm = None if self.divided else GatedRMSNorm(self.head_dim, eps=eps, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for part in self.children():
            part.reset_parameters()  # pyright: ignore[reportCallIssue]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, self.head_dim))
            for linear in (self.query_projection, self.key_projection, self.value_projection)
        )
        phi = FEATURE_MAPS[self.feature_map]
        return phi(q), phi(k), v

    def _out(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        y = y if self.norm is None else self.norm(y)
        return self.out_projection(y.flatten(-2).to(dtype))


@register_mixer(
    "linear_attention_bidirectional",
    primitive="bidirectional_gated_linear_scan",
    paper="Katharopoulos et al. 2020, arXiv 2006.16236",
    reference="fast-transformers AttentionLayer",
    parity="3e-7 (float32)",
)
class BidirectionalLinearAttention(LinearAttention):
    """Linear attention to all tokens, whose order plays no role; arguments as `LinearAttention`."""

    causal = False
    recurrent = False
