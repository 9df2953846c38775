"""Play episodes in a Gymnasium vector environment, under any of its autoreset modes.

    Spaces        sizes and bounds that a model needs
    read_spaces   Gymnasium spaces -> Spaces
    flatten_observations   environment -> environment with observations that a model reads
    make_envs     environment id, or a function that makes one -> vector environment
    play          vector environment + policy -> episodes per row

What the modes return with the last step of an episode, and so when the next one begins:
    NEXT_STEP   the final observation; the following step ignores its action and resets
    SAME_STEP   the next episode's first observation; the final one stands in the info
    DISABLED    the final observation; the caller resets the rows that ended

Letters: N environments side by side, S and A as in `data.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import Episode

try:
    import gymnasium
    from gymnasium.vector import AutoresetMode, VectorEnv
except ImportError as error:
    raise ImportError("scanweave.rl needs gymnasium: pip install 'scanweave[rl]'") from error

Act = Callable[[NDArray, NDArray, NDArray], NDArray]
EnvSource = str | Callable[..., gymnasium.Env[Any, Any]]


@dataclass(frozen=True)
class Spaces:
    """What a model needs to know of an environment.

    Attributes:
        state_dim: Channels of an observation, S, or the shape of an image.
        act_dim: Channels of a continuous action or number of options, A; or the options of each
            of several choices.
        discrete: Actions are choices.
        action_low: Lower bounds (A,), None when discrete or not bounded.
        action_high: Upper bounds (A,), None when discrete or not bounded.
    """

    state_dim: int | tuple[int, ...]
    act_dim: int | tuple[int, ...]
    discrete: bool
    action_low: NDArray | None = None
    action_high: NDArray | None = None


def read_spaces(
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    *,
    action_squash: bool = True,
) -> Spaces:
    """Sizes and bounds of a single environment's spaces.

    Observations: a Box of uint8 with two or three axes is an image; everything else becomes a
    flat vector (Dict, Tuple, Discrete and Boxes of several axes as `gymnasium.spaces.flatten`
    does, which `make_envs` applies).

    Args:
        observation_space: Of one environment.
        action_space: Of one environment: a flat Box, Discrete, MultiDiscrete or MultiBinary.
        action_squash: Continuous actions have finite bounds, which the model's [-1, 1] is mapped
            to. False: they have none, and the model's head is linear.

    Raises:
        ValueError: observations cannot be flattened; actions are of another kind, do not start
            at 0, or are not bounded and `action_squash` is True.
    """
    state_dim = _read_observations(observation_space)
    spaces = gymnasium.spaces
    if isinstance(action_space, spaces.Discrete):
        if action_space.start != 0:
            raise ValueError(f"action_space must start at 0, got {action_space}")
        return Spaces(state_dim, int(action_space.n), discrete=True)
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1:
        if np.any(action_space.start != 0):
            raise ValueError(f"action_space must start at 0, got {action_space}")
        return Spaces(state_dim, _options(action_space.nvec), discrete=True)
    if isinstance(action_space, spaces.MultiBinary) and len(action_space.shape) == 1:
        return Spaces(state_dim, _options(np.full(action_space.shape, 2)), discrete=True)
    if not isinstance(action_space, spaces.Box) or len(action_space.shape) != 1:
        raise ValueError(
            f"action_space must be a flat Box, Discrete, MultiDiscrete or MultiBinary, "
            f"got {action_space}"
        )
    if not action_squash:
        return Spaces(state_dim, action_space.shape[0], discrete=False)
    if not action_space.is_bounded():
        raise ValueError(
            f"action_space must be bounded, or action_squash False, got {action_space}"
        )
    return Spaces(
        state_dim, action_space.shape[0], False, action_space.low.copy(), action_space.high.copy()
    )


def _options(counts: NDArray) -> int | tuple[int, ...]:
    return int(counts[0]) if len(counts) == 1 else tuple(int(count) for count in counts)


def is_image(space: gymnasium.Space[Any]) -> bool:
    """Whether observations of this space go through an image encoder."""
    box = isinstance(space, gymnasium.spaces.Box)
    return box and space.dtype == np.uint8 and len(space.shape or ()) in (2, 3)


def _is_vector(space: gymnasium.Space[Any]) -> bool:
    return isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1


def _read_observations(space: gymnasium.Space[Any]) -> int | tuple[int, ...]:
    if is_image(space):
        return tuple(space.shape or ())
    try:
        return gymnasium.spaces.flatdim(space)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"observation_space must be an image or flatten, got {space}") from error


def flatten_observations(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    """The environment with flat observations; images and vectors stay as they are."""
    space = env.observation_space
    if is_image(space) or _is_vector(space):
        return env
    return gymnasium.wrappers.FlattenObservation(env)


def make_envs(
    env_id: EnvSource,
    num_envs: int,
    *,
    autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
    env_kwargs: dict[str, Any] | None = None,
) -> VectorEnv:
    """`num_envs` copies of an environment, stepped one after the other in this process.

    Observations that are neither vectors nor images are flattened, see `read_spaces`.

    Args:
        env_id: A Gymnasium id, or a function that makes one environment.
        num_envs: At least 1.
        autoreset_mode: See the module's docstring.
        env_kwargs: Arguments of `gymnasium.make`, or of the function.

    Raises:
        ValueError: `num_envs` is below 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}")
    if not isinstance(env_id, str):
        make = env_id

        def one() -> gymnasium.Env[Any, Any]:
            return flatten_observations(make(**(env_kwargs or {})))

        return gymnasium.vector.SyncVectorEnv([one] * num_envs, autoreset_mode=autoreset_mode)
    return gymnasium.make_vec(
        env_id,
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": autoreset_mode},
        # may be no wrapper: gymnasium only calls it
        wrappers=[flatten_observations],  # pyright: ignore[reportArgumentType]
        **(env_kwargs or {}),
    )


