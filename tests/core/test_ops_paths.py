"""The scan along paths against its definition in float64: every output, every gradient."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import (
    LAYOUTS,
    OPTIONAL,
    assert_all_near,
    assert_equal,
    compare,
    each,
    evaluate,
    pack,
)
from tests.core.path_cases import path_inputs, path_ref, random_paths
from torch import Tensor

from scanweave.core import path_selective_scan
from scanweave.core.ops.selective import compiled, path_values, portable

pytestmark = pytest.mark.poison
Check = Callable[..., None]
# B, L, D, N, K, groups: one, odd, aligned, ragged
SHAPES = [
    (1, 1, 1, 1, 1, None),
    (2, 63, 5, 3, 2, 5),
    (2, 40, 64, 16, 4, 1),
    (1, 70, 130, 1, 3, 2),
]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
EACH_DTYPE = pytest.mark.parametrize(("dtype", "weights"), DTYPES, ids=lambda d: str(d)[6:])
PATHS = pytest.mark.parametrize("path", ["compiled", "portable"], indirect=True)
RAGGED = (0, 5, 1, 0, 40, 1, 3, 0)
ALL: dict[str, Any] = {"return_final_state": True}


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs float32 and 16 bits on a CPU; without a compiler both are the portable path."""
    if request.param == "portable":
        monkeypatch.setattr(compiled, "takes", lambda _: False)
    return request.param


@PATHS
@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(
    assert_near: Check, shape: tuple, dtype: torch.dtype, weights: torch.dtype, path: str
):
    *sizes, count, groups = shape
    inputs = path_inputs(*sizes, directions=count, groups=groups, dtype=dtype, weights=weights)
    options = {"paths": random_paths(count, sizes[1]), "reverse": [k == 1 for k in range(count)]}
    compare(assert_near, path_selective_scan, path_ref, inputs, **options, **ALL)


@PATHS
@EACH_DTYPE
def test_equals_definition_packed(
    assert_near: Check, dtype: torch.dtype, weights: torch.dtype, path: str
):
    length, sequences = sum(RAGGED), len(RAGGED)
    inputs = path_inputs(
        1, length, 10, 3, 3, groups=2, sequences=sequences, dtype=dtype, weights=weights
    )
    options = {
        "paths": random_paths(3, length, lengths=RAGGED),
        "reverse": (False, True, False),
        "cu_seqlens": pack(RAGGED),
    }
    compare(assert_near, path_selective_scan, path_ref, inputs, **options, **ALL)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("count", range(len(OPTIONAL) + 1))
def test_every_set_of_options(assert_near: Check, count: int, softplus: bool):
    for dtype, without in itertools.product(
        (torch.float64, torch.float32), itertools.combinations(OPTIONAL, count)
    ):
        inputs = path_inputs(2, 10, 4, 3, 2, without=without, dtype=dtype)
        options = {"paths": random_paths(2, 10).long(), "dt_softplus": softplus}
        # the state's gradient is absent where nobody reads the state
        final = ALL if count % 3 else {}
        compare(assert_near, path_selective_scan, path_ref, inputs, **options, **final)


