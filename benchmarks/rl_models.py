"""What the table of agents compares: data sets with their environments, and methods.

    SETS       name -> data, environment, returns asked for, steps of context
    METHODS    name -> changes of the training script's settings
    settings   set, method, seed -> the training script's `Config`

All methods see the same windows in batches of the same number of steps, with the same optimiser,
schedule and number of updates, and none was tuned here. Sizes: 64 channels and two blocks, except
where a method is a multi-layer perceptron (256 channels, two layers).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scanweave.core.training import TrainConfig
from scanweave.rl.train import Config


@dataclass(frozen=True)
class Set:
    """A data set and how agents that learned from it are measured.

    Attributes:
        env_id: Environment that they play in.
        targets: Returns asked for; the first is the one that the table reports. Empty: the best
            return of the data, and two more of `default_targets`.
        source: File below the data folder, or empty: recorded from controllers.
        context: Steps of a window, K.
        env_max_steps: Time limit to play under, 0 for the environment's own.
        episodes: Played at each target.
        d4rl: Family whose references give the score of a return, empty for none.
    """

    env_id: str
    targets: tuple[float, ...] = ()
    source: str = ""
    context: int = 5
    env_max_steps: int = 0
    episodes: int = 20
    d4rl: str = ""


def _mujoco(env_id: str, family: str) -> Set:
    source = f"local/{env_id}/mixed-v0.hdf5"
    return Set(env_id, source=source, context=10, episodes=10, d4rl=family)


SETS: dict[str, Set] = {
    "Pendulum replay": Set("Pendulum-v1", (0.0, -200.0, -500.0), "rl_pendulum/pendulum_replay.npz"),
    "Pendulum medium": Set("Pendulum-v1", (0.0, -200.0, -500.0), "rl_pendulum/pendulum_medium.npz"),
    "CartPole expert": Set("CartPole-v1", (500.0, 250.0), "rl_cartpole/cartpole_expert.npz"),
    "local/Pendulum-v1/mixed-v0": Set("Pendulum-v1", (0.0, -250.0, -500.0)),
    "local/CartPole-v1/mixed-v0": Set("CartPole-v1", (500.0, 250.0, 100.0)),
    # the recorded episodes have 223 to 300 steps
    "Adroit door, human": Set(
        "gymnasium_robotics:AdroitHandDoor-v1",
        (1500.0, 750.0),
        "rl_adroit_door/door_human.hdf5",
        context=10,
        env_max_steps=300,
        episodes=10,
        d4rl="door",
    ),
    "local/Hopper-v5/mixed-v0": _mujoco("Hopper-v5", "hopper"),
    "local/HalfCheetah-v5/mixed-v0": _mujoco("HalfCheetah-v5", "halfcheetah"),
    "local/Walker2d-v5/mixed-v0": _mujoco("Walker2d-v5", "walker2d"),
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        changes: Of the training script's settings.
        loop: Of its training loop.
        share: For behaviour cloning, the share of the data, best episodes first; 0 for agents
            that are asked for a return.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    share: float = 0.0


_OFFICIAL = {
    "init": "official",
    "pad_mode": "official",
    "timestep_embedding": True,
    "remove_act_embs": False,
    "dropout": 0.1,
}

METHODS: dict[str, Method] = {
    "DecisionMamba": Method(),
    # initialisation, padding, tokens, dropout and schedule as published
    "DecisionMamba official": Method(_OFFICIAL, {"schedule": "constant"}),
    "mamba2": Method({"mixer": "mamba2"}),
    "mamba3": Method({"mixer": "mamba3"}),
    "rg_lru": Method({"mixer": "rg_lru"}),
    "attention": Method({"mixer": "attention"}),
    "gated_cnn": Method({"mixer": "gated_cnn"}),
    "BC": Method(share=1.0),
    "10 % BC": Method(share=0.1),
}


def settings(
    name: str, method: str, seed: int, *, folder: Path, data_dir: Path, steps: int
) -> Config:
    """Settings of one run of the training script.

    Args:
        name: Key of `SETS`.
        method: Key of `METHODS`.
        seed: Of the training; recorded sets and evaluations have the same seeds in all runs.
        folder: For everything that the run writes.
        data_dir: Where the sets' files lie.
        steps: Updates.
    """
    chosen, way = SETS[name], METHODS[method]
    loop = TrainConfig(
        output_dir=folder,
        max_steps=steps,
        batch_size=64,
        lr=2e-3,
        weight_decay=1e-4,
        warmup_steps=min(50, steps // 4),
        clip_grad=0.25,
        seed=seed,
        log_every=max(1, min(50, steps)),
        eval_every=0,
        save_every=10**9,
        cpu=True,
        overwrite=True,
        progress=False,
        tensorboard=False,
    )
    return Config(
        env_id=chosen.env_id,
        dataset=str(data_dir / chosen.source) if chosen.source else "",
        env_max_steps=chosen.env_max_steps,
        context=chosen.context,
        targets=chosen.targets,
        eval_episodes=chosen.episodes,
        train=replace(loop, **way.loop),
        **way.changes,
    )
