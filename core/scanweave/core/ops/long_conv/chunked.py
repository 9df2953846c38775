"""Time-invariant diagonal models in chunks of matrix products, packed sequences included.

    y[t] = sum_(s <= t) k[t - s] x[s] + C exp((j + 1) log_a) h      t is step j of its chunk
    h    = the state that enters the chunk

Every sequence is cut into chunks of T steps of its own. Within a chunk x meets a Toeplitz matrix of
the kernel k; what a chunk adds to the state is one product more, and a linear scan over chunks
carries it on. So the state is kept once a chunk, not once a step, and no size depends on where
packed sequences begin. Complex states are products of twice as many real numbers.

Letters: B batch, L length, D channels, N state, M real numbers of a state (2 N or N), S packed
sequences, T steps a chunk, K chunks.
Source: Dao & Gu 2024, arXiv 2405.21060, section 6 (chunks), with constant decays.
"""

from typing import Any

import torch
from torch import Tensor

from ..dense.layout import Layout, lay_out
from ..linear import linear_scan


def exp_steps(log_a: Tensor, steps: Tensor) -> Tensor:
    """exp(log_a steps) of real steps."""
    if not log_a.is_complex():
        return torch.exp(log_a * steps)
    # an eighth of the time of complex exponentials on a CPU
    return torch.polar(torch.exp(log_a.real * steps), log_a.imag * steps)


def toeplitz(kernel: Tensor) -> Tensor:
    """W[s, t] = kernel[t - s], 0 for t < s: (D, T) to (D, T, T), without a scatter."""
    dim, steps = kernel.shape
    line = torch.cat([kernel, torch.zeros_like(kernel)], 1)
    # rows of 2 T - 1 of a line of period 2 T move on by one each
    tiled = line.unsqueeze(1).expand(dim, steps, 2 * steps).flatten(1)
    return tiled[:, :-steps].unflatten(1, (steps, 2 * steps - 1))[..., :steps]


def _parts(v: Tensor) -> Tensor:
    """Real numbers (..., M) of states (..., N)."""
    return torch.view_as_real(v).flatten(-2) if v.is_complex() else v


def _whole(v: Tensor, dtype: torch.dtype) -> Tensor:
    """States (..., N) of real numbers (..., M)."""
    if not dtype.is_complex:
        return v
    return torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())


def _readers(v: Tensor) -> Tensor:
    """Real weights (..., M) that read the sum of states, or twice its real part, off `_parts`."""
    return _parts(2 * v.conj().resolve_conj()) if v.is_complex() else v


def run_chunks(
    x: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    reverse: bool,
    final: bool,
) -> tuple[Tensor, Any]:
    """Outputs (B, L, D) without skip, and the state after the last step of every sequence, or None.

    Args:
        x: Inputs, (B, L, D), real, not empty.
        log_a: (D, N) in the dtype of the state, as are B, C and `state`.
        B: Input weights.
        C: Read-out weights.
        state: Before the first step, (B, D, N), or (S, D, N) when packed; None is zero.
        cu_seqlens: Starts of packed sequences, (S + 1,).
        chunk: Steps T of a chunk.
        reverse: Run from the end to the start instead.
        final: Whether the last state is needed.
    """
    batch, _, dim = x.shape
    where = lay_out(x, cu_seqlens, chunk, reverse)
    steps = torch.arange(chunk + 1, device=x.device, dtype=x.dtype).unsqueeze(1)
    powers = exp_steps(log_a.unsqueeze(1), steps)  # (D, T + 1, N)
    out = _readers(C.unsqueeze(1) * powers)
    into = _parts(B.unsqueeze(1) * powers[:, :-1]).flip(1)
    kernel = (out[:, :-1] @ _parts(B).unsqueeze(-1)).squeeze(-1)
    # products over steps, a channel each: D, K, T
    cut = x.new_zeros(where.position.shape[0] * chunk, dim)
    cut = cut.index_copy(0, where.slot, x.flatten(0, 1))
    cut = cut.unflatten(0, (-1, chunk)).permute(2, 0, 1).contiguous()
    entering = _entering(cut @ into, log_a, state, where, batch, chunk)
    y = torch.baddbmm(cut @ toeplitz(kernel), _parts(entering).transpose(0, 1), out[:, 1:].mT)
    y = y.permute(1, 2, 0).flatten(0, 1).index_select(0, where.slot).view_as(x)
    if not final:
        return y, None
    return y, _last(cut, entering, log_a, into, state, where, chunk)


def _entering(
    ends: Tensor,
    log_a: Tensor,
    state: Tensor | None,
    where: Layout,
    batch: int,
    chunk: int,
) -> Tensor:
    """States that enter the chunks, (K, D, N), from what the chunks add, (D, K, M)."""
    # what rolls around meets a first chunk
    u = _whole(ends.transpose(0, 1), log_a.dtype).roll(1, 0)
    first = (where.position == 0)[:, None, None]
    before = 0 if state is None else state.index_select(0, where.owner)
    u = torch.where(first, before, u)
    if where.borders is not None:
        given = (u.unsqueeze(0), chunk * log_a)
        return linear_scan(*given, cu_seqlens=where.borders).squeeze(0)
    return linear_scan(u.view(batch, -1, *log_a.shape), chunk * log_a).flatten(0, 1)


def _last(
    cut: Tensor,
    entering: Tensor,
    log_a: Tensor,
    into: Tensor,
    state: Tensor | None,
    where: Layout,
    chunk: int,
) -> Tensor:
    """States after the last step of every sequence, (S, D, N)."""
    filled = (where.lengths > 0)[:, None, None]
    full = (where.lengths - 1).clamp(min=0) // chunk
    last = (where.first + full).clamp(max=cut.shape[1] - 1)
    rest = where.lengths - full * chunk  # 1 .. T steps of the last chunk
    # the last chunk's steps moved to its end, so that one product weighs them
    place = torch.arange(chunk, device=cut.device) - (chunk - rest).unsqueeze(1)
    tail = cut.index_select(1, last).gather(2, place.clamp(min=0).expand(cut.shape[0], -1, -1))
    tail = torch.where(place >= 0, tail, 0)
    added = _whole((tail @ into).transpose(0, 1), log_a.dtype)
    carried = exp_steps(log_a, rest[:, None, None].to(cut.dtype)) * entering.index_select(0, last)
    return torch.where(filled, carried + added, 0 if state is None else state)
