"""Learning rate as a function of the step.

A function without state rather than torch's LambdaLR: a resumed run needs nothing restored, and
a step that fp16 loss scaling skips raises no warning about the order of calls.
"""

import math
from typing import Literal


def schedule_factor(
    step: int,
    total: int,
    *,
    schedule: Literal["cosine", "linear", "constant"] = "cosine",
    warmup_steps: int = 0,
    final: float = 0.0,
) -> float:
    """What the highest learning rate is multiplied with in one step.

    Args:
        step: Steps already made, 0 <= step < total.
        total: Steps of the whole run.
        schedule: Course from 1 to `final` after warm-up; "constant" stays at 1.
        warmup_steps: Steps of a linear rise, the last of which has factor 1.
        final: Factor that cosine and linear would reach at step `total`.

    Raises:
        ValueError: `schedule` is unknown.

    Example:
        >>> [schedule_factor(s, 6, schedule="linear", warmup_steps=2) for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done * (1.0 - final)
    if schedule == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"schedule must be cosine, linear or constant, got {schedule!r}")
