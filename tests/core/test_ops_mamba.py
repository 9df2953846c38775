"""The Mamba block as one operator: it computes what its parts compute, and keeps less."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from scanweave.core import create_mixer
from scanweave.core.mixers import mamba
from scanweave.core.ops.conv import pair
from scanweave.core.ops.mamba.gate_kernel import gate

Check = Callable[..., None]
CONFIGS = [
    {},
    {"d_state": 3, "d_conv": 1, "expand": 1, "bias": True, "average": False},
    {"conv_bias": False, "dt_rank": 2},
]


def build(config: dict[str, Any], dtype: torch.dtype = torch.float64, dim: int = 8) -> Any:
    mixer = create_mixer("bimamba", dim, dtype=dtype, **config)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


@contextmanager
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mixers run the operators that the block is made of."""
    with monkeypatch.context() as patch:
        patch.setattr(mamba._MambaBase, "_whole", lambda self, x: False)
        yield


def run(mixer: Any, x: Tensor, cu_seqlens: Tensor | None = None) -> list[Tensor]:
    """Output and every gradient."""
    y = mixer(x, cu_seqlens=cu_seqlens)
    torch.manual_seed(1)
    # the same values whatever the dtype
    g = torch.randn(y.shape, dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, [x, *mixer.parameters()], g)
    return [y.detach(), *grads]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_block_is_its_parts(
    monkeypatch: pytest.MonkeyPatch, assert_near: Check, config: dict[str, Any], packed: bool
):
    mixer = build(config)
    x = torch.randn(1 if packed else 2, 13, 8, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 4, 4, 13], dtype=torch.int32) if packed else None
    found = run(mixer, x, cu_seqlens)
    with in_parts(monkeypatch):
        wanted = run(mixer, x, cu_seqlens)
    for actual, expected in zip(found, wanted, strict=True):
        assert_near(actual, expected, factor=0.1)


def test_block_under_autocast(monkeypatch: pytest.MonkeyPatch):
    mixer = build({}, torch.float32, 16)
    x = torch.randn(2, 13, 16, requires_grad=True)
    exact = run(mixer, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(mixer, x)
        with in_parts(monkeypatch):
            wanted = run(mixer, x)
    assert [v.dtype for v in found] == [v.dtype for v in wanted]
    for actual, parts, true in zip(found, wanted, exact, strict=True):
        off, allowed = ((v.float() - true).norm() for v in (actual, parts))
        # both round to bfloat16, in other places
        assert off <= 2 * allowed + 5e-3 * true.norm()


def test_frozen_and_alone(assert_near: Check):
    """Without gradients, or with those of the input only, the output is the same."""
    mixer = build({})
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = mixer(x)
    assert_near(mixer(x), wanted)
    mixer.requires_grad_(False)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(mixer(x).sum(), x)
    mixer.requires_grad_(True)
    (expected,) = torch.autograd.grad(mixer(x).sum(), x)
    assert_near(dx, expected)


def kept_bytes(mixer: Any, x: Tensor) -> int:
    """Bytes that autograd keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    kept: dict[int, int] = {}

    def pack(v: Tensor) -> Tensor:
        storage = v.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        y = mixer(x)
    total = sum(kept.values())
    y.sum().backward()
    return total


def test_block_keeps_less(monkeypatch: pytest.MonkeyPatch):
    mixer = build({"d_state": 4}, torch.float32, 32)
    x = torch.randn(4, 64, 32)
    found = kept_bytes(mixer, x)
    with in_parts(monkeypatch):
        wanted = kept_bytes(mixer, x)
    # two convolutions, two of time steps and the gated output: 5 activations of 64 channels
    assert wanted - found > 4.5 * 4 * 64 * 64 * 4


def test_replaced_projections_run(assert_near: Check):
    """A projection with a hook, or of another class, is called and not taken apart."""
    mixer = build({})
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    wanted = mixer(x)
    calls = []
    hook = mixer.x_proj_b.register_forward_hook(lambda *_: calls.append(1))
    assert_near(mixer(x), wanted)
    assert calls == [1]
    hook.remove()

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    double = Doubled(16, 8, bias=False, dtype=torch.float64)
    double.weight = mixer.out_proj.weight
    mixer.out_proj = double
    # the averaging mixer reads the weight itself
    mixer.average = False
    assert_near(mixer(x), 4 * wanted)


def arguments(dtype: torch.dtype = torch.float64) -> tuple:
    """Of the registered op, with gradients."""
    sizes = [(6, 2), (6,), (7, 6), (6, 3), (6, 2), (6,), (6,)]
    lists = [[0.3 * torch.randn(*s, dtype=dtype) for _ in range(2)] for s in sizes]
    lists[4] = [-v.abs() for v in lists[4]]
    x, w_in, w_out = (torch.randn(*s, dtype=dtype) for s in ((2, 5, 4), (12, 4), (4, 6)))
    tensors = (x, w_in, None, *lists, w_out, None)
    for v in (x, w_in, w_out, *(t for one in lists for t in one)):
        v.requires_grad_()
    return (*tensors, None, [False, True], True)


# opcheck itself looks at the gradients of copies, which are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    given = arguments()
    op = torch.ops.scanweave.mamba_block.default
    torch.library.opcheck(op, given)
    out, *kept = op(*given)
    assert [v.numel() for v in kept] == [0] * 4
    with torch.no_grad():
        kept = op(*given)[1:]
        grads = (torch.randn_like(out), *given[:-1], *kept)
        torch.library.opcheck(torch.ops.scanweave.mamba_block_backward.default, grads)


def test_gradcheck():
    given = arguments()
    flat = [v for v in tree_leaves(given) if isinstance(v, Tensor)]

    def call(*tensors: Tensor) -> Tensor:
        found = iter(tensors)

        def swap(v: object) -> object:
            return next(found) if isinstance(v, Tensor) else v

        return torch.ops.scanweave.mamba_block(*tree_map(swap, given))[0]

    assert torch.autograd.gradcheck(call, flat)


def test_compiles_whole(assert_near: Check):
    mixer = build({}, torch.float32)
    x = torch.randn(2, 7, 8, requires_grad=True)
    wanted = run(mixer, x)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(run(compiled, x), wanted, strict=True):
        assert_near(actual, expected)


def device() -> str:
    """The interpreter reads and writes memory of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [False, True])
