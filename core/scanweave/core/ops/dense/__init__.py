"""Time-invariant state-space models with a dense state matrix per channel."""

from .op import dense_scan
from .ssm import dense_ssm, state_powers

__all__ = ["dense_scan", "dense_ssm", "state_powers"]
