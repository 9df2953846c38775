"""The exponentially weighted average on a CPU: against the definition, and its laws."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.linear_cases import Check, compare, near, scaled_state, wkv_inputs
from tests.core.op_cases import evaluate, pack
from torch import Tensor

from scanweave.core.ops.wkv import wkv, wkv_ref, wkv_step

pytestmark = pytest.mark.poison
ALL: dict[str, Any] = {"return_final_state": True}
BOTH = pytest.mark.parametrize("op", [wkv, wkv_ref])
REVERSE = pytest.mark.parametrize("reverse", [False, True])
CONSTANT = pytest.mark.parametrize("constant", [False, True])
WITHOUT = pytest.mark.parametrize(
    "without", [(), ("bonus",), ("initial_state",), ("bonus", "initial_state")], ids=str
)
TOKENS = ("k", "v", "log_decay")


@BOTH
@pytest.mark.parametrize("bonus", [False, True])
def test_equals_its_matrix_of_weights(assert_near: Check, op: Callable[..., Tensor], bonus: bool):
    """Rows of exp(k[s] + decays) over their sum, as a softmax of all pairs."""
    given = wkv_inputs(2, 12, 3, without=("initial_state",))
    k, v, w, u = (t.detach() for t in given.values())
    t = torch.arange(12)
    steps = t.unsqueeze(1) - t  # (t, s)
    if bonus:
        score = k.unsqueeze(1) + (steps - 1).unsqueeze(-1) * w
        score = torch.where((steps == 0).unsqueeze(-1), u + k.unsqueeze(1), score)
    else:
        score = k.unsqueeze(1) + steps.unsqueeze(-1) * w
    score = score.masked_fill((steps < 0).unsqueeze(-1), float("-inf"))
    expected = (score.softmax(2) * v.unsqueeze(1)).sum(2)
    assert_near(op(k, v, w, u if bonus else None), expected)


@CONSTANT
@REVERSE
@WITHOUT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_definition(
    assert_near: Check,
    dtype: torch.dtype,
    without: tuple[str, ...],
    reverse: bool,
    constant: bool,
):
    inputs = wkv_inputs(2, 19, 3, constant=constant, without=without, dtype=dtype)
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, reverse=reverse)


@CONSTANT
@REVERSE
@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
def test_packed_is_separate(
    assert_near: Check, without: tuple[str, ...], reverse: bool, constant: bool
):
    lengths = (3, 0, 1, 6, 1)
    inputs = wkv_inputs(
        1, sum(lengths), 3, constant=constant, without=without, sequences=len(lengths)
    )
    cu = pack(lengths)

    def separate(initial_state: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        out, states = [], []
        for i, span in enumerate(itertools.pairwise(cu.tolist())):
            part = {
                n: t[:, slice(*span)] if n in TOKENS and t.ndim == 3 else t for n, t in kw.items()
            }
            options = {"initial_state": initial_state[i : i + 1], "reverse": reverse}
            y, state = wkv(**part, **options, **ALL)
            out.append(y)
            states.append(state)
        return torch.cat(out, 1), torch.cat(states)

    def run(**kw: Any) -> tuple[Tensor, Tensor]:
        return wkv(**kw, cu_seqlens=cu, reverse=reverse, **ALL)

    packed, apart = (evaluate(lambda f=f, **kw: _read(*f(**kw)), inputs) for f in (run, separate))
    near(assert_near, packed, apart)


def _read(y: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and the final sums on a scale that is not differentiated."""
    n, d, m = state.unbind(1)
    scale = torch.exp(m.detach().clamp(-30, 30))
    return y, torch.stack([n * scale, d * scale], 1)


@REVERSE
@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
@pytest.mark.parametrize("cuts", [(4,), (1, 1, 9), (0, 18)])
def test_pieces_with_states_are_the_whole(
    assert_near: Check, cuts: tuple[int, ...], without: tuple[str, ...], reverse: bool
):
    inputs = wkv_inputs(2, 19, 3, constant=False, without=without)

    def in_pieces(initial_state: Tensor, **kw: Any) -> tuple[Tensor, Tensor]:
        spans = [slice(*v) for v in itertools.pairwise([0, *cuts, 19])]
        state, out = initial_state, []
        for span in reversed(spans) if reverse else spans:
            part = {n: t[:, span] if n in TOKENS else t for n, t in kw.items()}
            y, state = wkv(**part, initial_state=state, reverse=reverse, **ALL)
            out.append(y)
        return _read(torch.cat(out[::-1] if reverse else out, 1), state)

    whole = evaluate(scaled_state(wkv), inputs, reverse=reverse)
    near(assert_near, evaluate(in_pieces, inputs), whole)


