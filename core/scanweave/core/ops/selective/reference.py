"""The definition of the selective scan (Mamba, S6), one step at a time: slow, readable, the oracle.

    delta[t] = softplus(dt[t] + dt_bias)                        (D,)
    h[t]     = exp(delta[t] A) * h[t-1] + delta[t] x[t] B[t]    (D, N), h before the start = state
    y[t]     = sum_n h[t] C[t] + D x[t]                         (D,)
    out[t]   = y[t] * silu(z[t])

Letters: B batch, L length, D channels, N state, G groups of channels that share B and C,
S packed sequences. The state is kept in float32, or float64 if an input is.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype


def selective_scan_ref(
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
    """The definition, by a Python loop over time. Same contract as `selective_scan`."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        out = torch.zeros_like(x)
        states = []
        for i, (start, end) in enumerate(itertools.pairwise(ends)):
            rows = slice(start, end)
            out_i, state = selective_scan_ref(
                x[:, rows],
                dt[:, rows],
                A,
                B[:, rows],
                C[:, rows],
                D,
                None if z is None else z[:, rows],
                dt_bias,
                dt_softplus,
                reverse=reverse,
                initial_state=None if initial_state is None else initial_state[i : i + 1],
                return_final_state=True,
            )
            out = torch.cat([out[:, :start], out_i, out[:, end:]], 1)
            states.append(state)
        if not return_final_state:
            return out
        dtype = computing_dtype(x, dt, A, B, C)
        return out, torch.cat(states) if states else x.new_zeros(0, *A.shape, dtype=dtype)

    dtype = computing_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    out_dtype = x.dtype
    x, dt, A, B, C = (v.to(dtype) for v in (x, dt, A, B, C))
    batch, length, dim = x.shape
    if B.ndim == 3:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    per_group = dim // B.shape[2]
    B = B.repeat_interleave(per_group, 2)  # (B, L, D, N)
    C = C.repeat_interleave(per_group, 2)
    delta = dt if dt_bias is None else dt + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)

    h = x.new_zeros(batch, dim, A.shape[1])
    if initial_state is not None:
        h = initial_state.to(dtype)
    ys: dict[int, Tensor] = {}
    for t in reversed(range(length)) if reverse else range(length):
        decay = torch.exp(delta[:, t, :, None] * A)
        h = decay * h + (delta[:, t] * x[:, t])[..., None] * B[:, t]
        ys[t] = (h * C[:, t]).sum(-1)
    y = torch.stack([ys[t] for t in range(length)], 1) if length else x
    if D is not None:
        y = y + D.to(dtype) * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(out_dtype)
    return (y, h) if return_final_state else y
