"""S4D and DSS against their public layers (stored values), initial values, modes, errors.

`data/mixers_diagonal.json` holds what state-spaces/s4 (commit e757cef: models/s4/s4d.py, and
FFTConv with SSMKernelDiag of models/s4/s4.py) and ag1988/dss (commit 777084e:
src/models/sequence/ss/standalone/dss.py, transposed=False) give in float64 with the weights,
inputs and cotangents of `waves`: outputs, the gradient of the input, and of every weight the sum
of its gradient times a wave of speed 0.37.
"""

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
from torch.nn import functional as F

from scanweave.core import Mixer, create_mixer
from scanweave.core.mixers.diagonal import DiagonalSSM, bilinear, expm1, following, zero_order_hold
from scanweave.core.mixers.diagonal_dss import SoftmaxDSS
from scanweave.core.mixers.diagonal_s4d import S4D, Init, initial_rates
from scanweave.core.training import param_groups

Check = Callable[..., None]
DATA = json.loads((Path(__file__).parent / "data" / "mixers_diagonal.json").read_text())
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
NAMES = ["s4d", "s4d_bidirectional", "dss", "dss_bidirectional", "dss_softmax"]


def stored(values: Any) -> Tensor:
    """Numbers of the file in float64."""
    return torch.tensor(values, dtype=torch.float64)


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The stored cases' input and cotangent."""
    x, g = (waves(1, 7, 2, speed=speed).to(dtype) for speed in (0.7, 0.9))
    return x.requires_grad_(), g


def fill(mixer: Mixer, means: dict[str, float]) -> list[str]:
    """Give every parameter its wave; returns their names in order."""
    names = sorted(k for k, _ in mixer.named_parameters())
    with torch.no_grad():
        for i, name in enumerate(names):
            p = mixer.get_parameter(name)
            p.copy_(0.5 * waves(*p.shape, speed=0.3 + 0.1 * i) + means.get(name, 0.0))
    return names


def compare(check: Check, mixer: Mixer, case: dict[str, Any], dtype: torch.dtype, skip=()) -> None:
    """Outputs and every gradient of a layer whose parameters are waves."""
    x, g = given(dtype)
    names = sorted(k for k, _ in mixer.named_parameters())
    y = mixer(x)
    check(y, stored(case["y"]), dtype=dtype, factor=0.1)
    grads = torch.autograd.grad((y * g).sum(), [x, *(mixer.get_parameter(k) for k in names)])
    check(grads[0], stored(case["gx"]), dtype=dtype, gradient=True, factor=0.1)
    for name, v in zip(names, grads[1:], strict=True):
        if name not in skip:
            total = (v.double() * waves(*v.shape, speed=0.37)).sum()
            check(total, stored(case["sums"][name]), dtype=dtype, gradient=True, name=name)
    packed = mixer(torch.cat([x, x], 1), cu_seqlens=pack((7, 7)))
    check(packed, torch.cat([y, y], 1), dtype=dtype, factor=0.1)


@FLOATS
def test_s4d_equals_the_published_layer(assert_near: Check, dtype: torch.dtype):
    mixer = create_mixer("s4d", 2, d_state=6, dtype=dtype)
    fill(mixer, {"kernel.log_dt": -1.5, "kernel.A_imag": 2.0})
    compare(assert_near, mixer, DATA["s4d"]["lin"], dtype)


class Bare:
    """The recurrence alone of an S4D mixer, as the stored kernels have it."""

    def __init__(self, init: str, disc: str, both: bool, dtype: torch.dtype) -> None:
        name = "s4d_bidirectional" if both else "s4d"
        size = 3 if init == "real" else 6
        mixer = create_mixer(name, 2, d_state=size, init=init, disc=disc, dtype=dtype)
        assert isinstance(mixer, S4D)
        self.mixer, self.kernel = mixer, mixer.kernel

    def load(self, case: dict[str, Any]) -> None:
        """Give the stored rates, with B in C; imaginary parts have the other sign."""
        kernel, real = self.kernel, self.kernel.init == "real"
        with torch.no_grad():
            kernel.log_dt.copy_(0.5 * waves(2, 1, speed=0.3)[:, 0] - 1.5)
            kernel.log_A_real.copy_(stored(case["A_real"]))
            B = stored(case["B"])
            self.mixer.D.copy_(waves(1, 2, speed=0.5)[0])
            C = waves(*kernel.C.shape, speed=0.4)
            if real:
                kernel.C.copy_(2 * C * B)  # theirs doubles what real states read, too
                return
            kernel.A_imag.copy_(stored(case["A_imag"]))
            product = torch.view_as_complex(C) * torch.view_as_complex(B)
            kernel.C.copy_(torch.view_as_real(product.conj().resolve_conj()))

    def __call__(self, x: Tensor) -> Tensor:
        return self.mixer.core(x)[1].squeeze(-1).transpose(1, 2)


