"""The RMS norm of mixers and stacks, in any mixture of dtypes.

Source: Zhang & Sennrich 2019, arXiv 1910.07467.
"""

from torch import Tensor, nn

from ..ops.checks import autocast_dtype
from ..ops.norm.cast import rms_norm_cast


class RMSNorm(nn.RMSNorm):
    """RMS norm computed in float32 or wider; the result has the dtype that a Linear would read."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of `x` (..., D), of any floating dtype."""
        dtype = autocast_dtype(x) or self.weight.dtype
        assert self.eps is not None
        return rms_norm_cast(x, self.weight, self.eps, dtype)
