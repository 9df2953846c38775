"""The registered ops under torch's machinery: opcheck, compile, export, autocast, fake tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import (
    LENGTHS,
    assert_all_near,
    assert_equal,
    compare,
    conv_inputs,
    each,
    evaluate,
    flat,
    pack,
    pair_inputs,
    scan_inputs,
)
from tests.core.registered_cases import (
    CONV,
    CONV_BACKWARD,
    SCAN,
    SCAN_BACKWARD,
    STEP,
    conv_args,
    scan_args,
    step_args,
    without_grad,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from scanweave.core import (
    bidirectional_selective_scan,
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
    symmetric_conv1d,
)
from scanweave.core.ops.selective import compiled as scan_in_c
from scanweave.core.ops.selective import selective_scan_ref

Check = Callable[..., None]


# opcheck itself looks at the gradients of copies, which are no leaves
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
SCAN_CASES = [
    {},
    {"directions": 2},
    {"directions": 2, "packed": True},
    {"bare": True},
    {"training": False},
]


@OPCHECK
@pytest.mark.parametrize("case", SCAN_CASES, ids=str)
def test_opcheck_scan(case: dict[str, Any]):
    torch.library.opcheck(SCAN, scan_args(**case))
    torch.library.opcheck(SCAN, without_grad(scan_args(**case)))


@OPCHECK
@pytest.mark.parametrize("case", SCAN_CASES[:4], ids=str)
def test_opcheck_scan_backward(case: dict[str, Any]):
    args = without_grad(scan_args(**case))
    out, y, final, kept = SCAN(*args)
    for dfinal in (None, torch.randn_like(final)):
        given = (torch.randn_like(out), dfinal, *args[:-1], y, kept)
        torch.library.opcheck(SCAN_BACKWARD, given)


@OPCHECK
@pytest.mark.parametrize("case", [{}, {"packed": True, "reverse": True}, {"bare": True}], ids=str)
def test_opcheck_convolution(case: dict[str, Any]):
    torch.library.opcheck(CONV, conv_args(**case))
    plain = without_grad(conv_args(**case))
    torch.library.opcheck(CONV, plain)
    torch.library.opcheck(CONV_BACKWARD, (torch.randn_like(plain[0]), *plain))


@pytest.mark.parametrize("bare", [False, True])
def test_opcheck_step(bare: bool):
    args = step_args(bare)
    torch.library.opcheck(STEP, args)
    y = STEP(*args)
    meta = [v.to("meta") if isinstance(v, Tensor) else v for v in args]
    assert STEP(*meta).shape == y.shape


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SCAN_CASES[:4], ids=str)
def test_fake_results_look_like_real_ones(case: dict[str, Any], dtype: torch.dtype, training: bool):
    args = without_grad(scan_args(**case, dtype=dtype, training=training))

    def looks(results: Any) -> list[tuple]:
        return [(v.shape, v.dtype, v.stride(), v.device.type) for v in results]

    real = SCAN(*args)
    with FakeTensorMode() as mode:
        fake_args = tree_map_only(Tensor, mode.from_tensor, args)
        fake = SCAN(*fake_args)
        given = (fake[0], fake[2], *fake_args[:-1], fake[1], fake[3])
        fake_grads = SCAN_BACKWARD(*given) if training else []
    assert looks(fake) == looks(real)
    if training:
        given = (real[0], real[2], *args[:-1], real[1], real[3])
        assert looks(fake_grads) == looks(SCAN_BACKWARD(*given))


def test_meta_tensors_give_shapes():
    pairs = pair_inputs(1, 11, 4, 3, sequences=5)
    for op, inputs in (
        (selective_scan, scan_inputs(1, 11, 4, 3, sequences=5)),
        (bidirectional_selective_scan, pairs),
        (causal_conv1d, conv_inputs(1, 11, 4, 3, sequences=5)),
    ):
        cu = pack(LENGTHS)
        real = evaluate(op, inputs, cu_seqlens=cu, return_final_state=True)
        meta = evaluate(
            op,
            each(inputs, lambda v: v.to("meta")),
            cu_seqlens=cu.to("meta"),
            return_final_state=True,
        )
        for name, v in meta.items():
            assert v.is_meta
            assert (v.shape, v.dtype) == (real[name].shape, real[name].dtype), name
    x = torch.empty(2, 5, 4, device="meta")
    assert symmetric_conv1d(x, torch.empty(4, 3, device="meta")).shape == x.shape


def compiled(op: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(op, fullgraph=True, backend="aot_eager", **kwargs)


# sizes that differ from all others: equal ones are one symbol to the compiler
OPS: list[tuple[str, Callable[..., Any], Callable[..., dict[str, Any]], tuple[int, ...]]] = [
    ("selective_scan", selective_scan, scan_inputs, (8, 7)),
    ("bidirectional", bidirectional_selective_scan, pair_inputs, (8, 7)),
    ("causal_conv1d", causal_conv1d, conv_inputs, (8, 7)),
]
EACH_OP = pytest.mark.parametrize(
    ("op", "draw", "sizes"), [o[1:] for o in OPS], ids=[o[0] for o in OPS]
)


@EACH_OP
def test_compiles_to_one_graph(
    op: Callable[..., Any], draw: Callable[..., dict[str, Any]], sizes: tuple[int, ...]
):
    f = compiled(op, dynamic=False)
    inputs = draw(2, 9, *sizes)
    expected = evaluate(op, inputs, return_final_state=True)
    assert_equal(evaluate(f, inputs, return_final_state=True), expected)
    with torch.no_grad():
        assert torch.equal(f(**inputs), expected["output 0"])


@EACH_OP
def test_compiles_for_any_size(
    op: Callable[..., Any], draw: Callable[..., dict[str, Any]], sizes: tuple[int, ...]
):
    f = compiled(op, dynamic=True)
    for batch, length in ((3, 9), (2, 5), (4, 20)):
        inputs = draw(batch, length, *sizes)
        expected = evaluate(op, inputs, return_final_state=True)
        with torch._dynamo.config.patch(error_on_recompile=batch != 3):
            assert_equal(evaluate(f, inputs, return_final_state=True), expected)


@EACH_OP
def test_compiles_packed(
    op: Callable[..., Any], draw: Callable[..., dict[str, Any]], sizes: tuple[int, ...]
):
    f = compiled(op, dynamic=True)
    for i, lengths in enumerate([(3, 0, 7), (1, 1, 5), (6, 2, 0, 9, 2)]):
        inputs = draw(1, sum(lengths), *sizes, sequences=len(lengths))
        options = {"cu_seqlens": pack(lengths), "return_final_state": True}
        expected = evaluate(op, inputs, **options)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_equal(evaluate(f, inputs, **options), expected)


def test_compiled_still_checks():
    f = compiled(selective_scan)
    inputs = scan_inputs(1, 9, 4, 3, sequences=2)
    with pytest.raises(ValueError, match="cu_seqlens must not fall"):
        f(**inputs, cu_seqlens=torch.tensor([0, 12, 9], dtype=torch.int32))


def test_compiles_symmetric_and_steps():
    inputs = conv_inputs(2, 9, 4, 3, without=("initial_state",))
    f = compiled(symmetric_conv1d)
    assert_equal(evaluate(f, inputs), evaluate(symmetric_conv1d, inputs))

    given = {k: v.detach() for k, v in scan_inputs(2, 1, 4, 3).items()}
    state = given.pop("initial_state")
    step = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in given.items()}
    ours, theirs = state.clone(), state.clone()
    f = compiled(selective_scan_step)
    assert torch.equal(f(theirs, **step), selective_scan_step(ours, **step))
    assert torch.equal(ours, theirs)

    given = {k: v.detach() for k, v in conv_inputs(2, 1, 4, 3).items()}
    x, state = given.pop("x")[:, 0], given.pop("initial_state")
    ours, theirs = state.clone(), state.clone()
    f = compiled(causal_conv1d_step)
    assert torch.equal(f(x, theirs, **given), causal_conv1d_step(x, ours, **given))
    assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_inductor(assert_near: Check):
    torch._dynamo.reset()

    def both(x: Tensor, weight: Tensor, **kw: Any) -> Tensor:
        u = causal_conv1d(torch.tanh(x), weight, activation="silu")
        return torch.relu(selective_scan(u, **kw))

    inputs = scan_inputs(2, 9, 4, 3) | {"weight": conv_inputs(2, 9, 4, 3)["weight"]}
    actual = evaluate(torch.compile(both, fullgraph=True), inputs)
    assert_all_near(assert_near, actual, evaluate(both, inputs))


class Scanned(nn.Module):
    """A convolution and a scan, as a model to export."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        weights = conv_inputs(1, 1, 4, 3, dtype=torch.float32)
        given = scan_inputs(1, 1, 4, 3, dtype=torch.float32)
        self.weight, self.A = nn.Parameter(weights["weight"]), nn.Parameter(given["A"])
        self.dt_bias, self.packed = nn.Parameter(given["dt_bias"]), packed

    def forward(
        self, x: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The scan of the convolved input, its input being its time step as well."""
        u = causal_conv1d(x, self.weight, activation="silu", cu_seqlens=cu_seqlens)
        return selective_scan(
            u,
            x,
            self.A,
            B,
            C,
            dt_bias=self.dt_bias,
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_exports_and_still_trains(assert_near: Check, dynamic: bool, packed: bool):
    model = Scanned()

    def draw(batch: int, length: int) -> tuple[Tensor, ...]:
        given = scan_inputs(batch, length, 4, 3, dtype=torch.float32)
        cu = (pack((2, 0, length - 2)),) if packed else ()
        return (given["x"].detach(), given["B"].detach(), given["C"].detach(), *cu)

    dim = torch.export.Dim
    sizes = {1: dim("length", min=3, max=100)} | ({} if packed else {0: dim("batch", max=100)})
    shapes = (*[sizes] * 3, *([None] if packed else [])) if dynamic else None
    first, other = (1, 1) if packed else (2, 5)
    program = torch.export.export(model, draw(first, 9), dynamic_shapes=shapes, strict=False)
    exported = program.module()
    for args in [draw(first, 9), *([draw(other, 20)] if dynamic else [])]:
        expected, actual = model(*args), exported(*args)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)
        wanted = torch.autograd.grad(expected[0].square().sum(), list(model.parameters()))
        parameters = dict(exported.named_parameters())
        leaves = [parameters[name] for name, _ in model.named_parameters()]
        for a, e in zip(torch.autograd.grad(actual[0].square().sum(), leaves), wanted, strict=True):
            assert_near(a, e, gradient=True)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"scanweave.selective_scan.default", "scanweave.short_conv.default"} <= names


@pytest.mark.parametrize("path", ["compiled", "portable"])
@EACH_OP
def test_autocast_does_not_touch_the_op(
    op: Callable[..., Any],
    draw: Callable[..., dict[str, Any]],
    sizes: tuple[int, ...],
    path: str,
    monkeypatch: pytest.MonkeyPatch,
):
    if path == "portable":
        monkeypatch.setattr(scan_in_c, "takes", lambda _: False)
    inputs = draw(2, 9, *sizes, dtype=torch.float32)
    expected = evaluate(op, inputs, return_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(evaluate(op, inputs, return_final_state=True), expected)


def test_steps_under_autocast():
    given = {k: v.detach() for k, v in scan_inputs(2, 1, 4, 3, dtype=torch.float32).items()}
    state = given.pop("initial_state")
    step = {k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v for k, v in given.items()}
    plain, cast = state.clone(), state.clone()
    expected = selective_scan_step(plain, **step)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(selective_scan_step(cast, **step), expected)
    assert torch.equal(plain, cast)


def test_autocast_layer(assert_near: Check):
    """A projection in bfloat16 feeds the scan: the state stays float32, gradients are right."""
    given = scan_inputs(2, 9, 4, 3, dtype=torch.float32)
    linear = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        x = linear(given["x"])
        out, state = selective_scan(**given | {"x": x}, return_final_state=True)
    assert (x.dtype, out.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    (dx,) = torch.autograd.grad(out.float().square().sum(), linear.weight)
    assert torch.isfinite(dx).all()
    assert dx.any()
    compare(
        assert_near, selective_scan, selective_scan_ref, given | {"x": x.detach().requires_grad_()}
    )


@EACH_OP
def test_inference_mode(
    op: Callable[..., Any], draw: Callable[..., dict[str, Any]], sizes: tuple[int, ...]
):
    lengths = (3, 0, 6)
    inputs = draw(1, 9, *sizes, sequences=3)
    expected = evaluate(op, inputs, cu_seqlens=pack(lengths), return_final_state=True)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            # cu_seqlens made inside is an inference tensor, which has no version counter
            y = op(**inputs, cu_seqlens=pack(lengths))
        assert not y.requires_grad
        assert torch.equal(y, expected["output 0"])


def test_checkpointing_repeats_the_forward():
    inputs = scan_inputs(2, 9, 4, 3)
    names = list(inputs)

    def saved(**kw: Tensor) -> Tensor:
        def f(*v: Tensor) -> Tensor:
            return selective_scan(**dict(zip(names, v, strict=True)))  # type: ignore[arg-type]

        out = checkpoint(f, *kw.values(), use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    assert_equal(evaluate(saved, inputs), evaluate(selective_scan, inputs))


def test_hooks_and_saved_tensors_survive_deletion():
    """Backward after the inputs' names are gone, and twice with a retained graph."""
    inputs = scan_inputs(2, 9, 4, 3)
    leaves = list(flat(inputs).values())
    out = selective_scan(**inputs)
    del inputs
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(out.sum(), leaves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_input_changed_in_place_is_noticed():
    for op, inputs in (
        (selective_scan, scan_inputs(2, 9, 4, 3)),
        (causal_conv1d, conv_inputs(2, 9, 4, 3)),
    ):
        x = inputs["x"].detach() * 1
        out = op(**inputs | {"x": x})
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
