"""Dense state-space models in chunks against their recurrence, registration, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from torch import Tensor

from scanweave.core.ops.dense import dense_scan, dense_ssm, state_powers
from scanweave.core.ops.dense.op import chunk_layout

Check = Callable[..., None]


def contraction(dim: int, state: int, dtype: torch.dtype) -> Tensor:
    """Matrices less the identity, none of whose powers grows, from slow to fast."""
    turn = torch.randn(dim, state, state, dtype=torch.float64)
    spread = 10 ** torch.linspace(-2.5, 0, dim, dtype=torch.float64)[:, None, None]
    A = spread * (turn - turn.mT - 0.3 * turn @ turn.mT - 0.1 * torch.eye(state))
    eye = torch.eye(state, dtype=torch.float64)
    return torch.linalg.solve(eye - 0.5 * A, A).to(dtype)


def model(
    dim: int, state: int, readouts: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    B = torch.randn(dim, state, dtype=torch.float64).to(dtype)
    C = torch.randn(dim, readouts, state, dtype=torch.float64).to(dtype)
    return tuple(v.requires_grad_() for v in (contraction(dim, state, dtype), B, C))  # type: ignore[return-value]


def loop(
    x: Tensor, E: Tensor, B: Tensor, C: Tensor, state: Tensor | None, **how: bool
) -> tuple[Tensor, Tensor]:
    """Token by token in float64: outputs (B, L, D, M) and the last state."""
    x, E, B, C = (v.double() for v in (x, E, B, C))
    h = x.new_zeros(x.shape[0], *B.shape) if state is None else state.double()
    reverse, exclusive = how.get("reverse", False), how.get("exclusive", False)
    rows = []
    tokens = x.unbind(1)
    for token in reversed(tokens) if reverse else tokens:
        after = h + torch.einsum("dnk,bdk->bdn", E, h) + B * token.unsqueeze(-1)
        rows.append(torch.einsum("dmn,bdn->bdm", C, h if exclusive else after))
        h = after
    if not rows:
        return x.new_zeros(*x.shape, C.shape[1]), h
    return torch.stack(rows[::-1] if reverse else rows, 1), h


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("how", [{}, {"reverse": True}, {"exclusive": True}], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (2, 63, 3, 2), (2, 64, 1, 5), (3, 200, 2, 1), (1, 129, 4, 1)], ids=str
)
def test_equals_the_recurrence(
    assert_near: Check, sizes: tuple[int, ...], how: dict[str, Any], dtype: torch.dtype
):
    batch, length, state, readouts = sizes
    weights = model(3, state, readouts, dtype)
    x = torch.randn(batch, length, 3, dtype=dtype).requires_grad_()
    before = torch.randn(batch, 3, state, dtype=dtype).requires_grad_()
    y, last = dense_ssm(x, *weights, initial_state=before, return_final_state=True, **how)
    expected = loop(x, *weights, before, **how)
    assert last is not None
    assert_near(y, expected[0], dtype=dtype, factor=0.2)
    assert_near(last, expected[1], dtype=dtype, factor=0.2)
    plain, none = dense_ssm(x, *weights, **how)
    assert none is None
    assert_near(plain, loop(x, *weights, None, **how)[0], dtype=dtype, factor=0.2)
    g, g_last = torch.randn_like(y), torch.randn_like(last)
    given = (x, before, *weights)
    actual = torch.autograd.grad((y, last), given, (g, g_last))
    for a, e in zip(
        actual, torch.autograd.grad(expected, given, (g.double(), g_last.double())), strict=True
    ):
        assert_near(a, e, dtype=dtype, gradient=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "lengths", [(3, 0, 130, 64, 1, 0), (0, 2), (64,), (65, 63), (0, 0)], ids=str
)
def test_packed_is_separate(assert_near: Check, lengths: tuple[int, ...], reverse: bool):
    weights = model(2, 3, 2)
    x = torch.randn(1, sum(lengths), 2, dtype=torch.float64).requires_grad_()
    before = torch.randn(len(lengths), 2, 3, dtype=torch.float64).requires_grad_()
    how = {"reverse": reverse}
    y, last = dense_ssm(
        x, *weights, initial_state=before, cu_seqlens=pack(lengths), return_final_state=True, **how
    )
    parts = [loop(v, *weights, before[i : i + 1], **how) for i, v in enumerate(x.split(lengths, 1))]
    expected = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    assert last is not None
    assert_near(y, expected[0])
    assert_near(last, expected[1])
    if not x.numel():
        assert all(v is not None for v in torch.autograd.grad(y.sum(), (x, *weights)))
        return
    g = torch.randn_like(y), torch.randn_like(last)
    given = (x, before, *weights)
    actual = torch.autograd.grad((y, last), given, g)
    for a, e in zip(actual, torch.autograd.grad(expected, given, g), strict=True):
        assert_near(a, e, gradient=True)


def test_nothing_crosses_a_border():
    weights = [v.detach() for v in model(2, 3, 1)]
    x, cu = torch.randn(1, 150, 2, dtype=torch.float64), pack((70, 10, 70))
    clean, _ = dense_ssm(x, *weights, cu_seqlens=cu)
    x[:, 70:80] = torch.nan
    y, _ = dense_ssm(x, *weights, cu_seqlens=cu)
    assert torch.equal(y[:, :70], clean[:, :70])
    assert torch.equal(y[:, 80:], clean[:, 80:])


def test_slow_states_keep_their_digits():
    """A memory of 1e4 steps in float32: powers of I + E itself would be off by 1e-3."""
    E = torch.full((1, 1, 1), -1e-4)
    one = torch.ones(1, 1)
    x = torch.zeros(1, 20_000, 1)
    x[:, 0] = 1
    y, _ = dense_ssm(x, E, one, one.unsqueeze(1))
    wanted = torch.exp(torch.arange(20_000).double() * torch.log1p(E.double()).flatten())
    assert ((y.flatten() - wanted) / wanted).abs().max() < 5e-6


def test_powers():
    E, B, C = (v.detach() for v in model(2, 3, 2))
    into, out, powers = state_powers(E, B, C, 3)
    step = torch.eye(3) + E
    for j in range(8):
        power = torch.linalg.matrix_power(step, j)
        assert torch.allclose(into[..., j], (power @ B.unsqueeze(-1)).squeeze(-1))
        assert torch.allclose(out[:, j], C @ power)
    for k in range(4):
        assert torch.allclose(powers[k] + torch.eye(3), torch.linalg.matrix_power(step, 2**k))


# opcheck itself reads .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_registered(longest: int):
    u = torch.randn(2, 8, 3, dtype=torch.float64).requires_grad_()
    E = contraction(2, 3, torch.float64).requires_grad_()
    position = torch.arange(8) % longest
    args = (u, E, position, longest)
    torch.library.opcheck(torch.ops.scanweave.dense_scan.default, args)
    assert torch.autograd.gradcheck(lambda a, b: dense_scan(a, b, position, longest), (u, E))
    h = dense_scan(*args).detach()
    given = (torch.randn_like(h), h, E.detach(), position, longest)
    torch.library.opcheck(torch.ops.scanweave.dense_scan_backward.default, given)
    with torch.no_grad():
        assert torch.equal(dense_scan(*args), h)


@pytest.mark.parametrize("reverse", [False, True])
def test_layout(reverse: bool):
    cu = pack((5, 0, 1, 4))
    torch.library.opcheck(torch.ops.scanweave.chunk_layout.default, (cu, 10, 4, reverse))
    slot, position, owner, first = (v.tolist() for v in chunk_layout(cu, 10, 4, reverse))
    # chunks of 4: two of the first sequence, one of the third, one of the last; two stay empty
    assert first == [0, 2, 2, 3]
    assert owner[:4] == [0, 0, 2, 3]
    assert position == [0, 1, 0, 0, 1, 2]
    forward = [0, 1, 2, 3, 4, 8, 12, 13, 14, 15]
    assert slot == ([4, 3, 2, 1, 0, 8, 15, 14, 13, 12] if reverse else forward)


def test_errors():
    E, B, C = (v.detach() for v in model(2, 3, 1))
    x = torch.randn(1, 5, 2, dtype=torch.float64)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"x": x[0]}, r"x must be \(B, L, D\) and floating point, got \(5, 2\)"),
        ({"x": x.long()}, "x must be .* floating point, got .*int64"),
        ({"E": E[:1]}, r"E must be \(D, N, N\) with D = 2, got \(1, 3, 3\)"),
        ({"E": E[..., :2]}, r"E must be \(D, N, N\) with D = 2, got \(2, 3, 2\)"),
        ({"B": B[:, :2]}, r"B must be \(D, N\) = \(2, 3\), got \(2, 2\)"),
        ({"C": C[..., :2]}, r"C must be \(D, M, N\) with E's \(2, 3\), got \(2, 1, 2\)"),
        ({"initial_state": B}, r"initial_state must be \(B, D, N\) = \(1, 2, 3\), got \(2, 3\)"),
        ({"cu_seqlens": pack((2, 2))}, "cu_seqlens must start at 0 and end at the length 5"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 5])}, "cu_seqlens must not fall, got 4 then 2"),
    ]
    good: dict[str, Any] = {"x": x, "E": E, "B": B, "C": C}
    for change, match in bad:
        with pytest.raises(ValueError, match=match):
            dense_ssm(**{**good, **change})
    u, place = torch.randn(2, 4, 3, dtype=torch.float64), torch.arange(4)
    with pytest.raises(ValueError, match=r"u must be \(D, C, N\) and float32 or float64"):
        dense_scan(u.half(), E, place, 4)
    with pytest.raises(
        ValueError, match=r"E must be \(D, N, N\) = \(2, 3, 3\) .*, got \(2, 3, 3\)"
    ):
        dense_scan(u, E.float(), place, 4)
    with pytest.raises(ValueError, match=r"position must be int64 \(C,\) = \(4,\), got .* \(3,\)"):
        dense_scan(u, E, place[:3], 4)
