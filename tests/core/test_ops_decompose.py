"""Exported programs whose registered ops became PyTorch's own: same outputs, same gradients."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from scanweave import core
from scanweave.core import (
    bidirectional_gated_linear_scan,
    bidirectional_selective_scan,
    causal_conv1d,
    decompositions,
    gated_linear_scan,
    grid_paths,
    linear_scan,
    path_selective_scan,
    rms_norm_gated,
    rotate_both,
    selective_scan,
    symmetric_conv1d,
    wkv,
)
from scanweave.core.ops.dense import dense_ssm

BATCH, LENGTH, DIM, STATE = 2, 11, 4, 3


class Call(nn.Module):
    """A function of tensors as a module, for `torch.export`."""

    def __init__(self, function: Callable[..., Any], settings: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self.function(**inputs, **self.settings)


def draw(*shape: int, at_most: float | None = None) -> Tensor:
    v = torch.randn(*shape, dtype=torch.float64)
    return (v if at_most is None else at_most - v.abs()).requires_grad_()


def scan(length: int = LENGTH, groups: int = 1, bare: bool = False) -> dict[str, Tensor]:
    rows = (BATCH, length, DIM)
    names = {
        **{"x": draw(*rows), "dt": draw(*rows), "A": draw(DIM, STATE, at_most=-0.1)},
        **{n: draw(BATCH, length, groups, STATE) for n in "BC"},
    }
    if bare:
        return names
    extra = {"D": draw(DIM), "z": draw(*rows), "dt_bias": draw(DIM)}
    return {**names, **extra, "initial_state": draw(BATCH, DIM, STATE)}


def pairs(inputs: dict[str, Tensor], other: dict[str, Tensor], *shared: str) -> dict[str, Any]:
    return {n: v if n in shared else (v, other[n]) for n, v in inputs.items()}


def paths(bare: bool = False) -> dict[str, Any]:
    one, order = scan(12, bare=bare), grid_paths(3, 4, "cross")
    assert order.shape[0] == 4
    for name in ("dt", "B", "C"):
        one[name] = torch.stack([draw(*one[name].squeeze(2).shape) for _ in range(4)], 2)
    for name in ("A", "D", "dt_bias", "initial_state"):
        if name in one:
            bound = -0.1 if name == "A" else None
            one[name] = draw(4, *one[name].shape, at_most=bound)
    return {n: v.detach().requires_grad_() for n, v in one.items()} | {"paths": order}


def gated(
    length: int = LENGTH, vector: bool = False, groups: int = 2, bare: bool = False
) -> dict[str, Tensor]:
    heads, keys, width = 4, 3, 5
    names = {
        **{n: draw(BATCH, length, groups, keys) for n in "qk"},
        "v": draw(BATCH, length, heads, width),
    }
    if bare:
        return names
    shape = (BATCH, length, heads, *((keys,) if vector else ()))
    extra = {"g": draw(*shape, at_most=0), "write": draw(BATCH, length, heads)}
    return {**names, **extra, "initial_state": draw(BATCH, heads, keys, width)}


def conv(width: int = 4, state: bool = False, bias: bool = True) -> dict[str, Tensor]:
    names = {"x": draw(BATCH, LENGTH, DIM), "weight": draw(DIM, width)}
    names |= {"bias": draw(DIM)} if bias else {}
    return names | ({"initial_state": draw(BATCH, width - 1, DIM)} if state else {})


def average(bare: bool = False) -> dict[str, Tensor]:
    rows = (BATCH, LENGTH, DIM)
    names = {"k": draw(*rows), "v": draw(*rows), "log_decay": draw(DIM, at_most=0)}
    return names if bare else {**names, "bonus": draw(DIM)}


def after_average(reverse: bool = False) -> dict[str, Tensor]:
    """With the state that other tokens left, as a state may not be any three numbers."""
    _, state = wkv(**average(), reverse=reverse, return_final_state=True)
    return {**average(bare=True), "initial_state": state.detach().requires_grad_()}


def dense(length: int = LENGTH) -> dict[str, Tensor]:
    E = 0.3 * torch.randn(DIM, STATE, STATE, dtype=torch.float64) - torch.eye(STATE)
    names = {"x": draw(BATCH, length, DIM), "E": E.requires_grad_(), "B": draw(DIM, STATE)}
    return {**names, "C": draw(DIM, 2, STATE), "initial_state": draw(BATCH, DIM, STATE)}


def rotation() -> dict[str, Tensor]:
    heads = {"q": draw(BATCH, LENGTH, 4, 6), "k": draw(BATCH, LENGTH, 2, 6)}
    return {**heads, "angles": draw(LENGTH, 1, 2)}


FINAL = {"return_final_state": True}
REVERSE = {"reverse": True, **FINAL}
CASES: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "scan": (selective_scan, scan, FINAL),
    "scan, one token": (selective_scan, lambda: scan(1), FINAL),
    "scan, bare": (selective_scan, lambda: scan(bare=True), {"dt_softplus": False}),
    "scan, reverse, groups": (selective_scan, lambda: scan(groups=2), REVERSE),
    "both directions": (
        bidirectional_selective_scan,
        lambda: pairs(scan(), scan(), "z"),
        FINAL,
    ),
    "paths": (path_selective_scan, paths, FINAL),
    "paths, some reverse": (
        path_selective_scan,
        lambda: paths(bare=True),
        {"reverse": (False, True, True, False)},
    ),
    "gated": (gated_linear_scan, gated, FINAL),
    "gated, chunks": (gated_linear_scan, lambda: gated(150), FINAL),
    "gated, chunks, reverse, exclusive": (
        gated_linear_scan,
        lambda: gated(150),
        {"exclusive": True, **REVERSE},
    ),
    "gated, bare": (gated_linear_scan, lambda: gated(bare=True, groups=4), {}),
    "gated, decay a channel": (gated_linear_scan, lambda: gated(vector=True), REVERSE),
    "gated, decay a channel, exclusive": (
        gated_linear_scan,
        lambda: gated(vector=True),
        {"exclusive": True, **FINAL},
    ),
    "gated, decay a channel, exclusive, no state": (
        gated_linear_scan,
        lambda: {n: v for n, v in gated(vector=True).items() if n != "initial_state"},
        {"exclusive": True},
    ),
    "quasi-separable": (
        bidirectional_gated_linear_scan,
        lambda: {
            **pairs(gated(70, bare=True), gated(70, bare=True), "v"),
            "g": (draw(BATCH, 70, 4, at_most=0), draw(BATCH, 70, 4, at_most=0)),
            "skip": draw(4),
        },
        {"form": "quasi_separable"},
    ),
    "convolution": (causal_conv1d, conv, {"activation": "silu"}),
    "convolution, state": (causal_conv1d, lambda: conv(state=True), FINAL),
    "convolution, reverse": (causal_conv1d, lambda: conv(bias=False), {"reverse": True}),
    "convolution, reverse, state": (causal_conv1d, lambda: conv(state=True), REVERSE),
    "convolution, centred": (symmetric_conv1d, lambda: conv(3), {"activation": "silu"}),
    "linear": (
        linear_scan,
        lambda: {
            **{"x": draw(BATCH, LENGTH, DIM), "log_a": draw(BATCH, LENGTH, DIM, at_most=0)},
            "initial_state": draw(BATCH, DIM),
        },
        FINAL,
    ),
    "linear, constant, reverse": (
        linear_scan,
        lambda: {"x": draw(BATCH, LENGTH, DIM), "log_a": draw(DIM, at_most=0)},
        REVERSE,
    ),
    "average": (wkv, lambda: average(bare=True), FINAL),
    "average, bonus, reverse": (wkv, average, REVERSE),
    "average, state": (wkv, after_average, FINAL),
    "average, state, reverse": (wkv, lambda: after_average(reverse=True), REVERSE),
    "dense": (dense_ssm, lambda: dense(150), FINAL),
    "dense, one chunk, exclusive, reverse": (dense_ssm, dense, {"exclusive": True, **REVERSE}),
    "norm": (
        rms_norm_gated,
        lambda: {"x": draw(3, 8), "weight": draw(8), "z": draw(3, 8)},
        {"group_size": 4},
    ),
    "norm before gate": (
        rms_norm_gated,
        lambda: {"x": draw(3, 8), "weight": draw(8), "z": draw(3, 8)},
        {"norm_before_gate": True},
    ),
    "rotation": (rotate_both, rotation, {}),
    "rotation, halves": (rotate_both, rotation, {"halves": True}),
}


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    values = torch.utils._pytree.tree_leaves(inputs)
    return [v for v in values if v.is_floating_point()]


def registered(graph: torch.fx.Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes if "scanweave" in str(n.target)}


def decomposed(model: nn.Module, inputs: dict[str, Any]) -> Callable[..., Any]:
    """What `run_decompositions` makes of an exported program, without the cost of exporting it."""
    module = make_fx(model, decomposition_table=decompositions())(inputs)
    assert not registered(module.graph)
    return module


def test_every_registered_op_is_replaced() -> None:
    """All but the steps, which change a state in place, and the backward ops."""
    # by the sources: other tests may have registered ops of the domains in this process
    folder = Path(core.__file__).parent
    sources = "".join(p.read_text(encoding="utf-8") for p in folder.rglob("*.py"))
    names = {f"scanweave::{n}" for n in re.findall(r'\.define\(\s*f?"(\w+)\(', sources)}
    assert names <= set(torch._C._dispatch_get_all_op_names())
    forward = {n for n in names if not n.endswith(("_step", "_backward"))}
    assert len(forward) >= 7
    assert {op.name().removesuffix(".default") for op in decompositions()} == forward


@pytest.mark.parametrize("case", CASES)
def test_same_outputs_and_gradients(case: str, assert_near: Callable[..., None]) -> None:
    function, make, settings = CASES[case]
    inputs = make()
    model = Call(function, settings)
    program = decomposed(model, inputs)

    def run(module: Callable[..., Any]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        outputs = torch.utils._pytree.tree_leaves(module(inputs))
        torch.manual_seed(1)
        loss = sum((v * torch.randn_like(v)).sum() for v in outputs)
        return outputs, torch.autograd.grad(loss, leaves(inputs))

    outputs, gradients = run(program)
    expected, expected_gradients = run(model)
    for actual, value in zip(outputs, expected, strict=True):
        assert_near(actual, value)
    for actual, value in zip(gradients, expected_gradients, strict=True):
        assert_near(actual, value, gradient=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["scan", "paths", "gated, chunks", "linear", "convolution"])
def test_dtypes(case: str, dtype: torch.dtype, assert_near: Callable[..., None]) -> None:
    """16-bit inputs give 16-bit outputs, and states in float32, without gradients."""
    function, make, settings = CASES[case]
    exact = torch.utils._pytree.tree_map(Tensor.detach, make())

    def cast(to: torch.dtype) -> dict[str, Any]:
        move = lambda v: v.to(to) if v.is_floating_point() else v  # noqa: E731
        return torch.utils._pytree.tree_map(move, exact)

    model, inputs = Call(function, settings), cast(dtype)
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(decomposed(model, inputs)(inputs))
    expected = torch.utils._pytree.tree_leaves(model(inputs))
    rounded = torch.utils._pytree.tree_map(
        lambda v: v.double() if v.is_floating_point() else v, inputs
    )
    reference = torch.utils._pytree.tree_leaves(model(rounded))
    for actual, value, truth in zip(outputs, expected, reference, strict=True):
        assert actual.dtype == value.dtype
        assert_near(actual, truth)


def test_strong_and_absent_decay(assert_near: Callable[..., None]) -> None:
    """Decays that underflow, and none at all, over many passes."""
    inputs = {n: v.detach() for n, v in gated(200).items()}
    inputs["g"] = torch.where(torch.rand_like(inputs["g"]) < 0.5, 0, -800).double()
    model = Call(gated_linear_scan, FINAL)
    outputs = decomposed(model, inputs)(inputs)
    for actual, value in zip(outputs, model(inputs), strict=True):
        assert_near(actual, value)


@pytest.mark.parametrize("steep", [-300.0, -1e30, float("-inf")])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("vector", [False, True])
def test_steep_decays_take_no_digits(
    assert_near: Callable[..., None], vector: bool, exclusive: bool, steep: float
) -> None:
    """What is kept after a steep step is as exact as what was before it, gradients included."""
    exact = {n: v.detach() for n, v in gated(12 if vector else 150, vector=vector).items()}
    exact["g"][:, 3::9] = steep
    model = Call(gated_linear_scan, {"exclusive": exclusive, **FINAL})

    def run(module: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        given = {n: v.to(dtype).requires_grad_() for n, v in exact.items()}
        outputs = module(given)
        torch.manual_seed(1)
        loss = sum((v * torch.randn(v.shape, dtype=torch.float64).to(v)).sum() for v in outputs)
        return [*outputs, *torch.autograd.grad(loss, list(given.values()))]

    single = {n: v.float() for n, v in exact.items()}
    found = run(decomposed(model, single), torch.float32)
    for i, (actual, value) in enumerate(zip(found, run(model, torch.float64), strict=True)):
        assert_near(actual, value, gradient=i > 1)


def test_batch_may_change() -> None:
    inputs = {n: v.detach() for n, v in scan(bare=True).items()}
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"inputs": {n: {} if n == "A" else {0: batch} for n in inputs}}
    model = Call(selective_scan, {})
    program = torch.export.export(model, (inputs,), dynamic_shapes=shapes)
    assert registered(program.graph)
    program = program.run_decompositions(decompositions())
    assert not registered(program.graph)
    more = {n: v if n == "A" else torch.cat([v, v, v]) for n, v in inputs.items()}
    torch.testing.assert_close(program.module()(more), model(more))


def test_length_must_be_static() -> None:
    inputs = {"x": draw(BATCH, LENGTH, DIM).detach(), "log_a": draw(DIM, at_most=0).detach()}
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {"inputs": {"x": {1: length}, "log_a": {}}}
    program = torch.export.export(Call(linear_scan, {}), (inputs,), dynamic_shapes=shapes)
    with pytest.raises(ValueError, match="length must be static in a decomposed program"):
        program.run_decompositions(decompositions())


@pytest.mark.parametrize(
    ("function", "make"), [(causal_conv1d, lambda: conv(bias=False)), (dense_ssm, dense)]
)
def test_packed_sequences_are_refused(
    function: Callable[..., Any], make: Callable[[], dict[str, Tensor]]
) -> None:
    inputs = {n: v.detach() for n, v in make().items() if n != "initial_state"}
    inputs["x"] = inputs["x"][:1]
    inputs["cu_seqlens"] = torch.tensor([0, 4, LENGTH], dtype=torch.int32)
    program = torch.export.export(Call(function, {}), (inputs,))
    with pytest.raises(ValueError, match=re.escape("cu_seqlens must be None") + r".*\(3,\)"):
        program.run_decompositions(decompositions())
