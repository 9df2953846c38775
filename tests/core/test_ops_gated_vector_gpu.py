"""Decays of key channels on a GPU at sizes of real models, against float64 there.

Several seeds each, and widths below those of models: kernels with chained matrix products have
been wrong on single architectures for single shapes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import gated_inputs, gated_pairs
from tests.core.op_cases import assert_equal, each, evaluate, pack
from tests.core.test_ops_gated_gpu import ALL, DTYPES, LENGTHS, SEEDS, check

from scanweave.core import bidirectional_gated_linear_scan, gated_linear_scan
from scanweave.core.ops.gated import gated_linear_scan_ref, portable

pytestmark = [pytest.mark.gpu, pytest.mark.poison, pytest.mark.timeout(600)]
Check = Callable[..., None]


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 runs on the portable path, what is tested must not."""
    forward, backward = portable.forward, portable.backward

    def guarded(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            assert arguments[-1] == torch.float64, "the op left the Triton kernels"
            return run(*arguments, **options)

        return call

    monkeypatch.setattr(portable, "forward", guarded(forward))
    monkeypatch.setattr(portable, "backward", guarded(backward))


def drawn(dtype: torch.dtype, seed: int, **options: Any) -> dict[str, Any]:
    given = {"kind": "all", "dtype": dtype, "device": "cuda", "seed": seed, "decay": 0.05}
    return given | options


def with_bonus(inputs: dict[str, Any]) -> dict[str, Any]:
    heads, keys = inputs["g"].shape[2:]
    rng = torch.Generator("cuda").manual_seed(3)
    bonus = torch.randn(heads, keys, generator=rng, device="cuda").requires_grad_()
    return inputs | {"bonus": bonus}


@DTYPES
@pytest.mark.parametrize(
    ("shape", "groups", "reverse", "exclusive"),
    [
        ((2, 300, 4, 128, 128), 4, False, False),
        ((2, 197, 6, 64, 64), 2, True, False),
        ((2, 60, 8, 64, 64), 8, False, True),
        ((1, 130, 2, 256, 16), 1, True, True),
        ((1, 129, 2, 16, 256), 2, False, False),
        ((2, 191, 3, 80, 48), 3, False, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("steep", [False, True])
def test_one_direction(
    assert_near: Check,
    shape: tuple,
    groups: int,
    reverse: bool,
    exclusive: bool,
    steep: bool,
    dtype: torch.dtype,
):
    options = {"reverse": reverse, "exclusive": exclusive, **ALL}
    for seed in SEEDS:
        inputs = gated_inputs(*shape, groups=groups, **drawn(dtype, seed))
        if steep:
            # of some channels, for a part of the sequence
            g = inputs["g"].detach().clone()
            g[:, shape[1] // 3 : 2 * shape[1] // 3, :, ::3] *= 200
            inputs["g"] = g.requires_grad_()
        inputs = with_bonus(inputs) if exclusive else inputs
        check(assert_near, gated_linear_scan, inputs, f"seed {seed}", **options)


@DTYPES
@pytest.mark.parametrize(
    ("form", "length"), [("add", 300), ("exclusive", 300), ("quasi_separable", 197)]
)
def test_both_directions(assert_near: Check, form: str, length: int, dtype: torch.dtype):
    without = ("initial_state",) if form == "quasi_separable" else ()
    options: dict[str, Any] = {"form": form, **({} if without else ALL)}
    for seed in SEEDS:
        inputs = gated_pairs(2, length, 4, 64, 64, without=without, **drawn(dtype, seed))
        check(assert_near, bidirectional_gated_linear_scan, inputs, f"seed {seed}", **options)


@DTYPES
@pytest.mark.parametrize("exclusive", [False, True])
def test_packed(assert_near: Check, exclusive: bool, dtype: torch.dtype):
    shape, cu = (1, sum(LENGTHS), 4, 64, 64), pack(LENGTHS, "cuda")
    options: dict[str, Any] = {"cu_seqlens": cu, "exclusive": exclusive, **ALL}
    for seed in SEEDS[:2]:
        inputs = gated_inputs(*shape, sequences=len(LENGTHS), **drawn(dtype, seed))
        inputs = with_bonus(inputs) if exclusive else inputs
        check(assert_near, gated_linear_scan, inputs, f"seed {seed}", **options)


def test_size_of_gla(assert_near: Check):
    for seed in SEEDS:
        inputs = gated_inputs(1, 2048, 16, 128, 128, **drawn(torch.bfloat16, seed))
        check(assert_near, gated_linear_scan, inputs, f"seed {seed}", **ALL)


def test_size_of_rwkv(assert_near: Check):
    for seed in SEEDS:
        inputs = with_bonus(gated_inputs(2, 1024, 32, 64, 64, **drawn(torch.bfloat16, seed)))
        check(assert_near, gated_linear_scan, inputs, f"seed {seed}", exclusive=True, **ALL)


def test_long_sequence(assert_near: Check):
    inputs = gated_inputs(1, 100_000, 1, 16, 16, **drawn(torch.float32, 0))
    check(assert_near, gated_linear_scan, inputs, "100000 steps", **ALL)


@pytest.mark.parametrize("exclusive", [False, True])
def test_every_decay_beside_every_other(assert_near: Check, exclusive: bool):
    """Against the definition: the portable path subtracts sums, which the strongest decays end."""
    kinds = torch.tensor([0.0, -1e-6, -0.1, -3.0, -100.0, -1e4, -1e30], device="cuda")
    inputs = gated_inputs(1, 150, 2, 32, 32, **drawn(torch.float32, 0))
    rng = torch.Generator("cuda").manual_seed(0)
    chosen = torch.randint(0, 7, inputs["g"].shape, generator=rng, device="cuda")
    inputs["g"] = kinds[chosen].requires_grad_()
    options = {"exclusive": exclusive, **ALL}
    actual = evaluate(gated_linear_scan, inputs, **options)
    dtypes = [torch.float32] * 2
    doubled = each(inputs, torch.Tensor.double)
    exact = evaluate(gated_linear_scan_ref, doubled, rounded_to=dtypes, **options)
    for name, v in actual.items():
        assert_near(v, exact[name], gradient=name.startswith("gradient"), name=name)


def test_runs_repeat_bit_by_bit():
    inputs = gated_inputs(
        1, sum(LENGTHS), 4, 64, 64, sequences=len(LENGTHS), **drawn(torch.bfloat16, 0)
    )
    options = {"cu_seqlens": pack(LENGTHS, "cuda"), **ALL}
    first = evaluate(gated_linear_scan, inputs, **options)
    for _ in range(5):
        assert_equal(evaluate(gated_linear_scan, inputs, **options), first)


def test_graphs_replay():
    inputs = with_bonus(gated_inputs(2, 197, 4, 64, 64, **drawn(torch.bfloat16, 0)))
    expected = evaluate(gated_linear_scan, inputs, exclusive=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = gated_linear_scan(**inputs, exclusive=True)
    graph.replay()
    assert torch.equal(y, expected["output 0"])
