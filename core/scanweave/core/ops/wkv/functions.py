"""The public forms of the exponentially weighted average: checks, then the registered op.

    wkv        a whole sequence
    wkv_step   one token

Equations and letters: `reference.py`.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, check_tensor, computing_dtype
from ..inputs import told_apart
from .op import Wkv
from .reference import power, ratio


def _check(k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None, letters: str) -> None:
    if not isinstance(k, Tensor) or k.ndim != letters.count(",") + 1:
        got = tuple(k.shape) if isinstance(k, Tensor) else type(k).__name__
        raise ValueError(f"k must be {letters}, got {got}")
    check_tensor("k", k, tuple(k.shape), k, letters)
    check_tensor("v", v, tuple(k.shape), k, letters)
    if isinstance(log_decay, Tensor) and log_decay.ndim == 1:
        check_tensor("log_decay", log_decay, tuple(k.shape[-1:]), k, "(D,)")
    else:
        check_tensor("log_decay", log_decay, tuple(k.shape), k, f"(D,) or {letters}")
    if bonus is not None:
        check_tensor("bonus", bonus, tuple(k.shape[-1:]), k, "(D,)")


@overload
def wkv(*args: Any, return_final_state: Literal[False] = False, **kwargs: Any) -> Tensor: ...


@overload
def wkv(*args: Any, return_final_state: Literal[True], **kwargs: Any) -> tuple[Tensor, Tensor]: ...


def wkv(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None = None,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Average the values so far, token s weighing exp(k[s] + the log decays after it).

    The numerator and the denominator of RWKV-4 (a gated, max-stabilised linear scan): no k
    overflows. Every input has a gradient; in states, the scale m only through what it scales.

    Args:
        k: Logarithms of the weights, (B, L, D); -inf is a token that is not there.
        v: Values, (B, L, D).
        log_decay: At most 0: constant, (D,), or for every step, (B, L, D).
        bonus: With it, (D,), a token is read before its own is added, which weighs exp(bonus + k)
            (RWKV-4); without, after.
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: n, d and m before the first token, (B, 3, D), or (S, 3, D) when packed: the
            sums over exp(m). Nothing seen is (0, 0, -inf).
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the state after the last token.

    Returns:
        Averages (B, L, D) in the dtype of v, 0 where nothing was seen; with `return_final_state`
        also the state, (B, 3, D) or (S, 3, D), float32 or float64.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Example:
        >>> v = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1)
        >>> wkv(torch.zeros(1, 3, 1), v, torch.zeros(1)).flatten().tolist()
        [1.0, 1.5, 3.0]

    Source: Peng et al. 2023 (RWKV), arXiv 2305.13048, equation 16 and appendix D.
    """
    _check(k, v, log_decay, bonus, "(B, L, D)")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, k)
    if initial_state is not None:
        rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(B, 3, D)" if cu_seqlens is None else "(S, 3, D)"
        check_tensor("initial_state", initial_state, (rows, 3, k.shape[2]), k, letters)
    given = (k, v, log_decay, bonus, initial_state)
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, final = Wkv.apply(*told_apart(given), cu_seqlens, bool(reverse), training)
    return (y, final) if return_final_state else y


def wkv_step(
    state: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None = None
) -> Tensor:
    """Advance `wkv` by one token; `state` is updated in place. No gradient.

    Args:
        state: n, d and m before the token, (B, 3, D) as `wkv` returns it; updated.
        k: Logarithms of the weights, (B, D).
        v: Values, (B, D).
        log_decay: (D,) or (B, D).
        bonus: As in `wkv`, (D,).

    Returns:
        Averages (B, D) in the dtype of v.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(k, v, log_decay, bonus, "(B, D)")
    check_tensor("state", state, (k.shape[0], 3, k.shape[1]), k, "(B, 3, D)")
    dtype = computing_dtype(k, v, log_decay, bonus, state)
    if state.dtype != dtype:
        raise ValueError(f"state must be {dtype} for these inputs, got {state.dtype}")
    with torch.no_grad():
        ks, vs = k.to(dtype), v.to(dtype)
        n, d, m = state.unbind(1)
        y = None
        if bonus is not None:
            own = bonus.to(dtype) + ks
            top = torch.maximum(m, own)
            past, now = power(m, top), power(own, top)
            y = ratio(past * n + now * vs, past * d + now)
        moved = m + log_decay.to(dtype)
        top = torch.maximum(moved, ks)
        past, now = power(moved, top), power(ks, top)
        n, d = past * n + now * vs, past * d + now
        state.copy_(torch.stack([n, d, top], 1))
        return (ratio(n, d) if y is None else y).to(v.dtype)
