"""The definition of the diagonal linear recurrence, one step at a time: slow, readable, the oracle.

    h[t] = exp(log_a[t]) * h[t-1] + x[t]        h before the start = initial_state, or 0

Letters: B batch, L length, D channels (any number of axes), S packed sequences. The state is kept
in float32, or float64 if an input is; complex likewise.
"""

import itertools

import torch
from torch import Tensor


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What states are kept in: complex if any input is, of 64-bit parts if any input is."""
    given = [v.dtype for v in tensors if v is not None]
    double = any(v in (torch.float64, torch.complex128) for v in given)
    if any(v.is_complex for v in given):
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32


def linear_scan_ref(
    x: Tensor,
    log_a: Tensor,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, by a Python loop over time. Same contract as `linear_scan`."""
    dtype = state_dtype(x, log_a, initial_state)
    decay = torch.exp(log_a.to(dtype))
    if log_a.ndim < x.ndim:
        decay = decay.expand(x.shape)
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows: dict[int, Tensor] = {}
    finals = []
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if initial_state is None:
            h = x.new_zeros(x.shape[:1] + x.shape[2:], dtype=dtype)
        else:
            h = initial_state.to(dtype)
            h = h if cu_seqlens is None else h[i : i + 1]
        for t in reversed(range(start, end)) if reverse else range(start, end):
            h = decay[:, t] * h + x[:, t]
            rows[t] = h
        finals.append(h)
    out = torch.stack([rows[t] for t in range(x.shape[1])], 1) if rows else x
    out = out.to(torch.promote_types(x.dtype, dtype) if dtype.is_complex else x.dtype)
    if not return_final_state:
        return out
    return out, torch.cat(finals) if finals else x.new_zeros(0, *x.shape[2:], dtype=dtype)
