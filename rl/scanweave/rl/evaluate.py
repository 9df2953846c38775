"""Measure an agent in its environment, at several returns asked for.

    TargetResult     returns and lengths of the episodes at one target
    Evaluation       all targets, with the seeds and versions that make the figures repeatable
    evaluate_agent   agent + environment id -> Evaluation
    main             `python -m scanweave.rl.evaluate --agent runs/rl/agent/agent`

Every (target, seed) pair is one row of a vector environment and plays one episode, so all
targets run in one batch and the figures do not depend on how many rows run side by side.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .agent import Agent
from .rollout import EnvSource, make_envs, play
from .scores import normalized_score


@dataclass(frozen=True)
class TargetResult:
    """Episodes played at one target.

    Attributes:
        target: Return asked for; None for an agent that takes no target.
        returns: Undiscounted return of every episode, in the order of the seeds.
        lengths: Steps of every episode.
    """

    target: float | None
    returns: list[float]
    lengths: list[int]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(np.std(self.returns))


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_agent`.

    Attributes:
        env_id: Environment.
        mode: How the agent remembered the past.
        seeds: Reset seeds, the same for every target.
        results: One per target, in the order asked.
        versions: Of the packages that move the figures.
        steps: Environment steps played.
        seconds: Wall time of playing.
    """

    env_id: str
    mode: str
    seeds: list[int]
    results: list[TargetResult]
    versions: dict[str, str]
    steps: int
    seconds: float

    @property
    def best(self) -> TargetResult:
        """The target with the highest mean return."""
        return max(self.results, key=lambda result: result.mean)

    def rows(self) -> list[dict[str, float | int | str | None]]:
        """One flat row per target, for tables and CSV."""
        return [
            {
                "env_id": self.env_id,
                "mode": self.mode,
                "target": result.target,
                "mean": result.mean,
                "std": result.std,
                "length": float(np.mean(result.lengths)),
                "episodes": len(result.returns),
            }
            for result in self.results
        ]

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def evaluate_agent(
    agent: Agent,
    env_id: EnvSource | None = None,
    *,
    targets: Sequence[float] | None = None,
    episodes: int = 20,
    seed: int = 10_000,
    num_envs: int = 128,
    mode: str | None = None,
    deterministic: bool = True,
    env_kwargs: dict[str, Any] | None = None,
) -> Evaluation:
    """Play episodes at every target and collect the returns.

    Args:
        agent: What plays.
        env_id: Gymnasium environment, or a function that makes one (`OldGym` for those of `gym`
            and `d4rl`); `agent.config.env_id` when None.
        targets: Returns to ask for; `agent.config.targets` when None. An agent that takes no
            target is played once.
        episodes: Per target.
        seed: Episode i is reset with seed + i.
        num_envs: Most environments side by side.
        mode: See `Agent.reset`; `agent.config.mode` when None.
        deterministic: False draws discrete actions from the agent's distribution, as the Atari
            papers do, under `seed`; figures then depend on `num_envs`.
        env_kwargs: Arguments of the environment, `max_episode_steps` for one without a limit.

    Raises:
        ValueError: no environment or target is known, or a count is not positive.
    """
    env_id = env_id or agent.config.env_id
    if not env_id:
        raise ValueError("env_id must be given: the agent was made without an environment")
    for name, count in (("episodes", episodes), ("num_envs", num_envs)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    asked = [float(target) for target in (agent.config.targets if targets is None else targets)]
    if agent.model.conditioned and not asked:
        raise ValueError("targets must hold a return, got none and config.targets is empty")
    asked = asked if agent.model.conditioned else [0.0]
    seeds = [seed + i for i in range(episodes)]
    jobs = [(target, number) for target in asked for number in seeds]
    played = []
    began = time.perf_counter()
    for start in range(0, len(jobs), num_envs):
        part = jobs[start : start + num_envs]
        envs = make_envs(env_id, len(part), env_kwargs=env_kwargs)
        agent.reset([target for target, _ in part], num_envs=len(part), mode=mode)

        def act(states: NDArray, rewards: NDArray, fresh: NDArray) -> NDArray:
            return agent.act(states, rewards, fresh, deterministic=deterministic)

        with torch.random.fork_rng(enabled=not deterministic):
            if not deterministic:
                torch.manual_seed(seed + start)
            played += [row[0] for row in play(envs, act, seeds=[number for _, number in part])]
        envs.close()
    seconds = time.perf_counter() - began
    results = [
        TargetResult(
            target=target if agent.model.conditioned else None,
            returns=[episode.total_reward for episode in played[i * episodes :][:episodes]],
            lengths=[len(episode) for episode in played[i * episodes :][:episodes]],
        )
        for i, target in enumerate(asked)
    ]
    return Evaluation(
        env_id=env_id if isinstance(env_id, str) else getattr(env_id, "__name__", str(env_id)),
        mode=mode or agent.config.mode,
        seeds=seeds,
        results=results,
        versions=_versions(),
        steps=sum(len(episode) for episode in played),
        seconds=seconds,
    )


@dataclass
class Config:
    """Arguments of `python -m scanweave.rl.evaluate`."""

    agent: Path
    """Folder with `agent.safetensors`."""
    env_id: str = ""
    """Environment; the agent's own where empty."""
    targets: tuple[float, ...] = ()
    """Returns to ask for; the agent's own where empty."""
    episodes: int = 20
    """Per target."""
    seed: int = 10_000
    """Of the first episode; the others count on."""
    num_envs: int = 128
    """Most environments side by side."""
    mode: str = ""
    """How the agent remembers; its own where empty."""
    max_episode_steps: int = 0
    """Time limit to play under, where it is not the environment's own."""
    sample: bool = False
    """Draw discrete actions instead of taking the likeliest."""
    score: str = ""
    """D4RL data set or family, for normalised scores beside the returns."""
    json: Path | None = None
    """File for everything: every episode's return, seeds and versions."""
    device: str = "cpu"
    """Where the agent computes."""


def main() -> None:
    """Read arguments, play, show a table."""
    try:
        import tyro
    except ImportError as error:
        raise ImportError(
            "scanweave.rl.evaluate needs tyro: pip install 'scanweave[train]'"
        ) from error
    from rich.console import Console
    from rich.table import Table

    config = tyro.cli(Config)
    limit = config.max_episode_steps
    found = evaluate_agent(
        Agent.load(config.agent, config.device),
        config.env_id or None,
        targets=config.targets or None,
        episodes=config.episodes,
        seed=config.seed,
        num_envs=config.num_envs,
        mode=config.mode or None,
        deterministic=not config.sample,
        env_kwargs={"max_episode_steps": limit} if limit else None,
    )
    columns = ["return asked for", "mean return", "± over episodes", "mean length", "episodes"]
    table = Table(*columns, *(["D4RL score"] if config.score else []), title=found.env_id)
    for row, result in zip(found.rows(), found.results, strict=True):
        asked = "" if result.target is None else f"{result.target:g}"
        cells = [asked, f"{result.mean:.1f}", f"{result.std:.1f}", f"{row['length']:.0f}"]
        cells.append(str(len(result.returns)))
        if config.score:
            cells.append(f"{float(normalized_score(config.score, result.mean)):.1f}")
        table.add_row(*cells)
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    Console().print(table, f"seeds {found.seeds[0]} to {found.seeds[-1]}; {versions}")
    if config.json:
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(found.document(), indent=1), encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("scanweave", "torch", "numpy", "gymnasium", "mujoco"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
