"""Both directions of the convolution in one launch against one launch each."""

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from tests.core.op_cases import LAYOUTS, pack
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from scanweave.core.ops.conv import kernels, pair
from scanweave.core.ops.conv.pair import convolve, gradients, takes

Check = Callable[..., None]
BOTH = [False, True]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernel = [pytest.mark.interpret, pytest.mark.poison]
SIZES = [(1, 1, 1), (2, 9, 3), (1, 3, 65), (2, 33, 5), (1, 70, 2)]
# sequences shorter than the taps, and empty ones
LENGTHS = [(0, 3, 1, 0, 2, 0), (17, 1, 15, 40), (1, 1, 1), (0, 0, 9, 0)]


class Case:
    """Input, taps, biases and gradients of outputs of two directions."""

    def __init__(
        self,
        batch: int,
        length: int,
        dim: int,
        width: int,
        *,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
        weights: torch.dtype = torch.float32,
        device: str | None = None,
    ) -> None:
        device = device or ("cpu" if INTERPRETED else "cuda")
        rng = torch.Generator().manual_seed(0)

        def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=rng).to(device, dtype)

        self.x = draw(batch, length, dim)
        self.taps = [draw(dim, width, dtype=weights) for _ in BOTH]
        self.biases = [draw(dim, dtype=weights) if bias else None for _ in BOTH]
        self.dys = [draw(batch, length, dim) for _ in BOTH]

    def together(self, cu_seqlens: Tensor | None = None) -> list[Tensor]:
        """Outputs, then gradients of x, taps and biases."""
        given = (self.x, self.taps, self.biases)
        assert takes(*given, BOTH)
        ys = convolve(*given, cu_seqlens, BOTH)
        dx, dtaps, dbiases = gradients(self.dys, *given, cu_seqlens, BOTH)
        return [*ys, dx, *dtaps, *dbiases]

    def alone(self, cu_seqlens: Tensor | None = None) -> list[Tensor]:
        """The same by one launch a direction, in float32."""
        x = self.x.float()
        ys, dxs, dtaps, dbiases = [], [], [], []
        for dy, w, b, back in zip(self.dys, self.taps, self.biases, BOTH, strict=True):
            rest = (w.float(), None if b is None else b.float(), None, cu_seqlens)
            settings = (w.shape[1] - 1, back, True)
            ys.append(kernels.conv_forward(x, *rest, *settings))
            dx, dw, *db = kernels.conv_backward(dy.float(), x, *rest, *settings)
            dxs.append(dx)
            dtaps.append(dw)
            dbiases += db
        return [*ys, dxs[0] + dxs[1], *dtaps, *dbiases]


def compare(assert_near: Check, case: Case, cu_seqlens: Tensor | None = None) -> None:
    """Every output and gradient, each in the dtype of what it belongs to."""
    like = [case.x, case.x, case.x, *case.taps, *(b for b in case.biases if b is not None)]
    found, wanted = case.together(cu_seqlens), case.alone(cu_seqlens)
    for actual, expected, v in zip(found, wanted, like, strict=True):
        assert (actual.shape, actual.dtype) == (v.shape, v.dtype)
        assert_near(actual, expected.double())


