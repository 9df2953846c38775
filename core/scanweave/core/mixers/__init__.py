"""Sequence mixers behind one protocol, by name. Importing this module registers all of them."""

from .attention import Attention, BidirectionalAttention
from .base import (
    Mixer,
    MixerInfo,
    State,
    create_mixer,
    list_mixers,
    mixer_info,
    register_mixer,
)
from .gated_cnn import BidirectionalGatedCNN, GatedCNN
from .hydra import Hydra
from .hyena import BidirectionalHyena, Hyena
from .lru import LRU
from .mamba import BiMamba, Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .retention import BidirectionalRetNet, RetNet
from .rg_lru import RGLRUBlock

__all__ = [
    "LRU",
    "Attention",
    "BiMamba",
    "BidirectionalAttention",
    "BidirectionalGatedCNN",
    "BidirectionalHyena",
    "BidirectionalRetNet",
    "GatedCNN",
    "Hydra",
    "Hyena",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "Mixer",
    "MixerInfo",
    "RGLRUBlock",
    "RetNet",
    "State",
    "create_mixer",
    "list_mixers",
    "mixer_info",
    "register_mixer",
]
