"""Sequence attention against a softmax over the pairs that its rules allow, one token at a time."""

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.linear_cases import Check
from tests.core.op_cases import assert_all_near, evaluate, pack
from torch import Tensor

from scanweave.core.ops import attention
from scanweave.core.ops.attention import sequence_attention, visible

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BACKENDS = pytest.mark.parametrize("backend", ["dense", "flex"])
LENGTHS = (3, 0, 1, 6, 1)
RULES = [
    {},
    {"causal": True},
    {"window": 3},
    {"window": 3, "causal": True},
    {"window": 1, "causal": True},
    {"window": 2, "causal": True, "prefix": 2},
    {"window": 2, "prefix": 1},
]
EACH_RULE = pytest.mark.parametrize("rule", RULES, ids=str)


def heads(
    batch: int, queries: int, keys: int, heads: int = 4, groups: int = 2, dtype: Any = torch.float64
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=rng, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    k, v = draw(batch, keys, groups, 8), draw(batch, keys, groups, 8)
    return {"q": draw(batch, queries, heads, 8), "k": k, "v": v}


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, real: list[bool], scale: float, rule: dict[str, Any]
) -> Tensor:
    """(L, H, P) from (L, H, P) and (T, G, P): lists of what each token sees, then softmax."""
    past, rows = k.shape[0] - q.shape[0], []
    place = list(itertools.accumulate(real))
    for i in range(past, k.shape[0]):
        seen = []
        for j in range(k.shape[0]):
            near = abs(place[i] - place[j]) < (rule.get("window") or 10**9)
            ok = real[j] and (near or place[j] <= rule.get("prefix", 0))
            if rule.get("causal"):
                ok = ok and j <= i
            if ok or i == j:
                seen.append(j)
        per_group = q.shape[1] // k.shape[1]
        out = []
        for h in range(q.shape[1]):
            g = h // per_group
            weights = (scale * (k[seen, g] @ q[i - past, h])).softmax(0)
            out.append(weights @ v[seen, g])
        rows.append(torch.stack(out))
    return torch.stack(rows)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    **rule: Any,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        parts = []
        for a, b in itertools.pairwise(cu_seqlens.tolist()):
            if b > a:
                given = (q[0, a:b], k[0, a:b], v[0, a:b])
                parts.append(one_sequence(*given, [True] * (b - a), scale, rule))
        return torch.cat(parts).unsqueeze(0)
    real = torch.ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    rows = zip(q, k, v, real.tolist(), strict=True)
    return torch.stack([one_sequence(*row, scale, rule) for row in rows])


def against_reference(
    assert_near: Check, inputs: dict[str, Tensor], backend: str, **options: Any
) -> None:
    if backend == "flex":  # has no gradient on a CPU; test_ops_linear_gpu.py has it
        given = {k: v.detach() for k, v in inputs.items()}
        y = sequence_attention(**given, backend="flex", **options)
        assert_near(y, reference(**given, **options))
        return
    actual = evaluate(sequence_attention, inputs, backend=backend, **options)
    expected = evaluate(reference, inputs, **options)
    for name in ("gradient of q", "gradient of k"):
        # of one key, weights are 1 whatever the scores: nothing to be relative to
        if not expected[name].any():
            assert actual.pop(name).abs().max() < 1e-12
            del expected[name]
    assert_all_near(assert_near, actual, expected)


@EACH_RULE
@BACKENDS
@pytest.mark.parametrize("past", [0, 4])
def test_rules(assert_near: Check, past: int, backend: str, rule: dict[str, Any]):
    inputs = heads(2, 7, 7 + past)
    against_reference(assert_near, inputs, backend, **rule)


@EACH_RULE
@BACKENDS
def test_packed(assert_near: Check, backend: str, rule: dict[str, Any]):
    inputs = heads(1, sum(LENGTHS), sum(LENGTHS))
    options = {"cu_seqlens": pack(LENGTHS), **rule}
    against_reference(assert_near, inputs, backend, **options)


@EACH_RULE
@BACKENDS
def test_masked(assert_near: Check, backend: str, rule: dict[str, Any]):
    """Padding on both sides and between; keys of a cache before the queries."""
    inputs = heads(2, 7, 9)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 0, 1]]).bool()
    against_reference(assert_near, inputs, backend, mask=mask, **rule)