def play(
    envs: VectorEnv, act: Act, *, episodes: int = 1, seeds: Sequence[int] | None = None
) -> list[list[Episode]]:
    """Play a fixed number of episodes in every row.

    A fixed number per row, not the first that end, so that short episodes are not preferred.

    Args:
        envs: N environments with any autoreset mode.
        act: Function of observations (N, S), rewards of the last step (N,) and the rows whose
            episode begins with this observation (N,) bool, to actions (N, A) or (N,). Rewards
            of such rows belong to no step and are 0. Called also for rows that are done.
        episodes: Per row.
        seeds: One per row, for the first reset.

    Returns:
        For every row its episodes in order.

    Raises:
        ValueError: `envs` does not tell its autoreset mode, or a count is wrong.
    """
    mode = autoreset_mode(envs)
    rows = envs.num_envs
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if seeds is not None and len(seeds) != rows:
        raise ValueError(f"seeds must be one per environment ({rows}), got {len(seeds)}")
    first_seeds: Any = None if seeds is None else [int(seed) for seed in seeds]
    states, _ = envs.reset(seed=first_seeds)
    fresh, rewards = np.ones(rows, dtype=bool), np.zeros(rows)
    history: list[tuple[NDArray, NDArray, NDArray]] = []
    began = np.zeros(rows, dtype=np.int64)
    closed: list[list[tuple[int, int, bool, NDArray]]] = [[] for _ in range(rows)]
    resetting = np.zeros(rows, dtype=bool)
    while min(map(len, closed)) < episodes:
        # environments may reuse the array that they return
        states = np.array(states)
        actions = act(states, rewards, fresh)
        following, rewards, terminated, truncated, info = envs.step(
            actions.reshape(envs.action_space.shape or actions.shape)
        )
        history.append((states, np.array(actions), np.array(rewards)))
        ended = (terminated | truncated) & ~resetting
        final = info.get("final_obs", following)
        for row in np.flatnonzero(ended):
            if len(closed[row]) < episodes:
                end = (int(began[row]), len(history), bool(terminated[row]), np.array(final[row]))
                closed[row].append(end)
        if mode == AutoresetMode.NEXT_STEP:
            fresh, resetting = resetting, ended
        else:
            fresh = ended
            if mode == AutoresetMode.DISABLED and ended.any():
                following, _ = envs.reset(options={"reset_mask": ended.copy()})
        # the next stored step is the first of a fresh row's episode
        began[fresh] = len(history)
        rewards = np.where(fresh, 0.0, rewards)
        states = following
    return [[_cut(history, row, *bounds) for bounds in closed[row]] for row in range(rows)]


def _cut(
    history: list[tuple[NDArray, NDArray, NDArray]],
    row: int,
    start: int,
    end: int,
    terminated: bool,
    final: NDArray,
) -> Episode:
    steps = history[start:end]
    return Episode(
        states=np.stack([states[row] for states, _, _ in steps]),
        actions=np.stack([actions[row] for _, actions, _ in steps]),
        rewards=np.array([rewards[row] for _, _, rewards in steps]),
        terminated=terminated,
        truncated=not terminated,
        final_state=final,
    )


def autoreset_mode(envs: VectorEnv) -> AutoresetMode:
    """When the rows of a vector environment begin anew.

    Raises:
        ValueError: it does not tell.
    """
    mode = envs.metadata.get("autoreset_mode")
    if mode is None:
        raise ValueError(
            f"envs must tell metadata['autoreset_mode'] (Gymnasium 1.1 or newer), got {envs}"
        )
    return AutoresetMode(mode)
