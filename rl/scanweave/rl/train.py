"""Train a Decision Mamba agent: `python -m scanweave.rl.train`.

Without options: 300 episodes of Pendulum-v1 are recorded from controllers of mixed quality, an
agent and two behaviour cloning baselines are trained on them, and all are evaluated in the
environment. With a data set in D4RL's layout:

    python -m scanweave.rl.train --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5

Expected without options, after about 45 seconds of one core's time (a minute and a half at most
on two idle cores): the agent earns -130 to -190 when asked for 0, and less when asked for less
(about -360 for -500, -650 for -800); cloning, which cannot be asked, earns -240 to -400; the
controller without flaws earns -155.

    Config        settings
    load_data     settings -> episodes and spaces
    make_loader   episodes -> DataLoader of windows
    build_model   settings and spaces -> untrained model
    fit           train one agent
    train         data, agent, baselines, evaluation: what `main` runs
"""

import csv
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scanweave.core import create_mixer
from scanweave.core.training import (
    TrainConfig,
    Trainer,
    TrainResult,
    parse_pairs,
    plot_history,
    seed_everything,
)

from .acting import Policy
from .agent import Agent
from .cloning import BehaviourCloning
from .data import Episode, TrajectoryWindows, clip_actions, keep_batch, top_episodes
from .evaluate import Evaluation, evaluate_agent
from .inputs import as_sizes
from .model import DecisionMamba
from .online import OnlineConfig, fine_tune
from .plot import plot_targets
from .record import record_episodes
from .rollout import Spaces, make_envs, read_spaces
from .sources import load_episodes


def _train_defaults() -> TrainConfig:
    return TrainConfig(
        output_dir=Path("runs/rl"),
        max_steps=800,
        batch_size=64,
        lr=2e-3,
        weight_decay=1e-4,
        warmup_steps=50,
        clip_grad=0.25,
        save_every=400,
    )


@dataclass(frozen=True)
class Config:
    """Settings of one run."""

    env_id: str = "Pendulum-v1"
    """Gymnasium environment to evaluate in, and to record from where there is no `dataset`.
    Empty: no evaluation."""
    dataset: str = ""
    """Recorded data: an HDF5 file in D4RL's layout or an .npz with the same keys, the id of a D4RL
    data set, or `minari:<id>`; see `load_episodes`."""
    download: bool = False
    """Fetch a data set that is named by its id and not on this machine."""
    max_episode_steps: int = 0
    """Length at which episodes are cut in data without `timeouts`."""
    env_max_steps: int = 0
    """Time limit to play under, where it is not the environment's own."""
    episodes: int = 300
    """Episodes to record."""
    noise: float = 0.75
    """Spread of the recorded players' quality, see `scanweave.rl.record`."""
    action_noise: float = 0.1
    """Random share of recorded actions."""
    data_seed: int = 0
    """Seed of the recording."""

    mixer: str = "mamba"
    """Causal mixer; `attention` gives a Decision Transformer, `gated_cnn` a convolution."""
    d_state: int = 8
    """State size N, for mixers that have one to choose."""
    mixer_args: tuple[str, ...] = ()
    """Further arguments of the mixer as name=value, such as `pattern=griffin` of a `stack`."""
    hidden_size: int = 64
    """Model channels."""
    n_layer: int = 2
    """Blocks."""
    context: int = 5
    """Steps of a training window, K."""
    dropout: float = 0.0
    """Dropout rate."""
    remove_act_embs: bool = True
    """Leave out action tokens, so that the agent does not imitate its own past."""
    timestep_embedding: bool = False
    """Tell the model how old the episode is."""
    max_ep_len: int = 1000
    """Rows of the timestep table."""
    init: Literal["mamba", "official"] = "mamba"
    """Initialisation, see `DecisionMamba`."""
    pad_mode: Literal["masked", "official"] = "masked"
    """What padding does, see `AgentConfig`."""
    mode: Literal["window", "recurrent", "periodic", "staggered"] = "window"
    """How the acting agent remembers, see `scanweave.rl.acting`."""
    scale: float = 0.0
    """Returns are divided by it; 0 takes the largest absolute return of the data."""

    targets: tuple[float, ...] = ()
    """Returns to ask for in evaluation; empty takes `default_targets` of the data."""
    eval_episodes: int = 20
    """Episodes per target."""
    eval_seed: int = 10_000
    """First seed of the evaluation's episodes; apart from the training's seed."""
    baselines: bool = True
    """Also train behaviour cloning on all data and on the best tenth."""

    online: OnlineConfig = field(default_factory=OnlineConfig)
    """Learning on from the agent's own episodes, after the recorded ones."""
    train: TrainConfig = field(default_factory=_train_defaults)
    """The training loop."""


