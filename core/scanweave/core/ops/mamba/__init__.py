"""A whole Mamba block as one operator, for training: it keeps little for its backward."""

from .op import mamba_block

__all__ = ["mamba_block"]
