"""A recurrence in log2(L) passes over all tokens, in PyTorch's own operators and any runtime's.

h[t] = a[t] h[t-1] + b[t] becomes passes in which every token takes in the one 1, 2, 4, ... before:

    b <- b + a * b moved by s;   a <- a * a moved by s;   s <- 2 s

Source: Hillis & Steele 1986, Data parallel algorithms, doi 10.1145/7902.7903.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def moved(v: Tensor, steps: int, reverse: bool = False, fill: float = 0.0) -> Tensor:
    """What stood `steps` tokens before each token on axis 1 (after it if `reverse`), or `fill`."""
    kept = v[:, steps:] if reverse else v[:, : v.shape[1] - steps]
    sides = [0, steps] if reverse else [steps, 0]
    return F.pad(kept, [0, 0] * (v.ndim - 2) + sides, value=fill)


def recurrence(
    a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """All h[t] = a[t] h[t-1] + b[t] along axis 1, and the last one; `a` broadcasts to `b`."""
    length = b.shape[1]
    if initial_state is not None:
        last = length - 1 if reverse else 0
        started = b[:, last : last + 1] + a[:, last : last + 1] * initial_state.unsqueeze(1)
        b = torch.cat([b[:, :last], started] if reverse else [started, b[:, 1:]], 1)
    step = 1
    while step < length:
        b = b + a * moved(b, step, reverse)
        if 2 * step < length:
            a = a * moved(a, step, reverse)
        step *= 2
    return b, b[:, 0] if reverse else b[:, length - 1]
