"""The matrix-state scan with decays of key channels on Triton kernels, against float64.

Interpreted with chunks of 16 steps, lengths around them, or on a GPU. Gentle and steep chunks run
different code, and both are here in every form. At sizes of real models, on a GPU:
`test_ops_gated_vector_gpu.py`.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import bidirectional_gated_ref, gated_inputs, gated_pairs, pieces
from tests.core.op_cases import (
    LAYOUTS,
    assert_all_near,
    assert_equal,
    compare,
    each,
    evaluate,
    pack,
)

from scanweave.core import bidirectional_gated_linear_scan, gated_linear_scan
from scanweave.core.ops.gated import gated_linear_scan_ref, kernels, portable

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.poison,
    # pairs that are not seen may overflow, and those of a NaN or infinity are bad
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
STEPS = 16
# mean log decays: chunks of 16 are steep from 7 a step on
GENTLE, STEEP = 0.5, 12.0
DECAYS = pytest.mark.parametrize("decay", [GENTLE, STEEP])


@pytest.fixture
def device() -> str:
    """The interpreter reads and writes memory of the CPU."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another path would give right results as well, so it must not run."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the op left the Triton kernels")

    monkeypatch.setattr(portable, "forward", refused)
    monkeypatch.setattr(portable, "backward", refused)
    monkeypatch.setattr(kernels, "CHUNK", STEPS)
    monkeypatch.setattr(kernels, "WIDE_CHUNK", STEPS)


def drawn(device: str, **options: Any) -> dict[str, Any]:
    return {"kind": "all", "dtype": torch.float32, "device": device, **options}


# B, L, H, K, V, groups, exclusive, reverse
CASES = [
    (1, 1, 1, 1, 1, 1, False, False),
    (2, STEPS - 1, 2, 3, 5, 1, True, True),
    (1, STEPS, 2, 16, 16, 2, False, True),
    (1, 2 * STEPS + 3, 2, 17, 3, 2, True, False),
]
OPTIONS = [
    ((), ALL, GENTLE),
    ((), ALL, STEEP),
    (("initial_state",), {}, GENTLE),
    (("write", "skip"), ALL, STEEP),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("without", "final", "decay"), OPTIONS, ids=str)
def test_one_direction(
    assert_near: Check,
    device: str,
    case: tuple,
    without: tuple[str, ...],
    final: dict[str, Any],
    decay: float,
):
    *shape, groups, exclusive, reverse = case
    inputs = gated_inputs(*shape, **drawn(device, groups=groups, without=without, decay=decay))
    options = {"exclusive": exclusive, "reverse": reverse, **final}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("exclusive", [False, True])
def test_gentle_and_steep_side_by_side(assert_near: Check, device: str, exclusive: bool):
    """Steep chunks between gentle ones, and steep heads beside gentle ones."""
    inputs = gated_inputs(1, 4 * STEPS, 2, 3, 4, **drawn(device))
    g = inputs["g"].detach().clone()
    g[:, STEPS : 2 * STEPS, 0] *= 40
    g[:, 2 * STEPS :, 1, 1] *= 40
    inputs["g"] = g.requires_grad_()
    options = {"exclusive": exclusive, **ALL}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@DECAYS
@pytest.mark.parametrize("form", ["add", "exclusive", "quasi_separable"])
def test_both_directions(assert_near: Check, device: str, form: str, decay: float):
    without = ("initial_state",) if form == "quasi_separable" else ()
    sizes = drawn(device, groups=1, without=without, decay=decay)
    inputs = gated_pairs(1, 2 * STEPS + 1, 2, 5, 3, **sizes)
    options: dict[str, Any] = {"form": form, **({} if without else ALL)}
    compare(
        assert_near, bidirectional_gated_linear_scan, bidirectional_gated_ref, inputs, **options
    )


