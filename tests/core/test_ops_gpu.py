"""The ops on a GPU at sizes of real models, against float64 there, which runs portable code."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import (
    assert_all_near,
    assert_equal,
    conv_inputs,
    each,
    evaluate,
    pack,
    pair_inputs,
    scan_inputs,
)
from torch import Tensor

from scanweave.core import (
    bidirectional_selective_scan,
    causal_conv1d,
    selective_scan,
    symmetric_conv1d,
)

pytestmark = [pytest.mark.gpu, pytest.mark.poison, pytest.mark.timeout(600)]
Check = Callable[..., None]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
ALL: dict[str, Any] = {"return_final_state": True}


def ragged(total: int, seed: int) -> tuple[int, ...]:
    """Lengths from 0 to 200 that add up to `total`, one of them 0 and one 1."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [0, 1]
    while sum(lengths) < total:
        drawn = int(torch.randint(0, 200, (), generator=rng))
        lengths.append(min(drawn, total - sum(lengths)))
    return tuple(lengths)


def check(
    assert_near: Check, op: Callable[..., Any], inputs: dict[str, Any], **options: Any
) -> None:
    """Outputs and gradients against the same op on float64 inputs."""
    actual = evaluate(op, inputs, **options)
    dtypes = [v.dtype for name, v in actual.items() if name.startswith("output")]
    exact = evaluate(op, each(inputs, Tensor.double), rounded_to=dtypes, **options)
    assert all(v.dtype == torch.float64 for v in exact.values())
    assert_all_near(assert_near, actual, exact)


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return each(inputs, Tensor.cuda)


@DTYPES
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "sizes",
    [
        (4, 197, 384, 16, None),
        (2, 1000, 130, 8, 2),
        (1, 4096, 64, 16, None),
        (3, 333, 96, 1, None),
        (8, 515, 1024, 4, 1),  # large enough for wide tiles, and to convert B and C first
    ],
    ids=str,
)
def test_scan(assert_near: Check, sizes: tuple, seed: int, dtype: torch.dtype):
    *shape, groups = sizes
    inputs = scan_inputs(
        *shape, groups=groups, dtype=dtype, weights=torch.float32, device="cuda", seed=seed
    )
    check(assert_near, selective_scan, inputs, reverse=bool(seed % 2), **ALL)


@DTYPES
@pytest.mark.parametrize("seed", range(3))
def test_scan_packed(assert_near: Check, seed: int, dtype: torch.dtype):
    lengths = ragged(2000, seed)
    inputs = scan_inputs(
        1,
        2000,
        192,
        16,
        sequences=len(lengths),
        dtype=dtype,
        weights=torch.float32,
        device="cuda",
        seed=seed,
    )
    cu = pack(lengths, "cuda")
    check(assert_near, selective_scan, inputs, reverse=bool(seed % 2), cu_seqlens=cu, **ALL)


@DTYPES
@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional(assert_near: Check, packed: bool, dtype: torch.dtype):
    lengths = ragged(2000, 0)
    inputs = pair_inputs(
        1 if packed else 4,
        2000 if packed else 197,
        384,
        16,
        sequences=len(lengths) if packed else None,
        dtype=dtype,
        weights=torch.float32,
        device="cuda",
    )
    cu = pack(lengths, "cuda") if packed else None
    check(assert_near, bidirectional_selective_scan, inputs, cu_seqlens=cu, **ALL)


@DTYPES
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [3, 4, 7])
def test_convolution(assert_near: Check, width: int, packed: bool, dtype: torch.dtype):
    lengths = ragged(2000, 1)
    shape = (1, 2000, 192) if packed else (4, 197, 384)
    cu = pack(lengths, "cuda") if packed else None
    for without in ((), ("initial_state",)):
        inputs = conv_inputs(
            *shape,
            width=width,
            sequences=len(lengths) if packed else None,
            without=without,
            dtype=dtype,
            weights=torch.float32,
            device="cuda",
        )
        for reverse in (False, True):
            options = {"activation": "silu", "reverse": reverse, "cu_seqlens": cu, **ALL}
            check(assert_near, causal_conv1d, inputs, **options)
    if width % 2:
        inputs.pop("initial_state", None)
        check(assert_near, symmetric_conv1d, inputs, activation="silu", cu_seqlens=cu)


