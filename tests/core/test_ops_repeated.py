"""One tensor as several inputs of an op: compiled to one graph, it is what it is uncompiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import assert_all_near, evaluate
from torch import Tensor

from scanweave.core import (
    bidirectional_gated_linear_scan,
    bidirectional_selective_scan,
    causal_conv1d,
    diagonal_ssm,
    fft_conv,
    gated_linear_scan,
    grid_paths,
    linear_scan,
    path_selective_scan,
    rms_norm_gated,
    rotate_both,
    selective_scan,
    sequence_attention,
    ssd,
    wkv,
)
from scanweave.core.ops.dense import dense_ssm
from scanweave.core.ops.inputs import told_apart
from scanweave.core.ops.mamba.op import mamba_block

PATHS = grid_paths(1, 5, "bidirectional")


def block(x: Tensor, w: Tensor, A: Tensor, taps: Tensor, one: Tensor) -> Tensor:
    """Both directions of a Mamba block on one set of weights."""
    out, ways = w[:4], [False, True]
    into, dt = [w[:7], w[:7]], [taps[:, :1], taps[:, :1]]
    taps2, ones, rates = [taps, taps], [one, one], [A, A]
    return mamba_block(x, w, None, taps2, ones, into, dt, rates, ones, ones, out, None, None, ways)


# every function with the shapes of what it is given; a minus: below zero
CASES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "selective_scan": (
        lambda x, A, B, D: selective_scan(x, x, A, B, B, D, x, D, return_final_state=True),
        ["2 5 4", "-4 3", "2 5 2 3", "4"],
    ),
    "bidirectional_selective_scan": (
        lambda x, dt, A, B, C: bidirectional_selective_scan(
            (x, x), (dt, dt), (A, A), (B, B), (C, C)
        ),
        ["2 5 4", "2 5 4", "-4 3", "2 5 2 3", "2 5 2 3"],
    ),
    "path_selective_scan": (
        lambda x, dt, A, B, D: path_selective_scan(x, dt, A, B, B, D, x, D, paths=PATHS),
        ["2 5 4", "2 5 2 4", "-2 4 3", "2 5 2 1 3", "2 4"],
    ),
    "mamba_block": (block, ["2 5 4", "8 4", "-4 3", "4 3", "4"]),
    "causal_conv1d": (lambda x, w: causal_conv1d(x, w, initial_state=x), ["2 3 4", "4 4"]),
    "gated_linear_scan": (lambda x: gated_linear_scan(x, x, x), ["2 5 4 3"]),
    "bidirectional_gated_linear_scan": (
        lambda x, v, g: bidirectional_gated_linear_scan((x, x), (x, x), v, (g, g), (g, g)),
        ["2 5 4 6", "2 5 4 3", "-2 5 4"],
    ),
    "ssd": (lambda x, A, dt: ssd(x, dt, A, x, x, A, A), ["2 5 4 3", "-4", "2 5 4"]),
    "linear_scan": (lambda x: linear_scan(x, x, return_final_state=True), ["-2 5 4"]),
    "wkv": (lambda k, w: wkv(k, k, w, w, return_final_state=True), ["2 5 4", "-4"]),
    "rms_norm_gated": (lambda x, w: rms_norm_gated(x, w, x), ["2 5 4", "4"]),
    "rotate_both": (lambda x, a: rotate_both(x, x, a), ["2 5 4 6", "5 1 3"]),
    "fft_conv": (
        lambda x, kernel: fft_conv(x, kernel, None, x, kernel_back=kernel),
        ["2 5 4", "4 5"],
    ),
    "diagonal_ssm": (lambda x, A: diagonal_ssm(x, A, A, A), ["2 5 4", "-4 3"]),
    "dense_ssm": (lambda x, C: dense_ssm(x, C, C[:, 0], C)[0], ["2 5 4", "-4 3 3"]),
    "sequence_attention": (lambda x: sequence_attention(x, x, x), ["2 5 4 3"]),
}


def draw(shape: str) -> Tensor:
    v = torch.randn([int(n) for n in shape.removeprefix("-").split()], dtype=torch.float64)
    return (-0.3 * v.abs() if shape.startswith("-") else v).requires_grad_()


@pytest.mark.parametrize("case", CASES)
def test_compiles_with_repeated_tensors(assert_near: Callable[..., None], case: str):
    function, shapes = CASES[case]
    inputs = {f"v{i}": draw(shape) for i, shape in enumerate(shapes)}

    def run(**given: Tensor) -> Any:
        return function(*given.values())

    expected = evaluate(run, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=False)
    # gradients are added in another order
    assert_all_near(assert_near, evaluate(compiled, inputs), expected)


def test_nothing_is_done_without_a_compiler():
    x = torch.zeros(3)
    found = told_apart([x, None, x])
    assert found[0] is x
    assert found[1] is None
    assert found[2] is x
