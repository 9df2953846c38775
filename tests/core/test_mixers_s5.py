"""S5 against its published code and its equations, initial values, time steps, errors.

`data/s5.npz` holds a layer's parameters, inputs and outputs in float64, made once by running
https://github.com/lindermanlab/S5 (3c18fdb) on jax 0.10.2: `SequenceLayer` in evaluation with its
norm set to the identity and its residual taken off, D = 3, P = 8 in 2 blocks, L = 11, parameters
perturbed so that no two are equal; zoh with half_glu1, zoh in both directions with full_glu,
bilinear with half_glu2, bilinear in both directions with gelu.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.core.op_cases import pack
from torch import Tensor

from scanweave.core import Mixer, create_mixer
from scanweave.core.mixers.hippo import nplr
from scanweave.core.mixers.s5 import S5
from scanweave.core.mixers.time_invariant import discretise

Check = Callable[..., None]
DATA = Path(__file__).parent / "data" / "s5.npz"
PUBLISHED = {
    "zoh.one": ("s5", "half_glu1"),
    "zoh.both": ("s5_bidirectional", "full_glu"),
    "bilinear.one": ("s5", "half_glu2"),
    "bilinear.both": ("s5_bidirectional", "gelu"),
}


def stored(case: str, dtype: torch.dtype) -> tuple[Mixer, Tensor, Tensor]:
    """The mixer with the published code's parameters, its inputs (1, L, D) and outputs."""
    with np.load(DATA) as arrays:
        names = [k for k in arrays.files if k.startswith(f"{case}.")]
        values = {k.removeprefix(f"{case}."): torch.from_numpy(arrays[k]) for k in names}
    x, y = values.pop("x"), values.pop("y")
    name, activation = PUBLISHED[case]
    mixer = create_mixer(
        *(name, 3),
        d_state=8,
        blocks=2,
        activation=activation,
        discretisation=case.split(".")[0],
        dtype=dtype,
    )
    mixer.load_state_dict(values, strict=True)
    return mixer, x.to(dtype).unsqueeze(0), y.unsqueeze(0)


@pytest.mark.parametrize("case", PUBLISHED)
def test_equals_the_published_code(assert_near: Check, case: str):
    mixer, x, y = stored(case, torch.float64)
    assert_near(mixer(x), y)
    mixer, x, y = stored(case, torch.float32)
    assert_near(mixer(x), y, dtype=torch.float32, factor=0.1)
    if mixer.recurrent:
        with torch.no_grad():
            state, rows = mixer.init_state(1), []
            for token in x.unbind(1):
                out, state = mixer.step(token, state)
                rows.append(out)
        assert_near(torch.stack(rows, 1), y, dtype=torch.float32, factor=0.1)


def equations(mixer: S5, x: Tensor) -> Tensor:
    """The continuous system, y by dense matrices of both conjugate halves in float64."""
    p = {k: v.detach().double() for k, v in mixer.named_parameters()}
    rates = torch.complex(p["Lambda_re"].clamp(max=-1e-4), p["Lambda_im"])
    dt = mixer.rate * p["log_step"].exp().squeeze(1)
    if mixer.discretisation == "zoh":
        decay = torch.exp(rates * dt)
        factor = (decay - 1) / rates
    else:
        decay = (1 + 0.5 * dt * rates) / (1 - 0.5 * dt * rates)
        factor = dt / (1 - 0.5 * dt * rates)
    B = torch.view_as_complex(p["B"]) * factor[:, None]
    y = p["D"] * x.double()
    for name, back in (("C", False), ("C1", False), ("C2", True)):
        if name not in p:
            continue
        C, rows = torch.view_as_complex(p[name]), []
        h = torch.zeros(x.shape[0], len(decay), dtype=torch.complex128)
        tokens = x.double().unbind(1)
        for token in reversed(tokens) if back else tokens:
            h = decay * h + token.to(B.dtype) @ B.T
            rows.append(2 * (h @ C.T).real)
        y = y + torch.stack(rows[::-1] if back else rows, 1)
    return y


