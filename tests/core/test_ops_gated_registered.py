"""The matrix-state scan under torch's machinery, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.gated_cases import gated_inputs, gated_pairs
from tests.core.op_cases import LENGTHS, assert_all_near, assert_equal, evaluate, pack
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from scanweave.core import (
    bidirectional_gated_linear_scan,
    gated_linear_attention,
    gated_linear_scan,
    gated_linear_scan_step,
    ssd,
)
from scanweave.core.ops.gated import kernels

Check = Callable[..., None]
SCAN = torch.ops.scanweave.gated_linear_scan.default
SCAN_BACKWARD = torch.ops.scanweave.gated_linear_scan_backward.default
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CASES: list[dict[str, Any]] = [
    {},
    {"kind": "all"},
    {"directions": 2},
    {"directions": 2, "packed": True, "shift": True},
    {"bare": True, "final": False},
    {"kind": "all", "bonus": True},
    {"bare": True, "bonus": True},
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def scan_args(
    directions: int = 1,
    kind: str = "tokens",
    packed: bool = False,
    shift: bool = False,
    bare: bool = False,
    final: bool = True,
    bonus: bool = False,
    grad: bool = False,
) -> tuple:
    """Positional arguments of the registered op."""
    given = gated_pairs(
        *(1 if packed else 2, 11, 4, 3, 2),
        groups=2,
        kind=kind,
        sequences=5 if packed else None,
        dtype=torch.float32,
    )

    def plain(v: Tensor) -> Tensor:
        return v.detach().clone().requires_grad_(grad)

    lists = {
        name: [plain(u) for u in v[:directions]] if isinstance(v, tuple) else plain(v)
        for name, v in given.items()
    }
    if bare:
        lists |= {"g": [], "write": [], "skip": None, "initial_state": []}
    names = ("q", "k", "v", "g", "write", "skip", "initial_state")
    cu = pack(LENGTHS) if packed else None
    flags = (cu, [False, True][:directions], shift, shift, final)
    extra = (plain(torch.randn(4, 3)),) if bonus else ()
    return (*(lists[n] for n in names), *flags, *extra)


def backward_args(args: tuple) -> tuple:
    """Those that the backward op takes, behind the gradients of its outputs."""
    return (*args[:11], *args[12:])


@OPCHECK
@EACH_CASE
def test_opcheck(case: dict[str, Any]):
    torch.library.opcheck(SCAN, scan_args(**case))
    torch.library.opcheck(SCAN, scan_args(**case, grad=True))


@OPCHECK
@EACH_CASE
def test_opcheck_backward(case: dict[str, Any]):
    args = scan_args(**case)
    out, final = SCAN(*args)
    dfinal = torch.randn_like(final) if case.get("final", True) else None
    torch.library.opcheck(SCAN_BACKWARD, (torch.randn_like(out), dfinal, *backward_args(args)))


@EACH_CASE
def test_fake_results_look_like_real_ones(case: dict[str, Any]):
    args = scan_args(**case)

    def looks(results: Any) -> list[tuple]:
        return [(v.shape, v.dtype, v.stride()) for v in results]

    real = SCAN(*args)
    grads = SCAN_BACKWARD(real[0], None, *backward_args(args))
    with FakeTensorMode() as mode:
        fake_args = tree_map_only(Tensor, mode.from_tensor, args)
        fake = SCAN(*fake_args)
        fake_grads = SCAN_BACKWARD(fake[0], None, *backward_args(fake_args))
    assert looks(fake) == looks(real)
    assert looks(fake_grads) == looks(grads)


def compiled(op: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(op, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_compiles_to_one_graph(kind: str):
    inputs = gated_inputs(2, 9, 4, 5, 6, groups=2, kind=kind)
    expected = evaluate(gated_linear_scan, inputs, return_final_state=True)
    f = compiled(gated_linear_scan, dynamic=False)
    assert_equal(evaluate(f, inputs, return_final_state=True), expected)


def test_compiles_for_any_size():
    f = compiled(gated_linear_scan, dynamic=True)
    for i, (batch, length) in enumerate(((3, 9), (2, 7), (4, 20))):
        inputs = gated_inputs(batch, length, 8, 5, 6, groups=2)
        expected = evaluate(gated_linear_scan, inputs, return_final_state=True)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_equal(evaluate(f, inputs, return_final_state=True), expected)


def test_compiles_packed():
    f = compiled(bidirectional_gated_linear_scan, dynamic=True)
    for i, lengths in enumerate([(3, 0, 7), (1, 1, 5), (6, 2, 0, 9, 2)]):
        inputs = gated_pairs(1, sum(lengths), 8, 5, 6, groups=2, without=("initial_state",))
        options = {"cu_seqlens": pack(lengths), "form": "quasi_separable"}
        expected = evaluate(bidirectional_gated_linear_scan, inputs, **options)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_equal(evaluate(f, inputs, **options), expected)


def test_compiles_step():
    given = {k: v.detach() for k, v in gated_inputs(2, 1, 4, 3, 5, groups=2).items()}
    state = given.pop("initial_state")
    token = {name: v[:, 0] for name, v in given.items()}
    ours, theirs = state.clone(), state.clone()
    y = compiled(gated_linear_scan_step)(theirs, **token)
    assert torch.equal(y, gated_linear_scan_step(ours, **token))
    assert torch.equal(ours, theirs)


class Scanned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(4))

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return ssd(x, dt, self.A, B, C)


def test_exports_and_still_trains(assert_near: Check):
    model = Scanned()

    def draw(batch: int, length: int) -> tuple[Tensor, ...]:
        shapes = ((4, 5), (4,), (2, 3), (2, 3))
        return tuple(torch.randn(batch, length, *s) for s in shapes)

    sizes = {0: torch.export.Dim("batch", max=100), 1: torch.export.Dim("length", max=100)}
    program = torch.export.export(model, draw(2, 9), dynamic_shapes=(sizes,) * 4, strict=False)
    exported = program.module()
    for args in (draw(2, 9), draw(5, 20)):
        expected, actual = model(*args), exported(*args)
        assert torch.equal(actual, expected)
        wanted = torch.autograd.grad(expected.square().sum(), model.A)
        leaf = dict(exported.named_parameters())["A"]
        given = torch.autograd.grad(actual.square().sum(), leaf)
        assert_near(given[0], wanted[0], gradient=True)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "scanweave.gated_linear_scan.default" in names


def test_autocast_does_not_touch_the_op():
    inputs = gated_inputs(2, 9, 4, 3, 5, dtype=torch.float32)
    expected = evaluate(gated_linear_scan, inputs, return_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(evaluate(gated_linear_scan, inputs, return_final_state=True), expected)
        x, dt, A = inputs["v"], inputs["write"], -torch.rand(4)
        y = ssd(x, dt, A, inputs["k"], inputs["q"])
    assert torch.equal(y, ssd(x, dt, A, inputs["k"], inputs["q"]))


def test_inference_mode():
    inputs = gated_inputs(1, 11, 4, 3, 5, sequences=5)
    expected = evaluate(gated_linear_scan, inputs, cu_seqlens=pack(LENGTHS))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y = gated_linear_scan(**inputs, cu_seqlens=pack(LENGTHS))
        assert not y.requires_grad
        assert torch.equal(y, expected["output 0"])


def test_meta_tensors_give_shapes():
    inputs = {k: v.detach().to("meta") for k, v in gated_inputs(2, 9, 4, 3, 5).items()}
    out, state = gated_linear_scan(**inputs, return_final_state=True)
    assert out.shape == (2, 9, 4, 5)
    assert state.shape == (2, 4, 3, 5)


def test_input_changed_in_place_is_noticed():
    inputs = gated_inputs(2, 9, 2, 3, 4)
    v = inputs["v"].detach() * 1
    out = gated_linear_scan(**inputs | {"v": v})
    v.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def t(*shape: int) -> Tensor:
    return torch.zeros(*shape)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"v": t(2, 9, 4)}, r"v must be \(B, L, H, V\), got \(2, 9, 4\)"),
        ({"v": [1]}, r"v must be \(B, L, H, V\), got list"),
        ({"v": t(2, 9, 4, 5).int()}, "v must be floating point, got torch.int32"),
        ({"v": t(2, 9, 4, 300)}, "v must have heads and 1 to 256 values a head"),
        ({"q": t(2, 9, 3)}, r"q must be \(B, L, G, K\), got \(2, 9, 3\)"),
        ({"q": t(2, 8, 2, 3)}, r"q must be \(B, L, G, K\) = \(2, 9, 2, 3\), got \(2, 8, 2, 3\)"),
        ({"q": t(2, 9, 3, 3)}, "q must have groups that divide the 4 heads, got 3"),
        ({"q": t(2, 9, 2, 257)}, "q must have 1 to 256 keys, got 257"),
        ({"k": t(2, 9, 2, 4)}, r"k must be \(B, L, G, K\) = \(2, 9, 2, 3\)"),
        ({"g": t(2, 9)}, r"g must be \(H, K\) = \(4, 3\), got \(2, 9\)"),
        ({"g": t(2, 9, 4, 5)}, r"g must be \(B, L, H, K\) = \(2, 9, 4, 3\)"),
        ({"g": t(2, 9, 4, 3, 1)}, r"g must be \(H,\), .* got \(2, 9, 4, 3, 1\)"),
        ({"g": 1.0}, r"g must be \(H,\), .* got float"),
        ({"g": t(4).int()}, "g must be floating point"),
        ({"write": t(2, 9)}, r"write must be \(B, L, H\) = \(2, 9, 4\)"),
        ({"skip": t(2, 4)}, r"skip must be \(H,\) or \(B, L, H\), got \(2, 4\)"),
        ({"skip": 1}, r"skip must be \(H,\) or \(B, L, H\), got int"),
        ({"skip": t(3)}, r"skip must be \(H,\) = \(4,\), got \(3,\)"),
        ({"skip": t(2, 9, 3)}, r"skip must be \(B, L, H\) = \(2, 9, 4\)"),
        ({"initial_state": t(2, 4, 5, 3)}, r"initial_state must be \(B, H, K, V\)"),
        ({"bonus": t(4, 3)}, "bonus must be None unless exclusive"),
        ({"bonus": t(4), "exclusive": True}, r"bonus must be \(H, K\) = \(4, 3\)"),
        ({"cu_seqlens": pack((9,))}, "x must have batch 1 with cu_seqlens"),
    ],
)
def test_refuses(changed: dict[str, Any], match: str):
    given = gated_inputs(2, 9, 4, 3, 5, groups=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=match):
        gated_linear_scan(**given | changed)


def test_refuses_packed():
    given = gated_inputs(1, 9, 4, 3, 5, sequences=2, dtype=torch.float32)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at the length 9"):
        gated_linear_scan(**given, cu_seqlens=pack((4, 4)))
    wrong = given | {"initial_state": t(3, 4, 3, 5)}
    with pytest.raises(ValueError, match=r"initial_state must be \(S, H, K, V\) = \(2, 4, 3, 5\)"):
        gated_linear_scan(**wrong, cu_seqlens=pack((4, 5)))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"form": "sum"}, "form must be 'add', 'exclusive' or 'quasi_separable', got 'sum'"),
        ({"q": t(2, 9, 2, 3)}, r"q must be a pair \(forward, reverse\), got a tensor"),
        ({"g": (t(4),)}, r"g must be a pair \(forward, reverse\), got 1 items"),
        ({"form": "quasi_separable"}, "initial_state and return_final_state need form 'add'"),
        ({"k": (t(2, 9, 2, 3), t(2, 9, 2, 4))}, r"k\[1\] must be \(B, L, G, K\)"),
        ({"g": (t(4), t(4, 3))}, "g must be of heads or of channels in both directions"),
        (
            {"q": (t(2, 9, 2, 3), t(2, 9, 1, 3)), "k": (t(2, 9, 2, 3), t(2, 9, 1, 3))},
            "q must have one shape in both directions",
        ),
    ],
)
def test_both_directions_refuse(changed: dict[str, Any], match: str):
    given = gated_pairs(2, 9, 4, 3, 5, groups=2, dtype=torch.float32)
    with pytest.raises(ValueError, match=match):
        bidirectional_gated_linear_scan(**given | changed)


def test_ssd_refuses():
    x, dt, A, B = t(2, 9, 4, 5), t(2, 9, 4), t(4), t(2, 9, 2, 3)
    with pytest.raises(ValueError, match=r"x must be \(B, L, H, P\), got \(2, 9, 4\)"):
        ssd(dt, dt, A, B, B)
    with pytest.raises(ValueError, match=r"x must be \(B, L, H, P\), got NoneType"):
        ssd(None, dt, A, B, B)
    with pytest.raises(ValueError, match=r"dt must be \(B, L, H\) = \(2, 9, 4\)"):
        ssd(x, dt[:1], A, B, B)
    with pytest.raises(ValueError, match=r"A must be \(H,\) = \(4,\)"):
        ssd(x, dt, A[:3], B, B)
    with pytest.raises(ValueError, match=r"D must be \(H,\) = \(4,\)"):
        ssd(x, dt, A, B, B, A[:3])
    with pytest.raises(ValueError, match=r"dt_bias must be \(H,\) = \(4,\)"):
        ssd(x, dt, A, B, B, A, A[:3])
    with pytest.raises(ValueError, match=r"q must be \(B, L, G, K\), got NoneType"):
        gated_linear_attention(None, B, x)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"v": t(2, 4)}, r"v must be \(B, H, V\), got \(2, 4\)"),
        ({"v": None}, r"v must be \(B, H, V\), got NoneType"),
        ({"q": t(2, 3)}, r"q must be \(B, G, K\), got \(2, 3\)"),
        ({"q": None}, r"q must be \(B, G, K\), got NoneType"),
        ({"q": t(2, 3, 3), "k": t(2, 3, 3)}, "q must have groups that divide the 4 heads, got 3"),
        ({"k": t(2, 2, 4)}, r"k must be \(B, G, K\) = \(2, 2, 3\)"),
        ({"state": t(2, 4, 3, 6)}, r"state must be \(B, H, K, V\) = \(2, 4, 3, 5\)"),
        ({"g": t(2, 4, 5)}, r"g must be \(B, H\) or \(B, H, K\), got \(2, 4, 5\)"),
        ({"g": 0}, r"g must be \(B, H\) or \(B, H, K\), got int"),
        ({"write": t(2, 3)}, r"write must be \(B, H\) = \(2, 4\)"),
        ({"skip": t(4)}, r"skip must be \(B, H\) = \(2, 4\)"),
    ],
)
def test_step_refuses(changed: dict[str, Any], match: str):
    given = {"q": t(2, 2, 3), "k": t(2, 2, 3), "v": t(2, 4, 5), "state": t(2, 4, 3, 5)}
    with pytest.raises(ValueError, match=match):
        gated_linear_scan_step(**given | changed)


def test_compiled_gradients_are_right(assert_near: Check):
    inputs = gated_pairs(2, 9, 4, 3, 5, groups=2, without=("initial_state",))
    f = compiled(bidirectional_gated_linear_scan)
    expected = evaluate(bidirectional_gated_linear_scan, inputs)
    assert_all_near(assert_near, evaluate(f, inputs), expected)


def test_blocks_of_halves_are_wide():
    """Triton compiles narrower ones wrongly for Hopper."""
    half = kernels.Precision(kernels.tl.bfloat16, "tf32", torch.bfloat16, 64)
    full = kernels.Precision(kernels.tl.float32, "tf32", torch.float32, 32)
    for keys, width in ((1, 1), (16, 32), (32, 16), (200, 80)):
        q, v = torch.empty(1, 1, 1, keys), torch.empty(1, 1, 1, width)
        plan = kernels.plan_of(q, v, half, 128, 64)
        assert min(plan.block_k, plan.block_v) >= 64
        assert plan.block_k * plan.key_blocks >= keys
        assert plan.block_v * plan.value_blocks >= width
        assert kernels.plan_of(q, v, full, 64, 64).block_k <= 64
