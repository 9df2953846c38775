"""C files of ops: who runs what, and what is said where there is no compiler."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.gated_cases import gated_inputs
from tests.core.linear_cases import linear_inputs, wkv_inputs
from tests.core.op_cases import Inputs, conv_inputs, evaluate, scan_inputs

from scanweave.core import (
    causal_conv1d,
    gated_linear_scan,
    linear_scan,
    selective_scan,
    selective_scan_step,
)
from scanweave.core.ops import native
from scanweave.core.ops.conv import compiled as conv
from scanweave.core.ops.gated import compiled as gated
from scanweave.core.ops.linear import compiled as linear
from scanweave.core.ops.native import Native
from scanweave.core.ops.selective import compiled as scan
from scanweave.core.ops.selective import compiled_step
from scanweave.core.ops.wkv import compiled as average
from scanweave.core.ops.wkv import wkv

# by the name that errors give
MODULES = {
    "selective_scan": scan,
    "selective_scan_step": compiled_step,
    "the convolution": conv,
    "linear_scan": linear,
    "wkv": average,
    "gated_linear_scan": gated,
}
FILES = {name: module.native for name, module in MODULES.items()}


def _step(**inputs: Any) -> torch.Tensor:
    tokens = ("x", "dt", "B", "C", "z")
    given = {k: v.detach()[:, 0] if k in tokens else v.detach() for k, v in inputs.items()}
    return selective_scan_step(given.pop("initial_state").clone(), **given).requires_grad_()


# op, its inputs
OPS: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "selective_scan": (selective_scan, scan_inputs(2, 33, 5, 3, dtype=torch.float32)),
    "selective_scan_step": (_step, scan_inputs(2, 1, 5, 3, dtype=torch.float32)),
    "the convolution": (causal_conv1d, conv_inputs(2, 33, 5, 4, dtype=torch.float32)),
    "linear_scan": (linear_scan, linear_inputs(2, 33, 5, dtype=torch.float32)),
    "wkv": (wkv, wkv_inputs(2, 33, 5, dtype=torch.float32)),
    "gated_linear_scan": (gated_linear_scan, gated_inputs(2, 33, 2, 3, 5, dtype=torch.float32)),
}


def run_all() -> dict[str, dict[str, torch.Tensor]]:
    """Outputs and gradients of every op."""
    found = {}
    for name, (op, inputs) in OPS.items():
        if name == "selective_scan_step":
            with torch.no_grad():
                found[name] = {"output 0": op(**inputs).detach()}
        else:
            found[name] = evaluate(op, inputs)
    return found


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a fresh process whose cache is empty."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("SCANWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_told", set())
    for file in FILES.values():
        monkeypatch.setattr(file, "_loaded", None)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("environment", "level", "text"),
    [
        ({"PATH": "", "CC": ""}, logging.WARNING, "no C compiler; install gcc or clang"),
        ({"CC": "/no/compiler"}, logging.WARNING, "set it to a C compiler"),
        ({"CC": "false"}, logging.WARNING, "false failed"),
        ({"SCANWEAVE_COMPILED": "0"}, logging.INFO, "unset it to compile"),
    ],
    ids=["no compiler", "wrong path", "failing compiler", "off"],
)
def test_all_ops_fall_back_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str],
    level: int,
    text: str,
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for file in FILES.values():
        monkeypatch.setattr(file, "run", None)
    with caplog.at_level(logging.INFO, "scanweave"):
        first, second = run_all(), run_all()
    (record,) = [v for v in caplog.records if v.name == "scanweave"]
    assert record.levelno == level
    assert text in record.getMessage()
    for name, file in FILES.items():
        assert not file.types
        assert file.status().startswith("off: ")
        assert text in file.status()
        for key, v in first[name].items():
            assert torch.equal(v, second[name][key]), (name, key)


def test_all_ops_run_their_file(assert_near: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not scan.native.types:
        pytest.skip(f"no compiler ({scan.status()})")
    for name, file in FILES.items():
        calls = []
        run = file.run
        monkeypatch.setattr(
            file, "run", lambda *a, calls=calls, run=run: calls.append(a) or run(*a)
        )
        inside = run_all()[name]
        assert calls, name
        with monkeypatch.context() as patch:
            patch.setattr(MODULES[name], "takes", lambda *_: False)
            count = len(calls)
            outside = run_all()[name]
            assert len(calls) == count, name
        for key, v in inside.items():
            assert_near(v, outside[key])


def test_says_how_it_was_compiled():
    if not scan.native.types:
        pytest.skip(f"no compiler ({scan.status()})")
    for file in FILES.values():
        assert file.status().startswith("on: ")
        assert f"{file.source.stem}-" in file.status()
    assert {torch.float32, torch.bfloat16} <= scan.native.types


def test_other_devices_and_dtypes_are_left(monkeypatch: pytest.MonkeyPatch):
    def refused() -> None:
        raise AssertionError("asked for the library although no tensor is for it")

    file = Native(Path("none.c"), "none")
    monkeypatch.setattr(file, "_library", refused)
    assert not file.takes([torch.ones(2, device="meta"), torch.ones(2)])
    assert not file.takes([None])
    loaded = native._Loaded(None, frozenset({torch.float32}), "")
    monkeypatch.setattr(file, "_library", lambda: loaded)
    assert file.takes([torch.ones(2), None, torch.ones(1)])
    assert not file.takes([torch.ones(2), torch.ones(1, dtype=torch.float64)])
    assert not file.takes([torch.ones(2), torch.ones(1, device="meta")])


@pytest.mark.parametrize("name", FILES)
def test_no_memory_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch):
    class Full:
        function = staticmethod(lambda _: 1)

    file = FILES[name]
    monkeypatch.setattr(file, "_loaded", native._Loaded(Full, frozenset(), ""))
    with pytest.raises(MemoryError, match=f"{name} has no memory left for its sums; use smaller"):
        file.run("function", [1, 2])


def test_threads_are_worth_their_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [native.threads(n, 10) for n in (0, 9, 10, 29, 30, 1000)] == [1, 1, 1, 2, 3, 4]
