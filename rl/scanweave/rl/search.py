"""Linear players by random search, and data sets of mixed quality from them.

    python -m scanweave.rl.search --env-id Hopper-v5 --out data/local

writes `data/local/Hopper-v5/mixed-v0.hdf5` in D4RL's layout and `mixed-v0.json` beside it (seed,
settings, versions, the player's weights and what it earns).

    a = clip(M (s - mean) / std)           the player
    M <- M + step / (b spread) sum_k (r(M + noise d_k) - r(M - noise d_k)) d_k

over the best b of n random directions d_k; mean, std of all states seen, spread of their returns.

    SearchConfig        settings
    search_linear       environment -> player and its history
    linear_controller   weights -> Controller, for `record_episodes`
    main                search, record, write

Expected, with MuJoCo 4.0 and about five minutes of one core each: a player of Hopper-v5 that earns
3,162 with `--iterations 100 --alive-bonus 1`, of HalfCheetah-v5 3,435 with the defaults, and of
Walker2d-v5 1,088 with `--noise 0.025 --step 0.03`. Other seeds find other players. Of one that
falls easily, variants need a small `--spread` and `--action-noise`, or they all fall.

Source: Mania, Guy and Recht 2018, arXiv 1803.07055, algorithm 2 (V2-t).
"""

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .controllers import Controller
from .d4rl import save_d4rl
from .data import Episode, return_statistics
from .record import record_episodes
from .rollout import VectorEnv, make_envs, play, read_spaces


