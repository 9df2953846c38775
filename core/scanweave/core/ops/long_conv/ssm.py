"""Time-invariant diagonal state-space models: in chunks, as a convolution or as a scan.

    h[t] = exp(log_a) h[t-1] + B x[t]           (D, N), h before the start = initial_state, or 0
    y[t] = sum_n C h[t] + D x[t]                2 Re(sum_n C h[t]) if anything is complex

A complex state stands for itself and its conjugate, hence 2 Re. The convolution cuts the sequence
into chunks of T steps: within a chunk the kernel k[j] = C exp(j log_a) B is convolved with x; the
states at the chunks' starts are a linear scan over chunks, and reach step j of a chunk through
C exp((j + 1) log_a). So memory is bounded by T, and pieces with states equal the whole.
Small chunks, of packed sequences too, are products of matrices instead (`chunked.py`).

Letters: B batch, L length, D channels, N state, S packed sequences, T steps a chunk, K chunks.
Source: Fu et al. 2023 (H3), arXiv 2212.14052, section 3.3, and Gu et al. 2022 (S4D),
arXiv 2206.11893, section 3.
"""

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, without_autocast
from ..linear import linear_scan
from ..linear.reference import state_dtype
from .chunked import exp_steps, run_chunks
from .convolution import convolve

CHUNK = 1024
# steps of a matrix product: 1 to 1.5x of 16 and 64 for sequences of 30 to 200 steps, a CPU
TILE = 32
Mode = Literal["auto", "conv", "chunk", "scan"]


def _check_weights(log_a: Tensor, B: Tensor, C: Tensor, like: Tensor) -> None:
    for name, v in (("log_a", log_a), ("B", B), ("C", C)):
        if not isinstance(v, Tensor) or v.ndim != 2:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"{name} must be (D, N), got {got}")
        if v.shape != log_a.shape:
            raise ValueError(f"{name} must be (D, N) = {tuple(log_a.shape)}, got {tuple(v.shape)}")
        if not (v.is_floating_point() or v.is_complex()):
            raise ValueError(f"{name} must be floating point or complex, got {v.dtype}")
        if v.device != like.device:
            raise ValueError(f"{name} must be on {like.device} as x is, got {v.device}")


def _read(v: Tensor) -> Tensor:
    """What a sum over states means: of complex ones, with their conjugates."""
    return 2 * v.real if v.is_complex() else v


def _powers(log_a: Tensor, length: int) -> Tensor:
    """exp(j log_a), (D, N, T)."""
    steps = torch.arange(length, device=log_a.device, dtype=log_a.real.dtype)
    return exp_steps(log_a.unsqueeze(-1), steps)


