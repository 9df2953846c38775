"""The selective scan and its gradients in plain PyTorch: any device, any dtype, no graph kept.

One direction, without the gate (`op.py` adds directions and applies it). Tokens are laid out
time-major: all first tokens, then all second tokens, ... Sequences are sorted by falling length,
so that the ones still running at step t are the first rows, and one fused multiply-add per step
advances all of them. Within a chunk of steps the decays, inputs and read-outs are computed at
once; chunks bound the memory. Nothing is kept for the backward, which first finds the state at
every chunk's start and then recomputes one chunk at a time from it.

States are kept as (G, N, P), not (D, N): rows of adjacent channels are what PyTorch's
elementwise loops run fast on, 1.4 to 2 times in all against rows of N = 16.

Letters: T tokens, D channels, N state, G groups, P = D / G, S sequences. Equations: `reference.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# elements of a (tokens, G, N, P) buffer: four of 1 MB in float32 stay in the cache of one core;
# from 2^16 to 2^19 times differ by less than their spread at (2, 197, 384, 16)
CHUNK_ELEMENTS = 1 << 18
# one kept state per this many steps at least, however large a state is
MIN_CHUNK_STEPS = 16


@dataclass
class TimeMajor:
    """Order of tokens in which step t of every sequence is contiguous."""

    offsets: list[int]  # tokens of step t are offsets[t]:offsets[t + 1]
    batch: int  # S
    length: int  # of the dense batch; of all tokens when packed
    reverse: bool
    tokens: Tensor | None = None  # (T,) packed: token at each place
    rows: Tensor | None = None  # (S,) packed: sequence in each row

    def to_time(self, v: Tensor) -> Tensor:
        """(B, L, ...) -> (T, ...)."""
        if self.tokens is not None:
            return v[0].index_select(0, self.tokens)
        v = v.transpose(0, 1)
        return (v.flip(0) if self.reverse else v).flatten(0, 1)

    def from_time(self, v: Tensor) -> Tensor:
        """(T, ...) -> (B, L, ...), contiguous."""
        if self.tokens is not None:
            return torch.empty_like(v).index_copy_(0, self.tokens, v).unsqueeze(0)
        v = v.view(self.length, self.batch, *v.shape[1:])
        return (v.flip(0) if self.reverse else v).transpose(0, 1).contiguous()

    def to_rows(self, state: Tensor) -> Tensor:
        """(S, ...) in the order of sequences -> in the order of rows, always a copy."""
        return state.clone() if self.rows is None else state.index_select(0, self.rows)

    def from_rows(self, state: Tensor) -> Tensor:
        """Inverse of `to_rows`."""
        if self.rows is None:
            return state
        return torch.empty_like(state).index_copy_(0, self.rows, state)

    def chunks(self, elements_per_token: int) -> list[tuple[int, int]]:
        """Ranges of steps whose buffers have about CHUNK_ELEMENTS elements."""
        steps = len(self.offsets) - 1
        budget = max(1, CHUNK_ELEMENTS // max(1, elements_per_token))
        ranges, start = [], 0
        while start < steps:
            stop = start + 1
            while stop < steps and (
                stop - start < MIN_CHUNK_STEPS
                or self.offsets[stop + 1] - self.offsets[start] <= budget
            ):
                stop += 1
            ranges.append((start, stop))
            start = stop
        return ranges


def time_major(
    batch: int, length: int, reverse: bool, cu_seqlens: Tensor | None, device: torch.device
) -> TimeMajor:
    """The layout of a dense batch (B, L), or of packed sequences."""
    if cu_seqlens is None:
        return TimeMajor([t * batch for t in range(length + 1)], batch, length, reverse)
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    count = lengths.numel()
    rows = torch.argsort(lengths, descending=True, stable=True)
    rank = torch.empty_like(rows).index_copy_(0, rows, torch.arange(count, device=device))
    sequence = torch.repeat_interleave(torch.arange(count, device=device), lengths)
    step = torch.arange(length, device=device) - starts[sequence]
    if reverse:
        step = lengths[sequence] - 1 - step
    tokens = torch.argsort(step * count + rank[sequence])
    alive = torch.bincount(step) if length else step
    offsets = [0, *alive.cumsum(0).tolist()]
    return TimeMajor(offsets, count, length, reverse, tokens, rows)


@dataclass
class _Inputs:
    """Time-major inputs in the computing dtype."""

    layout: TimeMajor
    x: Tensor  # (T, D)
    raw: Tensor  # (T, D) dt + dt_bias
    delta: Tensor  # (T, D)
    A: Tensor  # (G, N, P)
    B: Tensor  # (T, G, N)
    C: Tensor  # (T, G, N)


def _prepare(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
) -> _Inputs:
    layout = time_major(x.shape[0], x.shape[1], reverse, cu_seqlens, x.device)
    xs, raw, Bs, Cs = (layout.to_time(v).to(dtype) for v in (x, dt, B, C))
    if dt_bias is not None:
        raw = raw + dt_bias.to(dtype)
    delta = F.softplus(raw) if dt_softplus else raw
    return _Inputs(layout, xs, raw, delta, _inner(A.to(dtype), B.shape[2]), Bs, Cs)


def _grouped(v: Tensor, groups: int) -> Tensor:
    """(T, D) -> (T, G, 1, P)."""
    return v.unflatten(1, (groups, 1, -1))


def _inner(v: Tensor, groups: int) -> Tensor:
    """(..., D, N) -> (..., G, N, P), contiguous."""
    return v.unflatten(-2, (groups, -1)).transpose(-1, -2).contiguous()


def _outer(v: Tensor) -> Tensor:
    """(..., G, N, P) -> (..., D, N), contiguous."""
    return v.transpose(-1, -2).flatten(-3, -2).contiguous()


def _run_chunk(inp: _Inputs, steps: tuple[int, int], h: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """States of a chunk (t, G, N, P) behind those before it, its decays, and rows of each step.

    `h` (S, G, N, P) is advanced in place.
    """
    offsets, groups = inp.layout.offsets, inp.B.shape[1]
    counts = [offsets[t + 1] - offsets[t] for t in range(*steps)]
    tokens = slice(offsets[steps[0]], offsets[steps[1]])
    delta = _grouped(inp.delta[tokens], groups)
    decay = (delta * inp.A).exp_()
    history = decay.new_empty(counts[0] + decay.shape[0], *decay.shape[1:])
    history[: counts[0]] = h[: counts[0]]
    states = history[counts[0] :]
    w = delta * _grouped(inp.x[tokens], groups)
    torch.mul(w, inp.B[tokens].unsqueeze(-1), out=states)
    previous = h
    for now, factor in zip(states.split(counts), decay.split(counts), strict=True):
        alive = now.shape[0]
        if alive < previous.shape[0]:
            if previous is not h:
                h[alive : previous.shape[0]] = previous[alive:]
            previous = previous[:alive]
        now.addcmul_(factor, previous)
        previous = now
    h[: previous.shape[0]] = previous
    return history, decay, counts


def scan_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run one direction: y (B, L, D) without gate and the final state (S, D, N), in `dtype`."""
    inp = _prepare(x, dt, A, B, C, dt_bias, dt_softplus, reverse, cu_seqlens, dtype)
    layout = inp.layout
    h = _first_state(inp, initial_state)
    y = torch.empty_like(inp.x)
    for steps in layout.chunks(A.numel()):
        tokens = slice(layout.offsets[steps[0]], layout.offsets[steps[1]])
        history, _, counts = _run_chunk(inp, steps, h)
        states = history[counts[0] :]
        y[tokens] = torch.matmul(inp.C[tokens].unsqueeze(2), states).flatten(1)
    if D is not None:
        y.addcmul_(inp.x, D.to(dtype))
    return layout.from_time(y), layout.from_rows(_outer(h))


