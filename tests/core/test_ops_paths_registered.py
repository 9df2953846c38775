"""The registered scan along paths under torch's machinery: opcheck, compile, export, fakes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import LENGTHS, assert_equal, each, evaluate, pack
from tests.core.path_cases import path_inputs, random_paths
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from scanweave.core import grid_paths, path_selective_scan
from scanweave.core.ops.selective import compiled as scan_in_c

Check = Callable[..., None]
SCAN = torch.ops.scanweave.path_selective_scan.default
SCAN_BACKWARD = torch.ops.scanweave.path_selective_scan_backward.default
# opcheck itself looks at the gradients of copies, which are no leaves
OPCHECK = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CASES = [{}, {"packed": True}, {"bare": True}, {"training": False}]
ALL: dict[str, Any] = {"return_final_state": True}


def scan_args(
    packed: bool = False,
    bare: bool = False,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
) -> tuple:
    """Positional arguments of the registered op, as exported programs call it."""
    given = path_inputs(
        1 if packed else 2, 11, 4, 3, 2, groups=2, sequences=5 if packed else None, dtype=dtype
    )
    if not grad:
        given = {name: v.detach() for name, v in given.items()}
    names = ("D", "dt_bias", "initial_state", "z")
    optional = [None if bare else given[name] for name in names]
    tensors = [given[name] for name in ("x", "dt", "A", "B", "C")]
    paths = random_paths(2, 11, lengths=LENGTHS if packed else None)
    cu = pack(LENGTHS) if packed else None
    return (*tensors, *optional, paths, cu, [False, True], not bare, training)


@OPCHECK
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: dict[str, Any]):
    torch.library.opcheck(SCAN, scan_args(**case))
    torch.library.opcheck(SCAN, scan_args(**case, grad=False))


@OPCHECK
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_opcheck_backward(case: dict[str, Any]):
    args = scan_args(**case, grad=False)
    out, y, final, kept = SCAN(*args)
    for dfinal in (None, torch.randn_like(final)):
        given = (torch.randn_like(out), dfinal, *args[:-1], y, kept)
        torch.library.opcheck(SCAN_BACKWARD, given)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_fake_results_look_like_real_ones(case: dict[str, Any], dtype: torch.dtype, training: bool):
    args = scan_args(**case, dtype=dtype, training=training, grad=False)

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


def test_calling_the_op_itself_is_differentiable():
    args = scan_args()
    inputs = [v for v in args[:9] if v.requires_grad]
    assert len(inputs) == 9
    out, y, final, kept = SCAN(*args)
    assert not y.requires_grad
    assert kept.numel() == 0
    grads = torch.autograd.grad([out.sum(), final.sum()], inputs)
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state", "z")
    given = dict(zip(names, inputs, strict=True))
    results = path_selective_scan(**given, paths=args[9], reverse=args[11], **ALL)
    expected = torch.autograd.grad([v.sum() for v in results], inputs)
    for a, e in zip(grads, expected, strict=True):
        assert torch.equal(a, e)


def test_meta_tensors_give_shapes():
    inputs, paths, cu = path_inputs(1, 11, 4, 3, 2, sequences=5), random_paths(2, 11), pack((11,))
    inputs["initial_state"] = inputs["initial_state"][:, :1].detach().requires_grad_()
    real = evaluate(path_selective_scan, inputs, paths=paths, cu_seqlens=cu, **ALL)
    meta = evaluate(
        path_selective_scan,
        each(inputs, lambda v: v.to("meta")),
        paths=paths.to("meta"),
        cu_seqlens=cu.to("meta"),
        **ALL,
    )
    for name, v in meta.items():
        assert v.is_meta
        assert (v.shape, v.dtype) == (real[name].shape, real[name].dtype), name


def compiled(op: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(op, fullgraph=True, backend="aot_eager", **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiles_to_one_graph(dtype: torch.dtype):
    f = compiled(path_selective_scan, dynamic=False)
    inputs = path_inputs(2, 9, 8, 7, 3, dtype=dtype)
    options = {"paths": random_paths(3, 9), "reverse": (False, True, False)}
    expected = evaluate(path_selective_scan, inputs, **options, **ALL)
    assert_equal(evaluate(f, inputs, **options, **ALL), expected)
    with torch.no_grad():
        assert torch.equal(f(**inputs, **options), expected["output 0"])


def test_compiles_for_any_size():
    f = compiled(path_selective_scan, dynamic=True)
    # sizes that differ from all others: equal ones are one symbol to the compiler
    for batch, length in ((3, 9), (2, 5), (4, 20)):
        inputs = path_inputs(batch, length, 8, 7, 6)
        paths = random_paths(6, length)
        expected = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
        with torch._dynamo.config.patch(error_on_recompile=batch != 3):
            assert_equal(evaluate(f, inputs, paths=paths, **ALL), expected)


def test_compiles_packed():
    f = compiled(path_selective_scan, dynamic=True)
    for i, lengths in enumerate([(3, 0, 7), (1, 1, 5), (6, 2, 0, 9, 2)]):
        inputs = path_inputs(1, sum(lengths), 8, 7, 6, sequences=len(lengths))
        paths = random_paths(6, sum(lengths), lengths=lengths)
        options = {"paths": paths, "cu_seqlens": pack(lengths), **ALL}
        expected = evaluate(path_selective_scan, inputs, **options)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_equal(evaluate(f, inputs, **options), expected)


def test_compiled_still_checks():
    f = compiled(path_selective_scan)
    inputs, paths = path_inputs(2, 9, 4, 3, 2), random_paths(2, 9)
    paths[1, 3] = 9
    with pytest.raises(ValueError, match="paths must visit every token from 0 to 8 once, got 9"):
        f(**inputs, paths=paths)


def test_paths_can_be_made_in_the_graph():
    def scan(**kw: Any) -> Tensor:
        return path_selective_scan(**kw, paths=grid_paths(3, 4, "cross"))

    inputs = path_inputs(2, 12, 8, 7, 4)
    assert_equal(evaluate(compiled(scan), inputs), evaluate(scan, inputs))


class Scanned(nn.Module):
    """A scan whose paths are a buffer, as a model keeps them."""

    paths: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        given = path_inputs(1, 1, 4, 3, dtype=torch.float32)
        self.A, self.dt_bias = nn.Parameter(given["A"]), nn.Parameter(given["dt_bias"])
        self.register_buffer("paths", grid_paths(height, width), persistent=False)

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The gated scan."""
        return path_selective_scan(x, dt, self.A, B, C, z=x, dt_bias=self.dt_bias, paths=self.paths)


