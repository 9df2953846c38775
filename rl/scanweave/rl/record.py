"""Record trajectories of mixed quality from hand-written controllers.

    record_episodes   environment id -> episodes
    main              `python -m scanweave.rl.record --path pendulum.hdf5`, a file in D4RL's layout

200 episodes of Pendulum-v1 (40,000 steps) take about 2 seconds on one core.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .controllers import CONTROLLERS, Controller, perturbed
from .d4rl import save_d4rl
from .data import Episode
from .rollout import Spaces, make_envs, play, read_spaces


@dataclass
class Config:
    """Arguments of `python -m scanweave.rl.record`."""

    path: Path
    """HDF5 file to write."""
    env_id: str = "Pendulum-v1"
    """Environment, one of `scanweave.rl.controllers.CONTROLLERS`."""
    episodes: int = 200
    """Players to record, one episode each."""
    noise: float = 0.75
    """Each player's parameters are scaled by 1 + level * N(0, 1) with level from U(0, noise)."""
    action_noise: float = 0.1
    """Share of random motion in every action."""
    seed: int = 0
    """Seed of players, noise and environment."""
    overwrite: bool = False
    """Replace an existing file."""


def record_episodes(
    env_id: str,
    episodes: int,
    *,
    noise: float = 0.75,
    action_noise: float = 0.1,
    seed: int = 0,
    num_envs: int = 64,
    controller: Controller | None = None,
    env_kwargs: dict[str, Any] | None = None,
) -> list[Episode]:
    """Let differently good players play one episode each.

    Args:
        env_id: A Gymnasium environment; with a controller in `CONTROLLERS` unless given.
        episodes: Number of players and episodes.
        noise: Spread of the players' parameters, see `controllers.perturbed`; 0 records the
            good player only.
        action_noise: Continuous: standard deviation of noise on actions, relative to half the
            range. Discrete: chance of a random action.
        seed: Seed of players, noise and environments.
        num_envs: Environments side by side.
        controller: Policy family.
        env_kwargs: Arguments of the environment.

    Returns:
        Episodes; `meta` holds `env_id`, `seed`, `level` (0 is the good player).

    Raises:
        ValueError: there is no controller for the environment, or a number is out of range.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if not 0 <= action_noise <= 1:
        raise ValueError(f"action_noise must be in 0..1, got {action_noise}")
    if controller is None:
        if env_id not in CONTROLLERS:
            raise ValueError(f"env_id must be one of {', '.join(CONTROLLERS)}, got {env_id!r}")
        controller = CONTROLLERS[env_id]
    rng = np.random.default_rng(seed)
    parameters, levels = perturbed(controller, episodes, noise, rng)
    seeds = rng.integers(2**31, size=episodes)
    recorded: list[Episode] = []
    for start in range(0, episodes, num_envs):
        part = slice(start, min(start + num_envs, episodes))
        envs = make_envs(env_id, part.stop - start, env_kwargs=env_kwargs)
        spaces = read_spaces(envs.single_observation_space, envs.single_action_space)
        players = _Players(controller, parameters[part], spaces, action_noise, rng)
        recorded += [row[0] for row in play(envs, players, seeds=seeds[part].tolist())]
        envs.close()
    for episode, level, number in zip(recorded, levels, seeds, strict=True):
        episode.meta.update(env_id=env_id, seed=int(number), level=float(level))
    return recorded


class _Players:
    """One player per environment, with noise on the actions."""

    def __init__(
        self,
        controller: Controller,
        parameters: NDArray,
        spaces: Spaces,
        action_noise: float,
        rng: np.random.Generator,
    ) -> None:
        self.controller, self.parameters, self.spaces = controller, parameters, spaces
        self.action_noise, self.rng = action_noise, rng

    def __call__(self, states: NDArray, rewards: NDArray, fresh: NDArray) -> NDArray:
        actions = self.controller.act(states, self.parameters)
        low, high = self.spaces.action_low, self.spaces.action_high
        if low is None or high is None:
            chance = self.rng.random(len(actions)) < self.action_noise
            return np.where(
                chance, self.rng.integers(self.spaces.act_dim, size=len(actions)), actions
            )
        noise = self.action_noise * (high - low) / 2 * self.rng.standard_normal(actions.shape)
        return np.clip(actions + noise, low, high).astype(np.float32)


def main() -> None:
    """Read arguments, record, write."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "scanweave.rl.record needs tyro: pip install 'scanweave[train]'"
        ) from error
    config = tyro.cli(Config)
    if config.path.exists() and not config.overwrite:
        raise FileExistsError(f"{config.path} exists: choose another path or give --overwrite")
    episodes = record_episodes(
        config.env_id,
        config.episodes,
        noise=config.noise,
        action_noise=config.action_noise,
        seed=config.seed,
    )
    save_d4rl(config.path, episodes, overwrite=config.overwrite)


if __name__ == "__main__":
    main()
