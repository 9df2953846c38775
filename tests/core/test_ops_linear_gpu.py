"""The linear scan, the weighted average, long convolutions and attention on a GPU, full size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.linear_cases import (
    Check,
    linear_inputs,
    near,
    scaled_state,
    widened,
    wkv_inputs,
)
from tests.core.op_cases import assert_equal, evaluate, pack
from torch import Tensor

from scanweave.core import diagonal_ssm, fft_conv, linear_scan, sequence_attention, wkv
from scanweave.core.ops.linear import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.poison, pytest.mark.timeout(600)]
ALL: dict[str, Any] = {"return_final_state": True}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64], ids=str
)
REAL = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def ragged(total: int, longest: int, seed: int) -> tuple[int, ...]:
    """Lengths that add up to `total`, one of them 0 and one 1."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [0, 1]
    while sum(lengths) < total:
        drawn = int(torch.randint(0, longest, (), generator=rng))
        lengths.append(min(drawn, total - sum(lengths)))
    return tuple(lengths)


def check(
    assert_near: Check,
    op: Callable[..., Any],
    inputs: dict[str, Any],
    factor: float = 1.0,
    **options: Any,
) -> None:
    """Outputs and gradients against the same op in float64, which takes another path."""
    actual = evaluate(op, inputs, **options)
    dtypes = [v.dtype for name, v in actual.items() if name.startswith("output")]
    exact = evaluate(op, widened(inputs), rounded_to=dtypes, **options)
    near(assert_near, actual, exact, factor=factor)


# the first fills a GPU; the others are cut into segments
@DTYPES
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("sizes", [(8, 197, 2048), (1, 5000, 130), (2, 20000, 64)], ids=str)
def test_scan(assert_near: Check, sizes: tuple, constant: bool, seed: int, dtype: torch.dtype):
    decays = torch.float32 if constant and not dtype.is_complex else dtype
    inputs = linear_inputs(
        *sizes, constant=constant, dtype=dtype, decays=decays, device="cuda", seed=seed
    )
    cut = kernels.plan_of(inputs["x"], sizes[0]).segments > 1
    assert cut == (sizes[0] < 8)
    # the rounding of a constant decay adds up over its memory
    factor = 2.0 if constant else 1.0
    check(assert_near, linear_scan, inputs, factor, reverse=bool(seed), **ALL)


@DTYPES
@pytest.mark.parametrize("longest", [200, 9000])
def test_scan_packed(assert_near: Check, longest: int, dtype: torch.dtype):
    lengths = ragged(12000, longest, 0)
    inputs = linear_inputs(1, 12000, 96, dtype=dtype, sequences=len(lengths), device="cuda")
    for reverse in (False, True):
        options = {"cu_seqlens": pack(lengths, "cuda"), "reverse": reverse, **ALL}
        check(assert_near, linear_scan, inputs, **options)


@pytest.mark.parametrize("segments", [1, 2, 8, 32])
@DTYPES
def test_cuts_change_rounding_only(
    assert_near: Check, dtype: torch.dtype, segments: int, monkeypatch: pytest.MonkeyPatch
):
    plan = kernels.plan_of
    monkeypatch.setattr(kernels, "plan_of", lambda *a: plan(*a)._replace(segments=segments))
    for length in (1, 15, 333, 2048):
        inputs = linear_inputs(2, length, 70, dtype=dtype, device="cuda")
        check(assert_near, linear_scan, inputs, **ALL)


def test_long_memory(assert_near: Check):
    """A memory of a thousand steps over 131072, cut: rounding may not build up."""
    inputs = linear_inputs(1, 131072, 32, constant=True, dtype=torch.float32, device="cuda")
    inputs["log_a"] = torch.full_like(inputs["log_a"], -1e-3).requires_grad_()
    # half a rounding of the decay itself is 3e-5 after a thousand steps, at worst
    check(assert_near, linear_scan, inputs, factor=3, **ALL)


def test_runs_repeat_bit_by_bit():
    for inputs, op in (
        (
            linear_inputs(1, 9000, 64, constant=True, dtype=torch.float32, device="cuda"),
            linear_scan,
        ),
        (wkv_inputs(4, 500, 64, dtype=torch.float32, device="cuda"), wkv),
    ):
        first = evaluate(op, inputs, **ALL)
        for _ in range(3):
            assert_equal(evaluate(op, inputs, **ALL), first)


