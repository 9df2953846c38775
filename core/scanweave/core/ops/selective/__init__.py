"""The Mamba-1 selective scan: one direction, both directions, along paths, single step."""

from .functions import bidirectional_selective_scan, selective_scan
from .grid import grid_paths
from .paths import path_selective_scan
from .reference import selective_scan_ref
from .step import selective_scan_step

__all__ = [
    "bidirectional_selective_scan",
    "grid_paths",
    "path_selective_scan",
    "selective_scan",
    "selective_scan_ref",
    "selective_scan_step",
]
