"""Time-invariant models with a dense state matrix per channel, in matrix products.

    h[t] = (I + E) h[t-1] + B x[t]                    (D, N), h before the start = initial_state
    y[t] = C h[t]            inclusive reading        M readouts a channel
    y[t] = C h[t-1]          exclusive reading

Sequences are cut into chunks of T steps. Within a chunk x goes through the Toeplitz matrix of the
kernel C (I + E)^j B; what a chunk leaves behind is one product with (I + E)^(T-1-j) B; the states
at the chunks' starts are a `dense_scan`, and reach step j through C (I + E)^(j+1). No size depends
on where packed sequences begin. Powers come by doubling, T of them in log2 T rounds, and E in
place of I + E keeps the digits of states that hardly decay: float32 is exact to 1e-6.

Letters: B batch, L length, D channels, N state, M readouts, T steps a chunk, C chunks, S packed
sequences.
"""

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, computing_dtype, without_autocast
from .layout import Layout, lay_out
from .op import dense_scan

ROUNDS = 6
CHUNK = 2**ROUNDS


def state_powers(
    E: Tensor, B: Tensor, C: Tensor, rounds: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Powers of I + E with a vector on either side, 2^rounds of each.

    Args:
        E: The matrices less the identity, (D, N, N).
        B: Input weights, (D, N).
        C: Readouts, (D, M, N).
        rounds: Doublings.

    Returns:
        (I + E)^j B, (D, N, J); C (I + E)^j, (D, J, M, N); (I + E)^(2^k) - I for k = 0 .. rounds.
    """
    into, out, powers = B.unsqueeze(-1), C, [E]
    for _ in range(rounds):
        E = powers[-1]
        into = torch.cat([into, into + E @ into], 2)
        out = torch.cat([out, out + out @ E], 1)
        powers.append(torch.baddbmm(E, E, E, beta=2))
    return into, out.unflatten(1, (-1, C.shape[1])), powers


def _toeplitz(kernel: Tensor) -> Tensor:
    """W[s, t] = kernel[t - s], 0 for t < s: (..., T) to (..., T, T), without a scatter."""
    steps = kernel.shape[-1]
    line = torch.cat([kernel, torch.zeros_like(kernel)], -1)
    # rows of 2 T - 1 of a line of period 2 T move on by one each
    tiled = line.unsqueeze(-2).expand(*line.shape[:-1], steps, 2 * steps).flatten(-2)
    return tiled[..., :-steps].unflatten(-1, (steps, 2 * steps - 1))[..., :steps]


def dense_ssm(
    x: Tensor,
    E: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    exclusive: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run h[t] = (I + E) h[t-1] + B x[t], y[t] = C h[t], with a dense matrix per channel.

    Args:
        x: Inputs, (B, L, D), real.
        E: State matrices less the identity, (D, N, N); no power may grow.
        B: Input weights after discretisation, (D, N).
        C: Readouts, (D, M, N).
        exclusive: Read the state before the token instead, C h[t-1].
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: State before the first step, (B, D, N), or (S, D, N) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32; B must be 1.
        return_final_state: Also return the state after the last step.

    Returns:
        Outputs (B, L, D, M) in float32, or float64 if any input is, and the state if asked for.

    Raises:
        ValueError: a shape or dtype does not fit, or cu_seqlens is not valid.

    Source: Gu et al. 2021, arXiv 2110.13985, section 3 (both views of one model); chunks as in
    Dao & Gu 2024, arXiv 2405.21060, section 6.
    """
    _check(x, E, B, C, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    batch, length, dim = x.shape
    dtype = computing_dtype(x, E, B, C, initial_state)
    with without_autocast(x):
        xs, E, B, C = (v.to(dtype) for v in (x, E, B, C))
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = None if initial_state is None else initial_state.to(dtype)
        if x.numel() == 0:
            # of no elements, but with a gradient of 0 for the weights
            y = xs.unsqueeze(-1) * (C * B.unsqueeze(1)).sum() + 0 * E.sum()
            y = y.expand(batch, length, dim, C.shape[1])
            final = xs.new_zeros(sequences, dim, E.shape[1]) if state is None else state
            return y, final if return_final_state else None
        where = lay_out(x, cu_seqlens, CHUNK, reverse)
        # (D, T, C): products over steps and over chunks, a channel each
        cut = xs.new_zeros(where.position.shape[0] * CHUNK, dim)
        cut = cut.index_copy(0, where.slot, xs.flatten(0, 1)).unflatten(0, (-1, CHUNK))
        cut = cut.permute(2, 1, 0).contiguous()
        into, out, powers = state_powers(E, B, C if exclusive else C + C @ E, ROUNDS)
        kernel = C @ into
        if exclusive:
            kernel = torch.cat([torch.zeros_like(kernel[..., :1]), kernel[..., :-1]], -1)
        entering = _states(cut, E, into, powers, where, state)
        within = _toeplitz(kernel).permute(0, 3, 1, 2).flatten(1, 2)
        y = torch.baddbmm(within @ cut, out.flatten(1, 2), entering.transpose(1, 2))
        # (D, T M, C) to (C T, D, M)
        y = y.unflatten(1, (CHUNK, -1)).permute(3, 1, 0, 2).flatten(0, 1)
        y = y.index_select(0, where.slot).unflatten(0, (batch, -1))
        final = (
            _last_states(cut, entering, into, powers, where, state) if return_final_state else None
        )
        return y, final


def _states(
    cut: Tensor,
    E: Tensor,
    into: Tensor,
    powers: list[Tensor],
    where: Layout,
    state: Tensor | None,
) -> Tensor:
    """States that enter the chunks, (D, C, N)."""
    ends = (into.flip(-1) @ cut).transpose(1, 2)
    u = ends.roll(1, 1)  # what rolls around meets a first chunk
    first = (where.position == 0)[:, None]
    before: Tensor | float = 0.0
    if state is not None:
        before = state.index_select(0, where.owner).transpose(0, 1)
    # the most chunks that a sequence can have
    longest = where.position.shape[0]
    if where.borders is None:
        longest //= where.lengths.shape[0]
    return dense_scan(torch.where(first, before, u), powers[-1], where.position, longest)


def _last_states(
    cut: Tensor,
    entering: Tensor,
    into: Tensor,
    powers: list[Tensor],
    where: Layout,
    state: Tensor | None,
) -> Tensor:
    """States after the last token of every sequence, (S, D, N)."""
    filled = where.lengths > 0
    full = (where.lengths - 1).clamp(min=0) // CHUNK
    last = (where.first + full).clamp(max=cut.shape[2] - 1)
    rest = where.lengths - full * CHUNK  # 1 .. T tokens of the last chunk
    # the last chunk's tokens moved to its end, so that one product weighs them
    place = torch.arange(CHUNK, device=cut.device)[:, None] - (CHUNK - rest)
    tail = cut.index_select(2, last).gather(1, place.clamp(min=0).expand(cut.shape[0], -1, -1))
    tail = torch.where(place >= 0, tail, 0)
    h = entering.index_select(1, last).transpose(1, 2)
    for k, power in enumerate(powers):
        h = torch.where((rest >> k) % 2 == 1, h + power @ h, h)
    h = (h + into.flip(-1) @ tail).permute(2, 0, 1)
    return torch.where(filled[:, None, None], h, 0.0 if state is None else state)


def _check(
    x: Tensor, E: Tensor, B: Tensor, C: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, L, D) and floating point, got {tuple(x.shape)} {x.dtype}")
    if E.ndim != 3 or E.shape[0] != x.shape[2] or E.shape[1] != E.shape[2]:
        raise ValueError(f"E must be (D, N, N) with D = {x.shape[2]}, got {tuple(E.shape)}")
    if B.shape != E.shape[:2]:
        raise ValueError(f"B must be (D, N) = {tuple(E.shape[:2])}, got {tuple(B.shape)}")
    if C.ndim != 3 or C.shape[::2] != E.shape[:2]:
        raise ValueError(f"C must be (D, M, N) with E's {tuple(E.shape[:2])}, got {tuple(C.shape)}")
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if state is not None and tuple(state.shape) != (rows, *E.shape[:2]):
        shape = (rows, *E.shape[:2])
        raise ValueError(f"initial_state must be (B, D, N) = {shape}, got {tuple(state.shape)}")
