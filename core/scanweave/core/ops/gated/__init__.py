"""The matrix-state scan (SSD, gated linear attention): one direction, both, single step."""

from .functions import bidirectional_gated_linear_scan, gated_linear_scan
from .named import gated_linear_attention, head_steps, ssd, time_steps
from .reference import gated_linear_scan_ref, quasi_separable_ref
from .step import gated_linear_scan_step

__all__ = [
    "bidirectional_gated_linear_scan",
    "gated_linear_attention",
    "gated_linear_scan",
    "gated_linear_scan_ref",
    "gated_linear_scan_step",
    "head_steps",
    "quasi_separable_ref",
    "ssd",
    "time_steps",
]
