"""What running published code and comparing with its stored results share.

weights    the parameters of every published model
inputs     what it reads, and the cotangent of its output
Case       a model that runs
stand_in   a module for imports to find
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tests.core.wave_cases import waves
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
D_MODEL, LENGTH = 8, 9


def weights(shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """Waves for all parameters, one speed each by the order of their names; norms are near 1."""
    made = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        made[name] = 0.5 * waves(*shape, speed=i + 1.5)
        if name.endswith("weight") and ("norm" in name or "ln_" in name):
            made[name] += 1
    return made


def inputs() -> tuple[Tensor, Tensor]:
    """The input and the cotangent of the output, both (2, L, D)."""
    size = (2, LENGTH, D_MODEL)
    return waves(*size, speed=0.7).requires_grad_(), waves(*size, speed=0.3)


class Same(nn.Module):
    """Stands where embeddings were: the input as it is."""

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return x


def stand_in(name: str, **content: Any) -> ModuleType:
    """A module of this name that holds `content`, for imports to find."""
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    return module


class Case(NamedTuple):
    """A published model, and the losses that its experts leave to be added in training."""

    model: nn.Module
    balance: Callable[[], Tensor] | None = None
