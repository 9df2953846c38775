"""Empty input of the ops: nothing happens, forward and backward, and every shape is right."""

import pytest
import torch
from tests.core.op_cases import conv_inputs, evaluate, flat, pack, pair_inputs, scan_inputs

from scanweave.core import (
    bidirectional_selective_scan,
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
    symmetric_conv1d,
)

pytestmark = pytest.mark.poison
DIM, STATE, WIDTH = 4, 3, 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
EMPTY = [(2, 0, 4), (0, 5, 4), (0, 0, 4), (2, 5, 0), (0, 0, 0)]


@DTYPES
@pytest.mark.parametrize("groups", [None, 1])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_scan(sizes: tuple[int, int, int], groups: int | None, dtype: torch.dtype):
    inputs = scan_inputs(*sizes, state=STATE, groups=groups, dtype=dtype)
    pairs = pair_inputs(*sizes, state=STATE, groups=groups, dtype=dtype)
    for op, given in ((selective_scan, inputs), (bidirectional_selective_scan, pairs)):
        values = evaluate(op, given, return_final_state=True)
        assert values["output 0"].shape == sizes
        assert values["output 1"].shape == (sizes[0], sizes[2], STATE)
        for name, v in flat(given).items():
            gradient = values[f"gradient of {name}"]
            assert gradient.shape == v.shape, name
            if not name.startswith("initial_state"):
                assert not gradient.any(), name
    if sizes[1] == 0:
        state = inputs["initial_state"]
        _, after = selective_scan(**inputs, return_final_state=True)
        assert torch.equal(after, state)
        assert torch.equal(torch.autograd.grad(after.sum(), state)[0], torch.ones_like(state))


@pytest.mark.parametrize("width", [1, WIDTH])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty_convolution(sizes: tuple[int, int, int], width: int):
    inputs = conv_inputs(*sizes, width=width)
    for reverse in (False, True):
        values = evaluate(causal_conv1d, inputs, reverse=reverse, return_final_state=True)
        assert values["output 0"].shape == sizes
        assert values["output 1"].shape == (sizes[0], width - 1, sizes[2])
        for name, v in inputs.items():
            assert values[f"gradient of {name}"].shape == v.shape, name
        for name in ("weight", "bias"):
            assert not values[f"gradient of {name}"].any(), name
        if sizes[1] == 0:
            assert torch.equal(values["output 1"], inputs["initial_state"])
    given = conv_inputs(*sizes, width=3, without=("initial_state",))
    values = evaluate(symmetric_conv1d, given)
    assert values["output 0"].shape == sizes
    assert not values["gradient of weight"].any()


@DTYPES
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_empty_pack(lengths: tuple[int, ...], dtype: torch.dtype):
    count, cu = len(lengths), pack(lengths)
    options = {"cu_seqlens": cu, "return_final_state": True}
    for op, draw in ((selective_scan, scan_inputs), (bidirectional_selective_scan, pair_inputs)):
        inputs = draw(1, 0, DIM, STATE, sequences=count, dtype=dtype)
        values = evaluate(op, inputs, **options)
        assert values["output 0"].shape == (1, 0, DIM)
        states = flat({"initial_state": inputs["initial_state"]}).values()
        for i, state in enumerate(states, 1):
            assert torch.equal(values[f"output {i}"], state)
        fresh = draw(1, 0, DIM, STATE, without=("initial_state",), dtype=dtype)
        after = evaluate(op, fresh, **options)["output 1"]
        assert torch.equal(after, torch.zeros(count, DIM, STATE, dtype=dtype))
    inputs = conv_inputs(1, 0, DIM, WIDTH, sequences=count, dtype=dtype)
    for reverse in (False, True):
        values = evaluate(causal_conv1d, inputs, reverse=reverse, **options)
        assert values["output 0"].shape == (1, 0, DIM)
        assert torch.equal(values["output 1"], inputs["initial_state"])
        fresh = conv_inputs(1, 0, DIM, WIDTH, without=("initial_state",), dtype=dtype)
        _, after = causal_conv1d(**fresh, reverse=reverse, **options)
        assert torch.equal(after, torch.zeros(count, WIDTH - 1, DIM, dtype=dtype))


def test_steps_of_an_empty_batch():
    given = {k: v.detach() for k, v in scan_inputs(0, 1, DIM, STATE).items()}
    state = given.pop("initial_state")
    step = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in given.items()}
    assert selective_scan_step(state, **step).shape == (0, DIM)
    given = {k: v.detach() for k, v in conv_inputs(0, 1, DIM, WIDTH).items()}
    x, state = given.pop("x")[:, 0], given.pop("initial_state")
    assert causal_conv1d_step(x, state, **given).shape == (0, DIM)
