"""Checks of what a script's loss and its evaluation returned."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .log import COLUMNS


def split_loss(result: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
    """The scalar and the numbers to log that a loss returned.

    Raises:
        ValueError: it is neither a scalar nor one and a dict, or a name is one of the log's.
    """
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not isinstance(metrics, Mapping):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss must return a scalar tensor, or one and a dict, got {got}")
    if taken := sorted(set(metrics) & set(COLUMNS)):
        raise ValueError(f"loss must not name a metric {', '.join(taken)}: the log uses it")
    return loss.reshape(()), metrics


def checked_metrics(metrics: Any) -> dict[str, float]:
    """The numbers that an evaluation returned.

    Raises:
        ValueError: they are not a dict of at least one number.
    """
    if not isinstance(metrics, Mapping) or not metrics:
        raise ValueError(f"evaluate must return a dict of numbers, got {metrics!r}")
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"evaluate must return a dict of numbers, got {metrics!r}") from error
