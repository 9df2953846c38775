"""The selective scan and its gradients in plain PyTorch: any device, any dtype, no graph kept.

One direction, without the gate (`op.py` adds directions and applies it). Tokens are laid out
time-major: all first tokens, then all second tokens, ... Sequences are sorted by falling length,
so that the ones still running at step t are the first rows, and one fused multiply-add per step
advances all of them. Within a chunk of steps the decays, inputs and read-outs are computed at
once; chunks bound the memory. Nothing is kept for the backward, which first finds the state at
every chunk's start and then recomputes one chunk at a time from it.

Letters: T tokens, D channels, N state, G groups, S sequences. Equations: `reference.py`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# elements of a (tokens, D, N) buffer: 2 MB in float32 stays in the cache of one core
CHUNK_ELEMENTS = 1 << 19
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
    A: Tensor  # (D, N)
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
    return _Inputs(layout, xs, raw, delta, A.to(dtype), Bs, Cs)


def _grouped(v: Tensor, groups: int) -> Tensor:
    """(T, D, ...) -> (T, G, D / G, ...)."""
    return v.unflatten(1, (groups, -1))


def _run_chunk(inp: _Inputs, steps: tuple[int, int], h: Tensor) -> tuple[Tensor, Tensor]:
    """States (t, D, N) of a chunk and its decays; `h` (S, D, N) is advanced in place."""
    offsets, groups = inp.layout.offsets, inp.B.shape[1]
    first, last = offsets[steps[0]], offsets[steps[1]]
    tokens = slice(first, last)
    decay = (inp.delta[tokens].unsqueeze(-1) * inp.A).exp_()
    w = _grouped(inp.delta[tokens] * inp.x[tokens], groups)
    states = (w.unsqueeze(-1) * inp.B[tokens].unsqueeze(2)).flatten(1, 2)
    previous = h
    for t in range(*steps):
        rows = slice(offsets[t] - first, offsets[t + 1] - first)
        alive = offsets[t + 1] - offsets[t]
        if alive < previous.shape[0] and previous is not h:
            h[alive : previous.shape[0]] = previous[alive:]
        now = states[rows]
        torch.addcmul(now, decay[rows], previous[:alive], out=now)
        previous = now
    if previous is not h:
        h[: previous.shape[0]] = previous
    return states, decay


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
    layout, groups = inp.layout, B.shape[2]
    h = _first_state(inp, initial_state)
    y = torch.empty_like(inp.x)
    for steps in layout.chunks(A.numel()):
        tokens = slice(layout.offsets[steps[0]], layout.offsets[steps[1]])
        states, _ = _run_chunk(inp, steps, h)
        read = torch.matmul(_grouped(states, groups), inp.C[tokens].unsqueeze(-1))
        y[tokens] = read.squeeze(-1).flatten(1)
    if D is not None:
        y.addcmul_(inp.x, D.to(dtype))
    return layout.from_time(y), layout.from_rows(h)


def _first_state(inp: _Inputs, initial_state: Tensor | None) -> Tensor:
    if initial_state is None:
        return inp.x.new_zeros(inp.layout.batch, *inp.A.shape)
    return inp.layout.to_rows(initial_state.to(inp.x.dtype))


@dataclass
class ScanGradients:
    """Gradients of one direction; `state` is that of the initial state."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    state: Tensor


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
    e = g.new_zeros(shape) if dfinal is None else layout.to_rows(dfinal.to(dtype))
    dx, ddelta = torch.empty_like(inp.x), torch.empty_like(inp.x)
    dB, dC, dA = torch.empty_like(inp.B), torch.empty_like(inp.C), torch.zeros_like(A)
    ranges = layout.chunks(A.numel())
    starts = [_first_state(inp, initial_state)]
    for steps in ranges[:-1]:
        h = starts[-1].clone()
        _run_chunk(inp, steps, h)
        starts.append(h)
    for steps in reversed(ranges):
        first, last = offsets[steps[0]], offsets[steps[1]]
        tokens = slice(first, last)
        h0 = starts.pop()
        states, decay = _run_chunk(inp, steps, h0.clone())
        gc, Bc, Cc = _grouped(g[tokens], groups), inp.B[tokens], inp.C[tokens]
        delta, xc = inp.delta[tokens], inp.x[tokens]
        dC[tokens] = torch.matmul(gc.unsqueeze(-2), _grouped(states, groups)).squeeze(-2)
        s = (gc.unsqueeze(-1) * Cc.unsqueeze(2)).flatten(1, 2)
        following, following_decay = e, None
        for t in reversed(range(*steps)):
            rows = slice(offsets[t] - first, offsets[t + 1] - first)
            now = s[rows]
            if following_decay is None:
                now += following[: now.shape[0]]
            else:
                alive = following.shape[0]
                torch.addcmul(now[:alive], following_decay, following, out=now[:alive])
                now[alive:] += e[alive : now.shape[0]]
            following, following_decay = now, decay[rows]
        alive = following.shape[0]
        if following_decay is not None:
            torch.mul(following_decay, following, out=e[:alive])
        r1 = torch.matmul(_grouped(s, groups), Bc.unsqueeze(-1)).squeeze(-1).flatten(1)
        w = _grouped(delta * xc, groups)
        dB[tokens] = torch.matmul(w.unsqueeze(-2), _grouped(s, groups)).squeeze(-2)
        q = s.mul_(decay).mul_(_previous(states, h0, offsets, steps))
        dx[tokens] = r1 * delta
        ddelta[tokens] = r1.mul_(xc).add_((q * A).sum(-1))
        dA += torch.einsum("td,tdn->dn", delta, q)
    if D is not None:
        dx.addcmul_(g, D.to(dtype))
    ddt = ddelta * torch.where(inp.raw > 20, 1.0, torch.sigmoid(inp.raw)) if dt_softplus else ddelta
    return ScanGradients(
        layout.from_time(dx),
        layout.from_time(ddt),
        dA,
        layout.from_time(dB),
        layout.from_time(dC),
        (g * inp.x).sum(0),
        ddt.sum(0),
        layout.from_rows(e),
    )


def _previous(states: Tensor, h0: Tensor, offsets: list[int], steps: tuple[int, int]) -> Tensor:
    """The state before each token of a chunk, (t, D, N)."""
    first = offsets[steps[0]]
    alive = offsets[steps[0] + 1] - first
    if offsets[steps[1]] - first == alive * (steps[1] - steps[0]):
        return torch.cat([h0[:alive], states[: states.shape[0] - alive]])
    parts = [h0[:alive]]
    for t in range(steps[0] + 1, steps[1]):
        before = offsets[t - 1] - first
        parts.append(states[before : before + offsets[t + 1] - offsets[t]])
    return torch.cat(parts)
