"""The exponentially weighted average of RWKV-4, stabilised by a running maximum."""

from .functions import wkv, wkv_step
from .reference import wkv_ref

__all__ = ["wkv", "wkv_ref", "wkv_step"]
