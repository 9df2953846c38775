"""The matrix-state scan under the names of its kin: checks of arguments, then the same op.

    ssd                     Mamba-2
    time_steps              its time steps and log decays
    head_steps              the same of one or two sets of heads, from A or A_log
    gated_linear_attention  linear attention, RetNet, GLA, RWKV-5 and RWKV-6

Equations and letters: `reference.py`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor, computing_dtype, on_kernels, runs_now
from .functions import gated_linear_scan
from .time_steps_kernel import Form, HeadSteps


@overload
def ssd(*args: Any, return_final_state: Literal[False] = False, **kwargs: Any) -> Tensor: ...


@overload
def ssd(*args: Any, return_final_state: Literal[True], **kwargs: Any) -> tuple[Tensor, Tensor]: ...


@overload
def ssd(*args: Any, return_final_state: bool, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]: ...


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba-2's scan h[t] = exp(delta A) h[t-1] + delta B x^T, y = C h + D x.

    `gated_linear_scan` under Mamba-2's names: delta = clamp(softplus(dt + dt_bias)), q = C, k = B,
    v = x, g = delta A, write = delta, skip = D.

    Args:
        x: Inputs, (B, L, H, P).
        dt: Time steps before bias and softplus, (B, L, H).
        A: Decay rates, (H,), at most 0.
        B: Input vectors, (B, L, G, N).
        C: Read-out vectors, as B.
        D: Skip weights, (H,).
        dt_bias: Added to dt, (H,).
        dt_softplus: delta = softplus(dt + dt_bias) instead of dt + dt_bias.
        dt_limit: Smallest and largest delta.
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: State before the first step, (B, H, N, P), or (S, H, N, P) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the state after the last step.

    Returns:
        Outputs (B, L, H, P) in the dtype of x; the state, (B, H, N, P), if asked.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Dao & Gu 2024 (Mamba-2), arXiv 2405.21060, listing 1 and section 7.
    """
    if not isinstance(x, Tensor) or x.ndim != 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, L, H, P), got {got}")
    heads = x.shape[2]
    check_tensor("dt", dt, tuple(x.shape[:3]), x, "(B, L, H)")
    check_tensor("A", A, (heads,), x, "(H,)")
    for name, u in (("D", D), ("dt_bias", dt_bias)):
        if u is not None:
            check_tensor(name, u, (heads,), x, "(H,)")
    delta, g = time_steps(dt, A, dt_bias, dt_softplus, dt_limit)
    scan: Callable[..., Any] = gated_linear_scan
    return scan(
        *(C, B, x, g, delta, D),
        reverse=reverse,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
    )


def time_steps(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Time steps delta = clamp(softplus(dt + dt_bias)) and the log decay delta A, both (..., H)."""
    if dt.shape[-1:] == A.shape and (dt_bias is None or dt_bias.shape == A.shape):
        (delta,), (g,) = head_steps(dt, A, dt_bias, dt_softplus, dt_limit)
        return delta, g
    return _composed_steps(dt, A, dt_bias, dt_softplus, dt_limit)


def head_steps(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    *,
    sets: int = 1,
    log: bool = False,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`time_steps` of one or two sets of heads that share A and the bias.

    Args:
        dt: Time steps before bias and softplus, (..., R H), set after set.
        A: Decay rates, (H,), or with `log` A_log: rates are -exp(A_log).
        dt_bias: Added to dt, (H,).
        dt_softplus: As in `ssd`.
        dt_limit: As in `ssd`.
        sets: R, 1 or 2.
        log: A is A_log.

    Returns:
        The sets' time steps, and their log decays, (..., H) each, float32 or float64.
    """
    if runs_now(dt) and on_kernels(dt, A, dt_bias):
        low, high = dt_limit
        limited = tuple(dt_limit) != (0.0, math.inf)
        form = Form(sets, bool(dt_softplus), float(low), float(high), limited, log)
        found = HeadSteps.apply(dt, A, dt_bias, form)
        return found[:sets], found[sets:]
    if log:
        A = -torch.exp(A.to(computing_dtype(A)))
    if sets == 1:
        delta, g = _composed_steps(dt, A, dt_bias, dt_softplus, dt_limit)
        return (delta,), (g,)
    # one elementwise pass over both
    parts = dt.unflatten(-1, (sets, -1))
    delta, g = _composed_steps(parts, A, dt_bias, dt_softplus, dt_limit)
    return delta.unbind(-2), g.unbind(-2)


def _composed_steps(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    dtype = computing_dtype(dt, A, dt_bias)
    # elementwise: autocast changes nothing here
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    if tuple(dt_limit) != (0.0, math.inf):
        delta = delta.clamp(*dt_limit)
    return delta, delta * A.to(dtype)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run causal linear attention with decay: `gated_linear_scan` under attention's names.

    None for g is linear attention, (H,) RetNet, (B, L, H) a scalar gate, (B, L, H, K) GLA. With
    `bonus` the reading is that of RWKV-5 and RWKV-6: the state before the token, and the bonus.

    Args:
        q: Queries, (B, L, H, K), or (B, L, G, K).
        k: Keys, as q.
        v: Values, (B, L, H, V).
        g: Log decays, as `gated_linear_scan` takes.
        scale: Factor of q, 1 / sqrt(K) by default.
        bonus: Weight of the present token, (H, K).
        initial_state: State before the first step, (B, H, K, V), or (S, H, K, V) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the state after the last step.

    Returns:
        Outputs (B, L, H, V); the state if asked.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Yang et al. 2023, arXiv 2312.06635, section 3; Peng et al. 2024, arXiv 2404.05892.
    """
    if isinstance(q, Tensor) and q.ndim == 4:
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    scan: Callable[..., Any] = gated_linear_scan
    return scan(
        *(q, k, v, g),
        exclusive=bonus is not None,
        bonus=bonus,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
    )
