"""What all tests share: data folders, seeds, one tolerance table, NaN-poisoned allocations.

goldens, data_dir   folders outside the repository; a test that asks for one skips without it
assert_near         compare with a float64 reference by the table TOLERANCES
never_waiting       context in which the host must not wait for the GPU
poison              marker and option: uninitialised memory that scanweave asks for holds NaN
interpret, gpu      markers: need Triton's interpreter or a GPU, and skip without
"""

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

# one thread per worker: the tests are many small tensors, and several workers share the cores
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


class Tolerance(NamedTuple):
    """Largest allowed error, relative to the largest absolute value of the reference."""

    output: float
    gradient: float


# float32: rounding of one multiply-add chain of a few hundred steps is 1e-6 to 1e-5;
# 16-bit rows allow for the rounding of inputs and outputs only, the state is kept in float32
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-11, 1e-10),
    torch.float32: Tolerance(1e-5, 1e-4),
    torch.float16: Tolerance(4e-3, 8e-3),
    torch.bfloat16: Tolerance(2e-2, 4e-2),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options for data outside the repository and for poisoning."""
    group = parser.getgroup("scanweave")
    shared = ROOT.parent / "shared"
    group.addoption(
        "--goldens-dir",
        type=Path,
        default=shared / "goldens",
        help="outputs of public reference implementations (default: ../shared/goldens)",
    )
    group.addoption(
        "--data-dir",
        type=Path,
        default=shared / "data",
        help="real data sets (default: ../shared/data)",
    )
    group.addoption(
        "--poison",
        action="store_true",
        help="fill memory that scanweave allocates uninitialised with NaN, in every test",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Limit torch to the threads that the environment grants."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    has_gpu = torch.cuda.is_available()
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("interpret") and not (interprets or has_gpu):
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or a GPU"))


def _folder(config: pytest.Config, option: str) -> Path:
    path = config.getoption(option)
    assert isinstance(path, Path)
    if not path.is_dir():
        pytest.skip(f"no folder {path} (see {option})")
    return path


@pytest.fixture(scope="session")
def goldens(pytestconfig: pytest.Config) -> Path:
    """Folder with the reference implementations' outputs; skips when absent."""
    return _folder(pytestconfig, "--goldens-dir")


@pytest.fixture(scope="session")
def data_dir(pytestconfig: pytest.Config) -> Path:
    """Folder with real data sets; skips when absent."""
    return _folder(pytestconfig, "--data-dir")


@pytest.fixture(scope="session")
def tolerances() -> dict[torch.dtype, Tolerance]:
    """The tolerance table, by the dtype of the inputs."""
    return TOLERANCES


@pytest.fixture(scope="session")
def assert_near() -> Callable[..., None]:
    """A comparison with a more exact reference.

    `assert_near(actual, expected, dtype=None, gradient=False, name="", factor=1.0)`: the largest
    absolute difference, divided by the largest absolute value of `expected`, stays under the
    table's row for `dtype` (default: `actual.dtype`). NaN, infinities and wrong shapes fail.
    """

    def check(
        actual: Tensor | None,
        expected: Tensor | None,
        *,
        dtype: torch.dtype | None = None,
        gradient: bool = False,
        name: str = "value",
        factor: float = 1.0,
    ) -> None:
        assert actual is not None, f"{name} is None"
        assert expected is not None, f"reference of {name} is None"
        assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
        row = TOLERANCES[dtype or actual.dtype]
        limit = factor * (row.gradient if gradient else row.output)
        got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
        assert torch.isfinite(got).all(), f"{name} holds NaN or infinity"
        if want.numel() == 0:
            return
        scale = max(want.abs().max().item(), torch.finfo(torch.float32).tiny)
        error = (got - want).abs().max().item() / scale
        assert error <= limit, f"{name}: relative error {error:.3g} is over {limit:.3g}"

    return check


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random states, in any order and on any worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries under test read the global state)
    torch.manual_seed(0)


@contextmanager
def _never_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def never_waiting() -> Callable[[], AbstractContextManager[None]]:
    """A context in which whatever makes the host wait for the GPU raises."""
    return _never_waiting


@pytest.fixture(scope="session")
def _tables_of_torch() -> None:
    """Let torch collect its own functions while they are unpatched.

    `torch.device(...)` as a context and the compiler each look functions up in a table that they
    fill at first use; filled inside `_poison`, it would hold our wrappers for good.
    """
    with torch.device("meta"):
        torch.empty(0)
    torch.compile(torch.neg, backend="eager")(torch.ones(1))


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what scanweave allocates uninitialised with NaN.

    A kernel that forgets an element then shows in the comparison instead of passing by luck.
    Off unless the test or its module is marked `poison`, or pytest runs with `--poison`.
    """
    if not (request.config.getoption("--poison") or request.node.get_closest_marker("poison")):
        yield
        return
    request.getfixturevalue("_tables_of_torch")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        out = allocate(*args, **kwargs)
        # a traced graph calls the plain allocation: the wrapper must not become part of it
        if torch.compiler.is_compiling() or not _from_scanweave(sys._getframe(1)):
            return out
        if out.is_floating_point() or out.is_complex():
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return wrapper


def _from_scanweave(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("scanweave")
