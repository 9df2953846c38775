"""Kernels as Triton's compiler reads them, for every mixture of dtypes that an op takes.

The interpreter, which runs them on a CPU, knows no types: a variable that a loop makes float32
where it was bfloat16 is an error on a GPU alone. Ops run here on values that are never read, while
their launches are recorded and each one's source is checked, up to machine code. The shared memory
of the widest kernels is checked as well.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks import compiled_code
from benchmarks.compiled_code import TARGETS, Launch, check_types, recorded, shared_memory
from tests.core.gated_cases import gated_inputs, gated_pairs
from tests.core.linear_cases import linear_inputs, wkv_inputs
from tests.core.op_cases import Inputs, conv_inputs, each, evaluate, pack, pair_inputs, scan_inputs
from tests.core.path_cases import path_inputs, random_paths
from torch import Tensor

from scanweave.core import (
    bidirectional_gated_linear_scan,
    bidirectional_selective_scan,
    causal_conv1d,
    gated_linear_scan,
    linear_scan,
    path_selective_scan,
    rms_norm_gated,
    rotate_both,
    selective_scan,
    symmetric_conv1d,
    wkv,
)
from scanweave.core.ops.norm.cast import add_rms_norm_cast, rms_norm_cast
from scanweave.core.ops.norm.layer import add_layer_norm_cast, layer_norm_cast

pytestmark = pytest.mark.skipif(
    compiled_code.interpreted(), reason="TRITON_INTERPRET=1: kernels are not compiled"
)
Mix = dict[str, Any]
HALF = torch.bfloat16
# of activations and of what models keep in float32; where all is float32, nothing can differ
MIXES: dict[str, Mix] = {
    "mixed": {"dtype": HALF, "weights": torch.float32},
    "half": {"dtype": HALF, "weights": HALF},
}
MIX = pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
LENGTH = 300
PACKED = {"cu_seqlens": pack((100, 0, 1, 199))}
STATE: dict[str, Any] = {"return_final_state": True}


def check(op: Callable[..., Any], inputs: Inputs, **options: Any) -> None:
    """Every kernel that `op` and its gradient launch."""
    with recorded() as launches:
        evaluate(op, inputs, **options)
    assert launches
    seen: list[tuple[Any, ...]] = []
    for launch in launches:
        if (form := distinct(launch)) not in seen:
            seen.append(form)
            check_types(launch)


def distinct(launch: Launch) -> tuple[Any, ...]:
    """A launch but for its numbers, which have one type."""
    kernel, named = launch.form
    sizes = {k for k, v in named.items() if type(v) is int and not k.isupper()}
    return kernel, {k: v for k, v in named.items() if k not in sizes}


@MIX
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_selective_scans(mix: Mix, packed: bool, bare: bool):
    rows = {"sequences": 4} if packed else {}
    cu = PACKED if packed else {}
    without = ("D", "z", "dt_bias", "initial_state") if bare else ()
    for reverse in (False, True):
        inputs = scan_inputs(1, LENGTH, 24, 16, without=without, **rows, **mix)
        check(selective_scan, inputs, reverse=reverse, **cu, **STATE)
    inputs = pair_inputs(1, LENGTH, 24, 3, groups=2, without=without, **rows, **mix)
    check(bidirectional_selective_scan, inputs, **cu, **STATE)


@MIX
@pytest.mark.parametrize("state", [1, 4])
def test_scans_along_paths(mix: Mix, state: int):
    inputs = path_inputs(2, LENGTH, 24, state, **mix)
    paths = random_paths(4, LENGTH)
    check(path_selective_scan, inputs, paths=paths, **STATE)


@MIX
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("kind", ["none", "heads", "tokens", "channels", "all"])
def test_matrix_states(mix: Mix, kind: str, exclusive: bool, packed: bool):
    rows = {"sequences": 4} if packed else {}
    cu = PACKED if packed else {}
    for reverse in (False, True):
        inputs = gated_inputs(1, LENGTH, 4, 24, 40, groups=2, kind=kind, **rows, **mix)
        options = {"reverse": reverse, "exclusive": exclusive, **cu, **STATE}
        check(gated_linear_scan, inputs, **options)


@MIX
@pytest.mark.parametrize("length", [LENGTH, 2000])
@pytest.mark.parametrize("form", ["add", "exclusive", "quasi_separable"])
@pytest.mark.parametrize("kind", ["none", "tokens", "all"])
def test_both_directions(mix: Mix, kind: str, form: str, length: int):
    """Chunks that read each other, and that go through states."""
    without = ("initial_state",)
    if kind == "none":
        without += ("write", "skip")
    inputs = gated_pairs(1, length, 4, 16, 16, groups=1, kind=kind, without=without, **mix)
    check(bidirectional_gated_linear_scan, inputs, form=form)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.complex64])
def test_linear_scans(dtype: torch.dtype, constant: bool):
    for decays in {dtype, torch.promote_types(dtype, torch.float32)}:
        for sequences, cu in ((None, {}), (4, PACKED)):
            inputs = linear_inputs(
                1, LENGTH, 40, constant=constant, dtype=dtype, decays=decays, sequences=sequences
            )
            for reverse in (False, True):
                check(linear_scan, inputs, reverse=reverse, **cu, **STATE)


@MIX
@pytest.mark.parametrize("constant", [False, True])
def test_weighted_averages(mix: Mix, constant: bool):
    for sequences, cu in ((None, {}), (4, PACKED)):
        inputs = wkv_inputs(1, LENGTH, 40, constant=constant, sequences=sequences, **mix)
        check(wkv, inputs, **cu, **STATE)


@MIX
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolutions(mix: Mix, activation: str | None):
    for sequences, cu in ((None, {}), (4, PACKED)):
        inputs = conv_inputs(1, LENGTH, 40, 4, sequences=sequences, **mix)
        for reverse in (False, True):
            check(causal_conv1d, inputs, activation=activation, reverse=reverse, **cu, **STATE)
        inputs = conv_inputs(1, LENGTH, 40, 7, without=("initial_state",), **mix)
        check(symmetric_conv1d, inputs, activation=activation, **cu)


@MIX
@pytest.mark.parametrize("norm_first", [False, True])
def test_norms(mix: Mix, norm_first: bool):
    x, z = (torch.zeros(2, 9, 48, dtype=mix["dtype"]) for _ in range(2))
    weight = torch.ones(48, dtype=mix["weights"])
    inputs = each({"x": x, "weight": weight, "z": z}, Tensor.clone)
    check(rms_norm_gated, inputs, group_size=24, norm_before_gate=norm_first)


@MIX
@pytest.mark.parametrize("stream", [torch.float32, HALF], ids=lambda d: str(d)[6:])
def test_layer_norms(mix: Mix, stream: torch.dtype):
    x, branch = (torch.zeros(9, 48, dtype=kind) for kind in (stream, mix["dtype"]))
    weight, bias = (torch.ones(48, dtype=mix["weights"]) for _ in range(2))
    inputs = each({"x": x, "branch": branch, "weight": weight, "bias": bias}, Tensor.clone)
    check(add_layer_norm_cast, inputs, eps=1e-5, dtype=HALF)
    del inputs["branch"]
    for dtype in (HALF, torch.float32):
        check(layer_norm_cast, inputs, eps=1e-5, dtype=dtype)


@MIX
@pytest.mark.parametrize("stream", [torch.float32, HALF], ids=lambda d: str(d)[6:])
def test_rms_norms(mix: Mix, stream: torch.dtype):
    x, branch = (torch.zeros(9, 48, dtype=kind) for kind in (stream, mix["dtype"]))
    weight = torch.ones(48, dtype=mix["weights"])
    inputs = each({"x": x, "branch": branch, "weight": weight}, Tensor.clone)
    check(add_rms_norm_cast, inputs, eps=1e-5, dtype=HALF)
    del inputs["branch"]
    for dtype in (HALF, torch.float32):
        check(rms_norm_cast, inputs, eps=1e-5, dtype=dtype)


@MIX
@pytest.mark.parametrize("halves", [False, True])
def test_rotations(mix: Mix, halves: bool):
    for heads, groups in ((4, 4), (4, 2), (1, 1)):
        q, k = (torch.zeros(2, LENGTH, n, 24, dtype=mix["dtype"]) for n in (heads, groups))
        angles = torch.zeros(LENGTH, heads if heads == groups else 1, 6, dtype=mix["weights"])
        inputs = each({"q": q, "k": k, "angles": angles}, Tensor.clone)
        check(rotate_both, inputs, halves=halves)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["tokens", "all"])
def test_widest_heads_fit_small_gpus(kind: str, dtype: torch.dtype):
    """Keys and values of 256; GPUs of consumers give a program 99 KB, data centres' over 160."""
    inputs = gated_inputs(1, LENGTH, 2, 256, 256, kind=kind, dtype=dtype, weights=torch.float32)
    with recorded() as launches:
        evaluate(gated_linear_scan, inputs, **STATE)
    for launch in {launch.name: launch for launch in launches}.values():
        assert shared_memory(launch, TARGETS["sm_80"]) < 99 << 10, launch.name


def test_wrong_types_are_found():
    """A kernel whose loop changes a variable's type."""
    triton = pytest.importorskip("triton")
    tl = triton.language
    globals()["tl"] = tl

    @triton.jit
    def kernel(x_ptr, count):
        total = tl.load(x_ptr)
        for _ in range(count):
            total = total.to(tl.float32) * 2.0
        tl.store(x_ptr, total)

    launch = Launch(kernel, (torch.zeros(1, dtype=HALF), 3), {"enable_fp_fusion": True}, (1,))
    with pytest.raises(triton.CompilationError, match="Loop-carried variable total"):
        check_types(launch)
