"""The shared core: scan kernels as torch operators, and sequence mixers built on them."""

from .mixers import Mixer, MixerInfo, create_mixer, list_mixers, mixer_info, register_mixer
from .ops.attention import sequence_attention
from .ops.conv import causal_conv1d, causal_conv1d_step, symmetric_conv1d
from .ops.decompose import decompositions
from .ops.gated import (
    bidirectional_gated_linear_scan,
    gated_linear_attention,
    gated_linear_scan,
    gated_linear_scan_step,
    ssd,
)
from .ops.linear import linear_scan, linear_scan_step
from .ops.long_conv import diagonal_ssm, diagonal_ssm_step, fft_conv, ssm_kernel
from .ops.norm import rms_norm_gated
from .ops.rotate import rotate_both, rotate_pairs
from .ops.selective import (
    bidirectional_selective_scan,
    grid_paths,
    path_selective_scan,
    selective_scan,
    selective_scan_step,
)
from .ops.wkv import wkv, wkv_step
from .stack import create_stack

__all__ = [
    "Mixer",
    "MixerInfo",
    "bidirectional_gated_linear_scan",
    "bidirectional_selective_scan",
    "causal_conv1d",
    "causal_conv1d_step",
    "create_mixer",
    "create_stack",
    "decompositions",
    "diagonal_ssm",
    "diagonal_ssm_step",
    "fft_conv",
    "gated_linear_attention",
    "gated_linear_scan",
    "gated_linear_scan_step",
    "grid_paths",
    "linear_scan",
    "linear_scan_step",
    "list_mixers",
    "mixer_info",
    "path_selective_scan",
    "register_mixer",
    "rms_norm_gated",
    "rotate_both",
    "rotate_pairs",
    "selective_scan",
    "selective_scan_step",
    "sequence_attention",
    "ssd",
    "ssm_kernel",
    "symmetric_conv1d",
    "wkv",
    "wkv_step",
]
