"""The diagonal linear recurrence, real or complex, with constant or per-step decays."""

from .functions import linear_scan, linear_scan_step
from .reference import linear_scan_ref

__all__ = ["linear_scan", "linear_scan_ref", "linear_scan_step"]
