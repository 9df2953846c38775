"""What the kernels of short sequences share: decays inside a chunk, and what their tiles leave.

Letters and flags: `kernels.py`.
"""
# Triton's own language: constant branches
# pyright: reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import Direction, Frame
from .pair_kernel import parts_of_group
from .sums_kernel import Sums


@triton.jit
def between(of_q, of_k, BACK: tl.constexpr):
    """Log2 decays of pairs of one chunk, queries along the rows, or the columns going back."""
    return of_q[None, :] - of_k[:, None] if BACK else of_q[:, None] - of_k[None, :]


class Tiles(NamedTuple):
    """What pairs of chunks leave: E, and sums of F over rows, columns, and pairs without a decay.

    Places of a chunk's tiles: those of the forward direction from the first chunk on, then those
    of the reverse one, so that a chunk has two of its own.
    """

    products: Tensor  # (B, G, parts, chunks, chunks + 1, Q, Q)
    rows: Tensor | None  # (chunks + 1, M, H, Q), by the column's chunk
    columns: Tensor | None  # (chunks + 1, M, H, Q), by the row's chunk
    near: Tensor | None  # (D, M, H, Q)
    dskip: Tensor | None  # (B, L, H)


def tiles_of(frame: Frame, directions: list[Direction], sums: Sums, v: Tensor, skip: bool) -> Tiles:
    """Memory for the tiles; heads of a group in several parts where programs are few."""
    batch, length, heads, _ = v.shape
    groups, (chunks, chunk) = directions[0].q.shape[2], (frame.chunks, frame.chunk)
    has_g, has_w = sums.decays is not None, sums.factors is not None
    parts = parts_of_group(heads // groups, frame.slots * groups, v.device)

    def partial(wanted: bool, places: int) -> Tensor | None:
        shape = (places, frame.slots, heads, chunk)
        return torch.empty(shape, dtype=torch.float32, device=v.device) if wanted else None

    # products take operands of this dtype
    kept = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    shape = (batch, groups, parts, chunks, chunks + 1, chunk, chunk)
    dskip = None
    if skip:
        dskip = torch.empty((batch, length, heads), dtype=torch.float32, device=v.device)
    return Tiles(
        torch.empty(shape, dtype=kept, device=v.device),
        partial(has_g, chunks + 1),
        partial(has_g or has_w, chunks + 1),
        partial(has_w, len(directions)),
        dskip,
    )


def stages(value_blocks: int) -> int:
    """Heads whose rows are on their way at once: as many as fit in shared memory."""
    return {1: 3, 2: 2}.get(value_blocks, 1)