@pytest.mark.parametrize("groups", [1, 2, 4])
@BACKENDS
def test_groups_and_scale(assert_near: Check, backend: str, groups: int):
    inputs = heads(1, 5, 5, groups=groups)
    against_reference(assert_near, inputs, backend, causal=True, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_precision(assert_near: Check, dtype: torch.dtype):
    inputs = {k: v.detach() for k, v in heads(2, 7, 7, dtype=dtype).items()}
    y = sequence_attention(**inputs, window=3, causal=True)
    assert y.dtype == dtype
    assert_near(y, reference(**{k: v.double() for k, v in inputs.items()}, window=3, causal=True))


def test_window_as_long_as_the_sequence_is_none(assert_near: Check):
    inputs = {k: v.detach() for k, v in heads(2, 7, 7).items()}
    assert_near(sequence_attention(**inputs, window=7), sequence_attention(**inputs))


def test_visible_counts_the_present_token():
    seen = visible(6, 6, True, 3, 0, None, torch.device("cpu"))
    assert seen.sum(1).tolist() == [1, 2, 3, 3, 3, 3]
    seen = visible(6, 6, False, 2, 0, None, torch.device("cpu"))
    assert seen.sum(1).tolist() == [2, 3, 3, 3, 3, 2]


@pytest.mark.parametrize("sizes", [(2, 0, 0), (0, 4, 4)], ids=str)
def test_empty(sizes: tuple[int, int, int]):
    values = evaluate(sequence_attention, heads(*sizes), causal=True)
    assert values["output 0"].shape == (sizes[0], sizes[1], 4, 8)
    y = sequence_attention(**heads(1, 0, 0), cu_seqlens=pack((0, 0)))
    assert y.shape == (1, 0, 4, 8)


def test_compiles_to_one_graph(assert_near: Check):
    inputs = {k: v.detach() for k, v in heads(2, 7, 9).items()}
    torch._dynamo.reset()
    f = torch.compile(sequence_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for options in ({"causal": True}, {"causal": True, "window": 3, "prefix": 1}):
        assert_near(f(**inputs, **options), sequence_attention(**inputs, **options))


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"q": zeros(2, 5, 8)}, r"q must be \(B, L, H, P\), got \(2, 5, 8\)"),
    ({"k": zeros(2, 5, 4, 6)}, r"k must be \(B, T, G, P\) = \(2, 5, 4, 8\)"),
    ({"v": zeros(2, 4, 4, 8)}, r"v must be \(B, T, G, P\) = \(2, 5, 4, 8\)"),
    (
        {"k": zeros(2, 5, 3, 8), "v": zeros(2, 5, 3, 8)},
        "k must have heads that divide the 4 of q, got 3",
    ),
    ({"k": zeros(2, 4, 4, 8), "v": zeros(2, 4, 4, 8)}, "k must have at least the 5 places of q"),
    ({"window": 0}, "window must be at least 1, got 0"),
    ({"prefix": -1}, "prefix must be at least 0, got -1"),
    ({"mask": zeros(2, 5)}, r"mask must be bool \(B, T\) = \(2, 5\)"),
    ({"backend": "fast"}, "backend must be 'auto', 'dense' or 'flex', got 'fast'"),
    ({"cu_seqlens": pack((5,))}, "q and k must have batch 1 and one length with cu_seqlens"),
    (
        {"cu_seqlens": pack((5,)), "mask": torch.ones(2, 5, dtype=torch.bool)},
        "mask must be None with cu_seqlens",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[v[1] for v in ERRORS])
def test_refuses(changes: dict[str, Any], message: str):
    given = {name: zeros(2, 5, 4, 8) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message):
        sequence_attention(**given | changes)


def test_refuses_packing_that_does_not_fit():
    given = {name: zeros(1, 5, 4, 8) for name in ("q", "k", "v")}
    for cu, message in (
        (torch.zeros(2, 2), r"cu_seqlens must be a tensor \(S \+ 1,\)"),
        (torch.zeros(2), "cu_seqlens must be int32 or int64"),
        (pack((2, 2)), "cu_seqlens must start at 0 and end at the length 5"),
    ):
        with pytest.raises(ValueError, match=message):
            sequence_attention(**given, cu_seqlens=cu)


@EACH_RULE
@pytest.mark.parametrize("kind", ["plain", "past", "packed", "masked"])
def test_blocks_hold_all_that_is_seen(
    monkeypatch: pytest.MonkeyPatch, kind: str, rule: dict[str, Any]
):
    """Block by block: none that is seen is left out, and whole ones are seen as a whole."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    made: list[Any] = []
    make = attention._blocks

    def noted(*args: Any) -> Any:
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(attention, "_blocks", noted)
    queries, keys = 37, 37
    options: dict[str, Any] = {}
    if kind == "past":
        queries = 22
    elif kind == "packed":
        options["cu_seqlens"] = pack((9, 0, 1, 20, 7))
    elif kind == "masked":
        options["mask"] = torch.rand(2, keys, generator=torch.Generator().manual_seed(0)) < 0.9
    rows = 2 if kind == "masked" else 1
    inputs = {k: v.detach() for k, v in heads(rows, queries, keys).items()}
    sequence_attention(**inputs, backend="flex", **options, **rule)
    (blocks,) = made
    row, i, j = (torch.arange(n) for n in (rows, queries, keys))
    pairs = blocks.mask_mod(row[:, None, None], torch.zeros(()), i[:, None], j)
    pad = (0, -keys % 4, 0, -queries % 4)
    tiles = F.pad(pairs, pad).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
    seen = tiles.any(4).any(2)
    whole = tiles.all(4).all(2)
    size = seen.shape[-1]
    listed, full = (
        torch.stack([
            torch.zeros(size, dtype=torch.bool).index_fill(0, where[:n].long(), True)
            for where, n in zip(indices.flatten(0, 2), counts.flatten(), strict=True)
        ]).view_as(seen)
        for counts, indices in (
            (blocks.kv_num_blocks, blocks.kv_indices),
            (blocks.full_kv_num_blocks, blocks.full_kv_indices),
        )
    )  # fmt: skip
    assert not (listed & full).any()
    assert not (seen & ~(listed | full)).any()
    assert not (full & ~whole).any()
    if kind != "masked" and not rule.get("prefix"):
        assert torch.equal(listed | full, seen)
        assert torch.equal(full, whole)


def test_many_kinds_of_calls_stay_compiled(monkeypatch: pytest.MonkeyPatch):
    """More than the programs that the compiler keeps of one function: none falls back."""
    ran: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        ran.append(graph)
        return graph.forward

    monkeypatch.setattr(attention, "_compiles", lambda q: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    attention._compiled.cache_clear()
    inputs = {k: v.detach() for k, v in heads(1, 9, 9).items()}
    for window in range(1, 11):
        y = sequence_attention(**inputs, backend="flex", causal=True, window=window)
        assert len(ran) == window
        dense = sequence_attention(**inputs, backend="dense", causal=True, window=window)
        torch.testing.assert_close(y, dense)
    attention._compiled.cache_clear()
