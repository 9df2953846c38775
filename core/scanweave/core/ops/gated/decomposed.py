"""One direction of the matrix-state scan in PyTorch's own operators, for exported programs.

    matrix_states   a decay of every key channel: the states of all tokens, by doubling
    matrix_chunks   a decay a head: matrix products in chunks, the states between them by doubling

As in `portable.py` no exponent is above 0, and none is a difference of sums: a steep decay would
take the digits of all that comes after it, and one of minus infinity would leave nothing.

Letters: B batch, L length, H heads, K key width, V value width, Q steps of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..doubling import moved, recurrence
from .portable import CHUNK, sums_between


def matrix_states(
    q: Tensor,
    k: Tensor,
    written: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    exclusive: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V) for decays g, (B, L, H, K)."""
    inputs = k.unsqueeze(-1) * written.unsqueeze(-2)
    h, last = recurrence(torch.exp(g).unsqueeze(-1), inputs, initial_state, reverse)
    if exclusive:
        h = _entering(h, initial_state, reverse)
    return (q.unsqueeze(-2) @ h).squeeze(-2), last


def _entering(h: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """The state before each step, given the states after them."""
    before = moved(h, 1, reverse)
    if initial_state is None:
        return before
    start = initial_state.unsqueeze(1)
    return torch.cat([before[:, :-1], start] if reverse else [start, before[:, 1:]], 1)


def matrix_chunks(
    q: Tensor,
    k: Tensor,
    written: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    reverse: bool,
    exclusive: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) and the last state (B, H, K, V) for decays g, (B, L, H)."""
    length = q.shape[1]
    steps = min(CHUNK, length)
    beyond = -length % steps
    if reverse:
        q, k, written, g = (u.flip(1) for u in (q, k, written, g))
    # steps beyond the end write nothing and decay nothing
    chunked = (
        F.pad(u, [0, 0] * (u.ndim - 2) + [0, beyond]).unflatten(1, (-1, steps))
        for u in (q, k, written, g.unsqueeze(-1))
    )
    q, k, written, g = (u.transpose(2, 3) for u in chunked)  # (B, chunks, H, Q, width)
    none = torch.zeros_like(g[:, :, :, :1])
    sums = g.cumsum(3)
    read = torch.cat([none, sums[:, :, :, :-1]], 3) if exclusive else sums
    later = torch.cat([g[:, :, :, 1:], none], 3).flip(3).cumsum(3).flip(3)
    # how far the reading is behind the writing: below `exclusive` it sees nothing
    places = torch.arange(steps, device=q.device)
    seen = places.unsqueeze(1) - places >= int(exclusive)
    decays = torch.where(seen, torch.exp(sums_between(g.squeeze(4), 3, exclusive)), 0)
    inside = ((q @ k.mT) * decays) @ written
    inputs = (k * torch.exp(later)).mT @ written  # (B, chunks, H, K, V)
    h, last = recurrence(torch.exp(sums[:, :, :, -1:]), inputs, initial_state, reverse=False)
    carried = (q * torch.exp(read)) @ _entering(h, initial_state, reverse=False)
    out = (inside + carried).transpose(2, 3).flatten(1, 2)[:, :length]
    return out.flip(1) if reverse else out, last
