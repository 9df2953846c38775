"""Stored outputs of RWKV's published layers, and the numbers they were made from.

`data/rwkv.json`: classes of RWKV-LM's `RWKV-v5/src/model.py` (commit 524481d5) in float64, with
fla's `naive_recurrent_rwkv6` (commit bc3b101d, scale 1) in place of their CUDA kernels; the loops
of ChatRWKV's `RWKV_v5_demo.py` and `RWKV_v6_demo.py` (commit 965e40b8) gave the same to 1e-15.
Width 8, heads of 4, 5 tokens, layer 1 of 3. Weights, input and cotangent are `waves`: those of the
i-th name in the alphabet have speed 1.5 + 0.37 i. Values are (5, 8) in rows of 4; "gradient_sums"
are sums of a weight's gradient times a wave of speed 0.3; "initial" are initial values.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tests.core.wave_cases import waves
from torch import Tensor

STORED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "rwkv.json").read_text()
)


def wave_weights(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """A state dict of waves."""
    names = enumerate(sorted(shapes))
    return {name: waves(*shapes[name], speed=1.5 + 0.37 * i) for i, name in names}


def stored(name: str, key: str) -> Tensor:
    """Values (1, 5, 8) of one class."""
    return torch.tensor(STORED[name][key], dtype=torch.float64).view(1, 5, 8)
