"""Short depthwise convolutions along the length: causal, anti-causal, symmetric, single step."""

from .op import causal_conv1d, causal_conv1d_step, symmetric_conv1d
from .reference import causal_conv1d_ref

__all__ = ["causal_conv1d", "causal_conv1d_ref", "causal_conv1d_step", "symmetric_conv1d"]
