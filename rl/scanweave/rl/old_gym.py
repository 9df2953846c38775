"""Environments of the `gym` package, as those of `d4rl` are, made Gymnasium's.

    OldGym   env with `reset() -> obs` and `step() -> obs, reward, done, info` -> Gymnasium env

    evaluate_agent(agent, lambda: OldGym(gym.make("hopper-medium-v2")))

Neither `gym` nor `d4rl` is imported: the environment is taken by what it offers, in the older form
or in the newer one of gym 0.26.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rollout import gymnasium


class OldGym(gymnasium.Env[Any, Any]):
    """A Gymnasium environment around one of `gym`.

    `done` without the key `TimeLimit.truncated` in the info counts as the task's own end.

    Args:
        env: With `reset`, `step`, `observation_space` and `action_space`.

    Raises:
        ValueError: a space is neither a Box nor Discrete, or an attribute is missing.
    """

    def __init__(self, env: Any) -> None:
        for name in ("reset", "step", "observation_space", "action_space"):
            if not hasattr(env, name):
                raise ValueError(f"env must have {name}, got {type(env).__name__}")
        self.old = env
        self.observation_space = _space("observation_space", env.observation_space)
        self.action_space = _space("action_space", env.action_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray, dict[str, Any]]:
        """First observation; `options` are not of this interface."""
        super().reset(seed=seed)
        if seed is not None and hasattr(self.old, "seed"):
            self.old.seed(seed)
            found = self.old.reset()
        else:
            found = self.old.reset() if seed is None else self.old.reset(seed=seed)
        observation, info = found if isinstance(found, tuple) else (found, {})
        return self._observed(observation), dict(info)

    def step(self, action: Any) -> tuple[NDArray, float, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, info."""
        observation, reward, *ends, info = self.old.step(action)
        if len(ends) == 1:
            cut = bool(info.get("TimeLimit.truncated", False))
            terminated, truncated = bool(ends[0]) and not cut, bool(ends[0]) and cut
        else:
            terminated, truncated = map(bool, ends)
        return self._observed(observation), float(reward), terminated, truncated, dict(info)

    def close(self) -> None:
        """Close the environment inside, if it can be."""
        if hasattr(self.old, "close"):
            self.old.close()

    def _observed(self, observation: Any) -> NDArray:
        return np.asarray(observation, dtype=self.observation_space.dtype)


def _space(name: str, space: Any) -> gymnasium.Space[Any]:
    if hasattr(space, "n"):
        return gymnasium.spaces.Discrete(int(space.n))
    if not (hasattr(space, "low") and hasattr(space, "high")):
        raise ValueError(f"{name} must be a Box or Discrete, got {space}")
    low, high = np.asarray(space.low), np.asarray(space.high)
    # doubles, as d4rl's environments observe, would be cast by every model anyway
    kind = np.uint8 if low.dtype == np.uint8 else np.float32
    return gymnasium.spaces.Box(low.astype(kind), high.astype(kind), dtype=kind)
