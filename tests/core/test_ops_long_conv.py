"""Long convolutions against their sums, and diagonal state-space models in all their forms."""

import itertools
from typing import Any

import pytest
import torch
from tests.core.linear_cases import Check
from tests.core.op_cases import assert_all_near, evaluate, pack
from torch import Tensor

from scanweave.core.ops.long_conv import diagonal_ssm, diagonal_ssm_step, fft_conv, ssm_kernel
from scanweave.core.ops.long_conv.convolution import transform_size

ALL: dict[str, Any] = {"return_final_state": True}
REVERSE = pytest.mark.parametrize("reverse", [False, True])


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()


def convolved(
    x: Tensor, kernel: Tensor, D: Tensor, gate: Tensor, kernel_back: Tensor | None = None
) -> Tensor:
    """The sums themselves, through the matrix of all pairs."""
    lag = torch.arange(x.shape[1]).unsqueeze(1) - torch.arange(x.shape[1])

    def toeplitz(taps: Tensor, lag: Tensor) -> Tensor:
        inside = (lag >= 0) & (lag < taps.shape[1])
        return torch.where(inside, taps[:, lag.clamp(0, taps.shape[1] - 1)], 0.0)

    matrix = toeplitz(kernel, lag)
    if kernel_back is not None:
        matrix = matrix + toeplitz(kernel_back, -lag)
    return (torch.einsum("dts,bsd->btd", matrix, x) + D * x) * gate


