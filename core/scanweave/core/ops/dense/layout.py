"""Where tokens lie when sequences are cut into chunks: dense batches and packed ones alike.

Letters: B batch, L length, D channels, S sequences, K chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import exporting
from .op import chunk_layout


class Layout(NamedTuple):
    """Where tokens lie when every sequence is cut into chunks of its own.

    Attributes:
        slot: Place of every token in the chunks, one behind another, (B L,).
        position: Place of every chunk in its sequence, (K,).
        owner: Sequence of every chunk, (K,).
        first: First chunk of every sequence, (S,).
        lengths: Tokens of every sequence, (S,).
        borders: `first` and K, (S + 1,) int32; None if all sequences have as many chunks.
    """

    slot: Tensor
    position: Tensor
    owner: Tensor
    first: Tensor
    lengths: Tensor
    borders: Tensor | None


def lay_out(x: Tensor, cu_seqlens: Tensor | None, chunk: int, reverse: bool) -> Layout:
    """Cut the sequences of x (B, L, D) into chunks."""
    batch, length, _ = x.shape
    if cu_seqlens is not None:
        slot, position, owner, first = chunk_layout(cu_seqlens, length, chunk, reverse)
        end = torch.full_like(first[:1], position.shape[0])
        borders = torch.cat([first, end]).to(torch.int32)
        return Layout(slot, position, owner, first, cu_seqlens.diff().long(), borders)
    # in slots as packed ones, and not padded and cut, for which a compiler fixes lengths
    # nor may an exporter ask whether there is one chunk; what is too many stays empty
    each = length // chunk + 2 if exporting() else (length + chunk - 1) // chunk
    rows, places = (torch.arange(n, device=x.device) for n in (batch, batch * each))
    tokens = torch.arange(length, device=x.device)
    if reverse:
        tokens = length - 1 - tokens
    slot = (rows.unsqueeze(1) * (each * chunk) + tokens).flatten()
    lengths = torch.full_like(rows, length)
    return Layout(slot, places % each, places // each, rows * each, lengths, None)
