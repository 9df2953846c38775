"""The public forms of the selective scan: checks of arguments, then the registered op.

    selective_scan                 one direction
    bidirectional_selective_scan   both directions with their own parameters, added

Equations and letters: `reference.py`.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, check_tensor
from ..inputs import told_apart
from .op import SelectiveScan


class _Direction(NamedTuple):
    """Checked inputs of one direction, B and C with their group axis."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


def _check_direction(
    direction: _Direction, cu_seqlens: Tensor | None, suffix: str = ""
) -> _Direction:
    """Raise a ValueError that names the argument (with `suffix`) unless all of them fit."""
    x, dt, A, B, C, D, dt_bias, initial_state = direction
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x{suffix} must be (B, L, D), got {got}")
    check_tensor(f"x{suffix}", x, tuple(x.shape), x, "(B, L, D)")
    batch, length, dim = x.shape
    check_tensor(f"dt{suffix}", dt, (batch, length, dim), x, "(B, L, D)")
    if not isinstance(A, Tensor) or A.ndim != 2:
        got = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f"A{suffix} must be (D, N), got {got}")
    if A.is_complex():
        raise ValueError(f"A{suffix} must be real, got {A.dtype}")
    state = A.shape[1]
    check_tensor(f"A{suffix}", A, (dim, state), x, "(D, N)")
    if state < 1:
        raise ValueError(f"A{suffix} must have at least one state, got {tuple(A.shape)}")
    if not isinstance(B, Tensor) or B.ndim not in (3, 4):
        got = tuple(B.shape) if isinstance(B, Tensor) else type(B).__name__
        raise ValueError(f"B{suffix} must be (B, L, N) or (B, L, G, N), got {got}")
    groups = (B.shape[2],) if B.ndim == 4 else ()
    letters = "(B, L, G, N)" if groups else "(B, L, N)"
    check_tensor(f"B{suffix}", B, (batch, length, *groups, state), x, letters)
    check_tensor(f"C{suffix}", C, (batch, length, *groups, state), x, letters)
    if groups and (groups[0] < 1 or dim % groups[0]):
        raise ValueError(
            f"B{suffix} must have groups that divide the {dim} channels, got {groups[0]}"
        )
    if D is not None:
        check_tensor(f"D{suffix}", D, (dim,), x, "(D,)")
    if dt_bias is not None:
        check_tensor(f"dt_bias{suffix}", dt_bias, (dim,), x, "(D,)")
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(B, D, N)" if cu_seqlens is None else "(S, D, N)"
        name = f"initial_state{suffix}"
        check_tensor(name, initial_state, (rows, dim, state), x, letters)
    if not groups:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    return _Direction(x, dt, A, B, C, D, dt_bias, initial_state)


def _apply(
    directions: list[_Direction],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: tuple[bool, ...],
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    x = directions[0].x
    if z is not None:
        check_tensor("z", z, tuple(x.shape), x, "(B, L, D)")
    columns = list(zip(*directions, strict=True))
    present = [column for column in columns if column[0] is not None]
    has = (*(columns[i][0] is not None for i in (5, 6, 7)), z is not None)
    tensors = [v for column in present for v in column] + ([] if z is None else [z])
    training = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)
    settings = (reverse, dt_softplus, has, training, cu_seqlens)
    return SelectiveScan.apply(*settings, *told_apart(tensors))


@overload
def selective_scan(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def selective_scan(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the Mamba scan h[t] = exp(delta A) h[t-1] + delta B x, y = C h + D x, out = y silu(z).

    Every floating input has a gradient, the initial state and the final one included. State and
    sums are float32 (float64 if an input is), whatever the dtype of the activations.

    Args:
        x: Inputs, (B, L, D).
        dt: Time steps before bias and softplus, (B, L, D).
        A: Decay rates, (D, N), real; stable for A <= 0.
        B: Input vectors, (B, L, N), or (B, L, G, N) for G groups of D / G channels.
        C: Read-out vectors, as B.
        D: Skip weights, (D,).
        z: Gate, (B, L, D).
        dt_bias: Added to dt, (D,).
        dt_softplus: delta = softplus(dt + dt_bias) instead of dt + dt_bias.
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: State before the first step, (B, D, N), or (S, D, N) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the state after the last step.

    Returns:
        Outputs (B, L, D) in the dtype of x; with `return_final_state` also the state, (B, D, N)
        or (S, D, N), float32 or float64.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Gu & Dao 2023, arXiv 2312.00752, algorithm 2 and section 3.3.
    """
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    direction = _Direction(x, dt, A, B, C, D, dt_bias, initial_state)
    direction = _check_direction(direction, cu_seqlens)
    out, final = _apply([direction], z, cu_seqlens, (bool(reverse),), bool(dt_softplus))
    return (out, final[0]) if return_final_state else out


Pair = tuple[Tensor, Tensor]


@overload
def bidirectional_selective_scan(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def bidirectional_selective_scan(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Pair]: ...


def bidirectional_selective_scan(
    x: Pair,
    dt: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: Pair | None = None,
    z: Tensor | None = None,
    dt_bias: Pair | None = None,
    dt_softplus: bool = True,
    *,
    initial_state: Pair | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Pair]:
    """Run a forward and a reverse selective scan, add them, then gate: (y_f + y_r) silu(z).

    Args:
        x: Inputs of the forward and of the reverse scan, each (B, L, D), both in natural order.
        dt: Time steps, a pair as `x`; so are A, B, C, D, dt_bias and initial_state, each of
            the shape that `selective_scan` takes.
        A: Decay rates, a pair.
        B: Input vectors, a pair.
        C: Read-out vectors, a pair.
        D: Skip weights, a pair.
        z: The gate that both directions share, (B, L, D).
        dt_bias: Added to dt, a pair.
        dt_softplus: delta = softplus(dt + dt_bias).
        initial_state: States before the first step of the forward scan and before the last
            token of the reverse one.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32; B must be 1.
        return_final_state: Also return the pair of states after each scan's last step.

    Returns:
        Outputs (B, L, D), and the pair of final states if asked.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Zhu et al. 2024 (Vision Mamba), arXiv 2401.09417, algorithm 1.
    """
    pairs = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state)
    for name, pair in pairs.items():
        if pair is not None and (isinstance(pair, Tensor) or len(pair) != 2):
            got = "a tensor" if isinstance(pair, Tensor) else f"{len(pair)} items"
            raise ValueError(f"{name} must be a pair (forward, reverse), got {got}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x[0])
    directions = []
    for k, suffix in enumerate(("[0]", "[1]")):
        direction = _Direction(
            x[k],
            dt[k],
            A[k],
            B[k],
            C[k],
            None if D is None else D[k],
            None if dt_bias is None else dt_bias[k],
            None if initial_state is None else initial_state[k],
        )
        directions.append(_check_direction(direction, cu_seqlens, suffix))
    first, second = directions
    if first.x.shape != second.x.shape or first.A.shape != second.A.shape:
        raise ValueError(
            "x and A must have one shape in both directions, got "
            f"{tuple(first.x.shape)}, {tuple(second.x.shape)} and "
            f"{tuple(first.A.shape)}, {tuple(second.A.shape)}"
        )
    out, final = _apply(directions, z, cu_seqlens, (False, True), bool(dt_softplus))
    return (out, (final[0], final[1])) if return_final_state else out
