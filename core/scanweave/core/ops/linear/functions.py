"""The public forms of the linear scan: checks of arguments, then the registered op.

    linear_scan        a whole sequence
    linear_scan_step   one token

Equation and letters: `reference.py`.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_cu_seqlens
from ..inputs import told_apart
from .op import LinearScan
from .reference import state_dtype


def _check(name: str, v: object, shape: tuple[int, ...], like: Tensor, letters: str) -> None:
    if not isinstance(v, Tensor):
        raise ValueError(f"{name} must be a tensor {letters}, got {type(v).__name__}")
    if tuple(v.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, got {tuple(v.shape)}")
    if not (v.is_floating_point() or v.is_complex()):
        raise ValueError(f"{name} must be floating point or complex, got {v.dtype}")
    if v.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as x is, got {v.device}")


def _check_log_a(log_a: object, x: Tensor, tokens: int) -> None:
    """Raise unless `log_a` has the shape of x, or that of one token of one row."""
    channels = tuple(x.shape[tokens:])
    if not isinstance(log_a, Tensor):
        raise ValueError(f"log_a must be a tensor, got {type(log_a).__name__}")
    # the rank decides first: an exporter would compare a batch with channels
    wanted = tuple(x.shape) if log_a.ndim == x.ndim else channels
    if log_a.ndim != len(wanted) or tuple(log_a.shape) != wanted:
        raise ValueError(
            f"log_a must be {channels} for constant decays or {tuple(x.shape)} as x is, "
            f"got {tuple(log_a.shape)}"
        )
    _check("log_a", log_a, tuple(log_a.shape), x, "(D,)")


@overload
def linear_scan(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def linear_scan(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...


def linear_scan(
    x: Tensor,
    log_a: Tensor,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the diagonal recurrence h[t] = exp(log_a[t]) h[t-1] + x[t] along the length.

    Decays come as logarithms: exp(log_a) cannot leave (0, 1] by rounding when log_a <= 0, and the
    log is what models compute. log_a = -inf is a decay of 0; a negative decay is complex, with an
    imaginary part of pi. Every input has a gradient, the initial state and the final one included.

    Args:
        x: Inputs, (B, L, D), or (B, L, D, N) and so on: channels may have any number of axes.
            Real or complex.
        log_a: Logarithms of the decays, one per step with the shape of x, or constant with the
            shape of the channels, (D,) or (D, N). Real or complex; stable for real parts <= 0.
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: State before the first step, (B, D), or (S, D) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the state after the last step.

    Returns:
        States (B, L, D) in the dtype of x, complex if any input is; with `return_final_state`
        also the last one, (B, D) or (S, D), in float32 or float64, or complex of these parts.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Example:
        >>> linear_scan(torch.ones(1, 3, 1), torch.tensor([0.5]).log()).flatten().tolist()
        [1.0, 1.5, 1.75]

    Source: Martin & Cundy 2018, arXiv 1709.04057, section 2.2; Orvieto et al. 2023,
    arXiv 2303.06349, section 3.2 (complex decays).
    """
    if not isinstance(x, Tensor) or x.ndim < 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, L, D) or have more axes of channels, got {got}")
    _check("x", x, tuple(x.shape), x, "(B, L, D)")
    _check_log_a(log_a, x, 2)
    flat = x.flatten(2)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, flat)
    if initial_state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(B, D)" if cu_seqlens is None else "(S, D)"
        _check("initial_state", initial_state, (rows, *x.shape[2:]), x, letters)
        initial_state = initial_state.flatten(1)
    log_a = log_a.flatten(2) if log_a.ndim == x.ndim else log_a.flatten()
    dtype = state_dtype(flat, log_a, initial_state)
    if dtype.is_complex:
        flat, log_a = flat.to(dtype), log_a.to(dtype)
        initial_state = None if initial_state is None else initial_state.to(dtype)
    given = (flat, log_a, initial_state)
    training = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given)
    h, final = LinearScan.apply(*told_apart(given), cu_seqlens, bool(reverse), training)
    h = h.unflatten(2, x.shape[2:]) if x.ndim > 3 else h
    if not return_final_state:
        return h
    return h, final.unflatten(1, x.shape[2:]) if x.ndim > 3 else final


def linear_scan_step(state: Tensor, x: Tensor, log_a: Tensor) -> Tensor:
    """Advance `linear_scan` by one token; `state` is updated in place.

    No gradient: for inference. `linear_scan` with L = 1 and the same state has one.

    Args:
        state: State before the token, (B, D) as `linear_scan` returns it; updated.
        x: Input, (B, D), or with more axes of channels.
        log_a: Logarithms of the decays, (B, D), or (D,) for constant ones.

    Returns:
        The new state in the dtype of x, (B, D), complex if the state is.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if not isinstance(x, Tensor) or x.ndim < 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, D) or have more axes of channels, got {got}")
    _check("x", x, tuple(x.shape), x, "(B, D)")
    _check_log_a(log_a, x, 1)
    _check("state", state, tuple(x.shape), x, "(B, D)")
    dtype = state_dtype(x, log_a, state)
    if state.dtype != dtype:
        raise ValueError(f"state must be {dtype} for these inputs, got {state.dtype}")
    with torch.no_grad():
        state.mul_(torch.exp(log_a.to(dtype))).add_(x)
        return state.to(dtype if dtype.is_complex else x.dtype, copy=True)