@pytest.mark.parametrize("back", [0, 3, 40])
@pytest.mark.parametrize("taps", [1, 5, 19, 40])
@pytest.mark.parametrize("length", [1, 2, 19])
def test_convolution_is_its_sum(assert_near: Check, length: int, taps: int, back: int):
    inputs = {
        "x": draw(2, length, 3),
        "kernel": draw(3, taps),
        "D": draw(3),
        "gate": draw(2, length, 3, seed=1),
    }
    if back:
        inputs["kernel_back"] = draw(3, back, seed=2)
    # taps that reach nothing have a gradient of 0
    assert_all_near(assert_near, evaluate(fft_conv, inputs), evaluate(convolved, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transforms_are_never_half(assert_near: Check, dtype: torch.dtype):
    x, kernel = draw(2, 30, 3, dtype=dtype).detach(), draw(3, 30, dtype=torch.float32).detach()
    exact = fft_conv(x.double(), kernel.double())
    assert_near(fft_conv(x, kernel), exact)
    with torch.autocast("cpu", torch.bfloat16):
        y = fft_conv(x, kernel)
    assert y.dtype == dtype
    assert torch.equal(y, fft_conv(x, kernel))


def test_second_derivatives():
    inputs = draw(2, 5, 2), draw(2, 3), draw(2, 7, seed=2)

    def f(x: Tensor, kernel: Tensor, kernel_back: Tensor) -> Tensor:
        return fft_conv(x, kernel, kernel_back=kernel_back)

    assert torch.autograd.gradgradcheck(f, inputs)


def test_inputs_alone_are_kept_for_the_backward():
    x, kernel = draw(2, 50, 4, dtype=torch.float32), draw(4, 50, dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        fft_conv(x, kernel)
    assert sum(kept.values()) == x.nbytes + kernel.nbytes


def test_future_leaks_by_rounding_only():
    x, kernel = draw(1, 100, 2, dtype=torch.float32).detach(), draw(2, 100, dtype=torch.float32)
    changed = x.clone()
    changed[:, 50:] += 1
    before, after = (fft_conv(v, kernel.detach())[:, :50] for v in (x, changed))
    assert (before - after).abs().max() <= 2e-6 * after.abs().max()


@REVERSE
@pytest.mark.parametrize("taps", [1, 4, 25])
@pytest.mark.parametrize("cuts", [(7,), (1, 2, 18), (0, 19)])
def test_convolved_pieces_are_the_whole(
    assert_near: Check, cuts: tuple[int, ...], taps: int, reverse: bool
):
    inputs = {
        "x": draw(2, 19, 3),
        "kernel": draw(3, taps),
        "initial_state": draw(2, taps - 1, 3),
    }

    def in_pieces(x: Tensor, kernel: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        spans = [slice(*v) for v in itertools.pairwise([0, *cuts, 19])]
        state, out = initial_state, []
        for span in reversed(spans) if reverse else spans:
            options = {"initial_state": state, "reverse": reverse, **ALL}
            y, state = fft_conv(x[:, span], kernel, **options)
            out.append(y)
        return torch.cat(out[::-1] if reverse else out, 1), state

    whole = evaluate(fft_conv, inputs, reverse=reverse, **ALL)
    assert_all_near(assert_near, evaluate(in_pieces, inputs), whole)


def test_state_of_a_short_piece_is_padded():
    x, kernel = draw(1, 2, 3).detach(), draw(3, 6).detach()
    _, state = fft_conv(x, kernel, **ALL)
    assert torch.equal(state, torch.cat([torch.zeros(1, 3, 3, dtype=x.dtype), x], 1))


def test_transform_sizes():
    for length in (*range(1, 200), 1025, 131073):
        size = transform_size(length)
        assert length <= size <= max(2, 1.25 * length + 2)
        while size > 1 and any(size % p == 0 for p in (2, 3, 5)):
            size //= next(p for p in (2, 3, 5) if size % p == 0)
        assert size == 1


@pytest.mark.parametrize("sizes", [(2, 0, 3), (0, 4, 3), (2, 4, 0)], ids=str)
def test_empty(sizes: tuple[int, int, int]):
    inputs = {"x": draw(*sizes), "kernel": draw(sizes[2], 5)}
    assert evaluate(fft_conv, inputs, **ALL)["output 0"].shape == sizes
    model = ssm_inputs(*sizes, 2, dtype=torch.complex128)
    values = evaluate(diagonal_ssm, model, **ALL)
    assert values["output 0"].shape == sizes
    if sizes[1] == 0:
        assert torch.equal(values["output 1"], model["initial_state"])


# ---- diagonal state-space models ----


def ssm_inputs(
    batch: int, length: int, dim: int, state: int, dtype: torch.dtype, rows: int = 0
) -> dict[str, Tensor]:
    kind = torch.promote_types(dtype, torch.float64)

    def weights(*shape: int, seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=rng, dtype=kind)

    log_a = weights(dim, state, seed=1)
    log_a = torch.complex(-log_a.real.abs(), log_a.imag) if kind.is_complex else -log_a.abs()
    values = {
        "log_a": 0.3 * log_a,
        "B": weights(dim, state, seed=2),
        "C": weights(dim, state, seed=3),
        "initial_state": weights(rows or batch, dim, state, seed=4),
    }
    real = torch.float32 if dtype in (torch.float32, torch.complex64) else torch.float64
    x = {"x": draw(batch, length, dim, dtype=real), "D": draw(dim, dtype=real)}
    return x | {k: v.to(dtype).requires_grad_() for k, v in values.items()}


def ssm_loop(
    x: Tensor, D: Tensor, log_a: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, a step at a time."""
    h, out = initial_state, []
    for t in range(x.shape[1]):
        h = torch.exp(log_a) * h + B * x[:, t].unsqueeze(-1)
        y = (C * h).sum(-1)
        out.append((2 * y.real if y.is_complex() else y) + D * x[:, t])
    return torch.stack(out, 1), h


KINDS = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)


def near(assert_near: Check, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, v in expected.items():
        pair = (actual[name], v)
        a, e = (torch.view_as_real(u) if u.is_complex() else u for u in pair)
        assert_near(a, e, name=name, gradient=name.startswith("gradient"))


@KINDS
@REVERSE
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "scan"},
        {"mode": "conv"},
        {"mode": "conv", "chunk": 1},
        {"mode": "conv", "chunk": 5},
        {"mode": "conv", "chunk": 10},
        {"mode": "chunk"},
        {"mode": "chunk", "chunk": 1},
        {"mode": "chunk", "chunk": 5},
        {"mode": "auto", "chunk": 8},
    ],
    ids=str,
)
def test_forms_are_the_definition(
    assert_near: Check, options: dict[str, Any], reverse: bool, dtype: torch.dtype
):
    inputs = ssm_inputs(2, 20, 3, 4, dtype)

    def loop(x: Tensor, **kw: Tensor) -> tuple[Tensor, Tensor]:
        y, h = ssm_loop(x.flip(1) if reverse else x, **kw)
        return y.flip(1) if reverse else y, h

    actual = evaluate(diagonal_ssm, inputs, reverse=reverse, **options, **ALL)
    near(assert_near, actual, evaluate(loop, inputs))


@KINDS
def test_kernel_is_the_impulse_response(assert_near: Check, dtype: torch.dtype):
    given = {k: v.detach() for k, v in ssm_inputs(1, 30, 3, 4, dtype).items()}
    weights = [given[name] for name in ("log_a", "B", "C")]
    impulse = torch.zeros(1, 30, 3, dtype=torch.float64)
    impulse[:, 0] = 1
    kernel = ssm_kernel(*weights, 30)
    assert_near(kernel.t(), diagonal_ssm(impulse, *weights, mode="scan")[0])
    assert_near(fft_conv(given["x"], kernel), diagonal_ssm(given["x"], *weights, mode="conv"))


@KINDS
@REVERSE
@pytest.mark.parametrize("mode", ["scan", "conv", "chunk"])
def test_model_pieces_are_the_whole(
    assert_near: Check, mode: str, reverse: bool, dtype: torch.dtype
):
    inputs = ssm_inputs(2, 23, 3, 2, dtype)

    def in_pieces(x: Tensor, initial_state: Tensor, **kw: Tensor) -> tuple[Tensor, Tensor]:
        state, out = initial_state, []
        spans = [slice(0, 4), slice(4, 17), slice(17, 23)]
        for span in reversed(spans) if reverse else spans:
            options: dict[str, Any] = {"mode": mode, "chunk": 6, "reverse": reverse, **ALL}
            y, state = diagonal_ssm(x[:, span], **kw, initial_state=state, **options)
            out.append(y)
        return torch.cat(out[::-1] if reverse else out, 1), state

    whole = evaluate(diagonal_ssm, inputs, reverse=reverse, mode="scan", **ALL)
    near(assert_near, evaluate(in_pieces, inputs), whole)


@KINDS
def test_model_steps_and_packing(assert_near: Check, dtype: torch.dtype):
    given = {k: v.detach() for k, v in ssm_inputs(1, 9, 3, 2, dtype, rows=2).items()}
    x, state = given.pop("x"), given.pop("initial_state")
    cu = pack((4, 5))
    y, final = diagonal_ssm(x, **given, initial_state=state, cu_seqlens=cu, **ALL)
    for i, span in enumerate((slice(0, 4), slice(4, 9))):
        h = state[i : i + 1].clone()
        steps = [diagonal_ssm_step(h, x[:, t], **given) for t in range(span.start, span.stop)]
        assert_near(torch.stack(steps, 1), y[:, span])
        near(assert_near, {"state": h}, {"state": final[i : i + 1]})


@KINDS
@REVERSE
@pytest.mark.parametrize("chunk", [1, 4, 32])
@pytest.mark.parametrize("lengths", [(0, 9, 1, 0, 13), (8, 4, 0, 0), (23,)], ids=str)
def test_chunks_of_packed_sequences_are_the_scan(
    assert_near: Check, lengths: tuple[int, ...], chunk: int, reverse: bool, dtype: torch.dtype
):
    inputs = ssm_inputs(1, sum(lengths), 3, 4, dtype, rows=len(lengths))
    options: dict[str, Any] = {"cu_seqlens": pack(lengths), "reverse": reverse, **ALL}
    actual = evaluate(diagonal_ssm, inputs, mode="chunk", chunk=chunk, **options)
    near(assert_near, actual, evaluate(diagonal_ssm, inputs, mode="scan", **options))


@REVERSE
def test_chunks_keep_sequences_apart(reverse: bool):
    given = {k: v.detach() for k, v in ssm_inputs(1, 40, 3, 4, torch.complex64).items()}
    del given["initial_state"]
    options: dict[str, Any] = {"cu_seqlens": pack((15, 5, 0, 20)), "reverse": reverse, **ALL}
    x = given.pop("x")
    expected, last = diagonal_ssm(x, **given, **options)
    poisoned = x.clone()
    poisoned[:, 15:20] = float("nan")
    poisoned.requires_grad_()
    y, h = diagonal_ssm(poisoned, **given, **options)
    kept = torch.cat([torch.arange(15), torch.arange(20, 40)])
    assert torch.equal(y[:, kept], expected[:, kept])
    assert torch.equal(h[[0, 2, 3]], last[[0, 2, 3]])
    assert y[:, 15:20].isnan().all()
    (dx,) = torch.autograd.grad(y.nansum(), poisoned)
    assert dx[:, kept].isfinite().all()


def test_chunks_keep_no_state_of_every_step():
    inputs = ssm_inputs(1, 640, 4, 16, torch.complex64, rows=2)
    kept: dict[int, int] = {}

    def keep(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        diagonal_ssm(**inputs, cu_seqlens=pack((600, 40)), **ALL)
    # states of all steps: 640 x 4 x 16 complex numbers
    assert sum(kept.values()) < 640 * 4 * 16 * 8 / 2


class Packed(torch.nn.Module):
    def forward(self, x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor) -> Tensor:
        return diagonal_ssm(x, log_a, B, C, cu_seqlens=cu_seqlens)


def test_chunks_export_for_any_length(assert_near: Check):
    def inputs(lengths: tuple[int, ...]) -> tuple[Tensor, ...]:
        given = ssm_inputs(1, sum(lengths), 3, 4, torch.complex64)
        return *(given[k].detach() for k in ("x", "log_a", "B", "C")), pack(lengths)

    sizes = torch.export.Dim("length", min=2, max=512), torch.export.Dim("borders", min=3, max=64)
    shapes = {"x": {1: sizes[0]}, "log_a": None, "B": None, "C": None, "cu_seqlens": {0: sizes[1]}}
    program = torch.export.export(Packed(), inputs((40, 9)), dynamic_shapes=shapes, strict=False)
    for lengths in ((40, 9), (3, 0, 70, 64), (1, 32)):
        args = inputs(lengths)
        assert_near(program.module()(*args), Packed()(*args))


@pytest.mark.parametrize("mode", ["chunk", "scan", "conv"])
def test_model_in_half_precision_keeps_its_state(assert_near: Check, mode: str):
    given = {k: v.detach() for k, v in ssm_inputs(2, 600, 3, 2, torch.complex64).items()}
    half = given | {"x": given["x"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        y, state = diagonal_ssm(**half, mode=mode, **ALL)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.complex64)
    wide = {k: v.to(torch.promote_types(v.dtype, torch.float64)) for k, v in half.items()}
    exact, last = diagonal_ssm(**wide, mode="scan", **ALL)
    assert_near(y, exact)
    near(assert_near, {"state": state}, {"state": last})


def test_gradcheck():
    inputs = ssm_inputs(2, 5, 2, 2, torch.complex128)
    names = list(inputs)

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        return diagonal_ssm(**given, mode="conv", chunk=2, **ALL)

    assert torch.autograd.gradcheck(f, tuple(inputs.values()))


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


CONV_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": zeros(2, 4)}, r"x must be \(B, L, D\), got \(2, 4\)"),
    ({"x": zeros(2, 5, 4, dtype=torch.complex64)}, "x must be floating point"),
    ({"kernel": zeros(4)}, r"kernel must be \(D, K\) with at least one tap, got \(4,\)"),
    ({"kernel": zeros(4, 0)}, r"kernel must be \(D, K\) with at least one tap, got \(4, 0\)"),
    ({"kernel": zeros(3, 2)}, r"kernel must be \(D, K\) = \(4, 2\)"),
    ({"kernel_back": zeros(3, 2)}, r"kernel_back must be \(D, K\) = \(4, 2\)"),
    ({"D": zeros(3)}, r"D must be \(D,\) = \(4,\)"),
    ({"gate": zeros(2, 5, 3)}, r"gate must be \(B, L, D\) = \(2, 5, 4\)"),
    ({"initial_state": zeros(2, 3, 4)}, r"initial_state must be \(B, K - 1, D\) = \(2, 2, 4\)"),
    ({"kernel_back": zeros(4, 2), **ALL}, "kernel_back must be None with states"),
]


@pytest.mark.parametrize(("changes", "message"), CONV_ERRORS, ids=[v[1] for v in CONV_ERRORS])
def test_convolution_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        fft_conv(**{"x": zeros(2, 5, 4), "kernel": zeros(4, 3)} | changes)


SSM_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"x": zeros(2, 4)}, r"x must be \(B, L, D\) and floating point, got \(2, 4\)"),
    ({"log_a": zeros(4)}, r"log_a must be \(D, N\), got \(4,\)"),
    ({"B": zeros(4, 3)}, r"B must be \(D, N\) = \(4, 2\), got \(4, 3\)"),
    ({"C": zeros(4, 2, dtype=torch.int32)}, "C must be floating point or complex"),
    ({"C": zeros(4, 2, device="meta")}, "C must be on cpu as x is, got meta"),
    ({"x": zeros(2, 5, 3)}, "log_a must have the 3 channels of x"),
    ({"D": zeros(3)}, r"D must be \(D,\) = \(4,\), got \(3,\)"),
    ({"mode": "fast"}, "mode must be one of auto, conv, chunk, scan, got 'fast'"),
    ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ({"initial_state": zeros(2, 4)}, r"initial_state must be \(B, D, N\) = \(2, 4, 2\)"),
    (
        {"x": zeros(1, 5, 4), "cu_seqlens": pack((5,)), "mode": "conv"},
        "mode must be auto, chunk or scan with cu_seqlens, got 'conv'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SSM_ERRORS, ids=[v[1] for v in SSM_ERRORS])
def test_model_refuses(changes: dict[str, Any], message: str):
    weights = {name: zeros(4, 2) for name in ("log_a", "B", "C")}
    with pytest.raises(ValueError, match=message):
        diagonal_ssm(**{"x": zeros(2, 5, 4), **weights} | changes)


def test_step_refuses():
    weights = {name: zeros(4, 2) for name in ("log_a", "B", "C")}
    with pytest.raises(ValueError, match=r"x must be \(B, D\) and floating point"):
        diagonal_ssm_step(zeros(2, 4, 2), zeros(4), **weights)
    with pytest.raises(ValueError, match=r"state must be \(B, D, N\) = \(2, 4, 2\) torch.float32"):
        diagonal_ssm_step(zeros(2, 4), zeros(2, 4), **weights)
