"""Numbers that any program can make again, and layers' results on them that were stored.

waves             sines in any shape: the weights, inputs and cotangents behind stored results
fill_with_waves   give a mixer such weights
results           what a mixer makes of waves: outputs and gradients
check_stored      compare such results with a file
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scanweave.core import Mixer


def waves(*shape: int, speed: float) -> Tensor:
    """sin(speed), sin(2 speed), ... in one shape."""
    count = torch.Size(shape).numel()
    return torch.sin(speed * torch.arange(1, count + 1, dtype=torch.float64)).reshape(shape)


def fill_with_waves(mixer: Mixer) -> Mixer:
    """Load waves into all parameters, one speed each, by the order of their names."""
    shapes = {name: p.shape for name, p in sorted(mixer.named_parameters())}
    weights = {name: waves(*s, speed=i + 1.5) for i, (name, s) in enumerate(shapes.items())}
    mixer.load_state_dict(weights, strict=True)
    return mixer


def results(mixer: Mixer) -> dict[str, Tensor | None]:
    """Output of six tokens in two sequences of 8 channels, and gradients of all there is."""
    x = waves(2, 6, 8, speed=0.7).to(next(mixer.parameters()).dtype).requires_grad_()
    y = mixer(x)
    y.backward(waves(2, 6, 8, speed=1.1).to(x.dtype))
    found = {"output": y, "gradient of x": x.grad}
    return found | {f"gradient of {name}": p.grad for name, p in mixer.named_parameters()}


def check_stored(
    assert_near: Callable[..., None],
    actual: Mapping[str, Tensor | None],
    path: Path,
    case: str = "",
) -> None:
    """Compare with a file's arrays, or with those whose names begin with `case`, all of them."""
    with np.load(path) as stored:
        expected = {k: torch.from_numpy(stored[k]) for k in stored.files if k.startswith(case)}
    named = {f"{case} {name}".lstrip(): value for name, value in actual.items()}
    assert named.keys() == expected.keys()
    for name, value in named.items():
        gradient = name.removeprefix(f"{case} ").startswith("gradient")
        assert_near(value, expected[name], gradient=gradient, name=name)