def test_offsets_past_32_bits(assert_near: Check):
    """Rows behind element 2^31, cut and not."""
    free, _ = torch.cuda.mem_get_info()
    length, dim = 2**21 + 64, 1024
    if free < 8 * length * dim:  # x, log_a and h in float16, with room
        pytest.skip("needs 18 GB of GPU memory")
    x = torch.zeros(1, length, dim, dtype=torch.float16, device="cuda")
    log_a = torch.full((dim,), -1.0, device="cuda")
    x[:, -512:] = torch.randn(1, 512, dim, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        assert_near(linear_scan(x, log_a)[:, -512:], linear_scan(x[:, -512:], log_a))
        back = linear_scan(x, log_a, reverse=True)[:, -512:]
        assert_near(back, linear_scan(x[:, -512:], log_a, reverse=True))


def test_graph_replays(assert_near: Check):
    x = torch.randn(1, 4096, 64, device="cuda")
    log_a = -torch.rand(64, device="cuda")
    with torch.no_grad():
        linear_scan(x, log_a)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h = linear_scan(x, log_a)
        x.normal_()
        graph.replay()
        assert_near(h, linear_scan(x.double(), log_a.double()))


@REAL
@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
@pytest.mark.parametrize("constant", [False, True])
def test_average(assert_near: Check, constant: bool, without: tuple[str, ...], dtype: torch.dtype):
    options: dict[str, Any] = {"constant": constant, "without": without, "dtype": dtype}
    options |= {"weights": torch.float32, "device": "cuda"}
    inputs = wkv_inputs(4, 333, 130, **options)
    for reverse in (False, True):
        check(assert_near, scaled_state(wkv), inputs, reverse=reverse)
    lengths = ragged(2000, 300, 1)
    inputs = wkv_inputs(1, 2000, 64, sequences=len(lengths), **options)
    check(assert_near, scaled_state(wkv), inputs, cu_seqlens=pack(lengths, "cuda"))


@REAL
def test_long_convolution(assert_near: Check, dtype: torch.dtype):
    inputs = {
        "x": torch.randn(2, 3000, 48, device="cuda").to(dtype).requires_grad_(),
        "kernel": torch.randn(48, 3000, device="cuda").requires_grad_(),
    }
    check(assert_near, fft_conv, inputs)


@pytest.mark.parametrize("mode", ["conv", "chunk", "scan"])
def test_diagonal_model(assert_near: Check, mode: str):
    given = linear_inputs(1, 1, 48, 8, constant=True, dtype=torch.complex64, device="cuda")
    x = torch.randn(2, 2500, 48, device="cuda")
    weights = [given["log_a"].detach(), *torch.randn(2, 48, 8, dtype=x.dtype, device="cuda")]
    wide = [v.to(torch.promote_types(v.dtype, torch.float64)) for v in (x, *weights)]
    y, h = diagonal_ssm(x, *weights, mode=mode, **ALL)
    exact, last = diagonal_ssm(*wide, mode="scan", **ALL)
    assert_near(y, exact)
    # rounding of the constant decay, over its memory
    near(assert_near, {"state": h}, {"state": last}, factor=3)


# PyTorch 2.11's compiler hides this warning of its own, but not from those who raise it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@REAL
@pytest.mark.parametrize(
    "options",
    [{"causal": True, "window": 256}, {"window": 100, "prefix": 4}, {"causal": True}],
    ids=str,
)
def test_flex_attention(assert_near: Check, options: dict[str, Any], dtype: torch.dtype):
    """FlexAttention against the mask of all pairs in float64, gradients included."""
    lengths = ragged(1536, 500, 2)

    def draw(groups: int) -> Tensor:
        return torch.randn(1, 1536, groups, 64, device="cuda").to(dtype).requires_grad_()

    inputs = {"q": draw(4), "k": draw(2), "v": draw(2)}
    for cu in (None, pack(lengths, "cuda")):
        actual = evaluate(sequence_attention, inputs, backend="flex", cu_seqlens=cu, **options)
        exact = evaluate(
            sequence_attention,
            widened(inputs),
            rounded_to=[dtype],
            backend="dense",
            cu_seqlens=cu,
            **options,
        )
        # products on tensor cores are rounded to 10 bits in float32 as well
        near(assert_near, actual, exact, factor=200 if dtype == torch.float32 else 2)
