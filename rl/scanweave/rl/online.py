"""Learning on from the agent's own episodes, in the manner of the Online Decision Transformer.

    one round:   play `episodes` episodes, asked for more than the data holds, with noise
                 put them into the buffer, where the oldest make room
                 make `updates` updates on windows of the buffer

Windows are labelled with the returns that were really earned, not with those asked for, so that
a failed attempt teaches how to earn little. The buffer begins with the best recorded episodes.

Everything in a round follows from the weights and the optimiser at its start, the episodes so
far, and the seed. They are on disk after every round, so a run that was killed at any moment and
resumed ends at the same weights on a CPU.

    OnlineConfig   settings, a part of the training script's
    fine_tune      agent and recorded episodes -> evaluation after the last round

Source: Zheng, Zhang and Grover 2022, arXiv 2202.05607, section 4. Different from it: the policy is
deterministic plus noise, or the head's distribution where actions are discrete; no entropy term.
"""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import AdamW

from scanweave.core.training import param_groups, seed_everything

from .agent import Agent
from .data import Episode, TrajectoryWindows, top_episodes
from .evaluate import Evaluation, evaluate_agent
from .rollout import make_envs, play


@dataclass(frozen=True)
class OnlineConfig:
    """Settings of learning online."""

    rounds: int = 0
    """Rounds of playing and learning after the offline training; 0 for none."""
    episodes: int = 8
    """Episodes played in each round, side by side."""
    updates: int = 100
    """Updates in each round."""
    batch_size: int = 64
    """Windows of each update."""
    lr: float = 5e-4
    """Learning rate, constant."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of matrices."""
    clip_grad: float = 0.25
    """Largest norm of all gradients together."""
    buffer: int = 200
    """Episodes that are learned from; the best recorded ones make room for the agent's own."""
    target: tuple[float, ...] = ()
    """Return asked for while playing; empty takes the highest of the agent's targets."""
    noise: float = 0.1
    """Standard deviation of the noise on continuous actions, relative to half their range.
    Discrete actions are drawn from the head's distribution instead."""

    def __post_init__(self) -> None:
        for name in ("episodes", "updates", "batch_size", "buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"online.{name} must be at least 1, got {getattr(self, name)}")
        if self.rounds < 0 or self.noise < 0:
            raise ValueError(
                f"online.rounds and online.noise must be at least 0, "
                f"got {self.rounds} and {self.noise}"
            )
        if len(self.target) > 1:
            raise ValueError(f"online.target must be one number, got {self.target}")


def fine_tune(
    agent: Agent,
    recorded: Sequence[Episode],
    config: OnlineConfig,
    *,
    folder: Path,
    env_id: str,
    env_kwargs: dict[str, Any] | None = None,
    eval_episodes: int = 20,
    eval_seed: int = 10_000,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
) -> Evaluation:
    """Let an agent play and learn, in place; write `rounds.csv` and the agent into `folder`.

    Args:
        agent: Trained offline; keeps its normalisers and its scale.
        recorded: What it learned from.
        config: Settings.
        folder: For this run.
        env_id: Where it plays.
        env_kwargs: Arguments of the environment.
        eval_episodes: Per target, after the last round.
        eval_seed: First seed of these.
        seed: Of everything random in the rounds.
        resume: Go on after the last whole round in `folder`.
        overwrite: Begin anew where `folder` holds rounds.

    Returns:
        The agent's evaluation after the last round.

    Raises:
        ValueError: the agent takes no target, there is no environment, or `folder` holds rounds
            of other settings, or holds rounds and neither `resume` nor `overwrite` is set.
    """
    if not agent.model.conditioned:
        raise ValueError("agent must take a target to learn online, got a cloning agent")
    if not env_id:
        raise ValueError("env_id must be given to learn online, got none")
    targets = config.target or (max(agent.config.targets),)
    # the number of rounds may grow from one attempt to the next
    settings = {**asdict(config), "rounds": None, "seed": seed, "env_id": env_id}
    settings = json.loads(json.dumps(settings))
    groups = param_groups(agent, config.weight_decay, lr=config.lr)
    optimizer = AdamW(groups, lr=config.lr)
    share = _share(recorded, config.buffer)
    buffer = list(share)
    done, history = 0, []
    if (folder / "state.pt").is_file() and not overwrite:
        if not resume:
            raise ValueError(f"output_dir must be free, or resume or overwrite set, got {folder}")
        done, history = _restore(agent, optimizer, folder, settings)
        for number in range(1, done + 1):
            buffer = (buffer + _read(folder / f"round-{number:05d}.npz"))[-config.buffer :]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(done + 1, config.rounds + 1):
        round_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        seed_everything(round_seed)
        played = _play(agent, config, targets[0], env_id, env_kwargs, round_seed)
        _write_episodes(folder / f"round-{number:05d}.npz", played)
        # as it will be read again: the buffer of a resumed run is the same
        played = _read(folder / f"round-{number:05d}.npz")
        buffer = (buffer + played)[-config.buffer :]
        loss = _learn(agent, optimizer, buffer, config)
        returns = [episode.total_reward for episode in played]
        history.append(
            {
                "round": number,
                "episodes": len(played),
                "steps": sum(len(episode) for episode in played),
                "return": float(np.mean(returns)),
                "loss": loss,
            }
        )
        _save(agent, optimizer, folder, settings, number, history)
    agent.eval()
    agent.save(folder / "agent")
    return evaluate_agent(
        agent, env_id, episodes=eval_episodes, seed=eval_seed, env_kwargs=env_kwargs
    )


def _share(recorded: Sequence[Episode], count: int) -> list[Episode]:
    """The best episodes, worst first, so that they leave the buffer first."""
    ranked = top_episodes(recorded, 1.0)[:count]
    return ranked[::-1]


def _play(
    agent: Agent,
    config: OnlineConfig,
    target: float,
    env_id: str,
    env_kwargs: dict[str, Any] | None,
    seed: int,
) -> list[Episode]:
    """One episode in each of `config.episodes` environments, with noise."""
    agent.eval()
    agent.reset(target, num_envs=config.episodes)
    rng = np.random.default_rng(seed)
    last: NDArray | None = None

    def act(states: NDArray, rewards: NDArray, fresh: NDArray) -> NDArray:
        nonlocal last
        if agent.model.discrete:
            return agent.act(states, rewards, fresh, deterministic=False)
        actions = agent.act(states, rewards, fresh, last)
        if not agent.config.action_squash:
            low, high = np.float32(-np.inf), np.float32(np.inf)
            spread: Any = config.noise
        else:
            low, high = agent.action_low.cpu().numpy(), agent.action_high.cpu().numpy()
            spread = config.noise * (high - low) / 2
        noise = (spread * rng.standard_normal(actions.shape)).astype(np.float32)
        played = np.clip(actions + noise, low, high)
        last = played
        return played

    envs = make_envs(env_id, config.episodes, env_kwargs=env_kwargs)
    try:
        seeds = [int(number) for number in rng.integers(2**31, size=config.episodes)]
        return [row[0] for row in play(envs, act, seeds=seeds)]
    finally:
        envs.close()


def _learn(
    agent: Agent, optimizer: AdamW, buffer: Sequence[Episode], config: OnlineConfig
) -> float:
    """Updates on the buffer; their mean loss."""
    agent.train()
    windows = TrajectoryWindows(buffer, agent.model.max_length)
    total = torch.zeros(())
    for _ in range(config.updates):
        batch = windows.__getitems__(torch.randint(len(windows), (config.batch_size,)).tolist())
        loss, _ = agent({name: value.to(agent.device) for name, value in batch.items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), config.clip_grad)
        optimizer.step()
        total += loss.detach().cpu()
    mean = float(total) / config.updates
    if not np.isfinite(mean):
        raise FloatingPointError(f"loss must be finite, got {mean}; a lower online.lr may help")
    return mean


_PARTS = ("states", "actions", "rewards", "final_state")


def _write_episodes(path: Path, episodes: Sequence[Episode]) -> None:
    arrays: dict[str, Any] = {}
    for number, episode in enumerate(episodes):
        for part in _PARTS:
            arrays[f"{number}/{part}"] = getattr(episode, part)
        arrays[f"{number}/terminated"] = np.array(episode.terminated)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> list[Episode]:
    with np.load(path, allow_pickle=False) as file:
        count = len({name.split("/")[0] for name in file.files})
        return [
            Episode(
                **{part: file[f"{number}/{part}"] for part in _PARTS},
                terminated=bool(file[f"{number}/terminated"]),
                truncated=not bool(file[f"{number}/terminated"]),
                meta={"source": path.name},
            )
            for number in range(count)
        ]


def _save(
    agent: Agent,
    optimizer: AdamW,
    folder: Path,
    settings: dict[str, Any],
    number: int,
    history: list[dict[str, Any]],
) -> None:
    """After this a resumed run begins with the next round."""
    state = {
        "round": number,
        "settings": json.dumps(settings),
        "history": json.dumps(history),
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    partial = folder / f".state.{os.getpid()}"
    try:
        torch.save(state, partial)
        os.replace(partial, folder / "state.pt")
    finally:
        partial.unlink(missing_ok=True)
    with (folder / "rounds.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)


def _restore(
    agent: Agent, optimizer: AdamW, folder: Path, settings: dict[str, Any]
) -> tuple[int, list[dict[str, Any]]]:
    state = torch.load(folder / "state.pt", map_location=agent.device, weights_only=True)
    if (earlier := json.loads(state["settings"])) != settings:
        changed = sorted(key for key in settings if settings[key] != earlier.get(key))
        raise ValueError(f"online settings must be those of {folder} to resume, got new {changed}")
    agent.load_state_dict(state["agent"])
    optimizer.load_state_dict(state["optimizer"])
    return state["round"], json.loads(state["history"])