class TestKernels:
    """Interpreted, or on a GPU."""

    pytestmark = kernel

    @pytest.mark.parametrize("width", range(1, kernels.MAX_WIDTH + 1))
    def test_widths(self, assert_near: Check, width: int):
        for bias in (True, False):
            compare(assert_near, Case(2, 9, 3, width, bias=bias))
            compare(assert_near, Case(1, 9, 3, width, bias=bias), self.cu((2, 0, 6, 1)))

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    def test_sizes(self, assert_near: Check, sizes: tuple[int, int, int]):
        compare(assert_near, Case(*sizes, 4))

    @pytest.mark.parametrize("lengths", LENGTHS, ids=str)
    def test_packed(self, assert_near: Check, lengths: tuple[int, ...]):
        case = Case(1, sum(lengths), 3, 4)
        for dtype in (torch.int32, torch.int64):
            compare(assert_near, case, self.cu(lengths).to(dtype))

    @pytest.mark.parametrize("lengths", [None, (33, 1, 0, 37, 3)], ids=str)
    def test_long_spans(
        self, assert_near: Check, monkeypatch: pytest.MonkeyPatch, lengths: tuple | None
    ):
        """Where few programs do, each walks many steps; one of them walks all."""
        monkeypatch.setattr(kernels, "processors", lambda device: 0)
        case = Case(2 if lengths is None else 1, 74, 5, 4)
        compare(assert_near, case, None if lengths is None else self.cu(lengths))

    @pytest.mark.parametrize("most", [1, 1024])
    def test_many_parts(self, assert_near: Check, monkeypatch: pytest.MonkeyPatch, most: int):
        """More partial sums than a tile holds, or too many for a kernel."""
        monkeypatch.setattr(pair, "MOST_PARTS", most)
        monkeypatch.setattr(pair, "BACKWARD", kernels.Pace(1, 1, 1, 12))
        # a partial sum a token
        compare(assert_near, Case(1, 131, 3, 2, bias=most > 1))

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
    def test_half(self, assert_near: Check, half: torch.dtype):
        for weights in (torch.float32, half):
            compare(assert_near, Case(2, 9, 3, 4, dtype=half, weights=weights))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, assert_near: Check, layout: str):
        case = Case(2, 5, 4, 3)
        wanted = case.together()
        change = LAYOUTS[layout]
        case.x, case.dys = change(case.x), [change(v) for v in case.dys]
        case.taps = [change(v) for v in case.taps]
        for actual, expected in zip(case.together(), wanted, strict=True):
            assert_near(actual, expected)

    @pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_bad_values_stay_in_their_sequence(self, bad: float):
        case = Case(1, 9, 3, 3)
        cu = self.cu((3, 3, 3))
        clean = case.together(cu)
        case.x[0, 3:6] = bad
        others = [0, 1, 2, 6, 7, 8]
        for actual, expected in zip(case.together(cu)[:3], clean[:3], strict=True):
            assert torch.equal(actual[:, others], expected[:, others])

    def test_runs_repeat_bit_by_bit(self):
        case = Case(2, 40, 5, 4)
        for actual, expected in zip(case.together(), case.together(), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0)], ids=str)
    def test_empty(self, sizes: tuple[int, int, int]):
        case = Case(*sizes, 4)
        *outputs, dtaps, dtaps_r, dbias, dbias_r = case.together()
        assert [v.shape for v in outputs] == [sizes] * 3
        assert not any(v.any() for v in (dtaps, dtaps_r, dbias, dbias_r))

    def test_wrong_ends_are_refused(self):
        case = Case(1, 9, 3, 4)
        with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at the length 9"):
            case.together(self.cu((3, 5)))

    def test_a_tracer_sees_operators(self):
        case = Case(1, 9, 3, 4)
        given = (case.x, case.taps, case.biases)
        trace = make_fx(lambda x: convolve(x, case.taps, case.biases, None, BOTH))
        names = [str(node.target) for node in trace(case.x).graph.nodes]
        assert names.count("scanweave.short_conv.default") == 2
        # and of tensors without values nothing is launched
        assert not takes(case.x.to("meta"), *given[1:], BOTH)

    @staticmethod
    def cu(lengths: tuple[int, ...]) -> Tensor:
        """Ends of packed sequences where the kernels run."""
        return pack(lengths, "cpu" if INTERPRETED else "cuda")


UNLIKE: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "order": ({}, [True, False]),
    "one direction": ({}, [False]),
    "taps": ({"width": 3}, BOTH),
    "bias": ({"bias": False}, BOTH),
    "too many taps": ({}, BOTH),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_other_directions_go_one_by_one(monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(pair, "_on_kernels", lambda *tensors: True)
    change, reverse = UNLIKE[kind]
    width = 9 if kind == "too many taps" else 4
    case = Case(2, 7, 3, width, dtype=torch.float64, weights=torch.float64, device="cpu")
    other = Case(
        2,
        7,
        3,
        change.get("width", width),
        bias=change.get("bias", True),
        dtype=torch.float64,
        weights=torch.float64,
        device="cpu",
    )
    taps = [case.taps[0], other.taps[1]][: len(reverse)]
    biases = [case.biases[0], other.biases[1]][: len(reverse)]
    assert not takes(case.x, taps, biases, reverse)
    with mock.patch.object(pair, "pair_forward", side_effect=AssertionError):
        found = convolve(case.x, taps, biases, None, reverse)
    for y, w, b, back in zip(found, taps, biases, reverse, strict=True):
        settings = (None, None, w.shape[1] - 1, back, True)
        assert torch.equal(y, torch.ops.scanweave.short_conv(case.x, w, b, *settings))
    dys = case.dys[: len(reverse)]
    x = case.x.clone().requires_grad_()
    leaves = [v.requires_grad_() for v in (*taps, *(b for b in biases if b is not None))]
    outputs = convolve(x, taps, biases, None, reverse)
    wanted = torch.autograd.grad(outputs, [x, *leaves], dys)
    with torch.no_grad():
        dx, dtaps, dbiases = gradients(dys, x, taps, biases, None, reverse)
    for actual, expected in zip([dx, *dtaps, *dbiases], wanted, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("packed", [False, True])
def test_large(assert_near: Check, width: int, dtype: torch.dtype, packed: bool):
    size = (1, 20_000, 192) if packed else (16, 197, 768)
    case = Case(*size, width, dtype=dtype, device="cuda")
    lengths = (0, 1, 2, 197, 4800, 3, 0, 14_997)
    compare(assert_near, case, pack(lengths, "cuda") if packed else None)
