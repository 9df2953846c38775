"""The exponentially weighted average and its gradients in plain PyTorch, no graph kept.

Only what depends on the step before runs step by step: the maximum, then the two sums. The
exponentials between are computed for all tokens at once. Equations and letters: `reference.py`;
order of tokens: `linear.portable.Steps`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import computing_dtype
from ..linear.portable import Steps
from .reference import empty_state, power, ratio


class Saved(NamedTuple):
    """Every token's values in the order of steps, (T, D) each."""

    steps: Steps
    k: Tensor
    v: Tensor
    w: Tensor  # (T, D) or (D,)
    first: Tensor  # (S, 3, D)
    before: Tensor  # (T, 3, D): the state before the token
    after: Tensor  # (T, 3, D)
    own: Tensor  # log weight with which the token itself is read
    top: Tensor  # the largest log weight in a read
    sum: Tensor  # the denominator of a read over exp(top)
    y: Tensor


def _at(w: Tensor, span: slice) -> Tensor:
    return w if w.ndim == 1 else w[span]


def _run(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> Saved:
    dtype = computing_dtype(k, v, log_decay, bonus, initial_state)
    steps = Steps(k.shape[0], k.shape[1], reverse, cu_seqlens, k.device)
    ks, vs = steps.time(k, dtype), steps.time(v, dtype)
    w = log_decay.to(dtype) if log_decay.ndim == 1 else steps.time(log_decay, dtype)
    first = empty_state(steps.layout.batch, ks, dtype)
    if initial_state is not None:
        first = steps.layout.to_rows(initial_state.to(dtype))
    m = ks.clone()
    previous = first[:, 2]
    for span in steps.spans:
        now = m[span]
        torch.maximum(now, previous[: now.shape[0]] + _at(w, span), out=now)
        previous = now
    m_before = steps.previous(m, first[:, 2])
    keep, add = power(m_before + w, m).unsqueeze(1), power(ks, m)
    sums = torch.stack([add * vs, add], 1)
    previous = first[:, :2]
    for span in steps.spans:
        now = sums[span]
        now.addcmul_(keep[span], previous[: now.shape[0]])
        previous = now
    after = torch.cat([sums, m.unsqueeze(1)], 1)
    before = steps.previous(after, first)
    if bonus is None:
        own, top, total = ks, m, sums[:, 1]
        y = ratio(sums[:, 0], total)
    else:
        own = bonus.to(dtype) + ks
        top = torch.maximum(m_before, own)
        past, now = power(m_before, top), power(own, top)
        total = past * before[:, 1] + now
        y = ratio(past * before[:, 0] + now * vs, total)
    return Saved(steps, ks, vs, w, first, before, after, own, top, total, y)


def forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, D) and final states (S, 3, D), in the computing dtype."""
    s = _run(k, v, log_decay, bonus, initial_state, cu_seqlens, reverse)
    final = s.first.clone()
    final[: s.steps.alive] = s.after[s.steps.last]
    return s.steps.layout.from_time(s.y), s.steps.layout.from_rows(final)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, log_decay, bonus and the initial state, in the computing dtype.

    The gradients of N[t] and D[t] are kept as (en, ed) exp(-low), `low` being the least logarithm
    of a denominator that is still to come, less the decays up to there; so nothing overflows:
        dv = exp(k - low) en ;  dk = exp(k - low) (v en + ed)
        dw = exp(m[t-1] + w - low) (n[t-1] en + d[t-1] ed)
    and a read of P / Q adds (dy / Q, -y dy / Q), with weights exp(own - top), low = top.
    """
    s = _run(k, v, log_decay, bonus, initial_state, cu_seqlens, reverse)
    steps, layout = s.steps, s.steps.layout
    g = ratio(steps.time(dy, s.k.dtype), s.sum)
    read = torch.stack([g, -s.y * g], 1)  # (T, 2, D)
    infinite = torch.full_like(s.first[:, 2], float("inf"))
    top = torch.where(s.sum == 0, float("inf"), s.top)
    # what the final state sends back, and its scale; a scale of infinity is no gradient
    ended, ended_low = torch.zeros_like(s.first[:, :2]), infinite
    state = None if dfinal is None else layout.to_rows(dfinal.to(s.k.dtype))
    if state is not None:
        final = s.first[:, 2].clone()
        final[: steps.alive] = s.after[steps.last, 2]
        ended, ended_low = state[:, :2], torch.where(final == float("-inf"), infinite, final)
    # gradients of the sums after each token
    e, low_after = torch.empty_like(read), torch.empty_like(s.k)
    first_e, first_low = ended.clone(), ended_low.clone()
    inclusive, count = bonus is None, 0
    for span in reversed(steps.spans):
        low, now = low_after[span], e[span]
        rows = low.shape[0]
        # rows whose last token this is start from the final state
        low[:count], now[:count] = first_low[:count], first_e[:count]
        low[count:], now[count:] = ended_low[count:rows], ended[count:rows]
        w, here = _at(s.w, span), top[span]
        if inclusive:  # read after the token was added
            least = torch.minimum(low, here)
            now.mul_(power(least, low).unsqueeze(1))
            now.addcmul_(power(least, here).unsqueeze(1), read[span])
            low.copy_(least)
            first_low[:rows], first_e[:rows] = low - w, now
        else:
            moved = low - w
            least = torch.minimum(moved, here)
            before = now * power(least, moved).unsqueeze(1)
            before.addcmul_(power(least, here).unsqueeze(1), read[span])
            first_low[:rows], first_e[:rows] = least, before
        count = rows
    weight = power(s.k, low_after)
    dv, dk = weight * e[:, 0], weight * (s.v * e[:, 0] + e[:, 1])
    dw = power(s.before[:, 2] + s.w, low_after) * (s.before[:, :2] * e).sum(1)
    dbonus = s.k.new_zeros(s.k.shape[1])
    if not inclusive:
        own = power(s.own, s.top)
        dv = dv + own * g
        read_k = own * g * (s.v - s.y)
        dk = dk + read_k
        dbonus = read_k.sum(0)
    dn = power(s.first[:, 2], first_low).unsqueeze(1) * first_e
    # a sequence without tokens hands its state on, with the gradient
    dinitial = torch.cat([dn, (dn * s.first[:, :2]).sum(1, keepdim=True)], 1)
    if state is not None:
        dinitial[steps.alive :] = state[steps.alive :]
    dw = dw.sum(0) if log_decay.ndim == 1 else layout.from_time(dw)
    return layout.from_time(dk), layout.from_time(dv), dw, dbonus, layout.from_rows(dinitial)