def _first_state(inp: _Inputs, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return inp.x.new_zeros(inp.layout.batch, *inp.A.shape)
    return inp.layout.to_rows(_inner(initial_state.to(inp.x.dtype), inp.B.shape[1]))


@dataclass
class ScanGradients:
    """Gradients of one direction; `state` is that of the initial state."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    state: Tensor


def through_gate(dout: Tensor, y: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of y and z, in `dtype`, from that of y silu(z)."""
    dy, z = dout.to(dtype), z.to(dtype)
    gate = torch.sigmoid(z)
    return dy * z * gate, dy * y.to(dtype) * gate * (1 + z * (1 - gate))


def scan_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    dtype: torch.dtype,
) -> ScanGradients:
    """Gradients of one direction, all in `dtype`.

    With g the gradient of y and e the one that step t+1 sends to h[t] (dfinal after the end):
        s[t] = g[t] C[t] + e ;  e <- decay[t] s[t] ;  dB = sum_d s delta x ;  dC = sum_d g h
        dx = delta (s . B) + D g ;  d delta = x (s . B) + sum_n A s decay h[t-1]
    """
    inp = _prepare(x, dt, A, B, C, dt_bias, dt_softplus, reverse, cu_seqlens, dtype)
    layout, groups, A = inp.layout, B.shape[2], inp.A
    offsets = layout.offsets
    g = layout.to_time(dy).to(dtype)
    shape = (layout.batch, *A.shape)
    e = g.new_zeros(shape) if dfinal is None else layout.to_rows(_inner(dfinal.to(dtype), groups))
    dx, ddelta = torch.empty_like(inp.x), torch.empty_like(inp.x)
    dB, dC, dA = torch.empty_like(inp.B), torch.empty_like(inp.C), torch.zeros_like(A)
    ranges = layout.chunks(A.numel())
    starts = [_first_state(inp, initial_state)]
    for steps in ranges[:-1]:
        h = starts[-1].clone()
        _run_chunk(inp, steps, h)
        starts.append(h)
    for steps in reversed(ranges):
        tokens = slice(offsets[steps[0]], offsets[steps[1]])
        history, decay, counts = _run_chunk(inp, steps, starts.pop())
        states = history[counts[0] :]
        gc, Bc = _grouped(g[tokens], groups), inp.B[tokens]
        delta, xc = _grouped(inp.delta[tokens], groups), _grouped(inp.x[tokens], groups)
        dC[tokens] = torch.matmul(states, gc.transpose(-1, -2)).squeeze(-1)
        s = gc * inp.C[tokens].unsqueeze(-1)
        following, factor = e, None
        rows = zip(s.split(counts), decay.split(counts), strict=True)
        for now, own in reversed(list(rows)):
            alive = following.shape[0]
            if factor is None:
                now += following[: now.shape[0]]
            elif alive == now.shape[0]:
                now.addcmul_(factor, following)
            else:
                now[:alive].addcmul_(factor, following)
                now[alive:] += e[alive : now.shape[0]]
            following, factor = now, own
        if factor is not None:
            torch.mul(factor, following, out=e[: following.shape[0]])
        r1 = torch.matmul(Bc.unsqueeze(2), s)
        dB[tokens] = torch.matmul(s, (delta * xc).transpose(-1, -2)).squeeze(-1)
        q = s.mul_(decay).mul_(_previous(history, counts))
        dx[tokens] = (r1 * delta).flatten(1)
        ddelta[tokens] = r1.mul_(xc).add_((q * A).sum(2, keepdim=True)).flatten(1)
        dA += q.mul_(delta).sum(0)
    if D is not None:
        dx.addcmul_(g, D.to(dtype))
    ddt = ddelta * torch.where(inp.raw > 20, 1.0, torch.sigmoid(inp.raw)) if dt_softplus else ddelta
    return ScanGradients(
        layout.from_time(dx),
        layout.from_time(ddt),
        _outer(dA),
        layout.from_time(dB),
        layout.from_time(dC),
        (g * inp.x).sum(0),
        ddt.sum(0),
        layout.from_rows(_outer(e)),
    )


def _previous(history: Tensor, counts: list[int]) -> Tensor:
    """The state before each token of a chunk, (t, G, N, P)."""
    if counts[0] == counts[-1]:
        return history[: -counts[0]]
    rows = torch.tensor(counts, device=history.device)
    back = torch.cat([rows[:1], rows[:-1]]).repeat_interleave(rows)
    token = torch.arange(counts[0], history.shape[0], device=history.device)
    return history.index_select(0, token - back)
