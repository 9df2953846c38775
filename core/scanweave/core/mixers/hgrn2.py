"""HGRN2: a matrix state that forgets by gates and writes what they forget.

    q, v = silu(q_proj(x)), i_proj(x)
    f    = lower_bound + (1 - lower_bound) sigmoid(f_proj(x))     a gate a key channel
    S[t] = diag(f[t]) S[t-1] + (1 - f[t]) v[t]^T                  (K, P) a head
    y[t] = S[t]^T q[t] / sqrt(K)
    out  = o_proj(norm(y))                                        RMS norm of all channels

It is gated linear attention whose keys are 1 less the decays. Both directions share all but the
gates, of which f_proj makes one set each; y is their mean.

Letters: B batch, L length, D model channels, H heads of K key and P = D / H value channels.
Parameter names are those of flash-linear-attention's `HGRN2Attention` (without convolutions), so
its weights load strictly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from .base import register_mixer
from .gla import ChannelDecayAttention
from .matrix_state import GatedRMSNorm, check_sizes


@register_mixer(
    "hgrn2",
    primitive="gated_linear_attention",
    paper="Qin et al. 2024, arXiv 2404.07904",
    reference="flash-linear-attention HGRN2Attention",
    parity="3e-6 (float32), 1e-15 (float64)",
)
class HGRN2(ChannelDecayAttention):
    """HGRN2's mixer: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        num_heads: Heads H; by default the fewest of equal width up to 128.
        expand_ratio: Key channels K of a head; by default as many as value channels.
        lower_bound: Least that a gate keeps, in [0, 1); models raise it from layer to layer.
        eps: Added to the mean square of outputs.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size is not positive, the heads do not divide D or are too wide, or
            lower_bound is not in [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int | None = None,
        expand_ratio: int | None = None,
        lower_bound: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"d_model": d_model})
        if num_heads is None:
            fits = (h for h in range(1, d_model + 1) if d_model <= 128 * h)
            num_heads = next(h for h in fits if d_model % h == 0)
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"num_heads must divide d_model {d_model}, got {num_heads}")
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound must be in [0, 1), got {lower_bound}")
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, d_model // num_heads
        self.key_dim = self.head_dim if expand_ratio is None else expand_ratio
        check_sizes({"expand_ratio": self.key_dim})
        self._check_widths()
        self.lower_bound = lower_bound
        dd = {"device": device, "dtype": dtype}
        keys = num_heads * self.key_dim
        self.q_proj = nn.Linear(d_model, keys, bias=False, **dd)
        self.f_proj = nn.Linear(d_model, keys if self.causal else 2 * keys, bias=False, **dd)
        self.i_proj = nn.Linear(d_model, d_model, bias=False, **dd)
        self.g_norm = GatedRMSNorm(d_model, eps=eps, **dd)
        self.o_proj = nn.Linear(d_model, d_model, bias=False, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for part in (self.q_proj, self.f_proj, self.i_proj, self.g_norm, self.o_proj):
            part.reset_parameters()

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        shape = (self.num_heads, self.key_dim)
        q = F.silu(self.q_proj(x)).unflatten(-1, shape)
        v = self.i_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        logits = self.f_proj(x)
        logits = logits.to(computing_dtype(logits))
        if self.lower_bound > 0:
            kept = self.lower_bound + (1 - self.lower_bound) * torch.sigmoid(logits)
            g = torch.log(kept)
        else:
            g = F.logsigmoid(logits)
        gates = [way.unflatten(-1, shape) for way in g.chunk(1 if self.causal else 2, -1)]
        return q, v, [(-torch.expm1(gate).to(v.dtype), gate) for gate in gates]

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(self.g_norm(y.flatten(-2)))


@register_mixer(
    "hgrn2_bidirectional",
    primitive="bidirectional_gated_linear_scan",
    paper="Qin et al. 2024, arXiv 2404.07904",
    parity="7e-16 (float64; equations)",
)
class BidirectionalHGRN2(HGRN2):
    """HGRN2 in both directions, with gates of its own each; arguments as `HGRN2`."""

    causal = False
    recurrent = False
