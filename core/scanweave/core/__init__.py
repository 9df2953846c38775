"""The shared core: scan kernels as torch operators, and sequence mixers built on them."""

from .mixers import Mixer, MixerInfo, create_mixer, list_mixers, mixer_info, register_mixer
from .ops.conv import causal_conv1d, causal_conv1d_step, symmetric_conv1d
from .ops.selective import (
    bidirectional_selective_scan,
    grid_paths,
    path_selective_scan,
    selective_scan,
    selective_scan_step,
)

__all__ = [
    "Mixer",
    "MixerInfo",
    "bidirectional_selective_scan",
    "causal_conv1d",
    "causal_conv1d_step",
    "create_mixer",
    "grid_paths",
    "list_mixers",
    "mixer_info",
    "path_selective_scan",
    "register_mixer",
    "selective_scan",
    "selective_scan_step",
    "symmetric_conv1d",
]