def load_data(config: Config) -> tuple[list[Episode], Spaces]:
    """The episodes of these settings, and the spaces of their environment.

    Without an environment, action bounds are the smallest and largest actions of the data.

    Raises:
        ValueError: neither a data set nor an environment is named, or they do not fit.
    """
    if not config.dataset and not config.env_id:
        raise ValueError("env_id must be given without a dataset, got neither")
    spaces = None
    if config.env_id:
        envs = make_envs(config.env_id, 1, env_kwargs=_env_kwargs(config))
        spaces = read_spaces(envs.single_observation_space, envs.single_action_space)
        envs.close()
    if not config.dataset:
        episodes = record_episodes(
            config.env_id,
            config.episodes,
            noise=config.noise,
            action_noise=config.action_noise,
            seed=config.data_seed,
        )
    else:
        limit = config.max_episode_steps or None
        episodes = load_episodes(
            str(config.dataset), max_episode_steps=limit, download=config.download
        )
    found = _spaces_of(episodes)
    spaces = spaces or found
    # a choice that the data never makes is still one of the environment's
    mine, theirs = as_sizes(found.act_dim), as_sizes(spaces.act_dim)
    fits = len(mine) == len(theirs) and (
        all(a <= b for a, b in zip(mine, theirs, strict=True))
        if spaces.discrete
        else mine == theirs
    )
    if found.state_dim != spaces.state_dim or found.discrete != spaces.discrete or not fits:
        raise ValueError(
            f"dataset must fit {config.env_id} ({_sizes(spaces)}), got {_sizes(found)}"
        )
    if spaces.action_low is not None and spaces.action_high is not None:
        episodes = clip_actions(episodes, spaces.action_low, spaces.action_high)
    return episodes, spaces


def make_loader(episodes: Sequence[Episode], length: int, config: TrainConfig) -> DataLoader[Any]:
    """Shuffled windows of `length` steps, a whole batch per fetch."""
    return DataLoader(
        TrajectoryWindows(episodes, length),
        config.batch_size,
        shuffle=True,
        num_workers=config.num_workers,
        collate_fn=keep_batch,
    )


def fit(
    model: Policy, episodes: Sequence[Episode], spaces: Spaces, config: Config, name: str
) -> tuple[Agent, TrainResult, Evaluation | None]:
    """Train one agent and evaluate it; everything goes into `output_dir/name`.

    A batch holds as many steps for every model: `batch_size` windows of `context` steps.

    Args:
        model: What the agent computes with.
        episodes: Training data, the source of its normalisers.
        spaces: Of the environment.
        config: Settings.
        name: Sub-folder of `config.train.output_dir`.

    Returns:
        The agent with its last weights, the run, and its evaluation at the last step (None
        without an environment).
    """
    settings = replace(
        config.train,
        output_dir=config.train.output_dir / name,
        batch_size=config.train.batch_size * config.context // model.max_length,
    )
    agent = Agent.from_episodes(
        model,
        episodes,
        action_low=spaces.action_low,
        action_high=spaces.action_high,
        scale=config.scale or None,
        targets=config.targets,
        mode=config.mode,
        pad_mode=config.pad_mode,
        env_id=config.env_id,
    )
    if config.dataset:
        agent.config.data["source"] = str(episodes[0].meta.get("source", config.dataset))

    def measure(model: nn.Module) -> Evaluation:
        assert isinstance(model, Agent)
        return evaluate_agent(
            model,
            episodes=config.eval_episodes,
            seed=config.eval_seed,
            env_kwargs=_env_kwargs(config),
        )

    def metrics(model: nn.Module) -> dict[str, float]:
        evaluation = measure(model)
        by_target = {
            f"return_{result.target:g}": result.mean
            for result in evaluation.results
            if result.target is not None
        }
        return {"best_return": evaluation.best.mean, **by_target}

    loader = make_loader(episodes, model.max_length, settings)
    watched = metrics if config.env_id and settings.eval_every else None
    result = Trainer(settings, agent, _loss, loader, watched).fit()
    agent.eval()
    agent.save(settings.output_dir / "agent")
    plot_history(result.history, settings.output_dir / "curves.png")
    return agent, result, measure(agent) if config.env_id else None


def build_model(config: Config, spaces: Spaces) -> DecisionMamba:
    """The untrained model of these settings."""
    # built without memory to ask for its arguments: some have a state of another kind
    kind = type(create_mixer(config.mixer, config.hidden_size, device="meta"))
    takes_d_state = "d_state" in inspect.signature(kind).parameters
    own = {"d_state": config.d_state} if takes_d_state else {}
    return DecisionMamba(
        spaces.state_dim,
        spaces.act_dim,
        config.hidden_size,
        config.n_layer,
        config.context,
        config.max_ep_len,
        mixer=config.mixer,
        mixer_kwargs={**own, **parse_pairs(config.mixer_args, "mixer_args")},
        dropout=config.dropout,
        remove_act_embs=config.remove_act_embs,
        timestep_embedding=config.timestep_embedding,
        discrete=spaces.discrete,
        init=config.init,
    )