@PATHS
def test_gradient_of_the_state_only(assert_near: Check, path: str):
    inputs = path_inputs(2, 9, 6, 3, 2, without=("C", "D", "z"), dtype=torch.float32)
    paths = random_paths(2, 9)

    def final(op: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda **kw: op(**kw, C=torch.zeros_like(kw["B"]), paths=paths, **ALL)[1]

    compare(assert_near, final(path_selective_scan), final(path_ref), inputs)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", *OPTIONAL])
def test_gradient_of_one_input_only(name: str):
    inputs, options = path_inputs(2, 9, 6, 3, 2), {"paths": random_paths(2, 9), **ALL}
    every = evaluate(path_selective_scan, inputs, **options)
    rest = {k: v.detach() for k, v in inputs.items() if k != name}
    alone = evaluate(
        lambda **kw: path_selective_scan(**rest, **kw, **options), {name: inputs[name]}
    )
    assert_equal(alone, {k: every[k] for k in alone})


@PATHS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(assert_near: Check, layout: str, path: str):
    inputs = path_inputs(2, 10, 6, 3, 2, groups=2, dtype=torch.float32)
    paths = random_paths(2, 10)
    strided = each(inputs, LAYOUTS[layout])
    assert any(not v.is_contiguous() for v in strided.values())
    expected = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    wide = torch.stack([paths, paths + 99], -1)[..., 0]
    actual = evaluate(path_selective_scan, strided, paths=wide, **ALL)
    assert_all_near(assert_near, actual, expected)


def test_chunks_of_a_projection(assert_near: Check):
    """Inputs as a block makes them: views of one projection of the tokens."""
    rng = torch.Generator().manual_seed(0)
    projected = torch.randn(2, 9, 2 * (6 + 3 + 3), generator=rng, dtype=torch.float64)
    A = -torch.rand(2, 6, 3, generator=rng, dtype=torch.float64).requires_grad_()

    def through(op: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(projected: Tensor, A: Tensor) -> Tensor:
            dt, B, C = projected.unflatten(2, (2, 12)).split([6, 3, 3], -1)
            return op(dt.sum(2), dt, A, B, C, paths=random_paths(2, 9))

        return run

    inputs = {"projected": projected.requires_grad_(), "A": A}
    compare(assert_near, through(path_selective_scan), through(path_ref), inputs)


@PATHS
def test_many_threads_repeat_bit_by_bit(assert_near: Check, path: str):
    inputs = path_inputs(2, 200, 96, 8, 2, dtype=torch.float32)
    options = {"paths": random_paths(2, 200), **ALL}
    one = evaluate(path_selective_scan, inputs, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        first = evaluate(path_selective_scan, inputs, **options)
        assert_equal(evaluate(path_selective_scan, inputs, **options), first)
    finally:
        torch.set_num_threads(threads)
    assert_all_near(assert_near, first, one)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0), (0, 0, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int], dtype: torch.dtype, path: str):
    inputs = path_inputs(*sizes, 3, 2, dtype=dtype)
    values = evaluate(path_selective_scan, inputs, paths=random_paths(2, sizes[1]), **ALL)
    assert values["output 0"].shape == sizes
    for name, v in inputs.items():
        assert values[f"gradient of {name}"].shape == v.shape, name
        if name != "initial_state":
            assert not values[f"gradient of {name}"].any(), name
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], inputs["initial_state"])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_empty_pack(lengths: tuple[int, ...]):
    inputs = path_inputs(1, 0, 3, 2, 2, sequences=len(lengths), dtype=torch.float32)
    options = {"paths": random_paths(2, 0), "cu_seqlens": pack(lengths), **ALL}
    values = evaluate(path_selective_scan, inputs, **options)
    assert torch.equal(values["output 1"], inputs["initial_state"])
    assert not values["gradient of A"].any()


def test_leaves_inputs_alone():
    inputs, paths = path_inputs(2, 9, 6, 3, 2, dtype=torch.float32), random_paths(2, 9)
    before = {name: v.detach().clone() for name, v in inputs.items()}
    kept = paths.clone()
    evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    assert torch.equal(paths, kept)
    for name, v in inputs.items():
        assert torch.equal(v, before[name]), name


