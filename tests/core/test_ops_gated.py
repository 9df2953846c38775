"""The matrix-state scan on a CPU: against its definition, and the laws that it keeps."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import (
    KINDS,
    bidirectional_gated_ref,
    gated_inputs,
    gated_pairs,
    pieces,
)
from tests.core.op_cases import (
    LAYOUTS,
    LENGTHS,
    assert_all_near,
    assert_equal,
    compare,
    each,
    evaluate,
    pack,
)
from torch import Tensor

from scanweave.core import (
    bidirectional_gated_linear_scan,
    gated_linear_attention,
    gated_linear_scan,
    gated_linear_scan_step,
    ssd,
)
from scanweave.core.ops.gated import compiled, gated_linear_scan_ref, portable

pytestmark = pytest.mark.poison
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
OPTIONAL = ("g", "write", "skip", "initial_state")
FORMS = pytest.mark.parametrize("form", ["add", "exclusive", "quasi_separable"])
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=[3, 64])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks shorter and longer than the sequences, in blocks of one step and of all."""
    monkeypatch.setattr(portable, "CHUNK", request.param)
    monkeypatch.setattr(portable, "VECTOR_CHUNK", request.param)
    monkeypatch.setattr(portable, "BLOCK_ELEMENTS", 1 if request.param == 3 else 1 << 22)
    return request.param


@EACH_KIND
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1, 1), (2, 11, 4, 3, 5, 2), (1, 3, 2, 4, 2, 1), (2, 9, 3, 2, 3, 3)],
    ids=str,
)
def test_equals_the_definition(
    assert_near: Check, chunk: int, sizes: tuple, exclusive: bool, kind: str
):
    *shape, groups = sizes
    inputs = gated_inputs(*shape, groups=groups, kind=kind)
    if exclusive:
        inputs["bonus"] = torch.randn(shape[2], shape[3], dtype=torch.float64, requires_grad=True)
    for reverse in (False, True):
        options = {"exclusive": exclusive, "reverse": reverse, **ALL}
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("steep", [-300.0, -1e30, -math.inf])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_steep_decays_take_no_digits(
    assert_near: Check, monkeypatch: pytest.MonkeyPatch, kind: str, exclusive: bool, steep: float
):
    """What is kept after a steep step is as exact as what was before it."""
    monkeypatch.setattr(compiled, "takes", lambda *_: False)
    inputs = gated_inputs(2, 40, 2, 3, 4, kind=kind, dtype=torch.float32)
    g = inputs["g"].detach().clone()
    g[:, 3::9] = steep
    inputs["g"] = g.requires_grad_()
    options = {"exclusive": exclusive, **ALL}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@pytest.mark.parametrize("without", [OPTIONAL, ("write", "skip"), ("initial_state",)], ids=str)
def test_options(assert_near: Check, without: tuple[str, ...]):
    inputs = gated_inputs(2, 7, 2, 3, 4, without=without)
    for final in ({}, ALL):
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **final)
    per_head = inputs | {"skip": torch.randn(2, dtype=torch.float64, requires_grad=True)}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, per_head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_other_dtypes(assert_near: Check, kind: str, dtype: torch.dtype):
    inputs = gated_inputs(2, 40, 2, 8, 8, kind=kind, dtype=dtype, weights=torch.float32)
    actual = compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **ALL)
    assert actual["output 0"].dtype == dtype
    assert actual["output 1"].dtype == torch.float32


@EACH_KIND
@pytest.mark.parametrize("reverse", [False, True])
def test_packed(assert_near: Check, chunk: int, reverse: bool, kind: str):
    for lengths in (LENGTHS, (0, 11), (1,) * 11):
        inputs = gated_inputs(1, 11, 4, 3, 2, groups=2, kind=kind, sequences=len(lengths))
        options = {"cu_seqlens": pack(lengths), "reverse": reverse, **ALL}
        compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


@FORMS
@pytest.mark.parametrize("kind", ["none", "tokens", "all"])
@pytest.mark.parametrize("packed", [False, True])
def test_both_directions(assert_near: Check, chunk: int, packed: bool, kind: str, form: str):
    shape = (1 if packed else 2, 11, 4, 3, 2)
    without = ("initial_state",) if form == "quasi_separable" else ()
    inputs = gated_pairs(
        *shape, groups=2, kind=kind, sequences=5 if packed else None, without=without
    )
    options = {"form": form, "cu_seqlens": pack(LENGTHS) if packed else None}
    final = {} if without else ALL
    compare(
        assert_near,
        bidirectional_gated_linear_scan,
        bidirectional_gated_ref,
        inputs,
        **options,
        **final,
    )


