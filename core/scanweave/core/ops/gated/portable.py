"""The matrix-state scan and its gradients in plain PyTorch: any device, any dtype, no graph kept.

One direction, without the skip term (`op.py` adds directions and applies it). Every sequence is
cut into chunks of Q steps. With S the running sum of the log decays inside a chunk, R the sum that
reading uses (S itself, or without the present step when the reading is exclusive) and h the state
that enters the chunk,

    P[i, j] = q[i] . k[j] exp(R[i] - S[j])                 j <= i (exclusive: j < i)
    o       = (P * write) v + exp(R) q h
    h_next  = exp(S_Q) h + sum_j exp(S_Q - S[j]) write[j] k[j] v[j]^T

so that all the work is matrix products. No exponent is ever above 0; differences of S are summed
of their own decays, as a steep one would take the digits of all later sums. Chunks are laid out
step-major: the first chunks of all sequences, then the second ones, ... with sequences sorted by
falling length, so that the ones still running are the first rows. Blocks of chunks bound the
memory; the backward keeps one state per block and recomputes the others.

A log decay per key channel makes P a sum over channels of differences, which no matrix product
computes without overflow; its chunks are short.

Letters: M chunks of a block, Q steps, G groups, K keys, U = H / G heads of a group, V values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# the same time within 10 % from 32 to 128 at (2, 1024, 8, 64, 64) on a CPU
CHUNK = 64
# direct sums over pairs and channels: cost grows with the chunk
VECTOR_CHUNK = 16
# elements of the largest buffer of a block
BLOCK_ELEMENTS = 1 << 22


@dataclass
class Layout:
    """Where the tokens of every chunk are."""

    chunk: int
    offsets: list[int]  # chunks of step c are offsets[c]:offsets[c + 1]
    tokens: Tensor  # (M, Q) index into (B L), any where not valid
    valid: Tensor  # (M, Q)
    before: Tensor  # (M, Q) whether a token has a predecessor
    rows: Tensor  # (S,) sequence of each row
    full: bool  # every token is valid

    def gather(self, x: Tensor, start: int, stop: int, shift: int = 0) -> Tensor:
        """(B, L, ...) -> (M, Q, ...) of a range of chunks, 0 where there is no token.

        `shift` is the place of a token's predecessor relative to its own.
        """
        places = self.tokens[start:stop]
        valid = self.before[start:stop] if shift else self.valid[start:stop]
        if shift:
            places = torch.where(valid, places + shift, 0)
        found = x.flatten(0, 1)[places]
        if self.full and not shift:
            return found
        return torch.where(valid.reshape(*valid.shape, *(1,) * (x.ndim - 2)), found, 0)

    def scatter(self, out: Tensor, values: Tensor, start: int, stop: int, shift: int = 0) -> None:
        """Inverse of `gather`; `out` (B, L, ...) is contiguous."""
        places = self.tokens[start:stop]
        valid = self.before[start:stop] if shift else self.valid[start:stop]
        flat = out.flatten(0, 1)
        flat[(places + shift)[valid]] = values[valid].to(out.dtype)


def layout_of(
    batch: int, length: int, chunk: int, reverse: bool, cu_seqlens: Tensor | None, like: Tensor
) -> Layout:
    """Chunks of a dense batch (B, L), or of packed sequences."""
    device = like.device
    if cu_seqlens is None:
        starts = torch.arange(batch, device=device) * length
        lengths = torch.full_like(starts, length)
    else:
        starts = cu_seqlens[:-1].long()
        lengths = cu_seqlens[1:].long() - starts
    counts, rows = torch.sort((lengths + chunk - 1) // chunk, descending=True, stable=True)
    longest = int(counts[0]) if counts.numel() else 0
    alive = (counts.unsqueeze(0) > torch.arange(longest, device=device).unsqueeze(1)).sum(1)
    offsets = [0, *alive.cumsum(0).tolist()]
    step = torch.repeat_interleave(torch.arange(longest, device=device), alive)
    row = torch.arange(offsets[-1], device=device) - (alive.cumsum(0) - alive)[step]
    row = rows[row]
    time = step.unsqueeze(1) * chunk + torch.arange(chunk, device=device)
    size = lengths[row].unsqueeze(1)
    valid = time < size
    place = (size - 1 - time) if reverse else time
    tokens = torch.where(valid, starts[row].unsqueeze(1) + place, 0)
    return Layout(chunk, offsets, tokens, valid, valid & (time > 0), rows, bool(valid.all()))


@dataclass
class Problem:
    """Inputs of one direction, q and k of vector decays with one group a head."""

    q: Tensor  # (B, L, G, K)
    k: Tensor
    v: Tensor  # (B, L, G, U, V)
    g: Tensor | None  # (B, L, G, U) or (B, L, G, K)
    write: Tensor | None  # (B, L, G, U)
    layout: Layout
    vector: bool
    exclusive: bool
    shift: int
    dtype: torch.dtype

    def blocks(self) -> list[tuple[int, int]]:
        """Ranges of steps whose buffers have about BLOCK_ELEMENTS elements."""
        chunk, (groups, keys) = self.layout.chunk, self.q.shape[2:]
        heads, width = groups * self.v.shape[3], self.v.shape[4]
        pairs = chunk * chunk * (keys if self.vector else 1)
        each = heads * max(pairs, keys * width, chunk * width)
        offsets = self.layout.offsets
        ranges, start = [], 0
        while start < len(offsets) - 1:
            stop = start + 1
            while (
                stop < len(offsets) - 1
                and (offsets[stop + 1] - offsets[start]) * each <= BLOCK_ELEMENTS
            ):
                stop += 1
            ranges.append((start, stop))
            start = stop
        return ranges


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    exclusive: bool,
    shift: bool,
    dtype: torch.dtype,
) -> Problem:
    batch, length, heads, _ = v.shape
    vector = g is not None and g.ndim == 4
    if vector:
        q, k = (u.repeat_interleave(heads // u.shape[2], 2) for u in (q, k))
    groups = q.shape[2]
    layout = layout_of(batch, length, VECTOR_CHUNK if vector else CHUNK, reverse, cu_seqlens, v)
    return Problem(
        q,
        k,
        v.unflatten(2, (groups, -1)),
        g if g is None or vector else g.unflatten(2, (groups, -1)),
        None if write is None else write.unflatten(2, (groups, -1)),
        layout,
        vector,
        exclusive,
        0 if not shift else (1 if reverse else -1),
        dtype,
    )


def sums_between(g: Tensor, axis: int, exclusive: bool) -> Tensor:
    """Sums of the log decays from the step after j to step i; axes i and j for `axis` of `g`."""
    steps = g.shape[axis]
    later = torch.ones(steps, steps, dtype=torch.bool, device=g.device).tril(-1)
    later = later.reshape(steps, steps, *(1,) * (g.ndim - 1 - axis))
    sums = torch.where(later, g.unsqueeze(axis + 1), 0).cumsum(axis)
    if not exclusive:
        return sums
    none = torch.zeros_like(sums.narrow(axis, 0, 1))
    return torch.cat([none, sums.narrow(axis, 0, steps - 1)], axis)


class _Block:
    """What forward and backward share of a range of chunks."""

    def __init__(self, p: Problem, start: int, stop: int) -> None:
        def take(x: Tensor, shift: int = 0) -> Tensor:
            return p.layout.gather(x, start, stop, shift).to(p.dtype).transpose(1, 2)

        self.p = p
        self.q, self.k = take(p.q, p.shift), take(p.k)  # (M, G, Q, K)
        self.v = take(p.v)  # (M, G, Q, U, V)
        count, groups, steps, heads, width = self.v.shape
        self.heads_width = (heads, width)
        self.write = None if p.write is None else take(p.write).unsqueeze(-1)
        # (M, G, Q, U), or (M, G, Q, K) a channel
        g = self.v.new_zeros(count, groups, steps, heads) if p.g is None else take(p.g)
        none = torch.zeros_like(g[:, :, :1])
        sums = g.cumsum(2)
        read = torch.cat([none, sums[:, :, :-1]], 2) if p.exclusive else sums
        later = torch.cat([g[:, :, 1:], none], 2).flip(2).cumsum(2).flip(2)
        # a value column of ones: a decay a head scales rows of (Q, U, V), one a channel (Q, K)
        lift = 0 if p.vector else 1
        self.reading = torch.exp(read).reshape(*read.shape, *(1,) * lift)
        self.leaving = torch.exp(later).reshape(*later.shape, *(1,) * lift)
        across = torch.exp(sums[:, :, -1:])  # (M, G, 1, U or K)
        self.across = (
            across.squeeze(2).unsqueeze(-1)
            if p.vector
            else across.unsqueeze(-1).expand(-1, -1, -1, -1, width).flatten(3)
        )  # scales (M, G, K, U V)
        # of channels (M, G, Q, Q, K), of heads (M, G, U, Q, Q)
        between = sums_between(*((g, 2) if p.vector else (g.mT, 3)), p.exclusive)
        places = torch.arange(steps, device=g.device)
        steps_between = places.unsqueeze(1) - places - int(p.exclusive)  # (Q, Q)
        # pairs whose weight depends on a decay: the others must not enter sums that cancel them
        self.decayed = steps_between > 0
        seen = (steps_between >= 0).reshape(steps, steps, *(1,) * p.vector)
        self.decays = torch.where(seen, torch.exp(between), 0)
        if p.vector:
            products = self.q.unsqueeze(3) * self.k.unsqueeze(2)
            self.pairs = (products * self.decays).sum(-1).unsqueeze(2)  # (M, G, 1, Q, Q)
        else:
            self.products = (self.q @ self.k.transpose(-1, -2)).unsqueeze(2)  # (M, G, 1, Q, Q)
            self.pairs = self.products * self.decays

    def written(self) -> Tensor:
        """What a step adds to the state beside k, (M, G, Q, U, V)."""
        return self.v if self.write is None else self.v * self.write

    def inputs(self) -> Tensor:
        """What a chunk adds to the state, (M, G, K, U V)."""
        if self.p.vector:
            return (self.k * self.leaving).transpose(-1, -2) @ self.written().flatten(3)
        return self.k.transpose(-1, -2) @ (self.written() * self.leaving).flatten(3)

    def carried(self, h: Tensor) -> Tensor:
        """What a chunk reads of the state that enters it, (M, G, Q, U, V)."""
        if self.p.vector:
            return ((self.q * self.reading) @ h).unflatten(3, self.heads_width)
        return (self.q @ h).unflatten(3, self.heads_width) * self.reading

    def inside(self) -> Tensor:
        """What a chunk reads of its own tokens, (M, G, Q, U, V)."""
        return (self.pairs @ self.written().transpose(2, 3)).transpose(2, 3)


def _states(p: Problem, block: _Block, first: int, stop: int, h: Tensor) -> list[Tensor]:
    """States that enter the chunks of steps `first:stop`, and `h` moved on, rows in place."""
    entering, inputs = [], block.inputs()
    offsets = p.layout.offsets
    base = offsets[first]
    for step in range(first, stop):
        part = slice(offsets[step] - base, offsets[step + 1] - base)
        rows = h[: offsets[step + 1] - offsets[step]]
        entering.append(rows.clone())
        rows.mul_(block.across[part]).add_(inputs[part])
    return entering


def _first_state(p: Problem, state: Tensor | None, rows: int) -> Tensor:
    """(S, H, K, V) -> (S, G, K, U V) in the order of rows, a copy."""
    groups, keys = p.q.shape[2:]
    heads, width = p.v.shape[3:]
    if state is None:
        return p.v.new_zeros(rows, groups, keys, heads * width, dtype=p.dtype)
    h = state.to(p.dtype).index_select(0, p.layout.rows).unflatten(1, (groups, heads))
    return h.transpose(2, 3).flatten(3).contiguous()


def _last_state(p: Problem, h: Tensor) -> Tensor:
    """Inverse of `_first_state`."""
    h = h.unflatten(3, tuple(p.v.shape[3:])).transpose(2, 3).flatten(1, 2)
    return torch.empty_like(h, memory_format=torch.contiguous_format).index_copy_(
        0, p.layout.rows, h
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    exclusive: bool,
    shift: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H, V) without skip, and final states (S, H, K, V), both in `dtype`."""
    p = _problem(q, k, v, g, write, cu_seqlens, reverse, exclusive, shift, dtype)
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = _first_state(p, initial_state, rows)
    out = v.new_empty(p.v.shape, dtype=dtype)
    for first, stop in p.blocks():
        ends = (p.layout.offsets[first], p.layout.offsets[stop])
        block = _Block(p, *ends)
        entering = torch.cat(_states(p, block, first, stop, h))
        o = block.inside().add_(block.carried(entering))
        p.layout.scatter(out, o.transpose(1, 2), *ends)
    return out.flatten(2, 3), _last_state(p, h)


