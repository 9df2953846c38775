"""What a measured op consists of, and random inputs for it.

Letters: B batch, L length, D channels, N state, K directions.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .floor import Work
from .reference import Exact
from .shapes import Shape

# in float32 (or float64) whatever the dtype of the activations, as in a Mamba block
WEIGHTS = ("A", "D", "dt_bias", "weight", "bias")
# ending of the names of the reverse direction's tensors
BACK = "_r"


@dataclass
class Inputs:
    """Tensors by the op's argument names; the reverse direction's end in `_r`."""

    shape: Shape
    tensors: dict[str, Tensor]
    cu_seqlens: Tensor | None = None
    paths: Tensor | None = None  # (K, L): token of every step
    state: Tensor | None = None  # (B, D, N) that a step updates in place
    module: nn.Module | None = None

    def double(self) -> "Inputs":
        """The same values in float64."""
        if self.module is not None:
            module = copy.deepcopy(self.module).double()
            tensors = {"x": self.tensors["x"].detach().double().requires_grad_()}
            tensors |= dict(module.named_parameters())
            return Inputs(self.shape, tensors, module=module)
        tensors = {k: v.detach().double().requires_grad_() for k, v in self.tensors.items()}
        state = None if self.state is None else self.state.double()
        return Inputs(self.shape, tensors, self.cu_seqlens, self.paths, state)


@dataclass(frozen=True)
class Op:
    """One row of the registry.

    Attributes:
        name: What the command line takes.
        make: Random inputs of a shape, with gradients where the op has them.
        run: The op, as a user calls it.
        exact: Output and every gradient in float64, from float64 inputs and the output's gradient.
        work: Least bytes and exponentials, forward and backward; None for whole blocks, which are
            mostly matrix products.
        backward: Whether the op has gradients.
        directions: Directions of a scan.
        outputs: Outputs of the first input's shape; several are one tensor, (outputs, B, L, D).
    """

    name: str
    make: Callable[[Shape, torch.dtype, torch.device], Inputs]
    run: Callable[[Inputs], Tensor]
    exact: Callable[[Inputs, Tensor], Exact]
    work: Callable[[Shape, torch.dtype], tuple[Work, Work]] | None
    backward: bool = True
    directions: int = field(default=1)
    outputs: int = field(default=1)


class Draw:
    """Random leaves of one dtype on one device, the same values everywhere."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        # drawing on the device: the largest shape has 300 million elements a tensor
        self.rng = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def __call__(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values."""
        return torch.randn(*size, generator=self.rng, device=self.device, dtype=dtype or self.dtype)


def direction(draw: Draw, shape: Shape, suffix: str) -> dict[str, Tensor]:
    """One direction's inputs, distributed as in a freshly initialised Mamba block."""
    tokens = (shape.batch, shape.length)
    # steps log-uniform in [0.001, 0.1], through the inverse of softplus
    uniform = torch.rand(shape.dim, generator=draw.rng, device=draw.device)
    step = torch.exp(math.log(1e-3) + uniform * math.log(100.0))
    rates = torch.arange(1, shape.state + 1, device=draw.device, dtype=torch.float32)
    tensors = {
        "x": draw(*tokens, shape.dim),
        "dt": draw(*tokens, shape.dim),
        "A": -rates.repeat(shape.dim, 1),
        "B": draw(*tokens, shape.state),
        "C": draw(*tokens, shape.state),
        "D": draw(shape.dim, dtype=torch.float32),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }
    return {name + suffix: v for name, v in tensors.items()}
