"""Linear recurrence with one dense matrix per channel, as a torch operator.

    h[c] = u[c] + (I + E) h[c-1]        u[c] alone where position[c] is 0

E is what the matrix differs from the identity by: powers of I + E, of which E' = 2 E + E^2 is the
square's, then keep the digits of slow states. Doubling: round k adds (I + E)^(2^k) h[c - 2^k], so
log2 of the longest sequence's rounds of matrix products do, whatever the number of sequences.

    dense_scan     the public function
    chunk_layout   where tokens of packed sequences lie when each is cut into chunks of its own

Letters: D channels, C places, N state, L length, S packed sequences.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_cu_seqlens_values

_lib = torch.library.Library("scanweave", "FRAGMENT")
_lib.define("dense_scan(Tensor u, Tensor E, Tensor position, SymInt longest) -> Tensor")
_lib.define(
    "dense_scan_backward(Tensor dh, Tensor h, Tensor E, Tensor position, SymInt longest) -> "
    "(Tensor du, Tensor dE)"
)
_lib.define(
    "chunk_layout(Tensor cu_seqlens, SymInt length, int chunk, bool reverse) -> "
    "(Tensor slot, Tensor position, Tensor owner, Tensor first)"
)
_forward_op = torch.ops.scanweave.dense_scan.default
_backward_op = torch.ops.scanweave.dense_scan_backward.default


def double(u: Tensor, E: Tensor, position: Tensor, longest: int, back: bool) -> Tensor:
    """All rounds; `back` runs from the end, and `position` counts from a sequence's end then."""
    h, reach = u.clone(memory_format=torch.contiguous_format), 1
    while reach < longest:
        behind = h[:, reach:] if back else h[:, :-reach]
        reached = (position[:-reach] if back else position[reach:]) >= reach
        add = torch.where(reached[:, None], behind + behind @ E, 0)
        h = (
            torch.cat([h[:, :-reach] + add, h[:, -reach:]], 1)
            if back
            else torch.cat([h[:, :reach], h[:, reach:] + add], 1)
        )
        reach *= 2
        E = torch.baddbmm(E, E, E, beta=2)
    return h


def _longest(position: Tensor, longest: int) -> int:
    """How long sequences are at most, as far as it costs nothing to see."""
    longest = min(longest, position.shape[0])
    if position.is_cuda or not position.numel():
        return longest
    return min(longest, int(position.max()) + 1)


def _forward(u: Tensor, E: Tensor, position: Tensor, longest: int) -> Tensor:
    return double(u, E.mT, position, _longest(position, longest), False)


def _from_end(position: Tensor) -> Tensor:
    """Places from a sequence's last one, from places from its first one."""
    places = torch.arange(position.shape[0], device=position.device)
    # the first place of the next sequence, or the end
    starts = torch.where(position == 0, places, position.shape[0])
    after = torch.cat([starts[1:], starts.new_full((1,), position.shape[0])])
    following = after.flip(0).cummin(0).values.flip(0)
    return following - 1 - places


