"""D4RL's normalised scores: 0 is a random player, 100 an expert.

    REFERENCES         family or data set -> returns of random player and expert
    reference_returns  id or environment of a data set -> its row
    normalized_score   return -> score

Returns in Gymnasium's v4 and v5 tasks are not on this scale: engine and rewards differ from the
tasks that the references were played in. Say the environment's version beside a score.

Source: `d4rl/infos.py` of Farama D4RL 89141a6. D4RL's own function returns a fraction of 1.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

# longest name that a data set's id begins with counts
REFERENCES: dict[str, tuple[float, float]] = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "door": (-56.512833, 2880.5693087298737),
    "relocate": (-6.425911, 4233.877797728884),
    "kitchen": (0.0, 4.0),
    "maze2d-umaze": (23.85, 161.86),
    "maze2d-medium": (13.13, 277.39),
    "maze2d-large": (6.7, 273.99),
    "maze2d-umaze-dense": (68.537689, 193.66285642381482),
    "maze2d-medium-dense": (44.264742, 297.4552547777125),
    "maze2d-large-dense": (30.569041, 303.4857382709002),
    "maze2d-open": (0.01, 20.66),
    "maze2d-open-dense": (11.17817, 27.166538620695782),
    "minigrid-fourrooms": (0.01442, 2.89685),
}


def reference_returns(name: str) -> tuple[float, float]:
    """Returns of the random player and of the expert.

    Args:
        name: Id of a data set such as `hopper-medium-v2`, or a family such as `hopper`.

    Raises:
        ValueError: no family of D4RL begins this name.
    """
    parts = name.lower().split("-")
    for size in range(len(parts), 0, -1):
        if (found := REFERENCES.get("-".join(parts[:size]))) is not None:
            return found
    raise ValueError(f"name must begin with one of {', '.join(REFERENCES)}, got {name!r}")


def normalized_score(name: str, returns: ArrayLike) -> NDArray[np.float64]:
    """100 (return - random) / (expert - random), in the shape of `returns`.

    Raises:
        ValueError: no family of D4RL begins this name.

    Example:
        >>> float(normalized_score("hopper-medium-v2", 3234.3))
        100.0
    """
    low, high = reference_returns(name)
    return 100 * (np.asarray(returns, dtype=np.float64) - low) / (high - low)
