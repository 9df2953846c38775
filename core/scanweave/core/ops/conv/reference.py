"""The definition of the short depthwise convolution, one sequence at a time.

    c[t] = bias + sum_j w[j] x[t - left + j]        j = 0 .. W-1, in natural time
    y[t] = c[t], or silu(c[t])

causal: left = W - 1, so that the last tap meets the newest input. `reverse` mirrors time:
c[t] = bias + sum_j w[j] x[t + left - j], which equals flipping, convolving and flipping back.
symmetric: left = (W - 1) / 2. Outside a sequence x is 0, or comes from `initial_state`.

Letters: B batch, L length, D channels, W taps, S packed sequences.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import computing_dtype


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    symmetric: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The definition, one sequence at a time. Same contract as the public functions."""
    width = weight.shape[1]
    left = (width - 1) // 2 if symmetric else width - 1
    ends = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    parts = []
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if start == end:
            continue
        v = x[:, start:end]
        v = (v.flip(1) if reverse else v).transpose(1, 2)
        if initial_state is None:
            v = F.pad(v, (left, width - 1 - left))
        else:
            rows = slice(None) if cu_seqlens is None else slice(i, i + 1)
            v = torch.cat([initial_state[rows].to(v.dtype).transpose(1, 2), v], 2)
        dtype = computing_dtype(x, weight)
        c = F.conv1d(
            v.to(dtype),
            weight.to(dtype).unsqueeze(1),
            None if bias is None else bias.to(dtype),
            groups=v.shape[1],
        ).transpose(1, 2)
        parts.append(c.flip(1) if reverse else c)
    c = torch.cat(parts, 1) if parts else x
    return (F.silu(c) if activation == "silu" else c).to(x.dtype)
