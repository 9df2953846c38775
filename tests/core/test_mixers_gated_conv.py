"""BaseConv against zoology's layer (stored values) and its own sums, errors."""

from collections.abc import Callable

import pytest
import torch
from tests.core.wave_cases import waves

from scanweave.core import create_mixer

Check = Callable[..., None]
# zoology's BaseConv (zoology/mixers/base_conv.py, commit d88d6f54) with kernel_size 3 in float64,
# with the weights, input and cotangent of `waves`: output and gradient of its input, (6, 3)
OUTPUT = [
    [3.783450739, 1.059723036, 0.03749889184],
    [-2.138039484, 0.3536822316, -1.234219586],
    [2.437841686, 0.6964010761, 1.052769273],
    [0.1957569096, 1.522457348, -1.009983471],
    [0.1250271619, 0.06492785328, 1.028239283],
    [2.069966743, 1.629071579, -0.6342364469],
]
GRADIENT = [
    [4.764114165, 1.19084821, 2.038176477],
    [-0.2951986081, -2.24763989, 1.337040061],
    [0.1570606835, -2.180563091, 0.04015024695],
    [0.9589103643, -0.5895204123, 0.3123063037],
    [-0.9609701607, -1.125046063, 1.625547891],
    [2.220398501, 1.008578074, 0.259457489],
]
GRADIENTS = {
    "projection.bias": [0.412117964, -0.213992264, -1.223575282],
    "conv.conv.bias": [4.475501373, 2.714271879, 3.502496388],
    "conv.conv.weight": [
        *(1.136680578, -0.805728814, 3.276101923),
        *(-1.917339087, 1.984612272, -1.081347292),
        *(0.2152097262, 0.4713472766, -0.861220667),
    ],
}
SHAPES = {
    "projection.weight": (3, 3),
    "projection.bias": (3,),
    "conv.conv.weight": (3, 1, 3),
    "conv.conv.bias": (3,),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_equals_the_published_layer(assert_near: Check, dtype: torch.dtype):
    mixer = create_mixer("base_conv", 3, dtype=dtype)
    weights = {k: waves(*v, speed=0.7 + 0.1 * i) for i, (k, v) in enumerate(SHAPES.items())}
    mixer.load_state_dict(weights, strict=True)
    factor = 100 if dtype == torch.float64 else 0.1  # stored with ten digits
    x = waves(1, 6, 3, speed=0.9).to(dtype).requires_grad_()
    y = mixer(x)
    assert_near(y[0], torch.tensor(OUTPUT, dtype=torch.float64), factor=factor)
    y.backward(waves(1, 6, 3, speed=1.3).to(dtype))
    assert x.grad is not None
    wanted = torch.tensor(GRADIENT, dtype=torch.float64)
    assert_near(x.grad[0], wanted, gradient=True, factor=factor)
    for name, values in GRADIENTS.items():
        grad, wanted = mixer.get_parameter(name).grad, torch.tensor(values, dtype=torch.float64)
        assert grad is not None
        assert_near(grad.flatten(), wanted, gradient=True, factor=factor, name=name)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("width", [1, 3, 21])
def test_both_directions_are_their_sums(assert_near: Check, width: int, skip: bool):
    mixer = create_mixer(
        "base_conv_bidirectional", 4, kernel_size=width, skip=skip, dtype=torch.float64
    )
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    taps, bias = (mixer.get_parameter(f"conv.conv.{k}") for k in ("weight", "bias"))
    near = torch.nn.functional.pad(x, (0, 0, width // 2, width // 2))
    c = bias + sum(taps[:, 0, j] * near[:, j : j + 9] for j in range(width))
    projection = x @ mixer.get_parameter("projection.weight").T
    projection = projection + mixer.get_parameter("projection.bias")
    assert_near(mixer(x), c * projection + x * skip)


def test_errors():
    for name, config, match in (
        ("base_conv", {"kernel_size": 0}, "kernel_size must be at least 1, got 0"),
        ("base_conv", {"expand": 0}, r"expand \* d_model must be at least 1, got 0"),
        ("base_conv_bidirectional", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer(name, 8, **config)
    mixer = create_mixer("base_conv", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