KERNELS = [tuple(k.split("-")) for k in DATA["s4d"] if "-" in k]


@pytest.mark.parametrize("mode", ["scan", "conv"])
@pytest.mark.parametrize(("init", "disc", "way"), KERNELS)
@FLOATS
def test_s4d_equals_the_published_kernels(
    assert_near: Check, init: str, disc: str, way: str, mode: str, dtype: torch.dtype
):
    case = DATA["s4d"][f"{init}-{disc}-{way}"]
    bare = Bare(init, disc, way == "both", dtype)
    bare.mixer.mode = mode  # type: ignore[assignment]
    fresh = -torch.exp(bare.kernel.log_A_real[0])
    assert_near(fresh, -torch.exp(stored(case["A_real"])), dtype=torch.float32)
    if init != "real":
        ours, theirs = bare.kernel.A_imag[0], stored(case["A_imag"])
        # theirs are at least 1e-4
        assert_near(ours.sort()[0], theirs.sort()[0], dtype=torch.float32, factor=2)
    bare.load(case)
    x, g = given(dtype)
    y = bare(x)
    assert_near(y, stored(case["y"]), dtype=dtype, factor=0.1)
    (grad,) = torch.autograd.grad((y * g).sum(), x)
    assert_near(grad, stored(case["gx"]), dtype=dtype, gradient=True, factor=0.1)


@pytest.mark.parametrize("way", ["causal", "both"])
@FLOATS
def test_dss_equals_the_published_layer(assert_near: Check, way: str, dtype: torch.dtype):
    name = "dss" if way == "causal" else "dss_bidirectional"
    mixer = create_mixer(name, 2, d_state=3, dtype=dtype)
    fill(mixer, {"kernel.log_dt": -1.5})
    compare(assert_near, mixer, DATA["dss"][f"exp-{way}"], dtype)


@pytest.mark.parametrize("mode", ["scan", "conv"])
@FLOATS
def test_dss_softmax_equals_the_published_layer(assert_near: Check, mode: str, dtype: torch.dtype):
    mixer = create_mixer("dss_softmax", 2, d_state=3, mode=mode, dtype=dtype)
    fill(mixer, {"kernel.log_dt": -1.5})
    rates = mixer.get_parameter("kernel.Lambda")[:, 0]
    assert (rates > 0).any()
    # the published layer takes no gradient through what growing weights are counted from
    spared = ("kernel.Lambda", "kernel.log_dt")
    compare(assert_near, mixer, DATA["dss"]["softmax-both"], dtype, skip=spared)


def test_dss_rates(assert_near: Check):
    rates = stored(DATA["dss"]["rates"])
    softmax = create_mixer("dss_softmax", 2, d_state=3).get_parameter("kernel.Lambda")
    kernel = create_mixer("dss", 2, d_state=3)
    parts = [kernel.get_parameter(f"kernel.Lambda_{k}") for k in ("log_neg_re", "im")]
    exp = torch.stack([-parts[0].exp(), parts[1]], -1)
    for ours in (softmax, exp):
        assert_near(ours, rates.to(ours.dtype))


@pytest.mark.parametrize("growth", [-1.0, 0.0, 1.0])
def test_softmax_gradients_of_any_rates(growth: float):
    mixer = create_mixer("dss_softmax", 2, d_state=2, dtype=torch.float64)
    with torch.no_grad():
        mixer.get_parameter("kernel.log_dt").fill_(-1)
        rates = mixer.get_parameter("kernel.Lambda")
        rates[:, 0] = growth + 0.1 * torch.arange(1, 3)
    x, names = torch.randn(2, 4, 2, dtype=torch.float64), ["kernel.Lambda", "kernel.log_dt"]

    def f(*values: Tensor) -> Tensor:
        own = dict(zip(names, values, strict=True))
        return torch.func.functional_call(mixer, own, (x,))

    assert torch.autograd.gradcheck(f, [mixer.get_parameter(k) for k in names])