@dataclass
class Gradients:
    """Of the inputs of one direction, in the computing dtype; of q and k a group."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    write: Tensor | None
    initial_state: Tensor


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    exclusive: bool,
    shift: bool,
    dtype: torch.dtype,
) -> Gradients:
    """Gradients of `forward` under `dout` (B, L, H, V) and `dfinal` (S, H, K, V)."""
    p = _problem(q, k, v, g, write, cu_seqlens, reverse, exclusive, shift, dtype)
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks, h = p.blocks(), _first_state(p, initial_state, rows)
    starts = []
    for first, stop in blocks:
        starts.append(h.clone())
        if stop < len(p.layout.offsets) - 1:
            block = _Block(p, p.layout.offsets[first], p.layout.offsets[stop])
            _states(p, block, first, stop, h)
    dh = _first_state(p, dfinal, rows)
    dout = dout.unflatten(2, tuple(p.v.shape[2:4]))
    # of a shifted q the last token of a sequence is never read
    dq = torch.zeros(p.q.shape, dtype=dtype, device=v.device)
    dk, dv = torch.empty_like(dq), v.new_empty(p.v.shape, dtype=dtype)
    dg = None if p.g is None else v.new_empty(p.g.shape, dtype=dtype)
    dwrite = None if p.write is None else v.new_empty(p.write.shape, dtype=dtype)
    for (first, stop), start in zip(reversed(blocks), reversed(starts), strict=True):
        ends = (p.layout.offsets[first], p.layout.offsets[stop])
        block = _Block(p, *ends)
        parts = _block_gradients(p, block, first, stop, start, dh, dout)
        p.layout.scatter(dq, parts[0].transpose(1, 2), *ends, p.shift)
        for buffer, part in zip((dk, dv, dg, dwrite), parts[1:], strict=True):
            if buffer is not None:
                p.layout.scatter(buffer, part.transpose(1, 2), *ends)
    if p.vector:
        groups = q.shape[2]
        dq, dk = (u.unflatten(2, (groups, -1)).sum(3) for u in (dq, dk))
    elif dg is not None:
        dg = dg.flatten(2, 3)
    dwrite = None if dwrite is None else dwrite.flatten(2, 3)
    return Gradients(dq, dk, dv.flatten(2, 3), dg, dwrite, _last_state(p, dh))


def _block_gradients(
    p: Problem, b: _Block, first: int, stop: int, h: Tensor, dh: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and write in a block; `dh` is moved back to the block's start.

    The log decay of step t scales every pair j < t <= i, what steps i >= t read of the state, what
    steps j < t leave in it, and the state's own way: sums over the block's parts, never
    differences of sums over the sequence.
    """
    offsets = p.layout.offsets
    base, end = offsets[first], offsets[stop]
    do = p.layout.gather(dout, base, end).to(p.dtype).transpose(1, 2)  # (M, G, Q, U, V)
    h = torch.cat(_states(p, b, first, stop, h))
    queries = b.q * b.reading if p.vector else b.q
    keys = b.k * b.leaving if p.vector else b.k
    read = do if p.vector else do * b.reading
    inputs = queries.transpose(-1, -2) @ read.flatten(3)
    leaving = torch.empty_like(h)
    for step in reversed(range(first, stop)):
        part = slice(offsets[step] - base, offsets[step + 1] - base)
        rows = dh[: offsets[step + 1] - offsets[step]]
        leaving[part] = rows
        rows.mul_(b.across[part]).add_(inputs[part])

    written = b.written() if p.vector else b.written() * b.leaving
    dqueries, dkeys = read.flatten(3) @ h.mT, written.flatten(3) @ leaving.mT
    dwritten = (keys @ leaving).unflatten(3, b.heads_width)
    # each (M, G, Q, U or K): what the decay scales
    if p.vector:
        from_read, from_left = queries * dqueries, keys * dkeys
        dqueries, dkeys = dqueries * b.reading, dkeys * b.leaving
        across = (h * leaving * b.across).sum(-1).unsqueeze(2)
    else:
        dwritten = dwritten * b.leaving
        from_read = (b.carried(h) * do).sum(-1)
        from_left = (dwritten * b.written()).sum(-1)
        across = (h * leaving * b.across).unflatten(3, b.heads_width).sum((2, 4)).unsqueeze(2)

    do_heads, v_heads = do.transpose(2, 3), b.v.transpose(2, 3)  # (M, G, U, Q, V)
    dpairs = do_heads @ v_heads.mT
    inside = (b.pairs.mT @ do_heads).transpose(2, 3) + dwritten
    dv = inside if b.write is None else inside * b.write
    dwrite = (inside * b.v).sum(-1)
    if b.write is not None:
        dpairs = dpairs * b.write.transpose(2, 3).mT
    if p.vector:
        scaled = dpairs.transpose(2, 3).movedim(3, 4) * b.decays  # (M, G, Q, Q, K)
        dqueries = dqueries + (scaled * b.k.unsqueeze(2)).sum(3)
        dkeys = dkeys + (scaled * b.q.unsqueeze(3)).sum(2)
        scaled = scaled * (b.q.unsqueeze(3) * b.k.unsqueeze(2))
        scaled = torch.where(b.decayed.unsqueeze(-1), scaled, 0)
        later, sooner = scaled.sum(3), scaled.sum(2)
    else:
        scaled = dpairs * b.decays
        of_group = scaled.sum(2)
        dqueries, dkeys = dqueries + of_group @ b.k, dkeys + of_group.mT @ b.q
        scaled = torch.where(b.decayed, scaled * b.products, 0)
        later, sooner = scaled.sum(4).transpose(2, 3), scaled.sum(3).transpose(2, 3)
    later = later + from_read
    none = torch.zeros_like(later[:, :, :1])
    if p.exclusive:
        # the decay of its own step does not scale what a step reads
        later = torch.cat([later[:, :, 1:], none], 2)
    suffix = (later - sooner).flip(2).cumsum(2).flip(2)
    prefix = torch.cat([none, from_left[:, :, :-1]], 2).cumsum(2)
    return dqueries, dkeys, dv, suffix + prefix + across, dwrite
