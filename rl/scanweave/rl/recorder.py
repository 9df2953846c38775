"""Keep the episodes that somebody else's loop plays.

    RecordEpisodes         wrapper of one environment
    RecordVectorEpisodes   wrapper of a vector environment, any autoreset mode

    env = RecordEpisodes(gymnasium.make("CartPole-v1"))
    ...                                                   # any loop of reset and step
    save_minari("local/cartpole/mine-v0", env.episodes, env=env)

Letters: N environments side by side, T steps of an episode.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from .data import Episode
from .rollout import autoreset_mode


class _Track:
    """The episode in progress of one environment."""

    def __init__(self) -> None:
        self.states: list[NDArray] = []
        self.actions: list[NDArray] = []
        self.rewards: list[float] = []

    def begin(self, state: Any) -> None:
        """A reset: what was not finished is dropped."""
        self.states, self.actions, self.rewards = [np.array(state)], [], []

    def add(self, action: Any, reward: Any, state: Any) -> None:
        """One step; `state` is what followed."""
        self.actions.append(np.array(action))
        self.rewards.append(float(reward))
        self.states.append(np.array(state))

    def close(self, terminated: bool, meta: dict[str, object]) -> Episode:
        """The finished episode."""
        return Episode(
            states=np.stack(self.states[:-1]),
            actions=np.stack(self.actions),
            rewards=np.array(self.rewards),
            terminated=terminated,
            truncated=not terminated,
            final_state=self.states[-1],
            meta=meta,
        )


class RecordEpisodes(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that remembers its finished episodes in `episodes`.

    Observations must be arrays: wrap with `flatten_observations` before, where they are not.

    Args:
        env: The environment.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.episodes: list[Episode] = []
        self._track = _Track()
        self._meta: dict[str, object] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environment's; an unfinished episode is dropped."""
        state, info = self.env.reset(seed=seed, options=options)
        self._track.begin(state)
        self._meta = {} if seed is None else {"seed": seed}
        return state, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's."""
        state, reward, terminated, truncated, info = self.env.step(action)
        self._track.add(action, reward, state)
        if terminated or truncated:
            self.episodes.append(self._track.close(bool(terminated), self._meta))
        return state, reward, bool(terminated), bool(truncated), info


class RecordVectorEpisodes(VectorWrapper):
    """A vector environment that remembers its finished episodes in `episodes`, in order of end.

    Args:
        envs: N environments.

    Raises:
        ValueError: `envs` does not tell its autoreset mode.
    """

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__(envs)
        self.episodes: list[Episode] = []
        self._mode = autoreset_mode(envs)
        self._tracks = [_Track() for _ in range(envs.num_envs)]
        self._ended = np.zeros(envs.num_envs, dtype=bool)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the environments'; with `options["reset_mask"]` only those rows begin anew."""
        # copied before: Gymnasium takes the mask out of the options
        mask = np.array((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        states, info = self.env.reset(seed=seed, options=options)
        for row in np.flatnonzero(mask):
            self._tracks[row].begin(states[row])
        self._ended = self._ended & ~mask
        return states, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environments'."""
        states, rewards, terminated, truncated, info = self.env.step(actions)
        final = info.get("final_obs", states)
        resetting = self._ended & (self._mode == AutoresetMode.NEXT_STEP)
        ended = (terminated | truncated) & ~self._ended
        for row, track in enumerate(self._tracks):
            if resetting[row]:
                # this step ignored its action and gave the next episode's first observation
                track.begin(states[row])
            elif not self._ended[row]:
                follower = final[row] if ended[row] else states[row]
                track.add(actions[row], rewards[row], follower)
                if ended[row]:
                    self.episodes.append(track.close(bool(terminated[row]), {"row": row}))
                    if self._mode == AutoresetMode.SAME_STEP:
                        track.begin(states[row])
        # a row that ended waits for its reset, except where that has happened already
        waits = (self._ended & ~resetting) | ended
        self._ended = waits & (self._mode != AutoresetMode.SAME_STEP)
        return states, rewards, terminated, truncated, info
