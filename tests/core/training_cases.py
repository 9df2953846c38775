"""The data, model and settings that the tests of the training loop share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from scanweave.core.training import TrainConfig

FEATURES = torch.randn(28, 3, generator=torch.Generator().manual_seed(5))
TARGETS = FEATURES.sin().sum(1, keepdim=True)
DATA = TensorDataset(FEATURES, TARGETS)


def make_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)
    return nn.Sequential(*layers).to(dtype)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def make_config(path: Path, **values: Any) -> TrainConfig:
    quiet = {"progress": False, "tensorboard": False, "cpu": True, "log_every": 1}
    return TrainConfig(output_dir=path / "run", **{**quiet, "lr": 0.02, "epochs": 2, **values})


def weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return zip(FEATURES[:10], TARGETS[:10], strict=True)
