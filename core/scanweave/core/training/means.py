"""Means of what is logged, over the steps since the last row and over all processes."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

_PREFIX = "mean/"


class RunningMeans:
    """Sums on the device, so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], device: torch.device) -> None:
        """Add one value per name.

        Raises:
            ValueError: a value is not a single number.
        """
        # MPS has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        for name, value in values.items():
            value = torch.as_tensor(value, device=device).detach()
            if value.numel() != 1:
                raise ValueError(f"metric {name} must be one number, got {tuple(value.shape)}")
            entry = torch.stack([value.reshape(()).to(dtype), value.new_ones((), dtype=dtype)])
            self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The means by name, and start anew; every process must have the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names])
        self._sums = {}
        means = accelerator.reduce(sums[:, 0] / sums[:, 1], reduction="mean")
        assert isinstance(means, Tensor)
        return dict(zip(names, means.tolist(), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Sums and counts, (2,) each."""
        return {_PREFIX + name: entry for name, entry in sorted(self._sums.items())}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take back what `state` returned, among other entries."""
        self._sums = {
            name.removeprefix(_PREFIX): entry.to(device)
            for name, entry in state.items()
            if name.startswith(_PREFIX)
        }
