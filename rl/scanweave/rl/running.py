"""The book-keeping of N episodes that run side by side: what was asked, earned, when.

    Running   targets, earned rewards, times and beginnings, one per row

Letters: N rows.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Running:
    """N episodes in progress, kept in NumPy.

    Args:
        rows: N.
        target: Return asked for, one number or one per row.

    Raises:
        ValueError: `target` has another size.
    """

    def __init__(self, rows: int, target: NDArray) -> None:
        if target.size not in (1, rows):
            raise ValueError(
                f"target_return must be one number or one per environment ({rows}), "
                f"got {target.shape}"
            )
        self.first = np.ones(rows, dtype=bool)
        """Rows whose episode begins with the next observation."""
        self.time = np.zeros(rows, dtype=np.int64)
        """Steps since each episode began."""
        # float64: a target less hundreds of rewards must not drift
        self._target = np.broadcast_to(target.reshape(-1), rows).astype(np.float64)
        self._earned = np.zeros(rows)

    def __len__(self) -> int:
        return len(self.first)

    def restart(self, rows: ArrayLike, target: ArrayLike | None = None) -> None:
        """Let some rows, (N,) bool, begin anew, with another target if one is given."""
        begins = np.broadcast_to(np.asarray(rows, dtype=bool), self.first.shape)
        if target is not None:
            if not np.isfinite(np.asarray(target, dtype=np.float64)).all():
                raise ValueError(f"target_return must be finite, got {target}")
            self._target = np.where(begins, np.asarray(target, dtype=np.float64), self._target)
        self.first = self.first | begins

    def observe(self, reward: ArrayLike | None) -> None:
        """Count what the last actions earned, (N,); rows that begin have earned nothing.

        Raises:
            ValueError: the reward is missing, mis-shaped or not finite.
        """
        if reward is None:
            if not self.first.all():
                raise ValueError("reward must be given after an episode's first step, got None")
            reward = np.zeros(len(self))
        earned = np.asarray(reward, dtype=np.float64)
        if earned.size != len(self):
            raise ValueError(f"reward must be ({len(self)},), got {earned.shape}")
        earned = np.where(self.first, 0.0, earned.reshape(-1))
        if not np.isfinite(earned).all():
            raise ValueError(f"reward must be finite, got {earned}")
        self._earned = np.where(self.first, 0.0, self._earned + earned)
        self.time = np.where(self.first, 0, self.time)

    def to_go(self) -> NDArray:
        """Return still to be earned, (N,) float64."""
        return self._target - self._earned

    def advance(self) -> None:
        """An action has been chosen for every row."""
        self.first = np.zeros_like(self.first)
        self.time = self.time + 1
