"""The compiled weighted average on a CPU: outputs and gradients, and when it runs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.core.linear_cases import Check, compare, near, scaled_state, wkv_inputs
from tests.core.op_cases import LAYOUTS, assert_equal, each, evaluate, pack

from scanweave.core.ops.wkv import compiled, portable, wkv, wkv_ref

pytestmark = pytest.mark.poison
# around a chunk of 16 tokens, and a panel of 4 vectors, which are 16 to 64 channels
SHAPES = [(1, 1, 1), (2, 15, 5), (3, 16, 64), (2, 17, 65), (1, 100, 130)]
RAGGED = (0, 5, 1, 0, 33, 16, 2, 0)
ALL: dict[str, Any] = {"return_final_state": True}
REVERSE = pytest.mark.parametrize("reverse", [False, True])
CONSTANT = pytest.mark.parametrize("constant", [False, True])
WITHOUT = pytest.mark.parametrize(
    "without", [(), ("bonus",), ("initial_state",), ("bonus", "initial_state")], ids=str
)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test runs the compiled functions, both; skips where there is no compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not compiled.native.types:
        pytest.skip(f"no compiled average ({compiled.native.status()})")
    calls = []
    run = compiled.native.run

    def spy(name: str, arguments: list[int]) -> None:
        calls.append(name)
        run(name, arguments)

    monkeypatch.setattr(compiled.native, "run", spy)
    yield
    assert set(calls) == {"scanweave_wkv_forward", "scanweave_wkv_backward"}


@pytest.mark.usefixtures("used")
@CONSTANT
@REVERSE
@WITHOUT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(
    assert_near: Check, shape: tuple, without: tuple[str, ...], reverse: bool, constant: bool
):
    inputs = wkv_inputs(*shape, constant=constant, without=without, dtype=torch.float32)
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, reverse=reverse)


@pytest.mark.usefixtures("used")
@CONSTANT
@pytest.mark.parametrize("weights", [torch.float32, None], ids=["float32 weights", "all 16 bit"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half_precision_equals_definition(
    assert_near: Check, dtype: torch.dtype, weights: torch.dtype | None, constant: bool
):
    if dtype not in compiled.native.types:
        pytest.skip("the compiler knows no float16")
    inputs = wkv_inputs(2, 35, 33, constant=constant, dtype=dtype, weights=weights)
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs)


@pytest.mark.usefixtures("used")
@CONSTANT
@REVERSE
@WITHOUT
def test_packed_equals_definition(
    assert_near: Check, without: tuple[str, ...], reverse: bool, constant: bool
):
    inputs = wkv_inputs(
        1,
        sum(RAGGED),
        34,
        constant=constant,
        sequences=len(RAGGED),
        without=without,
        dtype=torch.float32,
    )
    for dtype in (torch.int32, torch.int64):
        options = {"reverse": reverse, "cu_seqlens": pack(RAGGED).to(dtype)}
        compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, **options)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_portable_path(
    assert_near: Check, monkeypatch: pytest.MonkeyPatch, packed: bool, dtype: torch.dtype
):
    """Gradients of the final state's three parts included, as they are."""
    sequences = len(RAGGED) if packed else None
    batch = 1 if packed else 2
    inputs = wkv_inputs(batch, sum(RAGGED), 33, sequences=sequences, dtype=dtype)
    options: dict[str, Any] = {"cu_seqlens": pack(RAGGED) if packed else None, **ALL}
    actual = evaluate(wkv, inputs, **options)
    monkeypatch.setattr(compiled, "takes", lambda _: False)
    near(assert_near, actual, evaluate(wkv, inputs, **options))


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
def test_large_weights_do_not_overflow(assert_near: Check, without: tuple[str, ...]):
    inputs = wkv_inputs(2, 70, 20, scale=300.0, without=without, dtype=torch.float32)
    # 300 in float32 is exact to 3e-5, and so are weights
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, factor=20)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
def test_absent_tokens_and_fading(assert_near: Check, without: tuple[str, ...]):
    """Weights of zero at the start and between, and decays that forget everything."""
    inputs = wkv_inputs(
        1, 40, 20, constant=False, without=("initial_state", *without), dtype=torch.float32
    )
    k, w = inputs["k"].detach().clone(), inputs["log_decay"].detach().clone()
    k[:, [0, 1, 4, 15, 16, 39]] = float("-inf")
    w[:, [3, 17, 20]] = float("-inf")
    changed = inputs | {"k": k.requires_grad_(), "log_decay": w.requires_grad_()}
    actual = evaluate(wkv, changed)
    near(assert_near, actual, evaluate(wkv_ref, each(changed, torch.Tensor.double)))
    assert not actual["output 0"][:, :2].any()
    for name, v in actual.items():
        assert torch.isfinite(v).all(), name


