"""Long sequences cut into spans: the same results, whatever the cut, in the Triton kernels.

On a CPU they run in Triton's interpreter (`TRITON_INTERPRET=1`), on a GPU as they are.
"""

import os
from collections.abc import Callable

import pytest
import torch
from tests.core.op_cases import (
    assert_all_near,
    assert_equal,
    bidirectional_ref,
    compare,
    each,
    evaluate,
    pack,
    pair_inputs,
    scan_inputs,
)
from torch import Tensor

from scanweave.core import bidirectional_selective_scan, selective_scan
from scanweave.core.ops.selective import kernels, selective_scan_ref, spans
from scanweave.core.ops.selective.kernels import CHUNK, LONG_CHUNK, chunk_of

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
Check = Callable[..., None]
ALL = {"return_final_state": True}
SPAN = CHUNK


@pytest.fixture
def device() -> str:
    """The interpreter reads and writes memory of the CPU."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[spans.Spans]:
    """Every sequence of two spans or more is cut; the cuts that were made."""
    made = []
    entering = spans.entering

    def recorded(*args: object) -> Tensor:
        made.append(next(v for v in args if isinstance(v, spans.Spans)))
        return entering(*args)

    monkeypatch.setattr(spans, "SHORTEST", SPAN)
    for module in (kernels, spans):
        monkeypatch.setattr(module, "processors", lambda _: 10**6)
    for module in ("forward_kernel", "backward"):
        monkeypatch.setattr(f"scanweave.core.ops.selective.{module}.entering", recorded)
    return made


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 2 * SPAN, 3, 3, None, False),
        (1, 2 * LONG_CHUNK + 1, 3, 1, None, True),
        (1, 3 * SPAN - 1, 5, 4, None, True),
        (2, 2 * SPAN + 7, 4, 3, 2, False),
        (1, 10 * SPAN + 3, 2, 3, None, False),  # more spans than are combined at once
    ],
    ids=str,
)
def test_spans(assert_near: Check, device: str, cuts: list, sizes: tuple):
    *shape, groups, reverse = sizes
    inputs = scan_inputs(*shape, groups=groups, dtype=torch.float32, device=device)
    compare(assert_near, selective_scan, selective_scan_ref, inputs, reverse=reverse, **ALL)
    assert [cut.steps for cut in cuts] == [chunk_of(shape[-1])[0]] * 2


@pytest.mark.parametrize("without", ["z", "initial_state", "D", "dt_bias"])
@pytest.mark.parametrize("softplus", [False, True])
def test_options(assert_near: Check, device: str, cuts: list, without: str, softplus: bool):
    inputs = scan_inputs(
        1, 2 * SPAN + 1, 3, 3, without=(without,), dtype=torch.float32, device=device
    )
    if not softplus:
        inputs["dt"] = inputs["dt"].detach().abs().requires_grad_()
    # the state's gradient is absent where nobody reads the state
    final = ALL if without in ("z", "initial_state") else {}
    options = {"dt_softplus": softplus, **final}
    compare(assert_near, selective_scan, selective_scan_ref, inputs, **options)
    assert len(cuts) == 2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [(0, 2 * SPAN, 1, 0, 0, SPAN), (2 * SPAN + 1, SPAN - 1), (3, 3 * SPAN + 2, SPAN, 0)],
    ids=str,
)
def test_packed(
    assert_near: Check, device: str, cuts: list, lengths: tuple[int, ...], reverse: bool
):
    inputs = scan_inputs(
        1, sum(lengths), 3, 3, sequences=len(lengths), dtype=torch.float32, device=device
    )
    options = {"reverse": reverse, "cu_seqlens": pack(lengths, device), **ALL}
    compare(assert_near, selective_scan, selective_scan_ref, inputs, **options)
    assert len(cuts) == 2


def test_both_directions(assert_near: Check, device: str, cuts: list):
    lengths = (SPAN + 3, 0, 2 * SPAN)
    for count in (None, len(lengths)):
        inputs = pair_inputs(
            1, sum(lengths), 3, 3, sequences=count, dtype=torch.float32, device=device
        )
        cu = None if count is None else pack(lengths, device)
        compare(
            assert_near,
            bidirectional_selective_scan,
            bidirectional_ref,
            inputs,
            cu_seqlens=cu,
            **ALL,
        )
    assert len(cuts) == 8


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half(assert_near: Check, device: str, cuts: list, half: torch.dtype):
    inputs = scan_inputs(1, 2 * SPAN + 5, 3, 3, dtype=half, weights=torch.float32, device=device)
    compare(assert_near, selective_scan, selective_scan_ref, inputs, **ALL)
    assert len(cuts) == 2


def test_cut_and_whole_agree(
    assert_near: Check, device: str, cuts: list, monkeypatch: pytest.MonkeyPatch
):
    inputs = scan_inputs(1, 4 * SPAN, 3, 3, dtype=torch.float32, device=device)
    cut = evaluate(selective_scan, inputs, **ALL)
    assert_equal(evaluate(selective_scan, inputs, **ALL), cut)
    assert len(cuts) == 4
    monkeypatch.setattr(spans, "SHORTEST", 8 * SPAN)
    assert_all_near(assert_near, evaluate(selective_scan, inputs, **ALL), cut)
    assert len(cuts) == 4


def test_slow_decay_is_carried_over_all_spans(assert_near: Check, device: str):
    """A state that never decays counts its inputs."""
    inputs = scan_inputs(1, 9 * SPAN, 2, 3, without=("z", "D"), dtype=torch.float32, device=device)
    inputs["A"] = torch.zeros_like(inputs["A"]).requires_grad_()
    actual = evaluate(selective_scan, inputs, **ALL)
    exact = evaluate(
        selective_scan_ref, each(inputs, Tensor.double), rounded_to=[torch.float32] * 2, **ALL
    )
    assert_all_near(assert_near, actual, exact)


@pytest.mark.parametrize(
    ("sizes", "groups", "state", "packed", "steps"),
    [
        ((8, 4096, 2048), 1, 16, False, 688),  # a language model's batch
        ((1, 131072, 768), 1, 16, False, 1008),
        ((1, 100_000, 192), 1, 16, True, 256),
        ((128, 197, 768), 1, 16, False, None),  # short
        ((128, 3136, 192), 1, 1, False, None),  # enough programs
        ((64, 60, 256), 1, 16, False, None),
    ],
    ids=str,
)
def test_where_sequences_are_cut(
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int, int],
    groups: int,
    state: int,
    packed: bool,
    steps: int | None,
):
    """On 132 multiprocessors."""
    monkeypatch.undo()
    monkeypatch.setattr(spans, "processors", lambda _: 132)
    x = torch.empty(sizes, device="meta")
    cut = spans.split(x, groups, state, 66 if packed else sizes[0], packed)
    assert (cut and cut.steps) == steps
    if cut:
        assert cut.steps % chunk_of(state)[0] == 0