def test_small_models_many_states(assert_near: Check):
    for state in (2, 5, 32, 64, 128):
        inputs = scan_inputs(2, 70, 40, state, dtype=torch.float32, device="cuda")
        check(assert_near, selective_scan, inputs, **ALL)


def test_values_are_those_of_the_cpu(assert_near: Check):
    for op, inputs in (
        (selective_scan, scan_inputs(2, 65, 24, 16)),
        (bidirectional_selective_scan, pair_inputs(2, 65, 24, 16)),
        (causal_conv1d, conv_inputs(2, 65, 24, 4)),
    ):
        exact = evaluate(op, inputs, **ALL)
        assert_all_near(assert_near, evaluate(op, on_gpu(inputs), **ALL), exact)
        rounded = evaluate(op, on_gpu(each(inputs, Tensor.float)), **ALL)
        assert_all_near(assert_near, rounded, exact, factor=3)


def test_runs_repeat_bit_by_bit():
    lengths = ragged(2000, 2)
    pairs = pair_inputs(
        1, 2000, 192, 16, sequences=len(lengths), dtype=torch.float32, device="cuda"
    )
    conv = conv_inputs(
        1, 2000, 192, 4, without=("initial_state",), dtype=torch.float32, device="cuda"
    )
    cu = pack(lengths, "cuda")
    for op, inputs in ((bidirectional_selective_scan, pairs), (causal_conv1d, conv)):
        first = evaluate(op, inputs, cu_seqlens=cu)
        for _ in range(3):
            assert_equal(evaluate(op, inputs, cu_seqlens=cu), first)


def test_long_memory(assert_near: Check):
    """A memory of about a thousand steps over 16384: rounding may not build up."""
    inputs = scan_inputs(1, 16384, 32, 16, dtype=torch.float32, device="cuda")
    inputs["A"] = torch.full_like(inputs["A"], -3e-3).requires_grad_()
    check(assert_near, selective_scan, inputs, **ALL)


def test_offsets_past_32_bits(assert_near: Check):
    """Rows behind element 2^31: one long sequence, half precision, a single state."""
    free, _ = torch.cuda.mem_get_info()
    length, dim = 2**21 + 64, 1024
    if free < 8 * length * dim:  # x, dt, out in float16, with room
        pytest.skip("needs 18 GB of GPU memory")
    x = torch.ones(1, length, dim, dtype=torch.float16, device="cuda")
    B = torch.ones(1, length, 1, dtype=torch.float16, device="cuda")
    A = torch.full((dim, 1), -1.0, device="cuda")
    short = 512  # steps after which nothing is left of a state
    x[:, -short:] = torch.randn(1, short, dim, device="cuda", dtype=torch.float16)
    weight = torch.randn(dim, 4, device="cuda")
    tail_x, tail_B = (v[:, -2 * short :].contiguous() for v in (x, B))
    with torch.no_grad():
        scanned = selective_scan(x, x, A, B, B)[:, -short:]
        convolved = causal_conv1d(x, weight)[:, -short:]
        scanned_tail = selective_scan(tail_x, tail_x, A, tail_B, tail_B)[:, -short:]
        convolved_tail = causal_conv1d(tail_x, weight)[:, -short:]
    assert_near(scanned, scanned_tail)
    assert torch.equal(convolved, convolved_tail)


def test_bad_values_stay_in_their_sequence():
    inputs = scan_inputs(1, 300, 64, 16, sequences=3, dtype=torch.float32, device="cuda")
    cu = pack((100, 100, 100), "cuda")
    clean = evaluate(selective_scan, inputs, cu_seqlens=cu, **ALL)
    for bad in (math.nan, math.inf):
        x = inputs["x"].detach().clone()
        x[0, 150] = bad
        spoiled = inputs | {"x": x.requires_grad_()}
        actual = evaluate(selective_scan, spoiled, cu_seqlens=cu, **ALL)
        for key in ("output 0", *(f"gradient of {name}" for name in ("x", "dt", "B", "C"))):
            for rows in (slice(0, 100), slice(200, 300)):
                assert torch.equal(actual[key][:, rows], clean[key][:, rows]), key
