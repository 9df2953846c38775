"""What an acting agent remembers of each running episode, and how it predicts from that.

Four ways, all batched over environments (N rows). K is the model's `max_length`.

    WindowMemory      re-reads the last K steps: 3K tokens per step, the published protocol
    RecurrentMemory   carries the mixer's state: 3 tokens per step, whatever the length
      "recurrent"       since the episode began: equal to one forward over the whole episode
      "periodic"        cleared every K steps: context 1..K
      "staggered"       two states started K/2 apart, the older is read: context K/2..K
    make_memory       mode name -> memory

A state carried past K steps is older than any the model was trained on. "periodic" and
"staggered" stay inside what training covers, because the loss is taken at every position of a
window: their output equals `forward` over the last `age` steps.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .atari import AtariDecisionMamba
from .cloning import BehaviourCloning
from .model import DecisionMamba

Policy = DecisionMamba | AtariDecisionMamba | BehaviourCloning

MODES = ("window", "recurrent", "periodic", "staggered")
PAD_MODES = ("masked", "official")


@dataclass
class Step:
    """One environment step of N rows, in the model's units.

    Attributes:
        states: (N, S), or images.
        previous_actions: Executed one step before, (N, A), (N,) or (N, M); zeros in `first` rows.
        returns_to_go: (N, 1).
        timesteps: (N,) int64.
        first: Rows whose episode begins here, (N,) bool.
    """

    states: Tensor
    previous_actions: Tensor
    returns_to_go: Tensor
    timesteps: Tensor
    first: Tensor


class Memory(Protocol):
    """Predicts the actions of N rows step by step; a `first` row forgets what was before."""

    def __call__(self, step: Step) -> Tensor:
        """Actions (N, A)."""
        ...


def make_memory(model: Policy, rows: int, mode: str, pad_mode: str) -> Memory:
    """The memory for one of `MODES`.

    Raises:
        ValueError: the mode is unknown, or the model has no state to carry.
    """
    if mode == "window":
        return WindowMemory(model, rows, pad_mode)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not model.recurrent:
        raise ValueError(f"mode must be 'window' for a mixer without a state, got {mode!r}")
    return RecurrentMemory(model, rows, mode)


class WindowMemory:
    """The last K steps of every row, right-aligned; a forward over them gives the action.

    With `pad_mode` "masked" the places before an episode's start are masked, so that a young
    row acts on its unpadded history. "official" reads them as zeros, unmasked, as the published
    evaluation does (README, trap 1).
    """

    def __init__(self, model: Policy, rows: int, pad_mode: str) -> None:
        if pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode must be one of {', '.join(PAD_MODES)}, got {pad_mode!r}")
        self.model, self.masked = model, pad_mode == "masked"
        self.columns: list[Tensor] = []
        self.rows = rows

    def __call__(self, step: Step) -> Tensor:
        """Actions (N, A) from the window that ends with this step."""
        if not self.columns:
            self.columns = self._blank(step)
        states, actions, returns_to_go, timesteps, filled = self.columns
        keep = ~step.first
        # the newest action slot is never read: it follows the state it would answer
        actions[:, -1] = step.previous_actions
        for column in self.columns:
            column[:, :-1] = column[:, 1:].clone()
            column.mul_(keep.view(-1, *[1] * (column.ndim - 1)))
        states[:, -1] = step.states
        actions[:, -1] = 0
        returns_to_go[:, -1] = step.returns_to_go
        timesteps[:, -1] = step.timesteps
        filled[:, -1] = True
        # while every row is young, the common empty part needs no computation
        start = 0 if not self.masked else int(filled.any(dim=0).int().argmax())
        window = [column[:, start:] for column in self.columns]
        mask = window.pop()
        if not self.masked or bool(mask.all()):
            return self.model(*window)[:, -1]
        return self.model(*window, mask=mask)[:, -1]

    def _blank(self, step: Step) -> list[Tensor]:
        def zeros(like: Tensor) -> Tensor:
            return like.new_zeros(self.rows, self.model.max_length, *like.shape[1:])

        return [
            zeros(step.states),
            zeros(step.previous_actions),
            zeros(step.returns_to_go),
            zeros(step.timesteps),
            zeros(step.first),
        ]


class RecurrentMemory:
    """A mixer state per row, or two; see the module's docstring for the modes.

    Every row of every slot counts its own age, because episodes end at different times.
    """

    def __init__(self, model: Policy, rows: int, mode: str) -> None:
        self.model, self.rows = model, rows
        self.period = None if mode == "recurrent" else model.max_length
        self.slots = 2 if mode == "staggered" and model.max_length > 1 else 1
        self.carried = model.init_state(self.slots * rows)
        self.age: Tensor | None = None

    def __call__(self, step: Step) -> Tensor:
        """Actions (N, A) after this step's tokens."""
        if self.age is None:
            self.age = torch.zeros(self.slots, self.rows, dtype=torch.int64).to(step.first.device)
        # a second slot begins K/2 steps later: until then its age is negative and it is not read
        offset = 0 if self.period is None else self.period // 2
        delays = torch.arange(self.slots, device=self.age.device)[:, None] * -offset
        age = torch.where(step.first, delays, self.age)
        if self.period is not None:
            age = torch.where(age == self.period, 0, age)
        fresh = ((age == 0) | step.first).flatten()
        predictions, self.carried = self.model.step(
            self._per_slot(step.states),
            self._per_slot(step.previous_actions),
            self._per_slot(step.returns_to_go),
            self._per_slot(step.timesteps),
            self.carried,
            # asking a GPU would make it wait
            fresh if fresh.device.type != "cpu" or bool(fresh.any()) else None,
        )
        self.age = age + 1
        if self.slots == 1:
            return predictions
        slots = predictions.view(self.slots, self.rows, -1)
        return torch.where((self.age[0] > self.age[1])[:, None], slots[0], slots[1])

    def _per_slot(self, values: Tensor) -> Tensor:
        return values.repeat(self.slots, *[1] * (values.ndim - 1))
