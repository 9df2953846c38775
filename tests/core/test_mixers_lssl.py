"""LSSL against its equations in float64, its memory, initial values, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from torch import Tensor, nn

from scanweave.core import create_mixer
from scanweave.core.mixers.hippo import hippo
from scanweave.core.mixers.lssl import LSSL

Check = Callable[..., None]


def published(mixer: LSSL, x: Tensor) -> Tensor:
    """Equations 3 and 5 of the paper with alpha = 1/2, token by token in float64."""
    p = {k: v.detach().double() for k, v in mixer.named_parameters()}
    A, B, dt = p["kernel.A"], p["kernel.B"], p["kernel.log_dt"].exp()
    eye = torch.eye(len(B), dtype=torch.float64)
    left = torch.linalg.inv(eye - 0.5 * dt[:, None, None] * A)
    turn = left @ (eye + 0.5 * dt[:, None, None] * A)
    into = (left @ (dt[:, None] * B).unsqueeze(-1)).squeeze(-1)
    h, rows = x.new_zeros(x.shape[0], *into.shape, dtype=torch.float64), []
    for token in x.double().unbind(1):
        h = (turn @ h.unsqueeze(-1)).squeeze(-1) + into * token.unsqueeze(-1)
        rows.append((p["C"] @ h.unsqueeze(-1)).squeeze(-1) + p["D"] * token.unsqueeze(-1))
    y = nn.functional.gelu(torch.stack(rows, 1).flatten(2))
    return y @ p["output_linear.weight"].T + p["output_linear.bias"]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"d_state": 5, "init": "legt", "channels": 3},
        {"d_state": 6, "init": "fout", "dt_max": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_equals_the_equations(assert_near: Check, config: dict[str, Any], dtype: torch.dtype):
    mixer, x = LSSL(4, dtype=dtype, **config), torch.randn(2, 150, 4, dtype=dtype)
    expected = published(mixer, x)
    assert_near(mixer(x), expected, dtype=dtype, factor=0.5)
    with torch.no_grad():
        state, rows = mixer.init_state(2), []
        for token in x.unbind(1):
            y, state = mixer.step(token, state)
            rows.append(y)
    assert_near(torch.stack(rows, 1), expected, dtype=dtype, factor=0.5)
    packed = mixer(x[:1], cu_seqlens=pack((70, 80)))
    parts = [published(mixer, v) for v in x[:1].split((70, 80), 1)]
    assert_near(packed, torch.cat(parts, 1), dtype=dtype, factor=0.5)


def test_state_is_hippos_memory(assert_near: Check):
    """The state holds the coefficients that the HiPPO matrices' own recurrence makes."""
    mixer = LSSL(1, d_state=8, init="legs", dtype=torch.float64)
    with torch.no_grad():
        mixer.kernel.log_dt.fill_(math.log(0.01))
        signal = torch.sin(torch.arange(200) / 15).double()
        result = mixer(signal[None, :, None], return_state=True)
    assert isinstance(result, tuple)
    A, B = hippo("legs", 8)
    eye = torch.eye(8, dtype=torch.float64)
    turn = torch.linalg.solve(eye - 0.005 * A, eye + 0.005 * A)
    into = torch.linalg.solve(eye - 0.005 * A, 0.01 * B)
    c = torch.zeros(8, dtype=torch.float64)
    for value in signal:
        c = turn @ c + into * value
    assert_near(result[1]["h"][0, 0], c)


def test_taps_are_the_response_to_one_token(assert_near: Check):
    mixer = LSSL(3, d_state=4, channels=2, dtype=torch.float64)
    one = torch.zeros(1, 70, 3, dtype=torch.float64)
    one[:, 0] = 1
    _, response = mixer.core(one)
    assert_near(mixer.taps(70).flatten(0, 1), response[0, :, :, 0])


def test_initial_values_and_parameters():
    mixer = LSSL(64, d_state=6, channels=2, init="legt")
    A, B = hippo("legt", 6)
    assert torch.equal(mixer.kernel.A, A.float())
    assert torch.equal(mixer.kernel.B, B.float())
    dt = mixer.kernel.log_dt.exp()
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 0.1001
    shapes = {k: tuple(v.shape) for k, v in mixer.state_dict().items()}
    kernel = {"kernel.log_dt": (64,), "kernel.A": (6, 6), "kernel.B": (6,)}
    output = {"output_linear.weight": (64, 128), "output_linear.bias": (64,)}
    assert shapes == kernel | {"C": (64, 2, 6), "D": (64, 2)} | output


def test_errors():
    for config, match in (
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"init": "cheb"}, "name must be one of legs, .*, got 'cheb'"),
        ({"init": "fout", "d_state": 3}, "size must be even and at least 2 for fout, got 3"),
        ({"dt_max": 1e-4}, r"dt_min must be in \(0, dt_max\], got 0.001 and 0.0001"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("lssl", 8, **config)
    mixer = create_mixer("lssl", 8)
    with pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