@pytest.mark.usefixtures("used")
@REVERSE
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["k", "v", "log_decay", "initial_state"])
def test_bad_values_stay_in_their_sequence(name: str, bad: float, reverse: bool):
    lengths, owner = (20, 0, 1, 40, 3), 3
    inputs = wkv_inputs(
        1, sum(lengths), 18, constant=False, sequences=len(lengths), dtype=torch.float32
    )
    spoiled = inputs[name].detach().clone()
    spoiled[(owner,) if name == "initial_state" else (0, slice(21, 61))] = bad
    options: dict[str, Any] = {"reverse": reverse, "cu_seqlens": pack(lengths), **ALL}
    clean = evaluate(wkv, inputs, **options)
    actual = evaluate(wkv, inputs | {name: spoiled.requires_grad_()}, **options)
    tokens, rows = [*range(21), 61, 62, 63], [0, 1, 2, 4]
    for key in ("output 0", *(f"gradient of {n}" for n in ("k", "v", "log_decay"))):
        assert torch.equal(actual[key][:, tokens], clean[key][:, tokens]), key
    for key in ("output 1", "gradient of initial_state"):
        assert torch.equal(actual[key][rows], clean[key][rows]), key


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("name", ["k", "v", "log_decay"])
@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
def test_nan_is_not_lost(name: str, without: tuple[str, ...]):
    inputs = wkv_inputs(1, 40, 20, constant=False, without=without, dtype=torch.float32)
    spoiled = inputs[name].detach().clone()
    spoiled[0, 20, 3] = float("nan")
    values = evaluate(wkv, inputs | {name: spoiled.requires_grad_()})
    # a bonus reads the token before its decay
    first = 21 if name == "log_decay" and not without else 20
    assert values["output 0"][0, first:, 3].isnan().all()
    assert not values["output 0"][0, :first].isnan().any()
    assert values["gradient of k"][0, :20, 3].isnan().all()
    others = [c for c in range(20) if c != 3]
    for key, v in values.items():
        assert not v[..., others].isnan().any(), key


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str):
    for constant in (False, True):
        inputs = wkv_inputs(2, 20, 18, constant=constant, dtype=torch.float32)
        strided = each(inputs, LAYOUTS[layout])
        assert any(not v.is_contiguous() for v in strided.values())
        for reverse in (False, True):
            options: dict[str, Any] = {"reverse": reverse, **ALL}
            expected = evaluate(wkv, inputs, **options)
            assert_equal(evaluate(wkv, strided, **options), expected)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
def test_threads_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch, packed: bool):
    monkeypatch.setattr(compiled, "WORK_PER_THREAD", 1)
    sequences = len(RAGGED) if packed else None
    inputs = wkv_inputs(1 if packed else 3, sum(RAGGED), 130, sequences=sequences)
    inputs = each(inputs, torch.Tensor.float)
    options: dict[str, Any] = {"cu_seqlens": pack(RAGGED) if packed else None}
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(evaluate(wkv, inputs, **ALL, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0])
    if not packed:
        rows = {n: inputs[n][1:2] for n in ("k", "v", "initial_state")}
        assert torch.equal(wkv(**inputs | rows)[0], results[0]["output 0"][1])


@pytest.mark.parametrize("sizes", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_empty_inputs(sizes: tuple[int, int, int]):
    inputs = wkv_inputs(*sizes, dtype=torch.float32)
    values = evaluate(wkv, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert values["gradient of initial_state"].shape == (sizes[0], 3, sizes[2])
    assert not values["gradient of log_decay"].any()
    assert not values["gradient of bonus"].any()
    if sizes[1] == 0:
        state, given = values["output 1"], inputs["initial_state"].detach()
        assert torch.equal(state[:, :2], given[:, :2])
        # kernels (as in the interpreter) keep the scale to base 2
        torch.testing.assert_close(state[:, 2], given[:, 2], rtol=1e-6, atol=0)


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool):
    given = wkv_inputs(1 if packed else 2, 11, 4, sequences=3 if packed else None)
    tensors = [v.detach().float() for v in given.values()]
    cu = pack((3, 0, 8)) if packed else None
    for reverse in (False, True):
        arguments = (*tensors, cu, reverse)
        torch.library.opcheck(torch.ops.scanweave.wkv.default, (*arguments, False))
        y, final, kept = torch.ops.scanweave.wkv.default(*arguments, False)
        gradients = torch.randn_like(y), torch.randn_like(final)
        op = torch.ops.scanweave.wkv_backward.default
        torch.library.opcheck(op, (*gradients, *arguments, kept))


def test_doubles_stay_with_the_portable_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "forward", None)
    monkeypatch.setattr(compiled, "backward", None)
    evaluate(wkv, wkv_inputs(1, 5, 4))
    inputs: dict[str, Any] = wkv_inputs(1, 5, 4, dtype=torch.float32)
    inputs["bonus"] = inputs["bonus"].detach().double().requires_grad_()
    evaluate(wkv, inputs)


@pytest.mark.usefixtures("used")
def test_no_other_path_runs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(portable, "forward", None)
    monkeypatch.setattr(portable, "backward", None)
    for dtype in (torch.float32, torch.bfloat16):
        evaluate(wkv, wkv_inputs(2, 5, 3, dtype=dtype), **ALL)
