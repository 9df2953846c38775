"""Hand-written controllers of two Gymnasium tasks, and copies of them in mixed quality.

A controller is a function of the observation and a parameter vector. Scaling each parameter by
a random factor once per episode makes players of every quality; noise on single actions would
not, because a squared loss averages it away and plain cloning would look as good as return
conditioning.

    Controller          parameters and the function that plays them
    CONTROLLERS         one per environment id
    perturbed           parameter vectors for many episodes

Letters: N rows (episodes side by side), P parameters of a controller, S and A as in `data.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Controller:
    """A policy family.

    Attributes:
        parameters: The good player's parameters, (P,).
        act: Function of observations (N, S) and parameters (N, P), to actions (N, A) float32 or
            (N,) int64.
        reference_return: Mean return of the good player, for orientation.
    """

    parameters: tuple[float, ...]
    act: Callable[[NDArray, NDArray], NDArray]
    reference_return: float


def _pendulum(observations: NDArray, parameters: NDArray) -> NDArray:
    """Pump energy until near the top, then catch with proportional and derivative gains.

    Torque = pump * speed * (top energy - energy) below, -(kp * angle + kd * speed) near the top.
    Energy is cos(angle) + speed^2 / 30, which is constant without torque (length and mass 1,
    gravity 10: the rod's inertia is 1/3, its weight times half its length 5); 1 at the top.
    """
    pump, kp, kd, catch = parameters.T
    cosine, sine, speed = observations.T
    angle = np.arctan2(sine, cosine)
    swing = pump * speed * (1 - cosine - speed**2 / 30)
    hold = -(kp * angle + kd * speed)
    torque = np.where(np.abs(angle) < catch, hold, swing)
    return np.clip(torque, -2, 2).astype(np.float32)[:, None]


def _cartpole(observations: NDArray, parameters: NDArray) -> NDArray:
    """Push right where a weighted sum of position, speed, angle and angular speed is positive."""
    return ((observations * parameters).sum(axis=1) > 0).astype(np.int64)


CONTROLLERS: dict[str, Controller] = {
    "Pendulum-v1": Controller((2.0, 12.0, 3.0, 0.6), _pendulum, -155.0),
    "CartPole-v1": Controller((0.05, 0.3, 2.0, 0.7), _cartpole, 500.0),
}


def perturbed(
    controller: Controller, count: int, noise: float, rng: np.random.Generator
) -> tuple[NDArray, NDArray]:
    """Parameter vectors of `count` players between good and bad.

    Each player draws a level from U(0, noise) and scales every parameter by 1 + level * N(0, 1).

    Returns:
        Parameters (count, P) and the levels (count,).

    Raises:
        ValueError: noise is negative.
    """
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    best = np.array(controller.parameters)
    level = rng.uniform(0, noise, size=count)
    factors = 1 + level[:, None] * rng.standard_normal((count, len(best)))
    return best * factors, level
