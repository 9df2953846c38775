"""Pairs of channels turned by angles (rotary positions), with gradients to the angles."""

from .op import rotate_both, rotate_pairs
from .reference import rotate_pairs_ref

__all__ = ["rotate_both", "rotate_pairs", "rotate_pairs_ref"]