@FORMS
def test_packed_directions_are_separate(assert_near: Check, form: str):
    inputs = gated_pairs(1, 11, 4, 3, 2, groups=2, without=("initial_state",))
    packed = bidirectional_gated_linear_scan(**inputs, form=form, cu_seqlens=pack(LENGTHS))
    start = 0
    for length in LENGTHS:
        part: dict[str, Any] = {}
        for name, v in inputs.items():
            rows = slice(start, start + length)
            part[name] = v[:, rows] if isinstance(v, Tensor) else (v[0][:, rows], v[1][:, rows])
        separate = bidirectional_gated_linear_scan(**part, form=form)
        assert_near(packed[:, start : start + length], separate)
        start += length


def test_quasi_separable_weighs_a_token_by_skip_alone():
    inputs = gated_pairs(1, 5, 1, 3, 2, without=("initial_state",))
    v = inputs["v"]
    y = bidirectional_gated_linear_scan(**inputs, form="quasi_separable")
    for t in range(5):
        (g,) = torch.autograd.grad(y[0, t, 0, 0], v, retain_graph=True)
        torch.testing.assert_close(g[0, t, 0, 0], inputs["skip"][0, t, 0].detach())
        assert g[0, :, 0, 0].all()


@EACH_KIND
def test_pieces_are_the_whole(assert_near: Check, chunk: int, kind: str):
    inputs = gated_inputs(2, 13, 2, 3, 4, kind=kind)

    def cut(*places: int) -> dict[str, Tensor]:
        return evaluate(lambda **kw: pieces(gated_linear_scan, kw, places), inputs)

    whole = evaluate(gated_linear_scan, inputs, **ALL)
    for places in ((1, 2, 3), (5,), (0, 7, 7, 12)):
        assert_all_near(assert_near, cut(*places), whole)


@pytest.mark.parametrize("exclusive", [False, True])
@EACH_KIND
def test_steps_are_the_whole(assert_near: Check, kind: str, exclusive: bool):
    inputs = {k: v.detach() for k, v in gated_inputs(2, 6, 4, 3, 5, groups=2, kind=kind).items()}
    whole, last = gated_linear_scan(**inputs, exclusive=exclusive, **ALL)
    state = inputs.pop("initial_state").clone()
    if kind in ("heads", "channels"):
        inputs["g"] = inputs["g"].expand(2, 6, *inputs["g"].shape)
    for t in range(6):
        token = {name: v[:, t] for name, v in inputs.items()}
        assert_near(gated_linear_scan_step(state, **token, exclusive=exclusive), whole[:, t])
    assert_near(state, last)


def test_chunks_change_nothing(assert_near: Check, monkeypatch: pytest.MonkeyPatch):
    for kind in ("tokens", "all"):
        inputs = gated_inputs(2, 50, 2, 3, 4, kind=kind)
        exact = evaluate(gated_linear_scan_ref, inputs, **ALL)
        for size in (1, 2, 7, 16, 50, 64):
            monkeypatch.setattr(portable, "CHUNK", size)
            monkeypatch.setattr(portable, "VECTOR_CHUNK", size)
            assert_all_near(assert_near, evaluate(gated_linear_scan, inputs, **ALL), exact)


@pytest.mark.parametrize("kind", ["tokens", "all"])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-6, 30.0, 1e4, 1e30])
def test_extreme_decays(assert_near: Check, decay: float, exclusive: bool, kind: str):
    """No overflow, no NaN, and gradients as exact as anywhere, where memory is long or none."""
    inputs = gated_inputs(1, 100, 2, 4, 3, kind=kind, dtype=torch.float32)
    # from half to one and a half: no step is much milder than the others
    inputs["g"] = (decay * (inputs["g"].detach() - 0.5)).requires_grad_()
    options = {"exclusive": exclusive, **ALL}
    compare(assert_near, gated_linear_scan, gated_linear_scan_ref, inputs, **options)


