"""The ops under a GPU's machinery: CUDA graphs, streams, autocast, opcheck, inductor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import (
    assert_all_near,
    conv_inputs,
    each,
    evaluate,
    pack,
    pair_inputs,
    scan_inputs,
)
from tests.core.registered_cases import (
    CONV,
    CONV_BACKWARD,
    SCAN,
    SCAN_BACKWARD,
    STEP,
    conv_args,
    scan_args,
    step_args,
    without_grad,
)
from torch import Tensor

from scanweave.core import (
    bidirectional_selective_scan,
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_step,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
Check = Callable[..., None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool):
    for args in (
        scan_args(2, packed, device="cuda"),
        scan_args(1, packed, bare=True, device="cuda"),
    ):
        torch.library.opcheck(SCAN, args)
        plain = without_grad(args)
        torch.library.opcheck(SCAN, plain)
        out, y, final, kept = SCAN(*plain)
        given = (torch.randn_like(out), torch.randn_like(final), *plain[:-1], y, kept)
        torch.library.opcheck(SCAN_BACKWARD, given)
    for bare in (False, True):
        args = conv_args(packed, bare, device="cuda")
        torch.library.opcheck(CONV, args)
        plain = without_grad(args)
        torch.library.opcheck(CONV_BACKWARD, (torch.randn_like(plain[0]), *plain))
    for bare in (False, True):
        torch.library.opcheck(STEP, step_args(bare, device="cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
def test_compiles_with_inductor(assert_near: Check, dynamic: bool):
    torch._dynamo.reset()

    def both(x: Tensor, weight: Tensor, **kw: Any) -> Tensor:
        u = causal_conv1d(torch.tanh(x), weight, activation="silu")
        return torch.relu(selective_scan(u, **kw))

    f = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for length in (70, 197) if dynamic else (70,):
        inputs = scan_inputs(3, length, 64, 16, dtype=torch.float32, device="cuda")
        inputs["weight"] = conv_inputs(1, 1, 64, 4, dtype=torch.float32, device="cuda")["weight"]
        assert_all_near(assert_near, evaluate(f, inputs), evaluate(both, inputs))


# the leaves were made on another stream than the captured one; the capture itself is what counts
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("packed", [False, True])
def test_graph_capture_of_training(packed: bool):
    """Forward and backward captured once and replayed on other values."""
    lengths = (30, 0, 50, 20)
    pairs = pair_inputs(
        1, 100, 64, 16, sequences=4 if packed else None, dtype=torch.float32, device="cuda"
    )
    cu = pack(lengths, "cuda") if packed else None
    leaves = [v for pair in pairs.values() for v in (pair if isinstance(pair, tuple) else (pair,))]
    weight = conv_inputs(1, 1, 64, 4, dtype=torch.float32, device="cuda")["weight"]
    leaves.append(weight)
    target = torch.randn(1, 100, 64, device="cuda")

    def step() -> list[Tensor]:
        x = tuple(causal_conv1d(v, weight, activation="silu", cu_seqlens=cu) for v in pairs["x"])
        out, states = bidirectional_selective_scan(
            **(pairs | {"x": x}), cu_seqlens=cu, return_final_state=True
        )
        loss = (out * target).sum() + states[0].square().sum()
        return [out, *torch.autograd.grad(loss, leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        fresh = scan_inputs(1, 100, 64, 16, dtype=torch.float32, device="cuda", seed=seed)
        with torch.no_grad():
            pairs["x"][0].copy_(fresh["x"])
            pairs["A"][1].copy_(fresh["A"])
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_graph_capture_of_steps():
    drawn = scan_inputs(4, 1, 64, 16, dtype=torch.float32, device="cuda")
    given = {k: v.detach() for k, v in drawn.items()}
    state = given.pop("initial_state")
    tokens = {k: v[:, 0].clone() for k, v in given.items() if k in ("x", "dt", "B", "C", "z")}
    weights = {k: v for k, v in given.items() if k not in tokens}
    drawn = conv_inputs(4, 1, 64, 4, dtype=torch.float32, device="cuda")
    conv = {k: v.detach() for k, v in drawn.items()}
    kept, window = state.clone(), conv.pop("initial_state")
    start = window.clone()
    conv.pop("x")

    def step() -> Tensor:
        u = causal_conv1d_step(tokens["x"], window, **conv, activation="silu")
        return selective_scan_step(kept, **(tokens | {"x": u}), **weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    kept.copy_(state)
    window.copy_(start)
    inputs = torch.randn(5, 4, 64, device="cuda")
    replayed = []
    for x in inputs:
        tokens["x"].copy_(x)
        graph.replay()
        replayed.append(y.clone())
    after = kept.clone(), window.clone()
    kept.copy_(state)
    window.copy_(start)
    for x, expected in zip(inputs, replayed, strict=True):
        tokens["x"].copy_(x)
        assert torch.equal(step(), expected)
    assert torch.equal(kept, after[0])
    assert torch.equal(window, after[1])


def test_devices_must_agree():
    inputs = scan_inputs(1, 5, 4, 3, sequences=2, dtype=torch.float32, device="cuda")
    cu = pack((2, 3))
    with pytest.raises(ValueError, match="cu_seqlens must be on cuda:0 as x is, got cpu"):
        selective_scan(**inputs, cu_seqlens=cu)
    with pytest.raises(ValueError, match="dt must be on cuda:0 as x is, got cpu"):
        selective_scan(**inputs | {"dt": inputs["dt"].cpu()})
    conv = conv_inputs(1, 5, 4, 3, dtype=torch.float32, device="cuda")
    with pytest.raises(ValueError, match="weight must be on cuda:0 as x is, got cpu"):
        causal_conv1d(**conv | {"weight": conv["weight"].cpu()})


def test_bad_cu_seqlens_is_seen_before_the_kernel():
    inputs = scan_inputs(1, 5, 4, 3, dtype=torch.float32, device="cuda", without=("initial_state",))
    for values in ((0, 9, 5), (0, 3), (1, 5), (0, 4, 2, 5)):
        cu = torch.tensor(values, dtype=torch.int32, device="cuda")
        with pytest.raises(ValueError, match="cu_seqlens must"):
            selective_scan(**inputs, cu_seqlens=cu)
    torch.cuda.synchronize()


def test_a_second_stream():
    inputs = scan_inputs(2, 65, 64, 16, dtype=torch.float32, device="cuda")
    expected = selective_scan(**inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = selective_scan(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, expected)


def test_autocast(assert_near: Check):
    linear = torch.nn.Linear(64, 64, device="cuda")
    given = scan_inputs(2, 65, 64, 16, dtype=torch.float32, device="cuda")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            x = linear(given["x"])
            out, state = selective_scan(**given | {"x": x}, return_final_state=True)
        assert (out.dtype, state.dtype) == (dtype, torch.float32)
        exact = selective_scan(**each(given | {"x": x}, Tensor.double), return_final_state=True)
        assert_near(out, exact[0])
        assert_near(state, exact[1])
        (g,) = torch.autograd.grad(out.float().square().mean(), linear.weight)
        assert torch.isfinite(g).all()