def test_directions_convolve_in_one_launch(
    monkeypatch: pytest.MonkeyPatch, assert_near: Check, packed: bool
):
    mixer = build({"d_state": 2, "expand": 1}, torch.float32).to(device())
    x = torch.randn(1 if packed else 2, 13, 8, device=device(), requires_grad=True)
    ends = torch.tensor([0, 4, 4, 13], dtype=torch.int32, device=device())
    cu_seqlens = ends if packed else None
    with ExitStack() as stack:
        forward, backward = (
            stack.enter_context(mock.patch.object(pair, name, wraps=getattr(pair, name)))
            for name in ("pair_forward", "pair_backward")
        )
        found = run(mixer, x, cu_seqlens)
    # the backward convolves anew
    assert (forward.call_count, backward.call_count) == (2, 1)
    with in_parts(monkeypatch):
        wanted = run(mixer, x, cu_seqlens)
    for actual, expected in zip(found, wanted, strict=True):
        assert_near(actual, expected)


def test_projections_are_written_in_place():
    """Products of all directions go into one tensor, which is not stacked from copies."""
    mixer = build({}, torch.float32)
    x = torch.randn(2, 7, 8, requires_grad=True)
    wanted = run(mixer, x)
    with mock.patch.object(torch, "stack", side_effect=AssertionError):
        found = run(mixer, x)
    for actual, expected in zip(found, wanted, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.interpret
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 33), (1, 70, 40)])
def test_gate_kernel(shape: tuple[int, int, int]):
    y = torch.randn(shape, device=device())
    both = torch.randn(*shape[:2], 2 * shape[2], device=device())
    z = both[..., shape[2] :]
    torch.testing.assert_close(gate(y, z), y * nn.functional.silu(z), atol=1e-6, rtol=1e-5)
    assert gate(y[:0], z[:0]).shape == (0, *shape[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_block_on_a_gpu(training: bool):
    """Under autocast it is near to float32, outputs and gradients."""
    mixer = build({}, torch.float32, 64).cuda()
    x = torch.randn(4, 197, 64, device="cuda", requires_grad=training)

    def outputs() -> list[Tensor]:
        if training:
            return run(mixer, x)
        with torch.no_grad():
            return [mixer(x)]

    wanted = outputs()
    with torch.autocast("cuda", torch.bfloat16):
        found = outputs()
    for actual, true in zip(found, wanted, strict=True):
        assert (actual.float() - true).norm() <= 5e-2 * true.norm()
