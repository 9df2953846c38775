"""Inputs of the linear scan and of the weighted average, and comparisons that know complex numbers.

Letters: B batch, L length, D channels, S packed sequences.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests.core.op_cases import Inputs, evaluate
from torch import Tensor

Check = Callable[..., None]


def linear_inputs(
    batch: int,
    length: int,
    *channels: int,
    constant: bool = False,
    dtype: torch.dtype = torch.float64,
    decays: torch.dtype | None = None,
    sequences: int | None = None,
    without: Sequence[str] = (),
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `linear_scan`; complex dtypes give rotating decays."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        wide = torch.complex128 if kind.is_complex else torch.float64
        return torch.randn(*shape, generator=rng, dtype=wide)

    decays = decays or dtype
    log_a = draw(*(() if constant else (batch, length)), *channels, kind=decays)
    log_a = torch.complex(-log_a.real.abs(), log_a.imag) if decays.is_complex else -log_a.abs()
    values = {
        "x": draw(batch, length, *channels).to(dtype),
        "log_a": log_a.to(decays),
        "initial_state": draw(batch if sequences is None else sequences, *channels),
    }
    state = torch.promote_types(dtype, torch.float32)
    values["initial_state"] = values["initial_state"].to(state)
    return {k: v.to(device).requires_grad_() for k, v in values.items() if k not in without}


def wkv_inputs(
    batch: int,
    length: int,
    dim: int,
    *,
    constant: bool = True,
    sequences: int | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    scale: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `wkv`; `scale` is that of the logarithms of the weights."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rows = batch if sequences is None else sequences
    n, d, m = draw(rows, dim), draw(rows, dim).abs() + 0.1, scale * draw(rows, dim)
    values = {
        "k": scale * draw(batch, length, dim),
        "v": draw(batch, length, dim),
        "log_decay": -draw(*(() if constant else (batch, length)), dim).abs(),
        "bonus": draw(dim),
        "initial_state": torch.stack([n, d, m], 1),
    }
    small = weights or dtype
    kinds = {"k": dtype, "v": dtype, "log_decay": small if constant else dtype, "bonus": small}
    state = torch.promote_types(dtype, torch.float32)
    return {
        name: v.to(device, kinds.get(name, state)).requires_grad_()
        for name, v in values.items()
        if name not in without
    }


def widened(inputs: Inputs) -> Inputs:
    """The same values in float64 or complex128, as new leaves."""

    def wide(v: Tensor) -> Tensor:
        v = v.detach().to(torch.complex128 if v.is_complex() else torch.float64)
        return v.requires_grad_()

    return {name: wide(v) for name, v in inputs.items()}


def parts(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Complex values as pairs of real ones."""
    return {k: torch.view_as_real(v) if v.is_complex() else v for k, v in values.items()}


def compare(
    assert_near: Check,
    op: Callable[..., object],
    reference: Callable[..., object],
    inputs: Inputs,
    *,
    factor: float = 1.0,
    **options: Any,
) -> dict[str, Tensor]:
    """Every output and gradient of `op` against `reference` in float64 on the same inputs."""
    actual = evaluate(op, inputs, **options)
    dtypes = [v.dtype for name, v in actual.items() if name.startswith("output")]
    exact = evaluate(reference, widened(inputs), rounded_to=dtypes, **options)
    for name, v in inputs.items():
        assert actual[f"gradient of {name}"].dtype == v.dtype, name
    near(assert_near, actual, exact, factor=factor)
    return actual


def near(
    assert_near: Check,
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    *,
    factor: float = 1.0,
) -> None:
    """Every value within the table's row of its own dtype."""
    assert actual.keys() == expected.keys()
    wanted = parts(expected)
    for name, v in parts(actual).items():
        gradient = name.startswith("gradient")
        assert_near(v, wanted[name], gradient=gradient, name=name, factor=factor)


def scaled_state(op: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`wkv` with its final sums on a scale of their own: a loss has to read n, d and m together."""

    def run(**kw: Any) -> tuple[Tensor, Tensor]:
        y, state = op(**kw, return_final_state=True)
        n, d, m = state.unbind(1)
        scale = torch.exp(torch.where(torch.isfinite(m), m.clamp(-30, 30), float("-inf")).detach())
        return y, torch.stack([n * scale, d * scale], 1)

    return run