@WITHOUT
@CONSTANT
def test_steps_are_the_whole(assert_near: Check, constant: bool, without: tuple[str, ...]):
    given = wkv_inputs(2, 9, 3, constant=constant, without=without, dtype=torch.float32)
    inputs = {n: t.detach() for n, t in given.items()}
    y, final = wkv(**inputs, **ALL)
    state = inputs.pop("initial_state", None)
    if state is None:
        state = torch.zeros_like(final)
        state[:, 2] = float("-inf")
    state = state.clone()
    steps = []
    for t in range(9):
        token = {n: v[:, t] if v.ndim == 3 else v for n, v in inputs.items()}
        steps.append(wkv_step(state, **token))
    assert_near(torch.stack(steps, 1), y)
    assert_near(state, final)


@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_no_overflow(assert_near: Check, without: tuple[str, ...], dtype: torch.dtype):
    inputs = wkv_inputs(2, 30, 3, scale=300.0, without=without, dtype=dtype)
    # 300 in float32 is exact to 3e-5, and so are weights
    factor = 1 if dtype == torch.float64 else 20
    compare(assert_near, scaled_state(wkv), scaled_state(wkv_ref), inputs, factor=factor)


def test_long_memory(assert_near: Check):
    """A plain average of 3000 tokens, none of which fades."""
    v = torch.randn(1, 3000, 2)
    y = wkv(torch.full_like(v, 80.0), v, torch.zeros(2))
    count = torch.arange(1, 3001, dtype=torch.float64).unsqueeze(1)
    assert_near(y, v.double().cumsum(1) / count)


@pytest.mark.parametrize("bonus", [False, True])
def test_infinite_weights_are_absent_tokens(assert_near: Check, bonus: bool):
    given = wkv_inputs(1, 8, 2, without=("initial_state",) if bonus else ("initial_state", "bonus"))
    k = given["k"].detach().clone()
    k[:, [0, 1, 4]] = float("-inf")
    inputs = given | {"k": k.requires_grad_(), "log_decay": torch.zeros(2, dtype=k.dtype)}
    inputs["log_decay"].requires_grad_()
    values = evaluate(wkv, inputs)
    assert not values["output 0"][:, :2].any()
    kept = [2, 3, 5, 6, 7]
    few = {n: t.detach()[:, kept] if n in ("k", "v") else t.detach() for n, t in inputs.items()}
    assert_near(values["output 0"][:, kept], wkv(**few))
    for name, v in values.items():
        assert torch.isfinite(v).all(), name


@pytest.mark.parametrize("without", [(), ("bonus",)], ids=str)
def test_gradcheck(without: tuple[str, ...]):
    inputs = wkv_inputs(2, 4, 2, constant=False, without=without)
    names = list(inputs)

    def f(*tensors: Tensor) -> tuple[Tensor, ...]:
        return _scaled(**dict(zip(names, tensors, strict=True)))

    # the gradient leaves the scale m of the final state out, so the state is read without it
    def _scaled(**kw: Any) -> tuple[Tensor, ...]:
        y, state = wkv(**kw, **ALL)
        n, d, _ = state.unbind(1)
        return y, n / d

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))


@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int]):
    inputs = wkv_inputs(*sizes)
    values = evaluate(wkv, inputs, **ALL)
    assert values["output 0"].shape == sizes
    assert not values["gradient of log_decay"].any()
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], inputs["initial_state"])


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"k": zeros(2, 4)}, r"k must be \(B, L, D\), got \(2, 4\)"),
    ({"v": zeros(2, 5, 3)}, r"v must be \(B, L, D\) = \(2, 5, 4\)"),
    ({"log_decay": zeros(3)}, r"log_decay must be \(D,\) = \(4,\)"),
    ({"log_decay": zeros(2, 4)}, r"log_decay must be \(D,\) or \(B, L, D\) = \(2, 5, 4\)"),
    ({"bonus": zeros(3)}, r"bonus must be \(D,\) = \(4,\)"),
    ({"initial_state": zeros(2, 4)}, r"initial_state must be \(B, 3, D\) = \(2, 3, 4\)"),
    ({"cu_seqlens": pack((5,))}, "x must have batch 1 with cu_seqlens"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[v[1] for v in ERRORS])
def test_refuses(changes: dict[str, Any], message: str):
    given = {"k": zeros(2, 5, 4), "v": zeros(2, 5, 4), "log_decay": zeros(4)}
    with pytest.raises(ValueError, match=message):
        wkv(**given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": zeros(4)}, r"k must be \(B, D\), got \(4,\)"),
        ({"state": zeros(2, 4)}, r"state must be \(B, 3, D\) = \(2, 3, 4\)"),
        ({"state": zeros(2, 3, 4, dtype=torch.bfloat16)}, "state must be torch.float32 for these"),
    ],
    ids=str,
)
def test_step_refuses(changes: dict[str, Any], message: str):
    given = {"state": zeros(2, 3, 4), "k": zeros(2, 4), "v": zeros(2, 4), "log_decay": zeros(4)}
    with pytest.raises(ValueError, match=message):
        wkv_step(**given | changes)
