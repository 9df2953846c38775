"""Rotation of channel pairs: against complex numbers, on every path, under torch's machinery."""

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.compiled_code import interpreted, recorded
from tests.core.op_cases import (
    LAYOUTS,
    Inputs,
    assert_all_near,
    assert_equal,
    compare,
    each,
    evaluate,
    leaf,
)
from torch import Tensor, nn

from scanweave.core import rotate_both, rotate_pairs
from scanweave.core.ops.rotate import kernels, rotate_pairs_ref
from scanweave.core.ops.rotate import op as rotate_op

pytestmark = pytest.mark.poison
Check = Callable[..., None]
HALVES = pytest.mark.parametrize("halves", [False, True])
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
OP = torch.ops.scanweave.rotate_pairs.default
BACKWARD = torch.ops.scanweave.rotate_pairs_backward.default
# shapes of q, of k and of angles: heads with angles of their own, groups that share them,
# one angle for all, and a single row
SHAPES = {
    "heads": ((2, 5, 3, 8), (2, 5, 3, 8), (2, 5, 3, 2)),
    "shared": ((2, 7, 4, 12), (2, 7, 2, 12), (7, 1, 6)),
    "rows": ((2, 5, 1, 6), (2, 5, 3, 6), (2, 1, 1, 3)),
    "step": ((3, 2, 10), (3, 2, 10), (3, 2, 3)),
    "constant": ((4, 6), (1, 6), (1,)),
    "one": ((1, 1, 1, 2), (1, 1, 1, 2), (1, 1, 1, 1)),
}
EACH_SHAPE = pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())


def rotate_inputs(
    q: tuple[int, ...],
    k: tuple[int, ...],
    angles: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Inputs:
    """Arguments of `rotate_both`; angles are float32 or wider."""
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*s, generator=rng, dtype=torch.float64) for s in (q, k, angles)]
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "q": leaf(drawn[0], dtype, device),
        "k": leaf(drawn[1], dtype, device),
        "angles": leaf(3 * drawn[2], wide, device),
    }


def both_ref(q: Tensor, k: Tensor, angles: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    return rotate_pairs_ref(q, angles, halves=halves), rotate_pairs_ref(k, angles, halves=halves)


def by_complex_numbers(x: Tensor, angles: Tensor, halves: bool) -> Tensor:
    """X exp(i angle), with pairs told apart by index."""
    count = angles.shape[-1]
    one = torch.arange(count) if halves else torch.arange(0, 2 * count, 2)
    other = one + (count if halves else 1)
    turned = torch.complex(x[..., one], x[..., other])
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    out = x.clone()
    out[..., one], out[..., other] = turned.real, turned.imag
    return out


@HALVES
@EACH_SHAPE
def test_definition_is_a_product_of_complex_numbers(
    assert_near: Check, shapes: tuple, halves: bool
):
    q, k, angles = (v.detach() for v in rotate_inputs(*shapes).values())
    for x in (q, k):
        found = rotate_pairs_ref(x, angles, halves=halves)
        assert_near(found, by_complex_numbers(x, angles, halves))
        assert torch.equal(found[..., 2 * angles.shape[-1] :], x[..., 2 * angles.shape[-1] :])


@HALVES
@EACH_SHAPE
def test_equals_the_definition(assert_near: Check, shapes: tuple, halves: bool):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        inputs = rotate_inputs(*shapes, dtype=dtype)
        compare(assert_near, rotate_both, both_ref, inputs, halves=halves)


@HALVES
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(layout: Callable[[Tensor], Tensor], halves: bool):
    inputs = rotate_inputs(*SHAPES["heads"], dtype=torch.float32)
    expected = evaluate(rotate_both, inputs, halves=halves)
    moved = {name: layout(v.detach()).requires_grad_() for name, v in inputs.items()}
    found = evaluate(rotate_both, moved, halves=halves)
    assert all(v.is_contiguous() for v in found.values())
    assert_equal(found, expected)


@HALVES
def test_turns_and_turns_back(assert_near: Check, halves: bool):
    x, _, angles = (v.detach() for v in rotate_inputs(*SHAPES["heads"]).values())
    there = rotate_pairs(x, angles, halves=halves)
    assert_near(there.square().sum(-1), x.square().sum(-1))
    assert_near(rotate_pairs(there, -angles, halves=halves), x)
    # as rotations add, products of turned vectors depend on differences of angles
    assert_near(
        rotate_pairs(there, angles, halves=halves), rotate_pairs(x, 2 * angles, halves=halves)
    )


def test_channels_that_stay_reach_nothing():
    x, angles = torch.randn(3, 8), torch.randn(3, 2)
    x[:, 4:] = float("nan")
    for halves in (False, True):
        out = rotate_pairs(x, angles, halves=halves)
        assert out[:, :4].isfinite().all()
        assert out[:, 4:].isnan().all()


@HALVES
def test_gradients_by_finite_differences(halves: bool):
    inputs = rotate_inputs((2, 3, 2, 6), (2, 3, 1, 6), (3, 1, 2))

    def f(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_both(q, k, angles, halves=halves)

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))


