"""The matrix-state scan by its Triton kernels: what to launch for an op's arguments.

A single chunk without states is one launch forward (and one for the sums of its decays). So are a
few chunks, which read each other pair by pair (`short_*.py`): fewer bytes and at most as many
matrix products as through states. Longer sequences walk over their chunks first. The backward walks
again instead of keeping the states of all chunks: they are as large as two activations.
"""

import torch
from torch import Tensor

from ..checks import on_kernels
from ..launch import adjacent
from .kernels import Direction, Frame, Precision, frame_of, precision_of
from .mix_kernel import mix
from .pair_kernel import pair
from .short_cross_kernel import cross_tiles
from .short_gather_kernel import gather
from .short_mix_kernel import short_mix
from .short_own_kernel import own_tiles
from .short_spread_kernel import spread
from .short_tiles import tiles_of
from .sums_kernel import Sums, directions_of, sums_of
from .walk_kernel import walk

# up to 512 tokens: more chunks are read faster as a state than one by one
FEW_CHUNKS = 8


def takes(v: Tensor, g: list[Tensor]) -> bool:
    """Whether the kernels run a scan: on a GPU, and not with a decay for every channel."""
    return on_kernels(v) and not (g and g[0].ndim == 4)


def forward(
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    final: bool,
) -> tuple[Tensor, Tensor]:
    """Output and, if asked, final states (D, S, H, K, V)."""
    q, k, v = [adjacent(u) for u in q], [adjacent(u) for u in k], adjacent(v)
    precision = precision_of(q, k, v)
    frame = frame_of(v, cu_seqlens, precision.chunk)
    short = not (final or initial_state) and 1 < frame.chunks <= FEW_CHUNKS
    sums = sums_of(frame, v, g, write, reverse, exclusive=exclusive, borders=short)
    directions = directions_of(q, k, sums, reverse)
    if short:
        options = {"exclusive": exclusive, "shift": shift}
        out = short_mix(frame, directions, sums, v, skip, precision, back=False, **options)
        return out, torch.empty(0, dtype=torch.float32, device=v.device)
    start = [s.contiguous() for s in initial_state]
    states, last = None, None
    if final or start or not frame.single:
        states, last = walk(
            frame,
            directions,
            v,
            start,
            precision,
            exclusive=exclusive,
            shift=shift,
            back=False,
            end=final,
        )
    if frame.single and not start:
        states = None
    out = mix(
        frame,
        directions,
        v,
        skip,
        states,
        precision,
        exclusive=exclusive,
        shift=shift,
        back=False,
    )
    return out, torch.empty(0, dtype=torch.float32, device=v.device) if last is None else last


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
) -> list[Tensor]:
    """Gradients of q, k, v, g, write, skip and initial states, in this order."""
    q, k, v = [adjacent(u) for u in q], [adjacent(u) for u in k], adjacent(v)
    dout = adjacent(dout)
    precision = precision_of(q, k, v)
    frame = frame_of(v, cu_seqlens, precision.chunk)
    short = not initial_state and dfinal is None and 1 < frame.chunks <= FEW_CHUNKS
    sums = sums_of(frame, v, g, write, reverse, exclusive=exclusive, borders=short)
    directions = directions_of(q, k, sums, reverse)
    if short:
        return _short_backward(dout, frame, directions, sums, v, skip, precision, exclusive, shift)
    states, dstates, dstart = None, None, None
    if initial_state or dfinal is not None or not frame.single:
        start = [s.contiguous() for s in initial_state]
        ends = [] if dfinal is None else [d.contiguous() for d in dfinal.unbind(0)]
        states, _ = walk(
            frame,
            directions,
            v,
            start,
            precision,
            exclusive=exclusive,
            shift=shift,
            back=False,
            end=False,
        )
        dstates, dstart = walk(
            frame,
            directions,
            dout,
            ends,
            precision,
            exclusive=exclusive,
            shift=shift,
            back=True,
            end=bool(initial_state),
        )
    dv = mix(
        frame,
        directions,
        dout,
        skip,
        dstates,
        precision,
        exclusive=exclusive,
        shift=shift,
        back=True,
    )
    parts = [
        pair(
            frame,
            direction,
            dout,
            v,
            None if states is None else states[d],
            None if dstates is None else dstates[d],
            precision,
            exclusive=exclusive,
            shift=shift,
            skip=skip is not None and d == 0,
        )
        for d, direction in enumerate(directions)
    ]
    grads = [p[0] for p in parts] + [p[1] for p in parts] + [dv]
    grads += [p[2] for p in parts if p[2] is not None]
    grads += [p[3] for p in parts if p[3] is not None]
    grads += [p[4] for p in parts if p[4] is not None]
    return grads + ([] if dstart is None else list(dstart.unbind(0)))


def _short_backward(
    dout: Tensor,
    frame: Frame,
    directions: list[Direction],
    sums: Sums,
    v: Tensor,
    skip: Tensor | None,
    precision: Precision,
    exclusive: bool,
    shift: bool,
) -> list[Tensor]:
    """`backward` of a few chunks, which read each other without states."""
    options = {"exclusive": exclusive, "shift": shift}
    dv = short_mix(frame, directions, sums, dout, skip, precision, back=True, **options)
    tiles = tiles_of(frame, directions, sums, v, skip is not None)
    own_tiles(frame, directions, sums, tiles, dout, v, precision, **options)
    cross_tiles(frame, directions, sums, tiles, dout, v, precision, **options)
    pairs = spread(frame, directions, tiles, precision, shift=shift)
    dg, dw = gather(frame, directions, sums, tiles, exclusive=exclusive)
    dskip = [] if tiles.dskip is None else [tiles.dskip]
    return [*(p[0] for p in pairs), *(p[1] for p in pairs), dv, *dg, *dw, *dskip]