@DECAYS
@pytest.mark.parametrize("form", ["reverse", "quasi_separable"])
def test_packed(assert_near: Check, device: str, form: str, decay: float):
    lengths = (3, 0, STEPS, 1, 2 * STEPS + 1, STEPS - 1)
    sizes = drawn(device, sequences=len(lengths), decay=decay)
    options: dict[str, Any] = {"cu_seqlens": pack(lengths, device)}
    if form == "reverse":
        inputs = gated_inputs(1, sum(lengths), 1, 4, 3, **sizes)
        options |= {"reverse": True, **ALL}
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)
    else:
        inputs = gated_pairs(1, sum(lengths), 1, 4, 3, without=("initial_state",), **sizes)
        options |= {"form": form}
        op = bidirectional_gated_linear_scan
        compare(assert_near, op, bidirectional_gated_ref, inputs, **options)


@DECAYS
def test_packed_sequences_are_those_alone(device: str, decay: float):
    lengths = (STEPS + 3, 2, 2 * STEPS)
    sizes = drawn(device, sequences=len(lengths), decay=decay)
    inputs = gated_inputs(1, sum(lengths), 2, 4, 3, **sizes)
    with torch.no_grad():
        out, final = gated_linear_scan(**inputs, cu_seqlens=pack(lengths, device), **ALL)
        start = 0
        for i, length in enumerate(lengths):
            part = {n: v[:, start : start + length] for n, v in inputs.items()}
            part["initial_state"] = inputs["initial_state"][i : i + 1]
            alone = gated_linear_scan(**part, **ALL)
            assert torch.equal(out[:, start : start + length], alone[0])
            assert torch.equal(final[i : i + 1], alone[1])
            start += length


@DECAYS
def test_pieces_are_the_whole(assert_near: Check, device: str, decay: float):
    inputs = gated_inputs(1, 2 * STEPS + 5, 2, 4, 3, **drawn(device, decay=decay))
    with torch.no_grad():
        whole = gated_linear_scan(**inputs, **ALL)
        parts = pieces(gated_linear_scan, inputs, (1, STEPS, STEPS + 7))
    for name, got, want in zip(("out", "final_state"), parts, whole, strict=True):
        assert_near(got, want.double(), name=name)


@DECAYS
def test_chunks_change_nothing(
    assert_near: Check, device: str, monkeypatch: pytest.MonkeyPatch, decay: float
):
    inputs = gated_inputs(1, 40, 1, 4, 3, **drawn(device, decay=decay))
    few = evaluate(gated_linear_scan, inputs, exclusive=True, **ALL)
    monkeypatch.setattr(kernels, "CHUNK", 64)
    monkeypatch.setattr(kernels, "WIDE_CHUNK", 64)
    one = evaluate(gated_linear_scan, inputs, exclusive=True, **ALL)
    for name, value in few.items():
        gradient = name.startswith("gradient")
        assert_near(value, one[name].double(), gradient=gradient, name=name)


