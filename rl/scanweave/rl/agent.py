"""An agent: a model with everything it needs to act, in one module and one folder.

Normalisers, the scale of returns, action bounds, context mode and default targets travel with
the weights; a checkpoint without them (as the published one) cannot act.

    Agent   loss for training; reset and act for roll-outs; save and load

Letters: N environments side by side, B, K, S, A as in `model.py`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .acting import MODES, PAD_MODES, Memory, Policy, Step, make_memory
from .agent_config import AgentConfig, default_targets
from .atari import AtariDecisionMamba
from .cloning import BehaviourCloning
from .data import Episode, fingerprint, return_statistics, state_statistics
from .graphed import graphed
from .inputs import action_shape
from .losses import choice_losses
from .model import DecisionMamba
from .running import Running
from .storage import read_agent, write_agent

_MODELS: dict[str, type[Policy]] = {
    "DecisionMamba": DecisionMamba,
    "AtariDecisionMamba": AtariDecisionMamba,
    "BehaviourCloning": BehaviourCloning,
}


class Agent(nn.Module):
    """A trainable, acting, storable agent around a model.

    Args:
        model: `DecisionMamba`, `AtariDecisionMamba` or `BehaviourCloning`.
        config: See `AgentConfig`.
        state_mean: Subtracted from states, (S,), or (1,) of images; 0 when None.
        state_std: Divides states, (S,), or (1,) of images; 1 when None, 255 of images.
        action_low: Lower bounds of a continuous action, (A,); -1 when None. The model's
            [-1, 1] is mapped to [low, high].
        action_high: Upper bounds, (A,); 1 when None.

    Raises:
        ValueError: a mode is unknown, the scale is not positive, or bounds are not finite or
            not in order.
    """

    state_mean: Tensor
    state_std: Tensor
    action_low: Tensor
    action_high: Tensor

    def __init__(
        self,
        model: Policy,
        config: AgentConfig | None = None,
        *,
        state_mean: ArrayLike | None = None,
        state_std: ArrayLike | None = None,
        action_low: ArrayLike | None = None,
        action_high: ArrayLike | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config = config or AgentConfig()
        if config.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {config.mode!r}")
        if config.pad_mode not in PAD_MODES:
            raise ValueError(
                f"pad_mode must be one of {', '.join(PAD_MODES)}, got {config.pad_mode!r}"
            )
        if not config.action_squash and model.config.get("action_tanh", False):
            raise ValueError("action_tanh must be False without action_squash, got True")
        if not config.scale > 0:
            raise ValueError(f"scale must be positive, got {config.scale}")
        image = len(model.state_shape) > 1
        channels = 1 if image else model.state_shape[0]
        for name, values, size, default in (
            ("state_mean", state_mean, channels, 0.0),
            ("state_std", state_std, channels, 255.0 if image else 1.0),
            ("action_low", action_low, model.act_dim, -1.0),
            ("action_high", action_high, model.act_dim, 1.0),
        ):
            given = np.full(size, default) if values is None else np.asarray(values)
            if given.shape != (size,) or not np.isfinite(given).all():
                raise ValueError(f"{name} must be ({size},) and finite, got {given}")
            self.register_buffer(name, torch.tensor(given, dtype=torch.float32))
        if bool((self.action_low >= self.action_high).any()):
            raise ValueError(
                f"action_low must be below action_high, got {action_low} and {action_high}"
            )
        self._memory: Memory
        self._running: Running | None = None
        self._mode = config.mode
        self._asked = np.asarray(config.targets[0] if config.targets else np.nan)

    @classmethod
    def from_episodes(
        cls,
        model: Policy,
        episodes: Sequence[Episode],
        *,
        action_low: ArrayLike | None = None,
        action_high: ArrayLike | None = None,
        scale: float | None = None,
        targets: Sequence[float] = (),
        mode: str = "window",
        pad_mode: str = "masked",
        env_id: str = "",
    ) -> "Agent":
        """An agent whose normalisers come from the data it will be trained on.

        `scale` None takes the largest absolute return, so that returns-to-go are of size 1;
        without `targets` the quantiles of `default_targets` are kept.
        """
        statistics = return_statistics(episodes)
        mean, std = state_statistics(episodes)
        largest = max(abs(statistics["min"]), abs(statistics["max"]))
        config = AgentConfig(
            scale=scale or largest or 1.0,
            targets=[float(target) for target in targets] or default_targets(statistics),
            mode=mode,
            pad_mode=pad_mode,
            env_id=env_id,
            data={**statistics, "sha256": fingerprint(episodes)},
        )
        return cls(
            model,
            config,
            state_mean=mean,
            state_std=std,
            action_low=action_low,
            action_high=action_high,
        )

    @classmethod
    def from_spaces(
        cls,
        observation_space: Any,
        action_space: Any,
        config: AgentConfig | None = None,
        *,
        model: str = "DecisionMamba",
        model_config: Mapping[str, Any] | None = None,
        state_mean: ArrayLike | None = None,
        state_std: ArrayLike | None = None,
    ) -> "Agent":
        """An untrained agent that fits the spaces of a single Gymnasium environment.

        Args:
            observation_space: See `read_spaces`.
            action_space: See `read_spaces`; the agent's bounds are its bounds.
            config: See `AgentConfig`.
            model: Class of the model.
            model_config: The model's other arguments.
            state_mean: As the class's own argument.
            state_std: As the class's own argument.

        Raises:
            ValueError: the model is unknown, or the spaces are not supported.
        """
        # imported here: an agent that is loaded acts without Gymnasium
        from .rollout import read_spaces

        if model not in _MODELS:
            raise ValueError(f"model must be one of {', '.join(_MODELS)}, got {model!r}")
        squash = config is None or config.action_squash
        spaces = read_spaces(observation_space, action_space, action_squash=squash)
        sizes: dict[str, Any] = {"state_dim": spaces.state_dim, "act_dim": spaces.act_dim}
        if model != "AtariDecisionMamba":
            sizes["discrete"] = spaces.discrete
            if not squash:
                sizes["action_tanh"] = False
        return cls(
            _MODELS[model](**sizes, **(model_config or {})),
            config,
            state_mean=state_mean,
            state_std=state_std,
            action_low=spaces.action_low,
            action_high=spaces.action_high,
        )

    @property
    def device(self) -> torch.device:
        """Where the agent computes."""
        return self.state_mean.device

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The training loss of one batch of `TrajectoryWindows`.

        Mean squared error in the model's [-1, 1] units, or cross-entropy for discrete actions
        (the sum over choices made at once), over the real steps only.

        Returns:
            The loss, and metrics by name, all scalars.
        """
        mask, actions = batch["mask"], batch["actions"]
        targets = actions if self.model.discrete else self._to_model(actions)
        fed, model_mask = targets, mask
        if self.config.pad_mode == "official":
            # the published batches hold -10 in padded actions and are read without a mask
            model_mask = None
            fed = fed if self.model.discrete else fed.masked_fill(~mask[..., None], -10.0)
        predictions = self.model(
            self._normalise(batch["states"]),
            fed,
            batch["returns_to_go"] / self.config.scale,
            batch["timesteps"],
            mask=model_mask,
        )
        real = mask.sum().clamp(min=1)
        if self.model.discrete:
            losses, hits = choice_losses(predictions, targets, self.model.choices)
            loss = losses.where(mask, 0.0).sum() / real
            return loss, {"accuracy": ((hits & mask).sum() / real).detach()}
        errors = (predictions - targets).square().where(mask[..., None], 0.0)
        loss = errors.sum() / (real * self.model.act_dim)
        return loss, {"action_error": loss.detach()}

    def reset(
        self,
        target_return: ArrayLike | None = None,
        *,
        mask: ArrayLike | None = None,
        num_envs: int | None = None,
        mode: str | None = None,
    ) -> None:
        """Begin new episodes.

        Args:
            target_return: Return to ask for, one number or one per environment. None: what
                was asked for last, or the first of `config.targets`.
            mask: Environments that begin anew, (N,) bool; None begins all, and forgets N.
            num_envs: N; taken from the next observations when None.
            mode: Remember the past in another way than `config.mode`, until the next full reset.

        Raises:
            ValueError: no target is known, or `mask` comes before any full reset.
        """
        if mask is not None:
            if self._running is None:
                raise ValueError("mask must follow a reset of all environments, got none before")
            self._running.restart(mask, target_return)
            return
        if target_return is not None:
            self._asked = np.asarray(target_return, dtype=np.float64)
        if self.model.conditioned and not np.isfinite(self._asked).all():
            raise ValueError(
                f"target_return must be finite, or config.targets give one, got {self._asked}"
            )
        self._running = None
        self._mode = mode or self.config.mode
        if num_envs is not None:
            self._begin(num_envs)

    @torch.inference_mode()
    def act(
        self,
        obs: ArrayLike,
        reward: ArrayLike | None = None,
        done: ArrayLike | None = None,
        prev_action: ArrayLike | None = None,
        *,
        deterministic: bool = True,
    ) -> NDArray:
        """Choose the next action of every environment.

        Args:
            obs: Observations, (N, S), or (S,) of a single environment; images likewise.
            reward: What the last action earned, (N,), in the unit of the training data; None
                at an episode's first step, and ignored for rows that have just been reset.
            done: Rows whose episode ended before `obs`, which is the first of the next, (N,)
                bool; the same as `reset(mask=done)` before this call.
            prev_action: Action that was really executed, where it differs from the one this
                agent gave last, in environment units.
            deterministic: False samples a discrete action from the model's distribution.

        Returns:
            Actions in environment units: (N, A) float32, or int64 (N,), or (N, M) of M choices;
            without N for a single environment.

        Raises:
            ValueError: a shape does not fit, or sampling is asked of a continuous agent.
        """
        if not deterministic and not self.model.discrete:
            raise ValueError("deterministic must be True for continuous actions, got False")
        states = np.asarray(obs)
        shape = self.model.state_shape
        if states.dtype != np.uint8:
            states = states.astype(np.float32)
        single = states.ndim == len(shape)
        states = states[None] if single else states
        if states.shape[1:] != shape:
            wanted = ", ".join(map(str, ("N", *shape)))
            raise ValueError(f"obs must be ({wanted}), got {np.shape(obs)}")
        finite = np.isfinite(states).reshape(len(states), -1).all(axis=1)
        if not finite.all():
            row = int((~finite).argmax())
            raise ValueError(f"obs must be finite, got {states[row]} in row {row}")
        if self._running is None:
            self.reset(mode=self._mode)
            self._begin(len(states))
        running = self._running
        assert running is not None
        if len(states) != len(running):
            raise ValueError(f"obs must have {len(running)} rows, got {len(states)}")
        if done is not None:
            running.restart(done)
        running.observe(reward)
        if prev_action is not None:
            executed = np.asarray(prev_action)[None] if single else np.asarray(prev_action)
            if executed.shape != self._previous.shape:
                raise ValueError(
                    f"prev_action must be {tuple(self._previous.shape)}, got {executed.shape}"
                )
            self._previous = self._from_env(executed)
        first = torch.from_numpy(running.first).to(self.device)
        keep = (~first).view(-1, *[1] * (self._previous.ndim - 1))
        step = Step(
            states=self._normalise(torch.from_numpy(states).to(self.device)),
            previous_actions=self._previous * keep,
            returns_to_go=self._scaled_to_go(running),
            timesteps=torch.from_numpy(running.time).to(self.device),
            first=first,
        )
        if self.training:
            # acting never drops out; switching costs a walk over all modules
            self.eval()
            predictions = self._memory(step)
            self.train()
        else:
            predictions = self._memory(step)
        running.advance()
        actions = self._choose(predictions, deterministic)
        return actions[0] if single else actions

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `agent.safetensors` and `agent.json` into a folder.

        Each file appears whole or not at all. The configuration also stands in the header of
        `agent.safetensors`, which is what `load` reads; the JSON file is for people and tools.
        """
        write_agent(folder, self.state_dict(), self._document())

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> "Agent":
        """Read what `save` wrote; needs no data, no environment and no pickle.

        Raises:
            FileNotFoundError: the folder holds no `agent.safetensors`.
            ValueError: the file is damaged or not an agent of this format.
        """
        weights, document = read_agent(folder, set(_MODELS))
        model = _MODELS[document["model"]](**document["model_config"])
        agent = cls(model, AgentConfig(**document["config"]))
        agent.load_state_dict(weights)
        return agent.to(device).eval()

    def _document(self) -> dict[str, Any]:
        return {
            "model": type(self.model).__name__,
            "model_config": self.model.config,
            "config": asdict(self.config),
        }

    def _begin(self, rows: int) -> None:
        self._running = Running(rows, self._asked)
        memory = make_memory(self.model, rows, self._mode, self.config.pad_mode)
        replayed = self.config.cuda_graph and self.device.type == "cuda"
        self._memory = graphed(memory) if replayed else memory
        shape = (rows, *action_shape(self.model))
        kind = torch.int64 if self.model.discrete else torch.float32
        self._previous = torch.zeros(shape, dtype=kind, device=self.device)

    def _scaled_to_go(self, running: Running) -> Tensor:
        to_go = (running.to_go() / self.config.scale).astype(np.float32)
        return torch.from_numpy(to_go)[:, None].to(self.device)

    def _normalise(self, states: Tensor) -> Tensor:
        return (states - self.state_mean) / self.state_std

    def _to_model(self, actions: Tensor) -> Tensor:
        if not self.config.action_squash:
            return actions
        return 2 * (actions - self.action_low) / (self.action_high - self.action_low) - 1

    def _from_env(self, actions: NDArray) -> Tensor:
        if self.model.discrete:
            return torch.as_tensor(actions, dtype=torch.int64).to(self.device)
        return self._to_model(torch.as_tensor(actions, dtype=torch.float32).to(self.device))

    def _choose(self, predictions: Tensor, deterministic: bool) -> NDArray:
        """Actions in environment units; remembers them as executed."""
        if self.model.discrete:
            sizes = self.model.choices or (self.model.act_dim,)
            picked = [
                logits.argmax(dim=-1)
                if deterministic
                else torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]
                for logits in predictions.split(sizes, dim=-1)
            ]
            self._previous = torch.stack(picked, dim=-1) if self.model.choices else picked[0]
            return self._previous.cpu().numpy()
        if not self.config.action_squash:
            self._previous = predictions.float()
            return self._previous.cpu().numpy()
        self._previous = predictions.float().clamp(-1, 1)
        span = self.action_high - self.action_low
        return (self.action_low + (self._previous + 1) / 2 * span).cpu().numpy()
