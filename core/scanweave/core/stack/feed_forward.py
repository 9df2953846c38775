"""Feed-forwards: what a layer does to every token by itself.

    mlp         down(act(up(x)))
    gated_mlp   down(act(gate(x)) * up(x))                 SwiGLU, GEGLU
    moe         one of several such, chosen by the token: see `moe.py`

Letters: B batch, L length, D model channels, F hidden channels.

Source: Vaswani et al. 2017, arXiv 1706.03762; Shazeer 2020, arXiv 2002.05202 (gated).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _squared_relu,
    "silu": F.silu,
}


def hidden_width(d_model: int, expand: float, activation: str) -> int:
    """Hidden channels F = expand * d_model, at least 1.

    Raises:
        ValueError: there would be none, or the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    hidden = int(expand * d_model)
    if hidden < 1:
        raise ValueError(f"expand * d_model must be at least 1, got {hidden}")
    return hidden


class MLP(nn.Module):
    """Two linear maps with an activation between.

    Args:
        d_model: Channels D.
        expand: Hidden channels F = expand * d_model.
        activation: A name in `ACTIVATIONS`.
        bias: Biases in both maps.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size is not positive, or the activation is unknown.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 4,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden_width(d_model, expand, activation)
        self.act = ACTIVATIONS[activation]
        self.up = nn.Linear(d_model, hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, d_model, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map every token of `x` (..., D) to (..., D)."""
        return self.down(self.act(self.up(x)))


class GatedMLP(nn.Module):
    """An MLP whose hidden channels are gated by an activation of a second map.

    Args:
        d_model: Channels D.
        expand: Hidden channels F = expand * d_model.
        activation: A name in `ACTIVATIONS`: "silu" is SwiGLU, "gelu" GEGLU.
        bias: Biases in all maps.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: a size is not positive, or the activation is unknown.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 8 / 3,
        activation: str = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden_width(d_model, expand, activation)
        self.act = ACTIVATIONS[activation]
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, d_model, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.gate_up.reset_parameters()
        self.down.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map every token of `x` (..., D) to (..., D)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)