@dataclass(frozen=True)
class SearchConfig:
    """Arguments of `python -m scanweave.rl.search`."""

    env_id: str = "Hopper-v5"
    """Environment with vectors as observations and continuous actions."""
    out: Path = Path("data/local")
    """Folder; the files go into a folder below it with the environment's name."""
    iterations: int = 60
    """Steps of the search."""
    directions: int = 16
    """Random directions of each step; each is played both ways."""
    best: int = 8
    """Directions that count."""
    step: float = 0.05
    """Length of a step."""
    noise: float = 0.05
    """Size of the directions that are tried."""
    alive_bonus: float = 0.0
    """Taken from every reward in the search, so that standing still earns nothing: 1 for
    Hopper-v5. A player of Walker2d-v5 has to learn standing first."""
    max_episode_steps: int = 0
    """Time limit in the search and the recording; 0 for the environment's own."""
    episodes: int = 200
    """Episodes to record, each by a player of its own."""
    spread: float = 0.5
    """Each player's weights are scaled by 1 + level * N(0, 1) with level from U(0, spread)."""
    action_noise: float = 0.1
    """Noise on recorded actions, relative to half their range."""
    seed: int = 0
    """Of search and recording."""
    overwrite: bool = False
    """Replace existing files."""

    def __post_init__(self) -> None:
        for name in ("iterations", "directions", "best", "episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.best > self.directions:
            raise ValueError(f"best must be at most directions {self.directions}, got {self.best}")
        for name in ("step", "noise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def linear_controller(
    weights: NDArray, low: NDArray, high: NDArray, reference_return: float
) -> Controller:
    """A player whose actions are linear in the observation and a constant, clipped.

    Args:
        weights: (A, S + 1), the constant's last.
        low: Bounds of the actions, (A,).
        high: Bounds, (A,).
        reference_return: Mean return of this player.
    """
    shape = weights.shape

    def act(observations: NDArray, parameters: NDArray) -> NDArray:
        matrices = parameters.reshape(-1, *shape)
        actions = (matrices[:, :, :-1] @ observations[:, :, None])[:, :, 0] + matrices[:, :, -1]
        return np.clip(actions, low, high).astype(np.float32)

    return Controller(tuple(weights.ravel().tolist()), act, reference_return)


def search_linear(config: SearchConfig) -> tuple[Controller, list[float]]:
    """Search a linear player.

    Returns:
        The best player found, and the mean return of every step's trials.

    Raises:
        ValueError: the environment has no flat observations or no bounded continuous actions.
    """
    # made once: a MuJoCo task compiles its model when it is made
    envs = make_envs(config.env_id, 2 * config.directions, env_kwargs=_limit(config))
    try:
        spaces = read_spaces(envs.single_observation_space, envs.single_action_space)
        low, high = spaces.action_low, spaces.action_high
        if low is None or high is None or not isinstance(spaces.state_dim, int):
            raise ValueError(
                f"env_id must have vectors and bounded continuous actions, got {spaces}"
            )
        return _search(config, envs, spaces.state_dim, low, high)
    finally:
        envs.close()


def _search(
    config: SearchConfig, envs: VectorEnv, channels: int, low: NDArray, high: NDArray
) -> tuple[Controller, list[float]]:
    rng = np.random.default_rng(config.seed)
    matrix = np.zeros((len(low), channels))
    # of all states seen, one by one: count, mean, sum of squared deviations
    count, mean, square = 0, np.zeros(channels), np.zeros(channels)
    best: tuple[float, NDArray] = (-np.inf, np.zeros((len(low), channels + 1)))
    history = []
    for _ in range(config.iterations):
        std = np.sqrt(square / max(count - 1, 1))
        std = np.where(std < 1e-7, 1.0, std)
        tries = rng.standard_normal((config.directions, *matrix.shape))
        players = np.concatenate([matrix + config.noise * tries, matrix - config.noise * tries])
        weights = _plain_weights(players, mean, std)
        played = _play(envs, weights, low, high, rng)
        earned = np.array([e.total_reward - config.alive_bonus * len(e) for e in played])
        returns = np.array([e.total_reward for e in played])
        history.append(float(returns.mean()))
        if returns.max() > best[0]:
            best = float(returns.max()), weights[int(returns.argmax())]
        plus, minus = np.split(earned, 2)
        chosen = np.argsort(-np.maximum(plus, minus), kind="stable")[: config.best]
        spread = np.concatenate([plus[chosen], minus[chosen]]).std() + 1e-8
        gain = ((plus - minus)[chosen, None, None] * tries[chosen]).sum(axis=0)
        matrix = matrix + config.step / (config.best * spread) * gain
        seen = np.concatenate([episode.states for episode in played]).astype(np.float64)
        total = count + len(seen)
        shift = seen.mean(axis=0) - mean
        square += ((seen - seen.mean(axis=0)) ** 2).sum(axis=0)
        square += shift**2 * count * len(seen) / total
        mean, count = mean + shift * len(seen) / total, total
    std = np.where(square < 1e-12, 1.0, np.sqrt(square / max(count - 1, 1)))
    final = _plain_weights(matrix[None], mean, std)[0]
    # one lucky start makes no good player: both are played again
    candidates = np.stack([final, best[1]])
    means = _mean_returns(envs, candidates, low, high, rng)
    pick = int(np.argmax(means))
    return linear_controller(candidates[pick], low, high, means[pick]), history


def main() -> None:
    """Read arguments, search, record, write."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "scanweave.rl.search needs tyro: pip install 'scanweave[train]'"
        ) from error
    write_mixed(tyro.cli(SearchConfig))


def write_mixed(config: SearchConfig) -> Path:
    """Search, record, write.

    Returns:
        Path of the HDF5 file.

    Raises:
        FileExistsError: it exists and `overwrite` is False.
    """
    path = config.out / config.env_id / "mixed-v0.hdf5"
    if path.exists() and not config.overwrite:
        raise FileExistsError(f"{path} exists: choose another folder or give --overwrite")
    controller, history = search_linear(config)
    episodes = record_episodes(
        config.env_id,
        config.episodes,
        noise=config.spread,
        action_noise=config.action_noise,
        seed=config.seed,
        controller=controller,
        env_kwargs=_limit(config),
    )
    save_d4rl(path, episodes, overwrite=config.overwrite)
    facts = {
        "name": f"local/{config.env_id}/mixed-v0",
        "settings": {**asdict(config), "out": config.out.name},
        "player_return": controller.reference_return,
        "returns": return_statistics(episodes),
        "search": history,
        "versions": _versions(),
        "weights": controller.parameters,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.replace(partial, path.with_suffix(".json"))
    return path


def _plain_weights(players: NDArray, mean: NDArray, std: NDArray) -> NDArray:
    """(P, A, S + 1) on plain observations, of (P, A, S) on normalised ones."""
    scaled = players / std
    return np.concatenate([scaled, -(scaled @ mean)[:, :, None]], axis=2)


def _play(
    envs: VectorEnv, weights: NDArray, low: NDArray, high: NDArray, rng: np.random.Generator
) -> list[Episode]:
    """One episode of each player; all from the same start."""
    controller = linear_controller(weights[0], low, high, 0.0)
    parameters = weights.reshape(len(weights), -1)

    def act(states: NDArray, rewards: NDArray, fresh: NDArray) -> NDArray:
        return controller.act(states, parameters)

    rows = play(envs, act, seeds=[int(rng.integers(2**31))] * len(weights))
    return [row[0] for row in rows]


def _mean_returns(
    envs: VectorEnv, players: NDArray, low: NDArray, high: NDArray, rng: np.random.Generator
) -> list[float]:
    """Mean return of each of two players over five starts, the same for both."""
    # the environments are as many as a step's trials: what is over plays and does not count
    rows = players[np.arange(envs.num_envs) % len(players)]
    played = [_play(envs, rows, low, high, rng)[: len(players)] for _ in range(5)]
    returns = [[episode.total_reward for episode in episodes] for episodes in played]
    return np.mean(returns, axis=0).tolist()


def _limit(config: SearchConfig) -> dict[str, int]:
    return {"max_episode_steps": config.max_episode_steps} if config.max_episode_steps else {}


def _versions() -> dict[str, str]:
    found = {}
    for package in ("scanweave", "numpy", "gymnasium", "mujoco"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
