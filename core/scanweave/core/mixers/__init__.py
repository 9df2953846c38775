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
from .linear_attention import BidirectionalLinearAttention, LinearAttention
from .lru import LRU
from .mamba import BiMamba, Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .retention import BidirectionalRetNet, RetNet
from .rg_lru import RGLRUBlock
from .s5 import S5, BidirectionalS5

__all__ = [
    "LRU",
    "S5",
    "Attention",
    "BiMamba",
    "BidirectionalAttention",
    "BidirectionalGatedCNN",
    "BidirectionalHyena",
    "BidirectionalLinearAttention",
    "BidirectionalRetNet",
    "BidirectionalS5",
    "GatedCNN",
    "Hydra",
    "Hyena",
    "LinearAttention",
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