def test_exports_and_still_trains(assert_near: Check):
    model = Scanned(3, 4)

    def draw(batch: int) -> tuple[Tensor, ...]:
        given = path_inputs(batch, 12, 4, 3, dtype=torch.float32)
        return tuple(given[name].detach() for name in ("x", "dt", "B", "C"))

    sizes = {0: torch.export.Dim("batch", max=100)}
    program = torch.export.export(model, draw(2), dynamic_shapes=(sizes,) * 4, strict=False)
    exported = program.module()
    for args in (draw(2), draw(5)):
        expected, actual = model(*args), exported(*args)
        assert torch.equal(actual, expected)
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        parameters = dict(exported.named_parameters())
        leaves = [parameters[name] for name, _ in model.named_parameters()]
        for a, e in zip(torch.autograd.grad(actual.square().sum(), leaves), wanted, strict=True):
            assert_near(a, e, gradient=True)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "scanweave.path_selective_scan.default" in names


@pytest.mark.parametrize("path", ["compiled", "portable"])
def test_autocast_does_not_touch_the_op(path: str, monkeypatch: pytest.MonkeyPatch):
    if path == "portable":
        monkeypatch.setattr(scan_in_c, "takes", lambda _: False)
    inputs = path_inputs(2, 9, 8, 7, 2, dtype=torch.float32)
    options = {"paths": random_paths(2, 9), **ALL}
    expected = evaluate(path_selective_scan, inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(evaluate(path_selective_scan, inputs, **options), expected)


def test_inference_mode():
    lengths = (3, 0, 6)
    inputs = path_inputs(1, 9, 8, 7, 2, sequences=3)
    paths = random_paths(2, 9, lengths=lengths)
    options: Any = {"paths": paths, "cu_seqlens": pack(lengths)}
    expected = evaluate(path_selective_scan, inputs, **options, **ALL)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            # tensors made inside are inference tensors, which have no version counter
            options = {"paths": paths.clone(), "cu_seqlens": pack(lengths)}
            y = path_selective_scan(**inputs, **options)
        assert not y.requires_grad
        assert torch.equal(y, expected["output 0"])


def test_checkpointing_repeats_the_forward():
    inputs, paths = path_inputs(2, 9, 4, 3, 2), random_paths(2, 9)
    names = list(inputs)

    def saved(**kw: Tensor) -> Tensor:
        def f(*v: Tensor) -> Tensor:
            given: Any = dict(zip(names, v, strict=True))
            return path_selective_scan(**given, paths=paths)

        out = checkpoint(f, *kw.values(), use_reentrant=False)
        assert isinstance(out, Tensor)
        return out

    assert_equal(evaluate(saved, inputs), evaluate(path_selective_scan, inputs, paths=paths))


@pytest.mark.parametrize("changed", ["x", "paths"])
def test_input_changed_in_place_is_noticed(changed: str):
    inputs: dict[str, Any] = path_inputs(2, 9, 4, 3, 2)
    inputs |= {"x": inputs["x"].detach() * 1, "paths": random_paths(2, 9)}
    out = path_selective_scan(**inputs)
    inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
