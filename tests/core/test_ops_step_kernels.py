"""Single steps in one launch: the short convolution's and the matrix-state scan's."""

import os

import pytest
import torch
from tests.core.gated_cases import gated_inputs
from torch import Tensor

from scanweave.core import causal_conv1d_step
from scanweave.core.ops.conv import op as conv_op
from scanweave.core.ops.gated import gated_linear_scan_step, step, step_kernel

pytestmark = [pytest.mark.interpret, pytest.mark.poison]
KINDS = ("none", "heads", "tokens", "channels", "all")


@pytest.fixture
def device() -> str:
    """The interpreter reads and writes memory of the CPU."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def _refused(*_: object) -> None:
    raise AssertionError("the step left its kernel")


@pytest.mark.parametrize("kind", KINDS)
def test_gated_step(kind: str, device: str, monkeypatch: pytest.MonkeyPatch):
    inputs = gated_inputs(2, 3, 4, 3, 5, groups=2, kind=kind)
    given = {k: v.detach().float() for k, v in inputs.items()}
    start = given.pop("initial_state")
    if kind in ("heads", "channels"):
        given["g"] = given["g"].expand(2, 3, *given["g"].shape)
    for exclusive in (False, True):
        expected, state = start.double(), start.to(device)
        # not contiguous, as a slot of a larger memory is
        state = torch.stack([state, state], -1)[..., 0]
        for t in range(3):
            doubled = {name: v[:, t].double() for name, v in given.items()}
            token = {name: v[:, t].to(device) for name, v in given.items()}
            g, write, skip = (doubled.get(name) for name in ("g", "write", "skip"))
            vectors = (doubled["q"], doubled["k"], doubled["v"])
            y = step._composed(expected, *vectors, g, write, skip, exclusive)
            with monkeypatch.context() as only:
                only.setattr(step, "_composed", _refused)
                out = gated_linear_scan_step(state, **token, exclusive=exclusive)
            torch.testing.assert_close(out.double().cpu(), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_gated_step_in_blocks_of_values(device: str, monkeypatch: pytest.MonkeyPatch):
    rng = torch.Generator().manual_seed(0)
    state, q, k, v = (
        torch.randn(shape, generator=rng)
        for shape in ((1, 2, 6, 7), (1, 2, 6), (1, 2, 6), (1, 2, 7))
    )
    after = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    y = (q.unsqueeze(-2) @ after).squeeze(-2)
    half = [u.to(device, torch.bfloat16) for u in (q, k, v)]
    monkeypatch.setattr(step_kernel, "TILE", 16)
    moved = state.to(device)
    out = gated_linear_scan_step(moved, *half)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float().cpu(), y, rtol=3e-2, atol=5e-2)
    torch.testing.assert_close(moved.cpu(), after, rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_step(width: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conv_op, "computing_dtype", _refused)
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    for dim, bias, silu in ((5, True, True), (200, False, False)):
        tokens, weight = draw(2, 3, dim), draw(dim, width)
        offset = draw(dim) if bias else None
        past = draw(2, width - 1, dim)
        # wider than the inputs, and channels that are not adjacent
        state = past.float().to(device).transpose(1, 2).contiguous().transpose(1, 2)
        window = torch.cat([past, tokens], 1).double()
        for t in range(3):
            given = None if offset is None else offset.to(device)
            out = causal_conv1d_step(
                tokens[:, t].to(device),
                state,
                weight.to(device),
                given,
                "silu" if silu else None,
            )
            y = (window[:, t : t + width] * weight.double().T).sum(1)
            y = y if offset is None else y + offset.double()
            y = torch.nn.functional.silu(y) if silu else y
            assert out.dtype == dtype
            near = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out.double().cpu(), y, rtol=near, atol=near)
        torch.testing.assert_close(state.double().cpu(), window[:, 3:], rtol=0, atol=0)


def test_steps_of_nothing(device: str):
    for batch, dim in ((0, 3), (2, 0)):
        x, weight = torch.zeros(batch, dim, device=device), torch.zeros(dim, 4, device=device)
        state = torch.zeros(batch, 3, dim, device=device)
        assert causal_conv1d_step(x, state, weight).shape == (batch, dim)
    v, q = torch.zeros(0, 2, 3, device=device), torch.zeros(0, 1, 4, device=device)
    state = torch.zeros(0, 2, 4, 3, device=device)
    assert gated_linear_scan_step(state, q, q, v).shape == (0, 2, 3)