@pytest.mark.parametrize("name", ["s5", "s5_bidirectional"])
@pytest.mark.parametrize(
    "config",
    [{}, {"d_state": 12, "blocks": 3, "rate": 0.25}, {"discretisation": "bilinear", "dt_max": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_equals_the_equations(
    assert_near: Check, name: str, config: dict[str, Any], dtype: torch.dtype
):
    mixer = create_mixer(name, 6, activation="none", dtype=dtype, **config)
    assert isinstance(mixer, S5)
    x = torch.randn(2, 29, 6, dtype=dtype)
    assert_near(mixer(x), equations(mixer, x), dtype=dtype, factor=0.1)
    packed = mixer(x[:1], cu_seqlens=pack((4, 25)))
    parts = [equations(mixer, v) for v in x[:1].split((4, 25), 1)]
    assert_near(packed, torch.cat(parts, 1), dtype=dtype, factor=0.1)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_discretisation_keeps_slow_states_exact(method: Any):
    """Small steps: exp(z) - 1 and the logarithm of a decay near 1 would lose their digits."""
    rates = torch.complex(
        torch.tensor([-0.5, -1e-4, -0.5, -23.0, -3.0]), torch.tensor([0.3, 1e-3, 900.0, 0.0, -7.0])
    )
    for dt in (1e-5, 1e-3, 0.1, 2.0):
        log_a, factor = discretise(rates, torch.tensor(dt), method)
        z = rates.to(torch.complex128) * float(torch.tensor(dt))
        if method == "zoh":
            decay, wanted = torch.exp(z), (torch.exp(z) - 1) / rates
        else:
            decay, wanted = (1 + z / 2) / (1 - z / 2), z / rates / (1 - z / 2)
        assert ((factor - wanted) / wanted).abs().max() < 5e-6
        # the rate of decay is right, not only the decay: it is raised to high powers
        true = torch.log(decay).real
        assert ((log_a.real - true) / true).abs().max() < 5e-6
        assert (torch.exp(log_a) - decay).abs().max() < 1e-4
    # the trapezoid makes a decay of 0 of z = -2: no infinity in its logarithm or gradient
    rate = torch.tensor([-2.0 + 0j], requires_grad=True)
    log_a, _ = discretise(rate, torch.tensor(1.0), "bilinear")
    assert torch.isfinite(torch.view_as_real(log_a)).all()


def test_initial_values():
    mixer = S5(32, d_state=64, blocks=4)
    rates = nplr("legs", 16).eigenvalues
    assert torch.allclose(mixer.Lambda_re, torch.full((32,), -0.5))
    assert torch.allclose(mixer.Lambda_im, rates.imag.repeat(4).float())
    dt = mixer.log_step.exp()
    assert dt.min() >= 0.999e-3
    assert dt.max() <= 0.1001
    assert abs(mixer.log_step.mean() - 0.5 * (math.log(1e-3) + math.log(0.1))) < 0.8
    # turning by V keeps the norm: B is of both halves, C of one
    wide = S5(64, d_state=256, blocks=2)
    both = 2 * wide.B.detach().square().sum()
    assert abs(float(both) / 64 - 1) < 0.1  # 256 states of variance 1 / 256, 64 channels
    C = wide.get_parameter("C").detach()
    assert abs(float(C.square().sum()) / 64 - 1) < 0.1
    normal = S5(64, d_state=256, c_init="normal").get_parameter("C").detach()
    assert abs(float(normal.std()) - 0.5**0.5) < 0.02
    half = create_mixer("s5_bidirectional", 8, dtype=torch.bfloat16).state_dict()
    kept = {k for k, v in half.items() if v.dtype == torch.float32}
    assert kept == {"Lambda_re", "Lambda_im", "log_step", "D"}


def test_output_keeps_the_scale_of_its_input():
    mixer, x = S5(64, activation="none"), torch.randn(2, 400, 64)
    with torch.no_grad():
        mixer.D.zero_()
        spread = mixer(x)[:, 100:].std()
    assert 0.02 < spread < 3


def test_rate_resamples(assert_near: Check):
    """Half the step on an input that is held twice as long is the same system (zoh)."""
    coarse = S5(4, d_state=8, activation="none", dtype=torch.float64)
    fine = S5(4, d_state=8, activation="none", rate=0.5, dtype=torch.float64)
    fine.load_state_dict(coarse.state_dict())
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    assert_near(fine(x.repeat_interleave(2, 1))[:, 1::2], coarse(x))


def test_states_never_grow():
    mixer = S5(4, d_state=8, activation="none")
    with torch.no_grad():
        mixer.Lambda_re.fill_(3.0)
        assert torch.isfinite(mixer(torch.ones(1, 3000, 4))).all()


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in create_mixer("s5", 6, d_state=4).state_dict().items()}
    rates = {"Lambda_re": (2,), "Lambda_im": (2,), "log_step": (2, 1)}
    gate = {"out2.weight": (6, 6), "out2.bias": (6,)}
    assert shapes == rates | {"B": (2, 6, 2), "C": (6, 2, 2), "D": (6,)} | gate
    assert create_mixer("s5", 7).state_dict()["B"].shape == (4, 7, 2)
    both = create_mixer("s5_bidirectional", 6, d_state=4, activation="full_glu").state_dict()
    assert {"C1", "C2", "out1.weight", "out2.weight"} <= both.keys()
    assert "C" not in both


def test_errors():
    for config, match in (
        ({"d_state": 0}, r"d_state must be a multiple of 2 \* blocks = 2, got 0"),
        ({"d_state": 6, "blocks": 2}, r"d_state must be a multiple of 2 \* blocks = 4, got 6"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"dt_min": 0.0}, r"dt_min must be in \(0, dt_max\], got 0.0 and 0.1"),
        ({"discretisation": "euler"}, "discretisation must be 'zoh' or 'bilinear', got 'euler'"),
        ({"activation": "relu"}, "activation must be one of half_glu1, .*, none, got 'relu'"),
        ({"c_init": "zero"}, "c_init must be 'truncated' or 'normal', got 'zero'"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("s5", 8, **config)
    with pytest.raises(ValueError, match="discretisation must be 'zoh' or 'bilinear', got 'foh'"):
        discretise(torch.zeros(1, dtype=torch.complex64), torch.ones(1), "foh")  # type: ignore[arg-type]
    mixer = create_mixer("s5", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