def train(config: Config) -> dict[str, Any]:
    """Load or record, train agent and baselines, evaluate, write everything.

    Returns:
        `evaluation` of the agent, `online` of the agent that learned on, and `baselines` by name
        (Evaluation or None), `agent`, `episodes` (statistics of the data), `steps` and
        `seconds` of the offline training, `history`.
    """
    episodes, spaces = load_data(config)
    folder = config.train.output_dir
    seed_everything(config.train.seed)
    model = build_model(config, spaces)
    agent, result, evaluation = fit(model, episodes, spaces, config, "agent")
    measured: dict[str, Evaluation | None] = {"agent": evaluation}
    if config.online.rounds:
        measured["agent, online"] = fine_tune(
            agent,
            episodes,
            config.online,
            folder=folder / "online",
            env_id=config.env_id,
            env_kwargs=_env_kwargs(config),
            eval_episodes=config.eval_episodes,
            eval_seed=config.eval_seed,
            seed=config.train.seed,
            resume=config.train.resume,
            overwrite=config.train.overwrite,
        )
    baselines: dict[str, Evaluation | None] = {}
    if config.baselines:
        for name, share in (("BC", 1.0), ("10 % BC", 0.1)):
            seed_everything(config.train.seed)
            cloning = BehaviourCloning(
                spaces.state_dim,
                spaces.act_dim,
                dropout=config.dropout,
                discrete=spaces.discrete,
            )
            part = top_episodes(episodes, share)
            baselines[name] = fit(cloning, part, spaces, config, name.replace(" % ", "-"))[2]
    best = {"step": result.best_step, **result.best_metrics} if result.best_step else None
    _write(folder, {**measured, **baselines}, best)
    return {
        "agent": agent,
        "evaluation": evaluation,
        "online": measured.get("agent, online"),
        "baselines": baselines,
        "best": best,
        "episodes": agent.config.data,
        "steps": result.steps,
        "seconds": result.seconds,
        "history": result.history,
    }


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return model(batch)


def _env_kwargs(config: Config) -> dict[str, Any]:
    return {"max_episode_steps": config.env_max_steps} if config.env_max_steps else {}


def _sizes(spaces: Spaces) -> str:
    kind = "choices" if spaces.discrete else "action channels"
    return f"{spaces.state_dim} state channels, {spaces.act_dim} {kind}"


def _spaces_of(episodes: Sequence[Episode]) -> Spaces:
    """Spaces that the data itself shows."""
    shape = episodes[0].states.shape[1:]
    state_dim = int(shape[0]) if len(shape) == 1 else shape
    actions = np.concatenate([episode.actions for episode in episodes])
    if np.issubdtype(actions.dtype, np.integer):
        options = np.atleast_1d(actions.max(axis=0)) + 1
        counts = tuple(int(option) for option in options)
        return Spaces(state_dim, counts[0] if actions.ndim == 1 else counts, discrete=True)
    low, high = actions.min(axis=0), actions.max(axis=0)
    return Spaces(state_dim, actions.shape[1], False, low, high)


def _write(
    folder: Path, everything: dict[str, Evaluation | None], best: dict[str, float] | None
) -> None:
    """evaluation.csv, evaluation.json and the picture of returns against targets."""
    measured = {name: found for name, found in everything.items() if found is not None}
    evaluation = measured.get("agent")
    if evaluation is None:
        return
    rows = [{"agent": name, **row} for name, found in measured.items() for row in found.rows()]
    with (folder / "evaluation.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    document: dict[str, Any] = {name: found.document() for name, found in measured.items()}
    if best is not None:
        # of the evaluations on the way; everything else is of the last weights
        document["best evaluation"] = best
    (folder / "evaluation.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    others = {name: found for name, found in measured.items() if not name.startswith("agent")}
    plot_targets(evaluation, folder / "targets.png", others)


def main() -> None:
    """Read the settings from the command line, train, show the table."""
    import tyro
    from rich.console import Console
    from rich.table import Table

    results = train(tyro.cli(Config, description=__doc__))
    if results["evaluation"] is None:
        return
    table = Table("agent", "return asked for", "mean return", "± over episodes", "episodes")
    everything = {"agent": results["evaluation"], "agent, online": results["online"]}
    for name, found in {**everything, **results["baselines"]}.items():
        for row in found.rows() if found else ():
            target = "" if row["target"] is None else f"{row['target']:.1f}"
            table.add_row(
                name, target, f"{row['mean']:.1f}", f"{row['std']:.1f}", str(row["episodes"])
            )
    Console().print(table)


if __name__ == "__main__":
    main()
