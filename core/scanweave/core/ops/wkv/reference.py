"""The definition of the exponentially weighted average, one step at a time: slow, the oracle.

A token s weighs exp(k[s]) when it is read first, and the decays of the steps after it from then on:

    N[t] = exp(w[t]) N[t-1] + exp(k[t]) v[t]        D[t] = exp(w[t]) D[t-1] + exp(k[t])
    y[t] = N[t] / D[t]                                                          without bonus
    y[t] = (N[t-1] + exp(u + k[t]) v[t]) / (D[t-1] + exp(u + k[t]))             with bonus u

Exponentials of k overflow, so the state is (n, d, m) with N = n exp(m), D = d exp(m), and m the
largest logarithm of a weight so far: m[t] = max(m[t-1] + w[t], k[t]). With nothing seen, m = -inf
and y = 0; so a token with k = -inf is not there.

Letters: B batch, L length, D channels, S packed sequences.
Source: Peng et al. 2023 (RWKV), arXiv 2305.13048, equation 16 and appendix D.
"""

import itertools

import torch
from torch import Tensor

from ..checks import computing_dtype


def power(v: Tensor, scale: Tensor) -> Tensor:
    """exp(v - scale); 0 for v = -inf and 1 for two +inf, where the difference is NaN."""
    same = (v == scale) & torch.isinf(v)
    difference = torch.where(same, torch.where(v < 0, v, 0.0), v - scale)
    return torch.exp(difference)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, 0 where nothing was seen."""
    empty = denominator == 0
    return torch.where(empty, 0.0, numerator / torch.where(empty, 1.0, denominator))


def empty_state(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, 3, D): n = d = 0, m = -inf."""
    state = like.new_zeros(rows, 3, like.shape[-1], dtype=dtype)
    state[:, 2] = float("-inf")
    return state


def wkv_ref(
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
    """The definition, by a Python loop over time. Same contract as `wkv`."""
    dtype = computing_dtype(k, v, log_decay, bonus, initial_state)
    ks, vs, w = k.to(dtype), v.to(dtype), log_decay.to(dtype).expand(k.shape)
    ends = [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows: dict[int, Tensor] = {}
    finals = []
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if initial_state is None:
            n, d, m = empty_state(k.shape[0], ks, dtype).unbind(1)
        else:
            first = initial_state if cu_seqlens is None else initial_state[i : i + 1]
            n, d, m = first.to(dtype).unbind(1)
        for t in reversed(range(start, end)) if reverse else range(start, end):
            if bonus is not None:
                own = bonus.to(dtype) + ks[:, t]
                top = torch.maximum(m, own).detach()
                past, now = power(m, top), power(own, top)
                rows[t] = ratio(past * n + now * vs[:, t], past * d + now)
            # a scale that cancels: its gradient is left out
            top = torch.maximum(m + w[:, t], ks[:, t]).detach()
            past, now = power(m + w[:, t], top), power(ks[:, t], top)
            n, d, m = past * n + now * vs[:, t], past * d + now, top
            if bonus is None:
                rows[t] = ratio(n, d)
        finals.append(torch.stack([n, d, m], 1))
    y = torch.stack([rows[t] for t in range(k.shape[1])], 1) if rows else v
    if not return_final_state:
        return y.to(v.dtype)
    return y.to(v.dtype), torch.cat(finals) if finals else empty_state(0, ks, dtype)
