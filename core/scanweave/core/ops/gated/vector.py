"""The matrix-state scan with a decay of every key channel: what its kernels are launched for.

Forward: q and k are scaled, then the states walk over the chunks (unless there is one chunk and
no state), then outputs are mixed. The backward scales and walks again. How: `vector_scale.py`.
"""

import torch
from torch import Tensor

from ..checks import on_kernels
from ..launch import adjacent
from .kernels import Frame, Precision, frame_of, precision_of
from .vector_mix import vector_mix
from .vector_pair import gradients, vector_pair
from .vector_scale import Vector, scaled
from .vector_steep import steep_pairs
from .vector_walk import vector_walk


def takes(v: Tensor, g: list[Tensor]) -> bool:
    """Whether these kernels run a scan: on a GPU, with a decay of every key channel."""
    return on_kernels(v) and bool(g) and g[0].ndim == 4


def forward(
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    bonus: Tensor | None,
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
    factors = write or [None] * len(q)
    flags = {"exclusive": exclusive, "shift": shift}
    directions = [
        scaled(frame, *d, bonus, precision, **flags)
        for d in zip(q, k, g, factors, reverse, strict=True)
    ]
    pairs = [steep_pairs(frame, d, v, None, None, precision, **flags) for d in directions]
    states, last = None, torch.empty(0, dtype=torch.float32, device=v.device)
    if final or initial_state or not frame.single:
        walks = [
            vector_walk(
                frame,
                direction,
                v,
                initial_state[d].contiguous() if initial_state else None,
                precision,
                back=False,
                end=final,
            )
            for d, direction in enumerate(directions)
        ]
        states = [walk[0] for walk in walks]
        if final:
            last = torch.stack([walk[1] for walk in walks if walk[1] is not None])
    if frame.single and not initial_state:
        states = None
    skip = _own(skip, directions[0])
    out = vector_mix(
        frame, directions, pairs, v, skip, states, precision, exclusive=exclusive, back=False
    )
    return out, last


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
    bonus: Tensor | None,
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
    factors = write or [None] * len(q)
    flags = {"exclusive": exclusive, "shift": shift}
    directions = [
        scaled(frame, *d, bonus, precision, **flags)
        for d in zip(q, k, g, factors, reverse, strict=True)
    ]
    parts = [
        gradients(frame, x, v, precision, shift=shift, skip=skip is not None and d == 0)
        for d, x in enumerate(directions)
    ]
    pairs = [
        steep_pairs(frame, x, v, dout, (part.q, part.k, part.g), precision, **flags)
        for x, part in zip(directions, parts, strict=True)
    ]
    states, dstates, dstart = _states_of(
        frame, directions, dout, dfinal, v, initial_state, precision
    )
    own = _own(skip, directions[0])
    dv = vector_mix(
        frame, directions, pairs, dout, own, dstates, precision, exclusive=exclusive, back=True
    )
    for d, (x, part) in enumerate(zip(directions, parts, strict=True)):
        h = None if states is None else states[d]
        dh = None if dstates is None else dstates[d]
        vector_pair(frame, x, dout, v, h, dh, part, precision, **flags)
    groups = q[0].shape[2]

    def of_groups(x: Tensor) -> Tensor:
        return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)

    grads = [of_groups(p.q) for p in parts] + [of_groups(p.k) for p in parts] + [dv]
    grads += [p.g for p in parts]
    grads += [p.write.sum(0) for p in parts if p.write is not None]
    grads += [p.skip for p in parts if p.skip is not None]
    return grads + dstart + [p.bonus.sum(0) for p in parts if p.bonus is not None]


def _own(skip: Tensor | None, direction: Vector) -> Tensor | None:
    """What a token's own value is multiplied by beside the scan: skip and bonus."""
    if direction.own is None:
        return skip
    return direction.own if skip is None else direction.own + skip


def _states_of(
    frame: Frame,
    directions: list[Vector],
    dout: Tensor,
    dfinal: Tensor | None,
    v: Tensor,
    initial_state: list[Tensor],
    precision: Precision,
) -> tuple[list[Tensor] | None, list[Tensor] | None, list[Tensor]]:
    """States that enter the chunks, gradients that leave them, those of the initial states."""
    if frame.single and not initial_state and dfinal is None:
        return None, None, []
    states, dstates, dstart = [], [], []
    for d, direction in enumerate(directions):
        start = initial_state[d].contiguous() if initial_state else None
        end = None if dfinal is None else dfinal[d].contiguous()
        walked, _ = vector_walk(frame, direction, v, start, precision, back=False, end=False)
        back, last = vector_walk(
            frame, direction, dout, end, precision, back=True, end=bool(initial_state)
        )
        states.append(walked)
        dstates.append(back)
        if last is not None:
            dstart.append(last)
    return states, dstates, dstart
