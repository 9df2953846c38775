"""The bonus of an exclusive reading as a skip, in plain PyTorch.

    skip[t] += sum_k q[t] bonus k[t]      of every head, (B, L, H)

Letters: B batch, L length, G groups of H heads, K keys.
"""

import torch
from torch import Tensor

from ..checks import computing_dtype


def with_bonus(skip: Tensor | None, q: Tensor, k: Tensor, bonus: Tensor) -> Tensor:
    """The factor of v that skip (B, L, H) and bonus (H, K) have in all."""
    dtype = computing_dtype(q, k, bonus)
    weights = bonus.to(dtype).unflatten(0, (q.shape[2], -1))
    own = torch.einsum("blgk,guk->blgu", q.to(dtype) * k.to(dtype), weights).flatten(2)
    return own if skip is None else skip + own


def bonus_gradients(
    dskip: Tensor, q: Tensor, k: Tensor, bonus: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What q, k and bonus have of the gradient of that factor."""
    dtype = computing_dtype(q, k, bonus)
    heads = (q.shape[2], -1)
    dskip, weights = dskip.to(dtype).unflatten(2, heads), bonus.to(dtype).unflatten(0, heads)
    queries, keys = q.to(dtype), k.to(dtype)
    of_group = torch.einsum("blgu,guk->blgk", dskip, weights)
    dbonus = torch.einsum("blgu,blgk->guk", dskip, queries * keys).flatten(0, 1)
    return of_group * keys, of_group * queries, dbonus