def test_bad_values_stay_in_their_sequence():
    inputs = gated_inputs(1, 11, 2, 3, 2, sequences=5)
    cu = pack(LENGTHS)
    clean = evaluate(gated_linear_scan, inputs, cu_seqlens=cu, **ALL)
    for bad in (math.nan, math.inf):
        for name in ("q", "k", "v", "g", "write"):
            spoiled = inputs[name].detach().clone()
            spoiled[0, 5] = bad
            given = inputs | {name: spoiled.requires_grad_()}
            actual = evaluate(gated_linear_scan, given, cu_seqlens=cu, **ALL)
            for key, v in actual.items():
                states = key in ("output 1", "gradient of initial_state")
                keep = [0, 1, 2, 4] if states else [0, 1, 2, 3, 10]
                rows, expected = (v, clean[key]) if states else (v[0], clean[key][0])
                assert torch.equal(rows[keep], expected[keep]), (name, key)
            assert not torch.isfinite(actual["output 0"][0, 5]).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(layout: Callable[[Tensor], Tensor]):
    inputs = gated_inputs(2, 9, 2, 3, 4)
    expected = evaluate(gated_linear_scan, inputs, **ALL)
    assert_equal(evaluate(gated_linear_scan, each(inputs, layout), **ALL), expected)


@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 4), (2, 0, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_empty(shape: tuple[int, ...], kind: str):
    inputs = gated_inputs(*shape, kind=kind)
    values = evaluate(gated_linear_scan, inputs, **ALL)
    assert values["output 0"].shape == inputs["v"].shape
    assert torch.equal(values["output 1"], inputs["initial_state"].detach())
    for name, v in inputs.items():
        assert values[f"gradient of {name}"].shape == v.shape
    nobody = gated_inputs(1, 0, 2, 3, 4, sequences=0)
    out, state = gated_linear_scan(**nobody, cu_seqlens=pack(()), **ALL)
    assert out.shape == (1, 0, 2, 4)
    assert state.shape == (0, 2, 3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(chunk: int, kind: str):
    for exclusive in (False, True):
        inputs = gated_inputs(1, 5, 2, 2, 3, groups=1, kind=kind)
        names = list(inputs)

        def f(*values: Tensor, exclusive: bool = exclusive, names: list[str] = names) -> Any:
            given = dict(zip(names, values, strict=True))
            return gated_linear_scan(**given, exclusive=exclusive, **ALL)

        assert torch.autograd.gradcheck(f, tuple(inputs.values()))


def test_ssd_is_the_scan_under_other_names(assert_near: Check):
    x, B, C = (torch.randn(2, 9, *s, dtype=torch.float64) for s in ((4, 5), (2, 3), (2, 3)))
    dt, A = torch.randn(2, 9, 4, dtype=torch.float64), -torch.rand(4, dtype=torch.float64)
    D, bias = torch.randn(2, 4, dtype=torch.float64)
    h0 = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    for limit in ((0.0, math.inf), (0.2, 0.7)):
        delta = torch.nn.functional.softplus(dt + bias).clamp(*limit)
        y, last = ssd(x, dt, A, B, C, D, bias, dt_limit=limit, initial_state=h0, **ALL)
        h, heads = h0, torch.arange(4) // 2
        for t in range(9):
            kept = torch.exp(delta[:, t] * A)[..., None, None] * h
            written = torch.einsum("bhn,bhp,bh->bhnp", B[:, t, heads], x[:, t], delta[:, t])
            h = kept + written
            read = torch.einsum("bhn,bhnp->bhp", C[:, t, heads], h)
            assert_near(y[:, t], read + D[:, None] * x[:, t])
        assert_near(last, h)
    raw = ssd(x, dt.abs(), A, B, C, dt_softplus=False)
    assert_near(raw, gated_linear_scan(C, B, x, dt.abs() * A, dt.abs()))


def test_attention_scales_and_reads_as_its_kin(assert_near: Check):
    inputs = gated_inputs(2, 9, 2, 4, 3, kind="all", without=("write", "skip"))
    bonus = torch.randn(2, 4, dtype=torch.float64)
    y = gated_linear_attention(**inputs)
    assert_near(y, gated_linear_scan(**inputs | {"q": inputs["q"] / 2}))
    y = gated_linear_attention(**inputs, scale=1.0, bonus=bonus)
    assert_near(y, gated_linear_scan_ref(**inputs, exclusive=True, bonus=bonus))