def ssm_kernel(log_a: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """The convolution kernel of a diagonal state-space model, k[j] = sum_n C exp(j log_a) B.

    Args:
        log_a: Logarithms of the decays, (D, N), real or complex.
        B: Input weights, discretised, (D, N).
        C: Read-out weights, (D, N).
        length: Taps T.

    Returns:
        (D, T), float32 or float64; twice the real part if anything is complex.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check_weights(log_a, B, C, log_a)
    dtype = state_dtype(log_a, B, C)
    with without_autocast(log_a):
        log_a, weights = log_a.to(dtype), B.to(dtype) * C.to(dtype)
        return _read(torch.einsum("dn,dnt->dt", weights, _powers(log_a, length)))


def _chunks(
    x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, state: Tensor | None, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Chunks of one length: outputs (B, K, T, D) and the state after the last one.

    Args:
        x: Inputs, (B, K, T, D), real.
        log_a: (D, N) in the dtype of the state, as are B and C.
        B: Input weights.
        C: Read-out weights.
        state: Before the first chunk, (B, D, N); None is zero.
        final: Whether the last state is needed.
    """
    _, count, steps, _ = x.shape
    powers = _powers(log_a, steps + 1)
    kernel = _read(torch.einsum("dn,dnt->dt", B * C, powers[..., :-1]))
    y = convolve(x, kernel, None, steps)
    if state is None and count == 1 and not final:
        return y, None
    ends = torch.einsum(
        "bktd,dnt->bkdn", x.to(B.dtype), B.unsqueeze(-1) * powers[..., :-1].flip(-1)
    )
    ends, last = linear_scan(ends, steps * log_a, initial_state=state, return_final_state=True)
    if state is None:
        state = torch.zeros_like(last)
    entering = torch.cat([state.unsqueeze(1), ends[:, :-1]], 1)
    y = y + _read(torch.einsum("bkdn,dnt->bktd", entering, C.unsqueeze(-1) * powers[..., 1:]))
    return y, last


@overload
def diagonal_ssm(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def diagonal_ssm(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...


def diagonal_ssm(
    x: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    mode: Mode = "auto",
    chunk: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run a time-invariant diagonal model, h[t] = exp(log_a) h[t-1] + B x[t], y[t] = C h[t] + D x.

    Every input has a gradient, the initial state and the final one included.

    Args:
        x: Inputs, (B, L, D), real.
        log_a: Logarithms of the decays, (D, N), real or complex; real parts at most 0.
        B: Input weights after discretisation, (D, N), real or complex.
        C: Read-out weights, (D, N). With anything complex, y is twice the real part.
        D: Skip weights, (D,).
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: State before the first step, (B, D, N), or (S, D, N) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32; B must be 1.
        return_final_state: Also return the state after the last step.
        mode: "conv" transforms, "chunk" multiplies matrices, "scan" keeps all states (B, L, D, N);
            "auto" is "chunk", in 1/3 to 1/5 of the time of "conv" (512 to 4096 steps, a CPU).
        chunk: Steps that are transformed (1024 by default) or multiplied (32) at once; bounds the
            memory, changes nothing else.

    Returns:
        Outputs (B, L, D) in the dtype of x, and the state if asked, of 32-bit or 64-bit parts.

    Raises:
        ValueError: a shape, dtype or device does not fit, or the mode does not fit cu_seqlens.
    """
    if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, L, D) and floating point, got {got}")
    _check_weights(log_a, B, C, x)
    batch, _, dim = x.shape
    if log_a.shape[0] != dim:
        raise ValueError(f"log_a must have the {dim} channels of x, got {tuple(log_a.shape)}")
    if D is not None and (not isinstance(D, Tensor) or tuple(D.shape) != (dim,)):
        got = tuple(D.shape) if isinstance(D, Tensor) else type(D).__name__
        raise ValueError(f"D must be (D,) = {(dim,)}, got {got}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
        if mode == "conv":
            raise ValueError("mode must be auto, chunk or scan with cu_seqlens, got 'conv'")
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (rows, *log_a.shape)
    if initial_state is not None and tuple(initial_state.shape) != shape:
        raise ValueError(
            f"initial_state must be (B, D, N) = {shape}, got {tuple(initial_state.shape)}"
        )
    dtype = state_dtype(x, log_a, B, C, initial_state)
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    with without_autocast(x):
        xs, log_a, B, C = x.to(real), log_a.to(dtype), B.to(dtype), C.to(dtype)
        state = None if initial_state is None else initial_state.to(dtype)
        if mode == "scan" or x.numel() == 0:
            h, last = linear_scan(
                xs.unsqueeze(-1) * B,
                log_a,
                reverse=reverse,
                initial_state=state,
                cu_seqlens=cu_seqlens,
                return_final_state=True,
            )
            y = _read((h * C).sum(-1))
        elif mode != "conv":
            y, last = run_chunks(
                *(xs, log_a, B, C, state, cu_seqlens),
                *(TILE if chunk is None else chunk, reverse, return_final_state),
            )
        else:
            turned = xs.flip(1) if reverse else xs
            y, last = _convolved(
                turned, log_a, B, C, state, CHUNK if chunk is None else chunk, return_final_state
            )
            y = y.flip(1) if reverse else y
        if D is not None:
            y = y + D.to(real) * xs
    return (y.to(x.dtype), last) if return_final_state else y.to(x.dtype)


def _convolved(
    x: Tensor,
    log_a: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor | None,
    chunk: int,
    final: bool,
) -> tuple[Tensor, Any]:
    """All whole chunks at once, then what is left over."""
    length = x.shape[1]
    whole = length // chunk * chunk
    parts = []
    if whole:
        cut = x[:, :whole].unflatten(1, (whole // chunk, chunk))
        y, state = _chunks(cut, log_a, B, C, state, final or whole < length)
        parts.append(y.flatten(1, 2))
    if whole < length:
        y, state = _chunks(x[:, whole:].unsqueeze(1), log_a, B, C, state, final)
        parts.append(y.squeeze(1))
    return torch.cat(parts, 1), state


def diagonal_ssm_step(
    state: Tensor, x: Tensor, log_a: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """Advance `diagonal_ssm` by one token; `state` is updated in place. No gradient.

    Args:
        state: State before the token, (B, D, N) as `diagonal_ssm` returns it; updated.
        x: Input, (B, D).
        log_a: Logarithms of the decays, (D, N).
        B: Input weights, (D, N).
        C: Read-out weights, (D, N).
        D: Skip weights, (D,).

    Returns:
        Output, (B, D), in the dtype of x.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, D) and floating point, got {got}")
    _check_weights(log_a, B, C, x)
    shape, dtype = (x.shape[0], *log_a.shape), state_dtype(x, log_a, B, C, state)
    if tuple(state.shape) != shape or state.dtype != dtype:
        raise ValueError(
            f"state must be (B, D, N) = {shape} {dtype}, got {tuple(state.shape)} {state.dtype}"
        )
    with torch.no_grad():
        state.mul_(torch.exp(log_a.to(dtype))).add_(x.unsqueeze(-1) * B)
        y = _read((state * C).sum(-1))
        if D is not None:
            y = y + D * x
        return y.to(x.dtype)