def test_softmax_weights_sum_to_one(assert_near: Check):
    """A real rate makes the weights of a state add up to W / Lambda over the sequence."""
    mixer = SoftmaxDSS(1, d_state=1, dtype=torch.float64)
    with torch.no_grad():
        mixer.D.zero_()
        mixer.kernel.log_dt.zero_()
        mixer.kernel.W.copy_(torch.tensor([2.0, 0.0]).expand(2, 1, 1, 2))
        for rate in (-0.3, 0.3):
            mixer.kernel.Lambda.copy_(torch.tensor([[rate, 0.0]]))
            row = mixer.matrix(torch.zeros(1, 5, 1, dtype=torch.float64))[0, 0, -1]
            weights = torch.exp(rate * torch.arange(5.0, dtype=torch.float64)).flip(0)
            assert_near(row, 2 / rate * weights / weights.sum(), dtype=torch.float32)


@pytest.mark.parametrize("length", [9, 70])
@pytest.mark.parametrize("name", NAMES)
def test_modes_agree(assert_near: Check, name: str, length: int):
    torch.manual_seed(0)
    ways = [create_mixer(name, 4, d_state=4, mode=mode) for mode in ("auto", "conv", "scan")]
    for other in ways[1:]:
        other.load_state_dict(ways[0].state_dict())
    x = torch.randn(2, length, 4)
    outputs = [way(x) for way in ways]
    gradients = [
        torch.autograd.grad(y.square().sum(), list(way.parameters()))
        for y, way in zip(outputs, ways, strict=True)
    ]
    for y, grads in zip(outputs[1:], gradients[1:], strict=True):
        assert_near(y, outputs[0], factor=0.5)
        for a, e in zip(grads, gradients[0], strict=True):
            assert_near(a, e, gradient=True)
    if ways[0].causal:
        y, state = ways[1](x[:, : length // 2], return_state=True)
        rest = ways[1](x[:, length // 2 :], state=state)
        assert_near(torch.cat([y, rest], 1), outputs[0], factor=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_long_sequences_of_both_kinds(assert_near: Check, name: str):
    """A convolution of several chunks equals packed sequences, which are scanned."""
    mixer = create_mixer(name, 2, d_state=2, dtype=torch.float64)
    x = torch.randn(1, 2100, 2, dtype=torch.float64)
    assert_near(mixer(x), mixer(x, cu_seqlens=pack((2100,))), factor=10)


def test_discretisation(assert_near: Check):
    A = torch.complex(*(waves(6, speed=v) - 1.1 * (v < 1) for v in (0.7, 1.3)))
    for size in (1e-9, 1e-3, 1.0, 30.0):
        dt = torch.full((6,), size, dtype=torch.float64)
        assert_near(torch.view_as_real(expm1(1j * dt)), torch.view_as_real(torch.expm1(1j * dt)))
        log_a, B = zero_order_hold(A, dt * A)
        assert_near(torch.view_as_real(B), torch.view_as_real(torch.expm1(dt * A) / A))
        assert torch.equal(log_a, dt * A)
        log_a, B = bilinear(dt, dt * A)
        a = (1 + dt * A / 2) / (1 - dt * A / 2)
        assert_near(torch.view_as_real(torch.exp(log_a)), torch.view_as_real(a))
        assert_near(torch.view_as_real(B * A), torch.view_as_real(a - 1), dtype=torch.float32)
    # in float32 small steps lose nothing
    small, exact = (zero_order_hold(v, 1e-4 * v)[1] for v in (A.to(torch.complex64), A))
    assert_near(torch.view_as_real(small), torch.view_as_real(exact), factor=0.1)


def test_following_tokens():
    y = torch.arange(1.0, 7).view(1, 6, 1)
    assert following(y, None).flatten().tolist() == [2, 3, 4, 5, 6, 0]
    assert following(y, pack((2, 0, 3, 1))).flatten().tolist() == [2, 0, 4, 5, 0, 0]
    assert following(y[:, :0], None).shape == (1, 0, 1)


def test_initial_values():
    n = torch.arange(4, dtype=torch.float64)
    expected: dict[Init, Tensor] = {
        "lin": math.pi * n,
        "inv": 8 / math.pi * (8 / (2 * n + 1) - 1),
        "quad": (2 * n + 1) ** 2 / math.pi,
    }
    for init, imaginary in expected.items():
        A, B = initial_rates(init, 4)
        assert torch.allclose(A.imag, imaginary), init
        assert (A.real == -0.5).all()
        assert (B == 1).all()
    A, B = initial_rates("real", 4)
    assert torch.equal(A, -(n + 1) + 0j)
    mixer = S4D(256, d_state=32, init="legs", dt_min=0.01, dt_max=0.02)
    dt = mixer.kernel.log_dt.exp()
    assert dt.min() >= 0.01 * (1 - 1e-5)
    assert dt.max() <= 0.02 * (1 + 1e-5)
    C = torch.view_as_complex(mixer.kernel.C.detach())
    B = initial_rates("legs", 16)[1].abs()
    assert torch.allclose(C.abs().square().mean(0).sqrt().double(), B, rtol=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_optimiser_groups(name: str):
    mixer = create_mixer(name, 4, d_state=4)
    rates = {}
    for group in param_groups(mixer, 0.1, lr=0.01):
        for p in group["params"]:
            rates[next(k for k, v in mixer.named_parameters() if v is p)] = (
                group["lr"],
                group["weight_decay"],
            )
    own = {k for k in rates if k.startswith("kernel.") and k != "kernel.C"}
    assert {rates[k] for k in own} == {(1e-3, 0.0)}
    assert rates["D"] == (0.01, 0.0)
    out = "output_linear.0.weight" if name.startswith("s4d") else "output_linear.weight"
    assert rates[out] == (0.01, 0.1)


def test_parameters_are_the_published_ones():
    shapes = {k: tuple(v.shape) for k, v in S4D(4, d_state=6).state_dict().items()}
    rates = dict.fromkeys(("kernel.log_A_real", "kernel.A_imag"), (4, 3))
    out = {"output_linear.0.weight": (8, 4, 1), "output_linear.0.bias": (8,)}
    assert shapes == {"D": (4,), "kernel.C": (4, 3, 2), "kernel.log_dt": (4,)} | rates | out
    assert S4D(4, d_state=6, init="real").kernel.C.shape == (4, 6)
    twin = create_mixer("s4d_bidirectional", 4, d_state=6)
    assert twin.get_parameter("kernel.C").shape == (2, 4, 3, 2)
    for name in NAMES:
        first, second = (create_mixer(name, 4, d_state=4) for _ in range(2))
        x = torch.randn(2, 5, 4)
        assert not torch.equal(first(x), second(x))
        second.load_state_dict(first.state_dict(), strict=True)
        assert torch.equal(first(x), second(x))
    half = create_mixer("dss", 4, dtype=torch.bfloat16).state_dict()
    kept = {k for k, v in half.items() if v.dtype == torch.float32}
    own = {"kernel.log_dt", "kernel.Lambda_log_neg_re", "kernel.Lambda_im"}
    assert kept == {"D"} | own


def test_is_time_invariant(assert_near: Check):
    mixer, x = create_mixer("s4d", 4, dtype=torch.float64), torch.randn(2, 9, 4).double()
    later = F.pad(x, (0, 0, 5, 0))
    assert_near(mixer(later)[:, 5:], mixer(x))
    assert torch.equal(mixer.matrix(x), mixer.matrix(-x))


def test_errors():
    for name, config, match in (
        ("s4d", {"d_state": 0}, "d_state must be at least 1, got 0"),
        ("s4d", {"d_state": 5}, "d_state must be even, complex states are pairs, got 5"),
        ("s4d", {"init": "fout"}, "init must be one of lin, inv, legs, quad, real, got fout"),
        ("s4d", {"disc": "euler"}, "disc must be one of zoh, bilinear, got euler"),
        ("s4d", {"mode": "fft"}, "mode must be one of auto, conv, scan, got fft"),
        ("s4d", {"init": "real", "disc": "bilinear"}, "disc must be zoh for real rates"),
        ("s4d", {"dt_min": 1.0}, r"dt_min must be in \(0, dt_max\], got 1.0 and 0.1"),
        ("dss", {"d_state": 0}, "d_state must be at least 1, got 0"),
        ("dss", {"dt_min": 0.0}, r"dt_min must be in \(0, dt_max\], got 0.0 and 0.1"),
        ("dss_softmax", {"mode": "fft"}, "mode must be one of auto, conv, scan, got fft"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer(name, 8, **config)
    for name in ("s4d", "dss"):
        mixer = create_mixer(name, 8)
        with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
            mixer.step(torch.randn(2, 7), mixer.init_state(2))


def test_base_class_has_no_model():
    bare = DiagonalSSM()
    for call in (bare._terms, bare._skip, lambda: bare._join(torch.zeros(1), torch.zeros(1))):
        with pytest.raises(NotImplementedError):
            call()
