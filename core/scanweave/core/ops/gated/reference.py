"""The definition of the matrix-state scan, one step at a time: slow, readable, the oracle.

    h[t] = exp(g[t]) * h[t-1] + write[t] k[t] v[t]^T      (K, V), h before the start = state
    o[t] = q[t] h[t]                                      inclusive reading
    o[t] = q[t] h[t-1] + (q[t] . (bonus * k[t])) v[t]     exclusive reading
    out[t] = o[t] + skip[t] v[t]

exp(g) scales the rows of h: one log decay per head, or one per key channel. This is SSD (Mamba-2)
with q = C, k = B, v = x, write = dt, g = dt A, skip = D, and gated linear attention.

Letters: B batch, L length, G groups of heads that share q and k, H heads, K key width (the
state's), V value width (the head's), S packed sequences. The state is kept in float32, or float64
if an input is.
"""

import itertools

import torch
from torch import Tensor

from ..checks import computing_dtype


def gated_linear_scan_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    write: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    exclusive: bool = False,
    bonus: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, by a Python loop over time. Same contract as `gated_linear_scan`."""
    dtype = computing_dtype(q, k, v, g, write, skip, bonus, initial_state)
    out_dtype = v.dtype
    batch, length, heads, width = v.shape
    keys = q.shape[-1]
    q, k = (u.to(dtype).repeat_interleave(heads // u.shape[2], 2) for u in (q, k))
    v = v.to(dtype)
    # one a head, or one a channel
    decay = v.new_ones(batch, length, heads, 1)
    if g is not None:
        g = g.to(dtype)
        if g.ndim < 3:
            g = g.expand(batch, length, *g.shape)
        decay = torch.exp(g if g.ndim == 4 else g.unsqueeze(-1))
    written = v if write is None else v * write.to(dtype).unsqueeze(-1)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = v.new_zeros(rows, heads, keys, width)
    if initial_state is not None:
        states = initial_state.to(dtype)
    ranges = [(0, length)] if cu_seqlens is None else list(itertools.pairwise(cu_seqlens.tolist()))

    outputs: dict[int, Tensor] = {}
    finals = []
    for i, (start, end) in enumerate(ranges):
        h = states if cu_seqlens is None else states[i : i + 1]
        for t in reversed(range(start, end)) if reverse else range(start, end):
            before = h
            h = decay[:, t].unsqueeze(-1) * h + k[:, t].unsqueeze(-1) * written[:, t].unsqueeze(-2)
            o = (q[:, t].unsqueeze(-1) * (before if exclusive else h)).sum(-2)
            if bonus is not None:
                o = o + (q[:, t] * bonus.to(dtype) * k[:, t]).sum(-1, keepdim=True) * v[:, t]
            outputs[t] = o
        finals.append(h)
    out = torch.stack([outputs[t] for t in range(length)], 1) if length else v
    if skip is not None:
        out = out + skip.to(dtype).unsqueeze(-1) * v
    out = out.to(out_dtype)
    if not return_final_state:
        return out
    return out, torch.cat(finals) if finals else states


def quasi_separable_ref(
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: Tensor,
    g: tuple[Tensor, Tensor] | None = None,
    write: tuple[Tensor, Tensor] | None = None,
    skip: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Both directions without the token itself, by the definition of Hydra's shift.

    The output of either scan moves one token on, so that token t gets what the forward scan read
    at t - 1 and the reverse one at t + 1; what moves over the border of a sequence is dropped.
    """
    ends = [0, v.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    total = torch.zeros_like(v)
    for d in range(2):
        o = gated_linear_scan_ref(
            q[d],
            k[d],
            v,
            None if g is None else g[d],
            None if write is None else write[d],
            reverse=d == 1,
            cu_seqlens=cu_seqlens,
        )
        assert isinstance(o, Tensor)
        parts = []
        for start, end in itertools.pairwise(ends):
            part = o[:, start:end]
            none = torch.zeros_like(part[:, :1])
            parts.append(torch.cat([none, part[:, :-1]] if d == 0 else [part[:, 1:], none], 1))
        total = total + torch.cat(parts, 1)
    return total if skip is None else total + (skip.unsqueeze(-1) * v).to(v.dtype)