def test_wide_heads_and_states(assert_near: Check, device: str):
    """Several blocks of keys and values, the last ones ragged."""
    for keys, width, decay in ((150, 3, GENTLE), (4, 140, GENTLE), (70, 70, STEEP)):
        inputs = gated_inputs(1, 19, 1, keys, width, **drawn(device, decay=decay))
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **ALL)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half(assert_near: Check, device: str, half: torch.dtype):
    # the interpreter multiplies in float32
    options = {"near_as": half if device == "cuda" else None, **ALL}
    for weights, decay in ((torch.float32, GENTLE), (half, STEEP)):
        sizes = drawn(device, weights=weights, decay=decay) | {"dtype": half}
        inputs = gated_inputs(1, 20, 2, 4, 3, **sizes)
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("decay", [0.0, 1e-6, 30.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize("exclusive", [False, True])
def test_extreme_decays(assert_near: Check, device: str, exclusive: bool, decay: float):
    inputs = gated_inputs(1, STEPS + 3, 2, 4, 3, **drawn(device))
    inputs["g"] = (decay * (inputs["g"].detach() - 0.5)).requires_grad_()
    options = {"exclusive": exclusive, **ALL}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("exclusive", [False, True])
def test_every_decay_beside_every_other(assert_near: Check, device: str, exclusive: bool):
    """What the weak decays of a chunk carry keeps its digits beside those that end all."""
    inputs = gated_inputs(1, 3 * STEPS, 2, 4, 3, **drawn(device))
    kinds = torch.tensor([0.0, -1e-6, -0.1, -3.0, -100.0, -1e4, -1e30], device=device)
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, len(kinds), inputs["g"].shape, generator=rng)
    # one channel forgets all but once in a chunk
    chosen[..., 0] = 0
    chosen[:, 5::STEPS, :, 0] = 6
    inputs["g"] = kinds[chosen.to(device)].requires_grad_()
    options = {"exclusive": exclusive, **ALL}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


def test_no_memory_at_all(device: str):
    """A log decay of minus infinity: nothing is left, and nothing is NaN."""
    inputs = gated_inputs(1, STEPS + 3, 1, 4, 3, **drawn(device))
    inputs["g"] = torch.full_like(inputs["g"], -torch.inf, requires_grad=True)
    values = evaluate(gated_linear_scan, inputs, **ALL)
    assert all(torch.isfinite(v).all() for v in values.values())
    q, k, v, write, skip = (inputs[n].detach() for n in ("q", "k", "v", "write", "skip"))
    own = (q * k).sum(-1) * write + skip
    torch.testing.assert_close(values["output 0"], own.unsqueeze(-1) * v)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(assert_near: Check, device: str, layout: Callable[[torch.Tensor], torch.Tensor]):
    inputs = gated_inputs(2, 5, 2, 3, 4, **drawn(device))
    expected = evaluate(gated_linear_scan, inputs, **ALL)
    actual = evaluate(gated_linear_scan, each(inputs, layout), **ALL)
    if device == "cpu":
        assert_equal(actual, expected)
    else:
        # a compiler that knows a stride to be 1 may sum in another order
        assert_all_near(assert_near, actual, expected)


def test_constant_decays(assert_near: Check, device: str):
    inputs = gated_inputs(2, STEPS + 2, 2, 3, 4, **drawn(device) | {"kind": "channels"})
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **ALL)


@DECAYS
@pytest.mark.parametrize("reverse", [False, True])
def test_bonus(assert_near: Check, device: str, reverse: bool, decay: float):
    inputs = gated_inputs(1, STEPS + 3, 2, 3, 5, **drawn(device, groups=1, decay=decay))
    rng = torch.Generator().manual_seed(7)
    inputs["bonus"] = torch.randn(2, 3, generator=rng).to(device).requires_grad_()
    options = {"exclusive": True, "reverse": reverse, **ALL}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_bad_values_stay_in_their_sequence(device: str, reverse: bool, exclusive: bool):
    inputs = gated_inputs(1, 30, 1, 3, 4, **drawn(device, sequences=3))
    options = {"exclusive": exclusive, "reverse": reverse, **ALL}
    options["cu_seqlens"] = pack((10, 10, 10), device)
    clean = evaluate(gated_linear_scan, inputs, **options)
    for name, bad in (("v", torch.nan), ("k", torch.inf), ("g", torch.nan)):
        x = inputs[name].detach().clone()
        # all of the sequence: what lies beside the others is read by mistake first
        x[0, 10:20] = bad
        spoiled = inputs | {name: x.requires_grad_()}
        actual = evaluate(gated_linear_scan, spoiled, **options)
        assert not torch.isfinite(actual["output 0"][:, 10:20]).all()
        for key in ("output 0", *(f"gradient of {n}" for n in ("q", "k", "v", "g", "write"))):
            for rows in (slice(0, 10), slice(20, 30)):
                assert torch.equal(actual[key][:, rows], clean[key][:, rows]), (name, key)


def test_empty(device: str):
    for shape in ((0, 5, 2, 3, 4), (2, 0, 2, 3, 4)):
        inputs = gated_inputs(*shape, **drawn(device))
        values = evaluate(gated_linear_scan, inputs, **ALL)
        assert torch.equal(values["output 1"], inputs["initial_state"].detach())
        assert values["gradient of q"].shape == inputs["q"].shape
