"""A model and the moving average of its weights, as one module that a checkpoint holds whole.

`Averaged` is the pair; timm's ModelEmaV3 keeps the average.
"""
# timm exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer


class Averaged(nn.Module):
    """A model in training, and average <- decay * average + (1 - decay) * model after every step.

    Args:
        model: What is trained.
        decay: Weight of the past; early in the run less if `warmup`.
        warmup: Let the decay rise with the number of steps.

    Raises:
        ValueError: `decay` is not in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}")
        self.model = model
        self.average = ModelEmaV3(model, decay=decay, use_warmup=warmup)
        self.average.requires_grad_(False)
        # in the checkpoint, because a decay that rises depends on it
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._count: int | None = None

    def follow(self, optimizer: Optimizer) -> None:
        """Update the average after every step that the optimiser really makes."""
        optimizer.register_step_post_hook(self._update)

    def _update(self, *_: Any) -> None:
        updates = self.get_buffer("updates")
        if self._count is None:
            # read from the device once: a GPU would have to be waited for
            self._count = int(updates)
        self._count += 1
        updates.add_(1)
        self.average.update(self.model, self._count)

    def forward(self, x: Tensor, averaged: bool = False) -> Tensor:
        """What the model, or its average, makes of `x`."""
        return self.average.module(x) if averaged else self.model(x)

    def train(self, mode: bool = True) -> "Averaged":
        """Switch the model; the average stays in evaluation mode."""
        super().train(mode)
        self.average.eval()
        return self
