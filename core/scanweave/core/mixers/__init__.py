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
from .based import Based, BidirectionalBased
from .channel_mix import BidirectionalChannelMix, ChannelMix
from .diagonal_dss import DSS, BidirectionalDSS, SoftmaxDSS
from .diagonal_s4d import S4D, BidirectionalS4D
from .gated_cnn import BidirectionalGatedCNN, GatedCNN
from .gated_conv import BaseConv, BidirectionalBaseConv
from .gla import GLA, BidirectionalGLA
from .gss import GSS
from .h3 import H3
from .hgrn2 import HGRN2, BidirectionalHGRN2
from .hydra import Hydra
from .hyena import BidirectionalHyena, Hyena
from .linear_attention import BidirectionalLinearAttention, LinearAttention
from .local_attention import LocalAttention
from .lru import LRU
from .lssl import LSSL
from .mamba import BiMamba, Mamba
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .mamba_heads import MambaHeads
from .mega import BidirectionalMega, Mega
from .phi_mamba import PhiMamba
from .retention import BidirectionalRetNet, RetNet
from .rg_lru import RGLRUBlock
from .rwkv import RWKV5, RWKV6, BidirectionalRWKV5, BidirectionalRWKV6
from .rwkv4 import RWKV4, BidirectionalRWKV4
from .s4 import S4, BidirectionalS4
from .s5 import S5, BidirectionalS5

__all__ = [
    "DSS",
    "GLA",
    "GSS",
    "H3",
    "HGRN2",
    "LRU",
    "LSSL",
    "RWKV4",
    "RWKV5",
    "RWKV6",
    "S4",
    "S4D",
    "S5",
    "Attention",
    "BaseConv",
    "Based",
    "BiMamba",
    "BidirectionalAttention",
    "BidirectionalBaseConv",
    "BidirectionalBased",
    "BidirectionalChannelMix",
    "BidirectionalDSS",
    "BidirectionalGLA",
    "BidirectionalGatedCNN",
    "BidirectionalHGRN2",
    "BidirectionalHyena",
    "BidirectionalLinearAttention",
    "BidirectionalMega",
    "BidirectionalRWKV4",
    "BidirectionalRWKV5",
    "BidirectionalRWKV6",
    "BidirectionalRetNet",
    "BidirectionalS4",
    "BidirectionalS4D",
    "BidirectionalS5",
    "ChannelMix",
    "GatedCNN",
    "Hydra",
    "Hyena",
    "LinearAttention",
    "LocalAttention",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MambaHeads",
    "Mega",
    "Mixer",
    "MixerInfo",
    "PhiMamba",
    "RGLRUBlock",
    "RetNet",
    "SoftmaxDSS",
    "State",
    "create_mixer",
    "list_mixers",
    "mixer_info",
    "register_mixer",
]
