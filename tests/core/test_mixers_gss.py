"""GSS against lucidrains' layer (stored values), initial values, parameters, errors.

`data/mixers_gss.json` holds what GSS of lucidrains/gated-state-spaces-pytorch (commit d484cf5,
gss.py; 2 inner channels for one, 3 states, 3 channels of the state-space model) gives in float64
with the weights, input and cotangent of `waves`: outputs with the input added, the gradient of the
input, and of every weight the sum of its gradient times a wave of speed 0.37.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from tests.core.wave_cases import waves
from torch import Tensor

from scanweave.core import create_mixer
from scanweave.core.mixers.gss import GSS
from scanweave.core.training import param_groups

Check = Callable[..., None]
DATA = json.loads((Path(__file__).parent / "data" / "mixers_gss.json").read_text())


def stored(values: Any) -> Tensor:
    """Numbers of the file in float64."""
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("mode", ["scan", "conv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_equals_the_published_layer(assert_near: Check, mode: str, dtype: torch.dtype):
    mixer = create_mixer("gss", 4, d_state=3, d_ssm=3, expand=2, norm=True, mode=mode, dtype=dtype)
    names = sorted(k for k, _ in mixer.named_parameters())
    with torch.no_grad():
        for i, name in enumerate(names):
            p = mixer.get_parameter(name)
            p.copy_(0.5 * waves(*p.shape, speed=0.3 + 0.1 * i))
    x, g = (waves(1, 7, 4, speed=speed).to(dtype) for speed in (0.7, 0.9))
    x.requires_grad_()
    y = mixer(x) + x
    assert_near(y, stored(DATA["y"]), factor=0.1)
    grads = torch.autograd.grad((y * g).sum(), [x, *(mixer.get_parameter(k) for k in names)])
    assert_near(grads[0], stored(DATA["gx"]), gradient=True, factor=0.1)
    for name, v in zip(names, grads[1:], strict=True):
        total = (v.double() * waves(*v.shape, speed=0.37)).sum()
        assert_near(total, stored(DATA["sums"][name]), dtype=dtype, gradient=True, name=name)
    packed = mixer(torch.cat([x, x], 1), cu_seqlens=pack((7, 7)))
    assert_near(packed, torch.cat([y - x] * 2, 1), factor=0.1)
    with torch.no_grad():
        state, rows = mixer.init_state(1), []
        for token in x.unbind(1):
            row, state = mixer.step(token, state)
            rows.append(row)
    assert_near(torch.stack(rows, 1), y - x, factor=0.2)


def test_parameters():
    mixer = GSS(16, d_state=3)
    shapes = {k: tuple(v.shape) for k, v in mixer.state_dict().items()}
    model = dict.fromkeys(("dss.Lambda_real", "dss.Lambda_imag"), (3,))
    read = dict.fromkeys(("dss.C_real", "dss.C_imag"), (4, 3))
    norm = dict.fromkeys(("dss.norm.weight", "dss.norm.bias", "dss.param_D"), (4,))
    unit = {"to_u.0.weight": (64, 16), "to_v.0.weight": (4, 16), "to_gate.weight": (64, 4)}
    assert shapes == model | read | norm | unit | {"to_out.weight": (16, 64), "to_out.bias": (16,)}
    assert {"norm.weight", "norm.bias"} <= GSS(16, norm=True).state_dict().keys()
    groups = param_groups(mixer, 0.1, lr=0.01)
    own = [p for g in groups if g["lr"] == 1e-3 and not g["weight_decay"] for p in g["params"]]
    assert {id(p) for p in own} == {id(mixer.dss.Lambda_real), id(mixer.dss.Lambda_imag)}


def test_initial_values():
    dss = GSS(4, d_ssm=300, d_state=400).dss
    for p in (dss.Lambda_real, dss.Lambda_imag, dss.C_real, dss.C_imag, dss.param_D):
        assert abs(p.mean()) < 0.2
        assert abs(p.std() - 1) < 0.15
    log_a = dss().log_a
    assert (log_a.real < 0).all()
    assert (log_a.imag > 0).all()
    assert torch.equal(log_a[0], log_a[299])


def test_errors():
    for config, match in (
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"d_ssm": 0}, "d_ssm must be at least 1, got 0"),
        ({"expand": 0.1}, r"expand \* d_model must be at least 1, got 0"),
        ({"mode": "fft"}, "mode must be one of auto, conv, scan, got fft"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("gss", 8, **config)