def ints(*rows: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(rows, dtype=dtype)


def zeros(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


ERRORS = [
    ({"x": zeros(2, 5)}, "x must be (B, L, D), got (2, 5)"),
    ({"x": None}, "x must be (B, L, D), got NoneType"),
    ({"x": zeros(2, 3, 4, dtype=torch.int64)}, "x must be floating point, got torch.int64"),
    ({"dt": zeros(2, 3, 4)}, "dt must be (B, L, K, D) = (2, 3, 2, 4), got (2, 3, 4)"),
    ({"A": zeros(4, 3)}, "A must be (K, D, N), got (4, 3)"),
    ({"A": None}, "A must be (K, D, N), got NoneType"),
    ({"A": zeros(2, 4, 3, dtype=torch.complex64)}, "A must be real, got torch.complex64"),
    ({"A": zeros(3, 4, 3)}, "A must be (K, D, N) = (2, 4, 3), got (3, 4, 3)"),
    ({"A": zeros(2, 4, 0)}, "A must have at least one state, got (2, 4, 0)"),
    ({"B": zeros(2, 3, 3)}, "B must be (B, L, K, N) or (B, L, K, G, N), got (2, 3, 3)"),
    ({"B": zeros(2, 3, 1, 3)}, "B must be (B, L, K, N) = (2, 3, 2, 3), got (2, 3, 1, 3)"),
    ({"C": zeros(2, 3, 2, 1, 3)}, "C must be (B, L, K, N) = (2, 3, 2, 3), got (2, 3, 2, 1, 3)"),
    (
        {"B": zeros(2, 3, 2, 3, 3), "C": zeros(2, 3, 2, 3, 3)},
        "B must have groups that divide the 4 channels, got 3",
    ),
    ({"D": zeros(4)}, "D must be (K, D) = (2, 4), got (4,)"),
    ({"dt_bias": zeros(1, 4)}, "dt_bias must be (K, D) = (2, 4), got (1, 4)"),
    ({"z": zeros(2, 3, 2, 4)}, "z must be (B, L, D) = (2, 3, 4), got (2, 3, 2, 4)"),
    (
        {"initial_state": zeros(2, 4, 3)},
        "initial_state must be (K, B, D, N) = (2, 2, 4, 3), got (2, 4, 3)",
    ),
    ({"reverse": (True,)}, "reverse must have one item for each of 2 paths, got 1 items"),
    ({"reverse": True}, "reverse must have one item for each of 2 paths, got True"),
    ({"paths": None}, "paths must be (K, L), got NoneType"),
    ({"paths": ints((0, 1, 2))[0]}, "paths must be (K, L), got (3,)"),
    ({"paths": zeros(2, 3)}, "paths must be int32 or int64, got torch.float64"),
    ({"paths": ints((0, 1, 2)).to("meta")}, "paths must be on cpu as x is, got meta"),
    ({"paths": zeros(0, 3, dtype=torch.int32)}, "paths must have at least one row, got (0, 3)"),
    ({"paths": ints((0, 1), (1, 0))}, "paths must have L = 3 columns, got (2, 2)"),
]
# rows of three tokens, the second row at fault
VALUES = [
    ((0, 1, 1), "paths must visit every token from 0 to 2 once, got 1 twice in row 1"),
    ((0, 1, 3), "paths must visit every token from 0 to 2 once, got 3 in row 1"),
    ((-1, 1, 2), "paths must visit every token from 0 to 2 once, got -1 in row 1"),
    ((2**31 - 1, 1, 2), "paths must visit every token from 0 to 2 once, got 2147483647 in row 1"),
]
STRAY = "paths must stay within each packed sequence, got token 2 at step 0 of row 1"


def arguments(**changes: Any) -> dict[str, Any]:
    given = path_inputs(2, 3, 4, 3, 2, without=("initial_state",))
    return given | {"paths": random_paths(2, 3)} | changes


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[text for _, text in ERRORS])
def test_names_the_bad_argument(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        path_selective_scan(**arguments(**changes))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("row", "message"), VALUES, ids=str)
def test_names_the_bad_path(row: tuple[int, ...], message: str, dtype: torch.dtype):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        path_selective_scan(**arguments(paths=ints((2, 0, 1), row, dtype=dtype)))


def test_paths_stay_within_packed_sequences():
    given = path_inputs(1, 3, 4, 3, 2, without=("initial_state",))
    paths, cu = ints((0, 2, 1), (2, 1, 0)), pack((1, 2))
    with pytest.raises(ValueError, match="^" + re.escape(STRAY)):
        path_selective_scan(**given, paths=paths, cu_seqlens=cu)
    # right for one packing says nothing about another, nor about the same one changed
    path_selective_scan(**given, paths=paths, cu_seqlens=pack((3,)))
    with pytest.raises(ValueError, match="^" + re.escape(STRAY)):
        path_selective_scan(**given, paths=paths, cu_seqlens=cu)
    moved = torch.tensor([0, 3, 3], dtype=torch.int32)
    path_selective_scan(**given, paths=paths, cu_seqlens=moved)
    moved[1] = 1
    with pytest.raises(ValueError, match="^" + re.escape(STRAY)):
        path_selective_scan(**given, paths=paths, cu_seqlens=moved)


def test_values_are_read_once_and_after_each_change(monkeypatch: pytest.MonkeyPatch):
    reads = []
    sort = Tensor.sort
    monkeypatch.setattr(Tensor, "sort", lambda *v: reads.append(v) or sort(*v))
    given = arguments()
    for _ in range(3):
        path_selective_scan(**given).sum().backward()
    assert len(reads) == 1
    given["paths"][0, 0] = 7
    with pytest.raises(ValueError, match="got 7 in row 0"):
        path_selective_scan(**given)
    packed = path_inputs(1, 3, 4, 3, 2, without=("initial_state",))
    packed |= {"paths": random_paths(2, 3), "cu_seqlens": pack((3,))}
    reads.clear()
    for _ in range(3):
        path_selective_scan(**packed).sum().backward()
    assert len(reads) == 1


def test_a_cuda_graph_clamps_paths(monkeypatch: pytest.MonkeyPatch):
    """What a capture records, which has no values to check; the GPU tests replay one."""

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    paths = ints((-5, 1, 2**31 - 1), dtype=torch.int64).as_subclass(OnGpu)
    assert path_values.readable(paths, None, 3).tolist() == [[0, 1, 2]]


def test_no_other_path_runs(monkeypatch: pytest.MonkeyPatch):
    """float32 stays in C where there is a compiler."""
    given = {k: v.detach().float() if v.is_floating_point() else v for k, v in arguments().items()}
    if not compiled.takes([given["x"]]):
        pytest.skip("no compiler")

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the op left the compiled library")

    monkeypatch.setattr(portable, "scan_forward", refused)
    assert path_selective_scan(**given).dtype == torch.float32


def test_no_second_derivatives():
    given = arguments()
    out = path_selective_scan(**given)
    (dx,) = torch.autograd.grad(out.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
