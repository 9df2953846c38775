"""The linear scan and the weighted average under torch's machinery: opcheck, compile, autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.linear_cases import Check, linear_inputs, near, wkv_inputs
from tests.core.op_cases import LENGTHS, assert_equal, evaluate, pack
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from scanweave.core.ops.linear import linear_scan
from scanweave.core.ops.wkv import wkv

SCAN = torch.ops.scanweave.linear_scan.default
SCAN_BACKWARD = torch.ops.scanweave.linear_scan_backward.default
AVERAGE = torch.ops.scanweave.wkv.default
AVERAGE_BACKWARD = torch.ops.scanweave.wkv_backward.default
ALL: dict[str, Any] = {"return_final_state": True}
# opcheck itself looks at the gradients of copies, which are no leaves
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CASES = [
    {"dtype": torch.float32},
    {"dtype": torch.complex64, "constant": True},
    {"dtype": torch.float64, "packed": True},
    {"dtype": torch.bfloat16, "bare": True, "training": False},
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def scan_args(
    dtype: torch.dtype,
    constant: bool = False,
    packed: bool = False,
    bare: bool = False,
    training: bool = True,
) -> tuple:
    given = linear_inputs(
        1 if packed else 2, 11, 4, constant=constant, dtype=dtype, sequences=5 if packed else None
    )
    state = None if bare else given["initial_state"]
    cu = pack(LENGTHS) if packed else None
    return given["x"], given["log_a"], state, cu, packed, training


def average_args(
    dtype: torch.dtype,
    constant: bool = False,
    packed: bool = False,
    bare: bool = False,
    training: bool = True,
) -> tuple:
    dtype = torch.float32 if dtype.is_complex else dtype
    given = wkv_inputs(
        1 if packed else 2, 11, 4, constant=constant, dtype=dtype, sequences=5 if packed else None
    )
    optional = (None, None) if bare else (given["bonus"], given["initial_state"])
    cu = pack(LENGTHS) if packed else None
    return given["k"], given["v"], given["log_decay"], *optional, cu, packed, training


def plain(args: tuple) -> tuple:
    return tuple(v.detach() if isinstance(v, Tensor) else v for v in args)


PAIRS = [(SCAN, SCAN_BACKWARD, scan_args), (AVERAGE, AVERAGE_BACKWARD, average_args)]
EACH_PAIR = pytest.mark.parametrize(("op", "back", "draw"), PAIRS, ids=["scan", "average"])


@OPCHECK
@EACH_PAIR
@EACH_CASE
def test_opcheck(op: Any, back: Any, draw: Callable[..., tuple], case: dict[str, Any]):
    args = draw(**case)
    torch.library.opcheck(op, args)
    args = plain(args)
    torch.library.opcheck(op, args)
    out, final, kept = op(*args)
    for dfinal in (None, torch.randn_like(final)):
        torch.library.opcheck(back, (torch.randn_like(out), dfinal, *args[:-1], kept))


@EACH_PAIR
@EACH_CASE
def test_fake_results_look_like_real_ones(
    op: Any, back: Any, draw: Callable[..., tuple], case: dict[str, Any]
):
    args = plain(draw(**case))

    def looks(results: Any) -> list[tuple]:
        return [(v.shape, v.dtype, v.stride(), v.device.type) for v in results]

    real = op(*args)
    with FakeTensorMode() as mode:
        fake_args = tree_map_only(Tensor, mode.from_tensor, args)
        fake = op(*fake_args)
        fake_grads = back(fake[0], fake[1], *fake_args[:-1], fake[2])
    assert looks(fake) == looks(real)
    assert looks(fake_grads) == looks(back(real[0], real[1], *args[:-1], real[2]))


def compiled(op: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(op, fullgraph=True, backend="aot_eager", **kwargs)


OPS = pytest.mark.parametrize(
    ("op", "draw"), [(linear_scan, linear_inputs), (wkv, wkv_inputs)], ids=["scan", "average"]
)


@OPS
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_for_any_size(op: Any, draw: Callable[..., dict[str, Any]], packed: bool):
    f = compiled(op, dynamic=True)
    # sizes that differ from all others: equal ones are one symbol to the compiler
    for i, lengths in enumerate([(3, 0, 7, 1), (1, 1, 5), (6, 2, 0, 9, 2)]):
        rows = {"sequences": len(lengths)} if packed else {}
        inputs = draw(1 if packed else 2 + i, sum(lengths), 8, **rows)
        options = {"cu_seqlens": pack(lengths) if packed else None, **ALL}
        expected = evaluate(op, inputs, **options)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_equal(evaluate(f, inputs, **options), expected)


@OPS
def test_autocast_does_not_touch_the_op(op: Any, draw: Callable[..., dict[str, Any]]):
    inputs = draw(2, 9, 8, dtype=torch.float32)
    expected = evaluate(op, inputs, **ALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(evaluate(op, inputs, **ALL), expected)


@OPS
def test_inference_mode(op: Any, draw: Callable[..., dict[str, Any]]):
    inputs = draw(1, 9, 8, sequences=3)
    expected = evaluate(op, inputs, cu_seqlens=pack((3, 0, 6)), **ALL)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            y = op(**inputs, cu_seqlens=pack((3, 0, 6)))
        assert not y.requires_grad
        assert torch.equal(y, expected["output 0"])


def test_conjugated_views(assert_near: Check):
    inputs = linear_inputs(2, 9, 3, dtype=torch.complex64)
    lazy = {k: v.detach().conj() for k, v in inputs.items()}
    assert all(v.is_conj() for v in lazy.values())
    solid = {k: v.resolve_conj() for k, v in lazy.items()}
    results = [dict(zip("hs", linear_scan(**v, **ALL), strict=True)) for v in (lazy, solid)]
    near(assert_near, *results)


def test_input_changed_in_place_is_noticed():
    given = linear_inputs(2, 9, 3)
    x = given["x"].detach() * 1
    out = linear_scan(**given | {"x": x})
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
