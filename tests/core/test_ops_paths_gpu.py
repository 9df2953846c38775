"""The scan along paths on a GPU at sizes of real models, against float64 there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import assert_all_near, assert_equal, each, evaluate, pack
from tests.core.path_cases import path_inputs, random_paths
from torch import Tensor

from scanweave.core import grid_paths, path_selective_scan

pytestmark = [pytest.mark.gpu, pytest.mark.poison, pytest.mark.timeout(600)]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)


def check(assert_near: Check, inputs: dict[str, Any], **options: Any) -> None:
    """Outputs and gradients against the same op on float64 inputs."""
    actual = evaluate(path_selective_scan, inputs, **options)
    dtypes = [v.dtype for name, v in actual.items() if name.startswith("output")]
    doubled = each(inputs, Tensor.double)
    exact = evaluate(path_selective_scan, doubled, rounded_to=dtypes, **options)
    assert all(v.dtype == torch.float64 for v in exact.values())
    assert_all_near(assert_near, actual, exact)


@DTYPES
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("batch", "height", "width", "dim", "state", "kind"),
    [
        (4, 56, 56, 192, 1, "cross"),
        (8, 14, 14, 768, 1, "cross"),
        (4, 7, 7, 1536, 1, "hilbert"),
        (2, 9, 31, 130, 16, "serpentine"),
        (2, 20, 11, 96, 4, "zigzag"),
    ],
)
def test_grids(
    assert_near: Check,
    batch: int,
    height: int,
    width: int,
    dim: int,
    state: int,
    kind: str,
    seed: int,
    dtype: torch.dtype,
):
    paths = grid_paths(height, width, kind, device="cuda")
    inputs = path_inputs(
        batch,
        height * width,
        dim,
        state,
        paths.shape[0],
        without=("z",) if seed else (),
        dtype=dtype,
        weights=torch.float32,
        device="cuda",
        seed=seed,
    )
    check(assert_near, inputs, paths=paths, **(ALL if seed < 2 else {}))


@DTYPES
def test_packed(assert_near: Check, dtype: torch.dtype):
    lengths = (0, 1, 300, 77, 0, 1200, 33, 64)
    length = sum(lengths)
    inputs = path_inputs(
        1,
        length,
        130,
        8,
        3,
        groups=2,
        sequences=len(lengths),
        dtype=dtype,
        weights=torch.float32,
        device="cuda",
    )
    check(
        assert_near,
        inputs,
        paths=random_paths(3, length, lengths=lengths, device="cuda"),
        reverse=(False, True, False),
        cu_seqlens=pack(lengths, "cuda"),
        **ALL,
    )


def test_long_path(assert_near: Check):
    inputs = path_inputs(1, 50_000, 32, 4, 2, dtype=torch.float32, device="cuda")
    check(assert_near, inputs, paths=random_paths(2, 50_000, device="cuda"), **ALL)


def test_runs_repeat_bit_by_bit():
    inputs = path_inputs(4, 196, 96, 1, dtype=torch.bfloat16, device="cuda")
    paths = grid_paths(14, 14, device="cuda")
    first = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    for _ in range(3):
        assert_equal(evaluate(path_selective_scan, inputs, paths=paths, **ALL), first)


def test_bad_paths_are_refused_on_the_gpu():
    """By name and before a kernel runs: an index out of bounds would end the process's GPU use."""
    inputs = path_inputs(2, 9, 4, 3, 2, dtype=torch.float32, device="cuda")
    for token, got in ((9, "got 9"), (-1, "got -1"), (2**31 - 1, "got 2147483647")):
        paths = random_paths(2, 9, device="cuda")
        paths[1, 4] = token
        with pytest.raises(ValueError, match=got):
            path_selective_scan(**inputs, paths=paths)
    torch.cuda.synchronize()


def test_values_are_read_once(never_waiting: Callable[..., Any]):
    inputs = path_inputs(2, 9, 4, 3, 2, dtype=torch.float32, device="cuda")
    paths = random_paths(2, 9, device="cuda")
    path_selective_scan(**inputs, paths=paths).sum().backward()
    with never_waiting():
        path_selective_scan(**inputs, paths=paths).sum().backward()


def test_cuda_graph_follows_its_paths():
    """Captured with one path, replayed with another, and with one that is out of bounds."""
    given = path_inputs(2, 12, 8, 3, dtype=torch.float32, device="cuda")
    inputs = {name: v.detach() for name, v in given.items()}
    paths = grid_paths(3, 4, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        path_selective_scan(**inputs, paths=paths)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = path_selective_scan(**inputs, paths=paths)
    for other in (grid_paths(3, 4, "hilbert", device="cuda"), random_paths(4, 12, device="cuda")):
        paths.copy_(other)
        graph.replay()
        assert torch.equal(out, path_selective_scan(**inputs, paths=other))
    paths.fill_(2**31 - 1)
    graph.replay()
    torch.cuda.synchronize()
    paths.copy_(grid_paths(3, 4, device="cuda"))
    graph.replay()
    assert torch.equal(out, path_selective_scan(**inputs, paths=grid_paths(3, 4, device="cuda")))