@HALVES
def test_gradients_of_some_inputs(halves: bool):
    given = {k: v.detach() for k, v in rotate_inputs(*SHAPES["heads"]).items()}
    expected = evaluate(rotate_both, each(given, Tensor.clone), halves=halves)
    cotangents = []
    for i, name in enumerate(("q", "k")):
        rng = torch.Generator().manual_seed(100 + i)
        cotangents.append(torch.randn(given[name].shape, generator=rng, dtype=torch.float64))
    for name in given:
        alone = given | {name: given[name].clone().requires_grad_()}
        (gradient,) = torch.autograd.grad(
            rotate_both(**alone, halves=halves), alone[name], cotangents
        )
        torch.testing.assert_close(gradient, expected[f"gradient of {name}"])


def refused(*_: object) -> None:
    raise AssertionError("the op left the Triton kernels")


@pytest.fixture
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward", "backward"):
        monkeypatch.setattr(rotate_op.portable, name, refused)
    # several programs
    monkeypatch.setattr(kernels, "TILE", 128)


@pytest.mark.interpret
@pytest.mark.usefixtures("kernels_only")
@HALVES
@EACH_SHAPE
def test_kernels(assert_near: Check, shapes: tuple, halves: bool):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = rotate_inputs(*shapes, dtype=dtype, device=DEVICE)
        compare(assert_near, rotate_both, both_ref, inputs, halves=halves)


@pytest.mark.interpret
@pytest.mark.usefixtures("kernels_only")
@HALVES
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_kernels_read_any_strides(
    assert_near: Check, layout: Callable[[Tensor], Tensor], halves: bool
):
    inputs = rotate_inputs(*SHAPES["heads"], dtype=torch.float32, device=DEVICE)
    expected = evaluate(rotate_both, inputs, halves=halves)
    moved = {name: layout(v.detach()).requires_grad_() for name, v in inputs.items()}
    actual = evaluate(rotate_both, moved, halves=halves)
    if DEVICE == "cpu":
        assert_equal(actual, expected)
    # a compiler chooses which products it fuses with their sum anew for every layout
    assert_all_near(assert_near, actual, expected)


@pytest.mark.interpret
@pytest.mark.usefixtures("kernels_only")
# NumPy's, in the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_kernels_know_every_quarter_turn(assert_near: Check):
    eighths = torch.arange(-40, 41, device=DEVICE, dtype=torch.float32) * (math.pi / 8)
    x = torch.tensor([1.0, 0.0], device=DEVICE).expand(81, 2)
    out = rotate_pairs(x, eighths.unsqueeze(-1))
    exact = torch.stack([eighths.double().cos(), eighths.double().sin()], -1)
    assert_near(out, exact)
    # no float32 tells where such angles are: any, of length 1, and none for what is no number
    huge = torch.tensor([[1e12], [-3e30]], device=DEVICE)
    assert_near(rotate_pairs(x[:2], huge).norm(dim=-1), torch.ones(2, dtype=torch.float64))
    lost = torch.tensor([[math.inf], [math.nan]], device=DEVICE)
    assert rotate_pairs(x[:2], lost).isnan().all()


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(assert_near: Check, dtype: torch.dtype, halves: bool):
    for shapes in (
        ((8, 197, 6, 128), (8, 197, 6, 128), (8, 197, 6, 32)),
        ((3, 333, 16, 64), (3, 333, 4, 64), (1, 333, 1, 32)),
        ((2, 3, 5000), (2, 3, 5000), (2, 3, 1037)),
    ):
        inputs = rotate_inputs(*shapes, dtype=dtype, device="cuda")
        compare(assert_near, rotate_both, both_ref, inputs, halves=halves)
        assert_equal(*(evaluate(rotate_both, inputs, halves=halves) for _ in range(2)))
    # a state, turned along an axis that is not the innermost in memory
    state = torch.randn(8, 3, 64, 128, device="cuda").transpose(-1, -2)
    angles = torch.linspace(0, 1, 32, device="cuda")
    exact = rotate_pairs_ref(state.double(), angles.double(), halves=halves)
    assert_near(rotate_pairs(state, angles, halves=halves), exact)


@pytest.mark.gpu
def test_large_angles_on_a_gpu():
    x = torch.tensor([1.0, 0.0], device="cuda")
    angles = torch.logspace(-6, 7, 100_000, device="cuda").unsqueeze(-1)
    angles = torch.cat([angles, -angles])
    wide = angles.double()
    exact = torch.cat([wide.cos(), wide.sin()], -1)
    assert (rotate_pairs(x.expand(200_000, 2), angles) - exact).abs().max() < 2e-7


@pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: launches are not recorded")
def test_one_launch_each_way():
    for shapes in SHAPES.values():
        inputs = rotate_inputs(*shapes, dtype=torch.float32)
        with recorded() as launches:
            evaluate(rotate_both, inputs)
        assert len(launches) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@HALVES
def test_registered(halves: bool):
    for shapes in (SHAPES["heads"], SHAPES["shared"]):
        q, k, angles = rotate_inputs(*shapes, dtype=torch.float32).values()
        for x in ([q, k], [q]):
            torch.library.opcheck(OP, (x, angles, halves))
            plain, turn = [v.detach() for v in x], angles.detach()
            torch.library.opcheck(OP, (plain, turn, halves))
            for slopes in (False, True):
                dout = [torch.randn_like(v) for v in plain]
                torch.library.opcheck(BACKWARD, (dout, plain, turn, halves, slopes))


@HALVES
def test_compiled(assert_near: Check, halves: bool):
    torch._dynamo.reset()
    compiled = torch.compile(rotate_both, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((2, 5), (3, 11)):
        inputs = rotate_inputs((batch, length, 4, 8), (batch, length, 2, 8), (length, 1, 3))
        expected = evaluate(rotate_both, inputs, halves=halves)
        assert_all_near(assert_near, evaluate(compiled, inputs, halves=halves), expected)


class Turned(nn.Module):
    def forward(self, q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_both(q, k, angles)


def test_exported_program_trains(assert_near: Check):
    inputs = rotate_inputs(*SHAPES["shared"])
    plain = tuple(v.detach() for v in inputs.values())
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"q": {0: batch}, "k": {0: batch}, "angles": {}}
    module = torch.export.export(Turned(), plain, dynamic_shapes=shapes).module()
    more = inputs | {n: torch.cat([inputs[n]] * 3).detach().requires_grad_() for n in ("q", "k")}
    found = evaluate(lambda q, k, angles: tuple(module(q, k, angles)), more)
    assert_all_near(assert_near, found, evaluate(rotate_both, more))


def test_meta_and_empty():
    shapes = ((2, 5, 3, 8), (2, 5, 1, 8), (5, 1, 4))
    q, k, angles = (v.detach().to("meta") for v in rotate_inputs(*shapes).values())
    assert [v.shape for v in rotate_both(q, k, angles)] == [q.shape, k.shape]
    inputs = rotate_inputs((2, 0, 3, 8), (2, 0, 3, 8), (1, 1, 4))
    values = evaluate(rotate_both, inputs)
    assert values["output 0"].shape == (2, 0, 3, 8)
    assert not values["gradient of angles"].any()


def test_second_derivatives_are_refused():
    inputs = rotate_inputs(*SHAPES["heads"])
    q, _ = rotate_both(**inputs)
    (gradient,) = torch.autograd.grad(q.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_errors():
    x, angles = torch.randn(2, 5, 4, 6), torch.randn(5, 1, 3)
    arguments: Any
    for arguments, rule in (
        (([1.0], angles), r"x must be \(P,\), \(H, P\), .* got list"),
        ((x[None], angles), r"x must be .* or \(B, L, H, P\), got \(1, 2, 5, 4, 6\)"),
        ((x.int(), angles), "x must be floating point, got torch.int32"),
        ((x, 1.0), r"angles must be \(\.\.\., R\), got float"),
        ((x, angles[0, 0, 0]), r"angles must be \(\.\.\., R\), got \(\)"),
        ((x, angles.long()), "angles must be floating point, got torch.int64"),
        ((x, angles.to("meta")), "angles must be on cpu as x is, got meta"),
        ((x[..., :5], angles[..., :2]), "x must have an even number of channels, got 5"),
        ((x, torch.randn(4)), "angles must turn 1 to 3 pairs of channels, got 4"),
        ((x, angles[..., :0]), "angles must turn 1 to 3 pairs of channels, got 0"),
        ((x, angles[:4]), r"angles must broadcast to x \(2, 5, 4, 6\) but for .* got \(4, 1, 3\)"),
        ((x[0], angles[None]), r"angles must broadcast to x \(5, 4, 6\)"),
    ):
        with pytest.raises(ValueError, match=rule):
            rotate_pairs(*arguments)
    # an odd number of channels has halves, and one that stays
    assert rotate_pairs(x[..., :5], angles[..., :2], halves=True).shape == (2, 5, 4, 5)
    with pytest.raises(ValueError, match="k must match q but for its heads, got"):
        rotate_both(x, x[:1], angles)
    with pytest.raises(ValueError, match=r"angles must broadcast to k \(2, 5, 2, 6\)"):
        rotate_both(x, x[:, :, :2], angles.expand(5, 4, 3))
    with pytest.raises(ValueError, match=r"k must be \(P,\)"):
        rotate_both(x, None, angles)  # type: ignore[arg-type]
