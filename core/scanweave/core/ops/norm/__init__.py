"""RMS norm with a gate, over groups of channels."""

from .op import rms_norm_gated
from .reference import rms_norm_gated_ref

__all__ = ["rms_norm_gated", "rms_norm_gated_ref"]
