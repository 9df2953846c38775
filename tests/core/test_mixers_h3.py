"""H3 against the official layer (stored values) and its own sums, initial values, errors."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from tests.core.wave_cases import waves
from torch import Tensor

from scanweave.core import create_mixer
from scanweave.core.mixers.h3 import H3, DiagonalKernel, ShiftKernel
from scanweave.core.training import param_groups

Check = Callable[..., None]
# HazyResearch H3 (src/models/ssm/h3.py, commit 5c4d06b5, mode diag, measure diag-lin) in float64,
# its kernels not rounded to float32, with the weights, input and cotangent of `waves` (weights in
# the order of its parameters, log_dt less 2): output, gradients (the first 12 of a parameter), and
# some values that it draws itself
PUBLISHED = json.loads((Path(__file__).parent / "data" / "h3.json").read_text())
CASES = pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED.keys())


def official(case: dict[str, Any]) -> dict[str, Tensor]:
    """A state dict with the official names."""
    return {
        name: waves(*case["shapes"][name], speed=0.7 + 0.1 * i) - 2 * name.endswith("log_dt")
        for i, name in enumerate(case["order"])
    }


def loaded(case: dict[str, Any], dtype: torch.dtype, **options: Any) -> H3:
    mixer = H3(**case["config"], dtype=dtype, **options)
    mixer.load_state_dict(official(case), strict=True)
    return mixer


@pytest.mark.parametrize("mode", ["conv", "scan"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@CASES
def test_equals_the_published_layer(
    assert_near: Check, case: dict[str, Any], dtype: torch.dtype, mode: str
):
    mixer = loaded(case, dtype, mode=mode)
    factor = 100 if dtype == torch.float64 else 0.1  # stored with ten digits
    expected = torch.tensor(case["output"], dtype=torch.float64)
    x = waves(2, 9, 4, speed=0.9).to(dtype).requires_grad_()
    y = mixer(x)
    assert_near(y, expected, factor=factor)
    y.backward(waves(2, 9, 4, speed=1.3).to(dtype))
    wanted = torch.tensor(case["grad_input"], dtype=torch.float64)
    assert_near(x.grad, wanted, gradient=True, factor=factor, name="input")
    for name, p in mixer.named_parameters():
        assert p.grad is not None, name
        first = torch.tensor(case["grads"][name], dtype=torch.float64)
        assert_near(p.grad.flatten()[:12], first, gradient=True, factor=factor, name=name)
    with torch.no_grad():
        state, rows = mixer.init_state(2), []
        for token in x.unbind(1):
            row, state = mixer.step(token, state)
            rows.append(row)
    assert_near(torch.stack(rows, 1), expected, factor=factor)


@CASES
def test_initial_values_are_the_published_ones(case: dict[str, Any]):
    mixer = H3(**case["config"], dtype=torch.float64)
    for name, values in case["initial"].items():
        wanted = torch.tensor(values, dtype=torch.float64)
        # that code draws them in float32
        torch.testing.assert_close(mixer.get_parameter(name).flatten(), wanted, rtol=1e-6, atol=0)


def kernels(mixer: H3) -> tuple[ShiftKernel, DiagonalKernel]:
    register, model = mixer.ssm_k_kernel["kernel"], mixer.kernel["kernel"]
    assert isinstance(register, ShiftKernel)
    assert isinstance(model, DiagonalKernel)
    return register, model


def summed(mixer: H3, x: Tensor) -> Tensor:
    """The layer by its sums over pairs of tokens, and its register by shifting it."""
    p, length = mixer.head_dim, x.shape[1]
    register, kernel = kernels(mixer)
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    held = torch.zeros(x.shape[0], mixer.d_model, mixer.d_conv, dtype=x.dtype)
    keys = []
    for t in range(length):
        held = torch.nn.functional.pad(held, (1, -1)) + register.B * k[:, t].unsqueeze(-1)
        keys.append((register.C * held).sum(-1) + mixer.ssm_k_D * k[:, t])
    A = torch.complex(-kernel.inv_A_real.exp(), kernel.A_imag)
    dt = kernel.log_dt.exp()[:, None]
    a, B = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    B, C = B * torch.view_as_complex(kernel.B), torch.view_as_complex(kernel.C[0])
    h = torch.zeros(x.shape[0], p, p, mixer.heads, kernel.A_imag.shape[1], dtype=a.dtype)
    rows = []
    for t in range(length):
        by_head = [u.unflatten(-1, (mixer.heads, p)).mT for u in (q[:, t], keys[t], v[:, t])]
        kv = by_head[1].unsqueeze(2) * by_head[2].unsqueeze(1)  # (B, P, P, H)
        h = a * h + B * kv.unsqueeze(-1)
        y = 2 * (C * h).sum(-1).real + mixer.D * kv
        rows.append((by_head[0].unsqueeze(2) * y).sum(1).flatten(1))
    return mixer.output_linear(torch.stack(rows, 1))


@pytest.mark.parametrize(
    "config", [{}, {"d_state": 4, "head_dim": 3}, {"d_state": 2, "d_conv": 20}], ids=str
)
@pytest.mark.parametrize("length", [3, 70])
def test_equals_its_sums(assert_near: Check, config: dict[str, Any], length: int):
    mixer = H3(6, dtype=torch.float64, **config)
    x = torch.randn(1, length, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_near(mixer(x), summed(mixer, x))
        parts = [summed(mixer, v) for v in x.split((1, length - 1), 1)]
    assert_near(mixer(x, cu_seqlens=pack((1, 0, length - 1))), torch.cat(parts, 1))
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[0, 0] = False
    assert_near(mixer(x, mask=mask)[:, 1:], parts[1])


@pytest.mark.parametrize("cuts", [(5,), (64, 68), (1, 2, 130)])
def test_pieces_are_the_whole_where_long_ones_are_transformed(
    assert_near: Check, cuts: tuple[int, ...]
):
    mixer, x = H3(4, dtype=torch.float64), torch.randn(2, 140, 4, dtype=torch.float64)
    whole, state, parts = mixer(x), None, []
    for piece in x.tensor_split(cuts, 1):
        y, state = mixer(piece, state=state, return_state=True)
        parts.append(y)
    assert_near(torch.cat(parts, 1), whole)


def test_initial_values_and_groups():
    mixer = H3(256, d_state=8, dt_min=0.01, dt_max=0.05)
    register, kernel = kernels(mixer)
    assert kernel.log_dt.min() >= math.log(0.01) - 1e-5
    assert kernel.log_dt.max() <= math.log(0.05) + 1e-5
    assert abs(kernel.C.std() - 0.5**0.5) < 0.05
    bound = 8**-0.5
    taps = register()
    assert 0.95 * bound < taps.abs().max() <= bound
    assert abs(mixer.D.std() - 1) < 0.2
    assert abs(mixer.ssm_k_D.std() - 1) < 0.2
    names = {id(p): k for k, p in mixer.named_parameters()}
    groups = param_groups(mixer, 0.1, lr=0.01)
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    own = {k for k, rate in rates.items() if rate == 1e-3}
    ssm = {f"kernel.kernel.{k}" for k in ("log_dt", "B", "inv_A_real", "A_imag")}
    assert own == ssm | {"ssm_k_kernel.kernel.B"}
    free = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert free >= own | {"D", "ssm_k_D", "q_proj.bias"}
    assert not {"q_proj.weight", "ssm_k_kernel.kernel.C"} & free


def test_errors():
    for config, match in (
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"d_state": 5}, "d_state must be even, got 5"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"head_dim": 3}, "head_dim must divide d_model 8, got 3"),
        ({"head_dim": 0}, "head_dim must divide d_model 8, got 0"),
        ({"dt_min": 0.0}, r"dt_min must be in \(0, dt_max\]"),
        ({"mode": "fft"}, "mode must be 'auto', 'conv' or 'scan', got 'fft'"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("h3", 8, **config)
    mixer = create_mixer("h3", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
