"""The published Decision Mamba, imported from a checkout and timed as it is.

    git clone https://github.com/Toshihiro-Ota/decision-mamba      # 35f9944
    python -m benchmarks.rl_speed --official decision-mamba

Where `mamba_ssm` and a GPU are there it is the published model; elsewhere `dmamba-min`, the variant
that the repository has for machines without one. What its scripts import besides (gym, a Decision
Transformer that needs an old transformers) is not run, and replaced by empty modules. Needs einops
and transformers.

    Official         the model and its evaluation loop
    load_official    checkout -> Official
    episode_seconds  seconds of every step of one episode of that loop, without the environment's
    update_seconds   seconds of training steps
"""

import importlib
import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Official:
    """The published code.

    Attributes:
        kind: "dmamba" or "dmamba-min".
        model: Its DecisionMamba.
        evaluate: Its loop over one episode.
        device: Where it runs.
    """

    kind: str
    model: nn.Module
    evaluate: Callable[..., tuple[float, int]]
    device: str


def load_official(
    checkout: Path, *, state_dim: int, act_dim: int, length: int, device: str
) -> Official:
    """The published model at the published Hopper size, untrained.

    Raises:
        FileNotFoundError: no checkout of the repository is there.
    """
    folder = checkout / "gym"
    if not (folder / "models" / "decision_mamba.py").is_file():
        raise FileNotFoundError(f"no checkout of decision-mamba in {checkout}")
    kind = "dmamba" if device == "cuda" and _has("mamba_ssm") else "dmamba-min"
    if kind == "dmamba-min":
        sys.modules["mamba_ssm"] = _module("mamba_ssm", Mamba=None)
    sys.modules["gym"] = _module("gym")
    unused = "models.decision_transformer"
    sys.modules[unused] = _module(unused, DecisionTransformer=None)
    sys.path.insert(0, str(folder))
    models = importlib.import_module("models.decision_mamba")
    # transformers' own wants attributes that only its newer models set
    models.GPT2PreTrainedModel.init_weights = lambda model: model.apply(model._init_weights)
    trainer = importlib.import_module("util.trainer")
    torch.manual_seed(0)
    model = models.DecisionMamba(
        state_dim,
        act_dim,
        128,
        max_length=length,
        max_ep_len=1000,
        model_type=kind,
        n_layer=3,
        n_head=1,
        n_inner=4 * 128,
        activation_function="relu",
        n_positions=1024,
        resid_pdrop=0.1,
        attn_pdrop=0.1,
        drop_p=0.1,
        window_size=6,
    )
    return Official(kind, model.to(device), trainer.evaluate_episode_rtg, device)


def _module(name: str, **inside: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(inside)
    return module


def _has(name: str) -> bool:
    try:
        importlib.import_module(name)
    # a build for another torch fails in its own ways
    except (ImportError, OSError, RuntimeError):
        return False
    return True


class _Free:
    """An old-style environment that costs nothing and notes when it was stepped."""

    def __init__(self, state_dim: int, clock: Callable[[], float]) -> None:
        self.states = np.random.default_rng(0).standard_normal((8, state_dim))
        self.clock, self.times = clock, [0.0][:0]

    def reset(self) -> np.ndarray:
        self.times.append(self.clock())
        return self.states[0]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        # the action is here: its device has finished
        self.times.append(self.clock())
        return self.states[len(self.times) % 8], 1.0, False, {}


def episode_seconds(
    official: Official, state_dim: int, *, steps: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds from one action to the next; the first steps of an episode cost as much as later."""
    env = _Free(state_dim, clock)
    zeros = np.zeros(state_dim, dtype=np.float32)
    with torch.no_grad():
        official.evaluate(
            env,
            state_dim,
            3,
            official.model,
            max_ep_len=steps + 1,
            target_return=3.6,
            state_mean=zeros,
            state_std=zeros + 1,
            device=official.device,
        )
    times = env.times[1:]
    return [after - before for before, after in itertools.pairwise(times)]


def update_seconds(
    official: Official, batch: dict[str, Tensor], *, calls: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds of single updates on one batch that is there already (theirs is drawn row by row)."""
    model = official.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    held = {name: value.to(official.device) for name, value in batch.items()}
    seconds = []
    for _ in range(calls + 1):
        began = clock()
        found = model(held["states"], held["actions"], held["returns_to_go"], held["timesteps"])
        real = held["mask"]
        loss = (found[real] - held["actions"][real]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        if official.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return seconds[1:]
