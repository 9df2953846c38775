"""The Triton kernels along paths against float64: interpreted (TRITON_INTERPRET=1) or on a GPU.

Interpreting is slow, so shapes are tiny; all that a path does not touch is in
`test_ops_kernels.py`.
"""

import os
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

from scanweave.core import grid_paths, path_selective_scan, selective_scan
from scanweave.core.ops.selective import compiled, portable
from scanweave.core.ops.selective.kernels import CHUNK, LONG_CHUNK

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> str:
    """The interpreter reads and writes memory of the CPU."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another path would give right results as well, so it must not run."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the op left the Triton kernels")

    for name in ("scan_forward", "scan_backward"):
        monkeypatch.setattr(portable, name, refused)
    for name in ("forward", "backward"):
        monkeypatch.setattr(compiled, name, refused)


# B, L, D, N, K, groups, reverse
SIZES = [
    (1, 1, 1, 1, 1, None, (False,)),
    (2, 5, 3, 3, 2, None, (False, True)),
    (1, 3, 70, 16, 2, None, (True, False)),  # several blocks of channels, the last one ragged
    (2, 6, 6, 1, 4, None, (False,) * 4),  # SS2D
    (1, 6, 6, 4, 3, 3, (False, True, True)),
    (1, CHUNK, 2, 1, 2, None, (False, True)),
    (1, CHUNK + 1, 2, 3, 2, 2, (False, True)),
    (1, 2 * CHUNK + 1, 3, 3, 1, None, (False,)),
    (1, LONG_CHUNK + 1, 2, 1, 1, None, (False,)),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_scan(assert_near: Check, device: str, sizes: tuple):
    *shape, groups, reverse = sizes
    inputs = path_inputs(*shape, groups=groups, dtype=torch.float32, device=device)
    options = {"paths": random_paths(shape[4], shape[1], device=device), "reverse": reverse}
    compare(assert_near, path_selective_scan, path_ref, inputs, **options, **ALL)


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("without", [(), ("z",), ("D", "dt_bias"), OPTIONAL], ids=str)
def test_options(assert_near: Check, device: str, without: tuple[str, ...], softplus: bool):
    inputs = path_inputs(1, 4, 3, 2, 2, without=without, dtype=torch.float32, device=device)
    options = {"paths": random_paths(2, 4, device=device).long(), "dt_softplus": softplus}
    # the state's gradient is absent where nobody reads the state
    final = ALL if softplus else {}
    compare(assert_near, path_selective_scan, path_ref, inputs, **options, **final)


@pytest.mark.parametrize(
    ("lengths", "state"),
    [((0, 3, 1, 0, 0, 2, 0), 3), ((CHUNK, 1, CHUNK + 1), 1), ((0, CHUNK + 3), 2)],
    ids=str,
)
def test_packed(assert_near: Check, device: str, lengths: tuple[int, ...], state: int):
    length, sequences = sum(lengths), len(lengths)
    inputs = path_inputs(
        1, length, 3, state, 2, sequences=sequences, dtype=torch.float32, device=device
    )
    options = {
        "paths": random_paths(2, length, lengths=lengths, device=device),
        "reverse": (False, True),
        "cu_seqlens": pack(lengths, device),
    }
    compare(assert_near, path_selective_scan, path_ref, inputs, **options, **ALL)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_half(assert_near: Check, device: str, half: torch.dtype):
    for weights, without in ((torch.float32, ()), (half, ("z",))):
        inputs = path_inputs(
            1, 5, 5, 3, 3, without=without, dtype=half, weights=weights, device=device
        )
        options = {"paths": random_paths(3, 5, device=device)}
        compare(assert_near, path_selective_scan, path_ref, inputs, **options, **ALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_agrees(assert_near: Check, device: str, dtype: torch.dtype):
    paths = grid_paths(2, 3, device=device)
    inputs = path_inputs(2, 6, 3, 1, dtype=dtype, weights=torch.float32, device=device)
    exact = path_ref(**each(inputs, Tensor.double), paths=paths, **ALL)
    with torch.no_grad():
        for a, e in zip(path_selective_scan(**inputs, paths=paths, **ALL), exact, strict=True):
            assert_near(a, e)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(assert_near: Check, device: str, layout: str):
    inputs = path_inputs(2, 3, 4, 3, 2, groups=2, dtype=torch.float32, device=device)
    paths = random_paths(2, 3, device=device)
    expected = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    strided = each(inputs, LAYOUTS[layout])
    wide = torch.stack([paths, paths + 99], -1)[..., 0]
    actual = evaluate(path_selective_scan, strided, paths=wide, **ALL)
    assert_all_near(assert_near, actual, expected)


def test_the_natural_path_is_a_plain_scan(assert_near: Check, device: str):
    inputs = path_inputs(2, 6, 5, 3, 1, dtype=torch.float32, device=device)
    paths = torch.arange(6, dtype=torch.int32, device=device)[None]

    def plain(x: Tensor, z: Tensor, dt: Tensor, B: Tensor, C: Tensor, **kw: Tensor) -> Any:
        given: Any = {name: v[0] for name, v in kw.items()}
        out, state = selective_scan(x, dt[:, :, 0], B=B[:, :, 0], C=C[:, :, 0], z=z, **given, **ALL)
        return out, state[None]

    actual = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    assert_all_near(assert_near, actual, evaluate(plain, inputs))


def test_runs_repeat_bit_by_bit(device: str):
    inputs = path_inputs(1, 8, 5, 3, 2, sequences=3, dtype=torch.float32, device=device)
    options = {
        "paths": random_paths(2, 8, lengths=(3, 0, 5), device=device),
        "cu_seqlens": pack((3, 0, 5), device),
        **ALL,
    }
    first = evaluate(path_selective_scan, inputs, **options)
    assert_equal(evaluate(path_selective_scan, inputs, **options), first)


@pytest.mark.parametrize("sizes", [(2, 0, 4), (0, 5, 4), (2, 5, 0), (0, 0, 0)], ids=str)
def test_empty(device: str, sizes: tuple[int, int, int]):
    inputs = path_inputs(*sizes, 3, 2, dtype=torch.float32, device=device)
    paths = random_paths(2, sizes[1], device=device)
    values = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    assert values["output 0"].shape == sizes
    for name, v in inputs.items():
        assert values[f"gradient of {name}"].shape == v.shape, name
        if name != "initial_state":
            assert not values[f"gradient of {name}"].any(), name
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], inputs["initial_state"])
