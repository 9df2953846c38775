"""Balancing gradients in the training loop: whatever the loss is multiplied by, they are too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.training_cases import make_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scanweave.core.stack import MoE
from scanweave.core.training import Trainer

# four micro-batches that are alike, so that their mean is one of them
TOKENS = torch.randn(7, 6, generator=torch.Generator().manual_seed(5)).repeat(4, 1)


def trained(path: Path, *, accumulate: int, scaler: Any = None) -> tuple[Tensor, Tensor]:
    """The router's weight before and after one step on the balancing gradient alone."""
    torch.manual_seed(0)
    model = nn.Sequential(MoE(6, num_experts=4, router="switch", balance=1.0))
    weight = model[0].router.weight
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    config = make_config(
        path, accumulate=accumulate, max_steps=1, schedule="constant", clip_grad=0.0
    )
    batches = DataLoader(TensorDataset(TOKENS), 7)
    trainer = Trainer(config, model, lambda m, b: 0 * m(b[0]).sum(), batches, optimizer=optimizer)
    trainer.accelerator.scaler = scaler
    trainer.fit()
    return before, weight.detach().clone()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_balance_in_a_step(tmp_path: Path, accumulate: int, scale: float | None) -> None:
    before, expected = trained(tmp_path / "plain", accumulate=1)
    assert (before - expected).abs().max() > 1e-3
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    _, found = trained(tmp_path / "scaled", accumulate=accumulate, scaler=scaler)
    torch.testing.assert_close(found, expected)
