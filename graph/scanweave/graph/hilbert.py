"""Node order along a Hilbert curve through positions in the plane or in space.

hilbert_scores   positions -> place on the curve, for `node_order=` or `AddNodeOrder("hilbert")`
hilbert_index    whole coordinates -> place on the curve
"""

import torch
from torch import Tensor


def hilbert_scores(pos: Tensor, batch: Tensor | None = None, bits: int | None = None) -> Tensor:
    """Place of every node on a Hilbert curve through the bounding cube of its graph.

    Nodes next to each other on the curve are next to each other in space. It depends on the
    frame: turning the positions changes the order.

    Args:
        pos: Positions, (n, 2) or (n, 3).
        batch: Graph of every node, (n,) int64; one graph when absent.
        bits: Cells along a side, as a power of two; 16 when absent.

    Returns:
        Scores, (n,) int64.

    Raises:
        ValueError: `pos` has another shape or is not finite, or `bits` is out of range.
    """
    if pos.dim() != 2 or pos.size(1) not in (2, 3):
        raise ValueError(f"pos must be (n, 2) or (n, 3), got {tuple(pos.shape)}")
    bits = 16 if bits is None else bits
    if not 1 <= bits <= 20:
        raise ValueError(f"bits must be in [1, 20], got {bits}")
    if not bool(pos.isfinite().all()):
        raise ValueError("pos must be finite, got NaN or infinity")
    if batch is None:
        batch = torch.zeros(pos.size(0), dtype=torch.int64, device=pos.device)
    pos = pos.double()
    number = torch.unique(batch, return_inverse=True)[1].unsqueeze(1).expand_as(pos)
    low = torch.full_like(pos, torch.inf).scatter_reduce_(0, number, pos, "amin").gather(0, number)
    offset = pos - low
    span = torch.zeros_like(pos).scatter_reduce_(0, number, offset, "amax").gather(0, number)
    # one scale for all axes, so that the curve does not stretch
    side = span.amax(1, keepdim=True) if pos.numel() else span
    cells = torch.where(side > 0, offset / side, 0.0) * (2**bits - 1)
    return hilbert_index(cells.round().long(), bits)


def hilbert_index(cells: Tensor, bits: int) -> Tensor:
    """Place on the Hilbert curve through the cube of 2^bits cells a side.

    Args:
        cells: Whole coordinates in [0, 2^bits), (n, axes) int64.
        bits: Bits of a coordinate; bits * axes is at most 62.

    Returns:
        Places, (n,) int64 in [0, 2^(bits * axes)).

    Source: Skilling 2004, "Programming the Hilbert curve", AIP Conference Proceedings 707.
    """
    axes = cells.size(1)
    x = list(cells.unbind(1))
    for level in range(bits - 1, 0, -1):
        high, low = 1 << level, (1 << level) - 1
        for axis in range(axes):
            upper = (x[axis] & high) != 0
            # in the upper half the first axis is mirrored, in the lower one it is swapped in
            swap = torch.where(upper, 0, (x[0] ^ x[axis]) & low)
            x[0] = torch.where(upper, x[0] ^ low, x[0] ^ swap)
            x[axis] = x[axis] ^ swap if axis else x[0]
    for axis in range(1, axes):
        x[axis] = x[axis] ^ x[axis - 1]
    turn = torch.zeros_like(x[0])
    for level in range(bits - 1, 0, -1):
        turn = torch.where((x[-1] & (1 << level)) != 0, turn ^ ((1 << level) - 1), turn)
    place = torch.zeros_like(turn)
    for level in range(bits - 1, -1, -1):
        for axis in range(axes):
            place = place << 1 | ((x[axis] ^ turn) >> level & 1)
    return place
