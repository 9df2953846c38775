"""The linear attention of BASED: the softmax's exponential by three terms of its Taylor series.

    q, k, v = proj_q(x), proj_k(x), proj_v(x)          H heads, F channels of q and k
    s       = q[t] . k[u] / sqrt(F)
    w[t, u] = 1 + s + s^2 / 2 = phi(q[t]) . phi(k[u])
    y[t]    = sum_u w[t, u] v[u] / (sum_u w[t, u] + eps),     out = out_proj(y)

over u <= t, or over all u. phi(a) holds 1, the F channels and their products of pairs once each,
which are the pairs of (1, a): (F + 1) (F + 2) / 2 features, 153 for F = 16. The published models
alternate this layer with `local_attention` of short windows and with short convolutions.

Letters: B batch, L length, D model channels, H heads of F channels and P values, K features, S
packed sequences. Parameter names are those of the published code's `LinearAttention`, so its
weights load strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from .base import register_mixer
from .linear_attention import MAX_WIDTH, FeatureAttention, split_heads
from .matrix_state import check_sizes


def taylor_features(x: Tensor) -> Tensor:
    """phi(x), (..., K) for x (..., F): phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(F)."""
    dim, dtype = x.shape[-1], computing_dtype(x)
    pairs = torch.triu_indices(dim + 1, dim + 1, device=x.device)
    place = torch.arange(dim + 1, device=x.device)
    # a product with ones and zeros: gathering would add gradients in an order of its own
    chosen = (pairs.unsqueeze(-1) == place).to(dtype)
    chosen = torch.where(place > 0, chosen * dim**-0.25, chosen)
    square = ((pairs[0] == pairs[1]) & (pairs[0] > 0)).unsqueeze(-1)
    left = torch.where(square, chosen[0] * 0.5**0.5, chosen[0])
    chosen = torch.cat([left, chosen[1]]).to(x.dtype)
    a, b = F.linear(F.pad(x, (1, 0), value=1.0), chosen).chunk(2, -1)
    return a * b


@register_mixer(
    "based",
    primitive="gated_linear_scan",
    paper="Arora et al. 2024, arXiv 2402.18668",
    reference="HazyResearch based LinearAttention",
    parity="5e-7 (float32)",
)
class Based(FeatureAttention):
    """Linear attention with Taylor features: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        num_heads: Heads H; by default the fewest of equal width up to 64.
        feature_dim: Channels F of a head's queries and keys, at most 21.
        eps: Added to the sum of weights.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size is not positive, the heads do not divide D, or there are too many
            features or values a head.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        feature_dim: int = 16,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"feature_dim": feature_dim})
        self.num_heads, self.head_dim = split_heads(d_model, num_heads)
        self.d_model, self.feature_dim, self.eps = d_model, feature_dim, eps
        self.key_dim = (feature_dim + 1) * (feature_dim + 2) // 2
        if self.key_dim > MAX_WIDTH:
            raise ValueError(f"feature_dim must be at most 21, got {feature_dim}")
        self._check_widths()
        dd = {"bias": False, "device": device, "dtype": dtype}
        self.proj_q = nn.Linear(d_model, feature_dim * self.num_heads, **dd)
        self.proj_k = nn.Linear(d_model, feature_dim * self.num_heads, **dd)
        self.proj_v = nn.Linear(d_model, d_model, **dd)
        self.out_proj = nn.Linear(d_model, d_model, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for part in (self.proj_q, self.proj_k, self.proj_v, self.out_proj):
            part.reset_parameters()

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw = torch.cat([self.proj_q(x), self.proj_k(x)], -1)
        q, k = taylor_features(raw.unflatten(-1, (-1, self.feature_dim))).chunk(2, -2)
        return q, k, self.proj_v(x).unflatten(-1, (self.num_heads, self.head_dim))

    def _out(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out_proj(y.flatten(-2).to(dtype))


@register_mixer(
    "based_bidirectional",
    primitive="bidirectional_gated_linear_scan",
    paper="Arora et al. 2024, arXiv 2407.05483",
    parity="2e-15 (float64; equations)",
)
class BidirectionalBased(Based):
    """Linear attention with Taylor features to all tokens, in no order; arguments as `Based`."""

    causal = False
    recurrent = False