def _backward(
    dh: Tensor, h: Tensor, E: Tensor, position: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    du = double(dh, E, _from_end(position), _longest(position, longest), True)
    carried = torch.where((position[1:] > 0)[:, None], h[:, :-1], 0)
    return du, du[:, 1:].transpose(1, 2) @ carried


for _device in ("CPU", "CUDA"):
    _lib.impl("dense_scan", _forward, _device)
    _lib.impl("dense_scan_backward", _backward, _device)


def _forward_fake(u: Tensor, E: Tensor, position: Tensor, longest: int) -> Tensor:
    return u.new_empty(u.shape)


def _backward_fake(
    dh: Tensor, h: Tensor, E: Tensor, position: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    return h.new_empty(h.shape), E.new_empty(E.shape)


torch.library.register_fake("scanweave::dense_scan", _forward_fake, lib=_lib)
torch.library.register_fake("scanweave::dense_scan_backward", _backward_fake, lib=_lib)


class DenseScan(torch.autograd.Function):
    """The states of checked tensors, with gradients to u and E."""

    # dL/du[c] = dL/dh[c] + (I + E)^T dL/du[c+1], the same recurrence from the end;
    # dL/dE = sum_c dL/du[c] h[c-1]^T
    @staticmethod
    def forward(ctx, u, E, position, longest):  # noqa: D102
        h = _forward_op(u, E, position, longest)
        ctx.save_for_backward(h, E, position)
        ctx.longest = longest
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        h, E, position = ctx.saved_tensors
        return *_backward_op(dh, h, E, position, ctx.longest), None, None


def _differentiable(u: Tensor, E: Tensor, position: Tensor, longest: int) -> Tensor:
    if not (torch.is_grad_enabled() and (u.requires_grad or E.requires_grad)):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(u, E, position, longest)
    return DenseScan.apply(u, E, position, longest)


_lib.impl("dense_scan", _differentiable, "Autograd")


def dense_scan(u: Tensor, E: Tensor, position: Tensor, longest: int) -> Tensor:
    """Run h[c] = u[c] + (I + E) h[c-1] over sequences that lie one behind another.

    Args:
        u: Inputs, (D, C, N), float32 or float64.
        E: The matrices less the identity, (D, N, N), dtype of u; stable if no power grows.
        position: Place of each input in its own sequence, from 0, (C,) int64.
        longest: At least the number of places of the longest sequence; bounds the rounds.

    Returns:
        Every state, (D, C, N), in the dtype of u. Gradients reach u and E.

    Raises:
        ValueError: a shape or dtype does not fit.

    Example:
        >>> u, E = torch.ones(1, 3, 1), torch.full((1, 1, 1), -0.5)
        >>> dense_scan(u, E, torch.arange(3), 3).flatten().tolist()
        [1.0, 1.5, 1.75]

    Source: Hillis & Steele 1986, Data parallel algorithms, doi 10.1145/7902.7903.
    """
    if u.ndim != 3 or u.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"u must be (D, C, N) and float32 or float64, got {u.shape} {u.dtype}")
    square = (u.shape[0], u.shape[2], u.shape[2])
    if tuple(E.shape) != square or E.dtype != u.dtype:
        raise ValueError(
            f"E must be (D, N, N) = {square} {u.dtype}, got {tuple(E.shape)} {E.dtype}"
        )
    if tuple(position.shape) != (u.shape[1],) or position.dtype != torch.int64:
        raise ValueError(
            f"position must be int64 (C,) = {(u.shape[1],)}, "
            f"got {position.dtype} {tuple(position.shape)}"
        )
    return _forward_op(u, E, position, longest)


def _layout(
    cu_seqlens: Tensor, length: int, chunk: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_cu_seqlens_values(cu_seqlens, length)
    device = cu_seqlens.device
    bounds = cu_seqlens.long()
    starts, lengths = bounds[:-1], bounds.diff()
    ends = ((lengths + chunk - 1) // chunk).cumsum(0)
    first = torch.cat([ends.new_zeros(1), ends])[:-1]
    places = torch.arange(length // chunk + starts.shape[0], device=device)
    owner = torch.searchsorted(ends, places, right=True).clamp(max=starts.shape[0] - 1)
    tokens = torch.arange(length, device=device)
    row = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    place = tokens - starts[row]
    if reverse:
        place = lengths[row] - 1 - place
    return first[row] * chunk + place, places - first[owner], owner, first


def _layout_fake(
    cu_seqlens: Tensor, length: int, chunk: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = cu_seqlens.shape[0] - 1
    total = length // chunk + sequences
    sizes = (length, total, total, sequences)
    slot, position, owner, first = (cu_seqlens.new_empty(n, dtype=torch.int64) for n in sizes)
    return slot, position, owner, first


for _device in ("CPU", "CUDA"):
    _lib.impl("chunk_layout", _layout, _device)
torch.library.register_fake("scanweave::chunk_layout", _layout_fake, lib=_lib)


def chunk_layout(
    cu_seqlens: Tensor, length: int, chunk: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut every packed sequence into chunks of its own; as many as there can be at most.

    Args:
        cu_seqlens: Starts of S packed sequences, (S + 1,), S at least 1.
        length: Tokens L.
        chunk: Places of a chunk.
        reverse: Whether sequences run from their last token.

    Returns:
        int64: where each token lies, (L,), its chunk times `chunk` plus its place there; place of
        each chunk in its sequence and which one that is, (L // chunk + S,); first chunk of each
        sequence, (S,). Chunks that stay empty continue the last sequence.

    Raises:
        ValueError: cu_seqlens falls, or does not run from 0 to L.
    """
    return torch.ops.scanweave.chunk_layout.default(cu_seqlens, length, chunk, reverse)
