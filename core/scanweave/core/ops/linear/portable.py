"""The linear scan and its gradients in plain PyTorch: any device, any dtype, no graph kept.

Tokens are laid out time-major and one fused multiply-add per step advances all rows. A dense batch
with few channels is cut into segments that run side by side: with T steps a segment, T and L / T
steps of Python replace L. What a segment starts from reaches its steps through the product of
their decays, so nothing is divided and nothing overflows. Packed sequences are sorted by falling
length (`selective.portable.TimeMajor`), so that no row meets another one's values. Conjugates are
computed, not marked: below autograd, compiled programs skip the dispatch that resolves the mark.

Letters: L length, R rows, T tokens or steps a segment, K segments, D channels, S sequences.
"""

import itertools
import math

import torch
from torch import Tensor

from ..selective.portable import time_major
from .reference import state_dtype

# elements a step from which the work, not Python, takes the time: 5 us a step on one core
WIDE = 1 << 14
# steps from which cutting pays
LONG = 64


def scan_forward(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States (B, L, D) and the final ones (S, D), both in the computing dtype."""
    dtype = state_dtype(x, log_a, initial_state)
    if cu_seqlens is not None:
        return _packed_forward(x, log_a, initial_state, cu_seqlens, reverse, dtype)
    xs, decay = _in_time(x, reverse, dtype), _decay(log_a, reverse, dtype)
    first = x.new_zeros(xs.shape[1:], dtype=dtype) if initial_state is None else initial_state
    first = first.to(dtype)
    if not xs.shape[0]:
        return x.to(dtype), first.clone()
    h = run(xs, _later(decay), _at(decay, 0) * first)
    return _from_time(h, reverse), h[-1].clone()


def scan_backward(
    dh: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, log_a and the initial state, in the computing dtype.

    With g the gradient of h and the state's own at the end, s[t] = g[t] + conj(a[t+1]) s[t+1]:
        dx[t] = s[t] ;  dlog_a[t] = s[t] conj(a[t] h[t-1]) ;  dinitial = conj(a[0]) s[0]
    """
    dtype = state_dtype(x, log_a, initial_state)
    if cu_seqlens is not None:
        return _packed_backward(dh, dfinal, x, log_a, initial_state, cu_seqlens, reverse, dtype)
    xs, decay, g = _in_time(x, reverse, dtype), _decay(log_a, reverse, dtype), dh.to(dtype)
    g = _in_time(g, reverse, dtype)
    first = x.new_zeros(xs.shape[1:], dtype=dtype) if initial_state is None else initial_state
    first = first.to(dtype)
    last = torch.zeros_like(first) if dfinal is None else dfinal.to(dtype)
    if not xs.shape[0]:
        return x.to(dtype), torch.zeros_like(log_a, dtype=dtype), last.clone()
    h = run(xs, _later(decay), _at(decay, 0) * first)
    back = _later(decay).conj_physical()
    s = run(g.flip(0), back.flip(0) if back.ndim == 3 else back, last).flip(0)
    carried = decay * torch.cat([first.unsqueeze(0), h[:-1]])
    dlog_a = s * carried.conj_physical()
    dlog_a = dlog_a.sum((0, 1)) if log_a.ndim == 1 else _from_time(dlog_a, reverse)
    return _from_time(s, reverse), dlog_a, _at(decay, 0).conj_physical() * s[0]


def run(x: Tensor, decay: Tensor, start: Tensor) -> Tensor:
    """h[0] = x[0] + start, h[t] = decay[t-1] h[t-1] + x[t].

    Args:
        x: Inputs, (L, R, D), L at least 1.
        decay: (L - 1, R, D) or (D,).
        start: Added to the first input, (R, D).

    Returns:
        States, (L, R, D), a new tensor.
    """
    length, rows, dim = x.shape
    if length < LONG or rows * dim >= WIDE:
        h = x.clone(memory_format=torch.contiguous_format)
        h[0] += start
        _steps(h, decay)
        return h
    steps = math.isqrt(length)
    segments = -(-length // steps)
    padding = segments * steps - length
    h = torch.cat([x, x.new_zeros(padding, rows, dim)])
    h[0] += start
    # (T, K, R, D), segments side by side
    h = h.view(segments, steps, rows, dim).transpose(0, 1).contiguous()
    if decay.ndim == 1:
        inner = decay
        powers = decay.expand(steps, dim).cumprod(0).view(steps, 1, 1, dim)
    else:
        # the decay of a segment's first step leads there from the segment before it
        tail = decay.new_ones(padding, rows, dim)
        cut = torch.cat([decay.new_ones(1, rows, dim), decay, tail])
        cut = cut.view(segments, steps, rows, dim).transpose(0, 1)
        inner, powers = cut[1:], cut.cumprod(0)
    _steps(h, inner)
    last = powers[-1].expand(segments, rows, dim)
    entering = torch.zeros_like(h[0])
    for k in range(1, segments):
        torch.addcmul(h[-1, k - 1], last[k - 1], entering[k - 1], out=entering[k])
    h.addcmul_(powers, entering)
    return h.transpose(0, 1).reshape(segments * steps, rows, dim)[:length]


def _steps(h: Tensor, decay: Tensor) -> None:
    constant = decay.ndim == 1
    rows = h.unbind(0)
    factors = [decay] * (len(rows) - 1) if constant else decay.unbind(0)
    for now, factor, previous in zip(rows[1:], factors, rows, strict=False):
        now.addcmul_(factor, previous)


def _decay(log_a: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    """(D,), or (L, B, D) in the order of steps."""
    decay = torch.exp(log_a.to(dtype))
    return decay if log_a.ndim == 1 else _in_time(decay, reverse, dtype)


def _later(decay: Tensor) -> Tensor:
    return decay if decay.ndim == 1 else decay[1:]


def _at(decay: Tensor, t: int) -> Tensor:
    return decay if decay.ndim == 1 else decay[t]


def _in_time(v: Tensor, reverse: bool, dtype: torch.dtype) -> Tensor:
    v = v.to(dtype).transpose(0, 1)
    return v.flip(0) if reverse else v


def _from_time(v: Tensor, reverse: bool) -> Tensor:
    return (v.flip(0) if reverse else v).transpose(0, 1).contiguous()


class Steps:
    """Tokens in the order of steps, and where each row's neighbours are."""

    def __init__(
        self,
        batch: int,
        length: int,
        reverse: bool,
        cu_seqlens: Tensor | None,
        device: torch.device,
    ) -> None:
        self.layout = time_major(batch, length, reverse, cu_seqlens, device)
        offsets = self.layout.offsets
        self.spans = [slice(a, b) for a, b in itertools.pairwise(offsets)]
        if cu_seqlens is None:
            lengths = torch.full((batch,), length, device=device)
        else:
            assert self.layout.rows is not None
            lengths = cu_seqlens.diff().long()[self.layout.rows]
        # rows that have a token
        self.alive = offsets[1] if len(offsets) > 1 else 0
        starts = torch.tensor(offsets, device=device)
        row = torch.arange(self.alive, device=device)
        # the last token of each of them, and the token before each token of later steps
        self.last = starts[lengths[: self.alive] - 1] + row
        token = torch.arange(offsets[-1], device=device)
        step = torch.bucketize(token, starts, right=True) - 1
        self.before = (token - starts[step] + starts[(step - 1).clamp(min=0)])[self.alive :]

    def previous(self, v: Tensor, first: Tensor) -> Tensor:
        """What was before each token of v (T, ...): `first` (S, ...) before the first ones."""
        return torch.cat([first[: self.alive], v[self.before]])

    def time(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, ...) -> (T, ...), a copy."""
        moved = self.layout.to_time(v)
        return moved.to(dtype, copy=moved.data_ptr() == v.data_ptr())


class _Packed(Steps):
    """Packed sequences and their decays."""

    def __init__(
        self, x: Tensor, log_a: Tensor, cu_seqlens: Tensor, reverse: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(1, x.shape[1], reverse, cu_seqlens, x.device)
        decay = torch.exp(log_a.to(dtype))
        self.constant = log_a.ndim == 1
        self.decay = decay if self.constant else self.layout.to_time(decay)

    def factor(self, span: slice) -> Tensor:
        return self.decay if self.constant else self.decay[span]


def _packed_states(inp: _Packed, x: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    h = inp.time(x, dtype)
    previous = first
    for span in inp.spans:
        now = h[span]
        now.addcmul_(inp.factor(span), previous[: now.shape[0]])
        previous = now
    return h


def _first(inp: _Packed, x: Tensor, initial_state: Tensor | None, dtype: torch.dtype) -> Tensor:
    if initial_state is None:
        return x.new_zeros(inp.layout.batch, x.shape[2], dtype=dtype)
    return inp.layout.to_rows(initial_state.to(dtype))


def _packed_forward(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    reverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    inp = _Packed(x, log_a, cu_seqlens, reverse, dtype)
    first = _first(inp, x, initial_state, dtype)
    h = _packed_states(inp, x, first, dtype)
    final = first.clone()
    final[: inp.alive] = h[inp.last]
    return inp.layout.from_time(h), inp.layout.from_rows(final)


def _packed_backward(
    dh: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
    reverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    inp = _Packed(x, log_a, cu_seqlens, reverse, dtype)
    layout = inp.layout
    first = _first(inp, x, initial_state, dtype)
    h = _packed_states(inp, x, first, dtype)
    s = inp.time(dh, dtype)
    e = torch.zeros_like(first) if dfinal is None else layout.to_rows(dfinal.to(dtype))
    s[inp.last] += e[: inp.alive]
    for span, after in zip(inp.spans[-2::-1], inp.spans[:0:-1], strict=True):
        later = s[after]
        s[span][: later.shape[0]].addcmul_(inp.factor(after).conj_physical(), later)
    carried = inp.decay * inp.previous(h, first)
    dlog_a = s * carried.conj_physical()
    dlog_a = dlog_a.sum(0) if inp.constant else layout.from_time(dlog_a)
    if inp.alive:
        head = slice(0, inp.alive)
        e[head] = inp.factor(head).conj_physical() * s[head]
    return layout.from_time(s), dlog_a, layout.from_rows(e)
