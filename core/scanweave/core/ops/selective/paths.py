"""Selective scans along paths through the tokens, added: the 2-D scans of vision models.

    path_selective_scan   checks of arguments, then the registered op (`path_op.py`)

Direction k has its own dt, A, B, C, D and dt_bias; its step t is token p = paths[k, t] (or, if
reversed, steps run from the path's end):

    delta[t] = softplus(dt[p, k] + dt_bias[k])
    h[t]     = exp(delta[t] A[k]) * h[t-1] + delta[t] x[p] B[p, k]
    y[p]    += sum_n h[t] C[p, k] + D[k] x[p]
    out[p]   = y[p] * silu(z[p])                              once all directions are added

Letters: B batch, L length, D channels, N state, G groups, K directions, S packed sequences.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_cu_seqlens, check_tensor
from ..inputs import told_apart
from .path_op import PathSelectiveScan


def _got(v: object) -> object:
    return tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__


def _check_paths(paths: Tensor, x: Tensor) -> int:
    """Raise unless `paths` has the form (K, L) integer; K. Values are checked where the op runs."""
    if not isinstance(paths, Tensor) or paths.ndim != 2:
        raise ValueError(f"paths must be (K, L), got {_got(paths)}")
    if paths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"paths must be int32 or int64, got {paths.dtype}")
    if paths.device != x.device:
        raise ValueError(f"paths must be on {x.device} as x is, got {paths.device}")
    if paths.shape[0] < 1:
        raise ValueError(f"paths must have at least one row, got {tuple(paths.shape)}")
    if paths.shape[1] != x.shape[1]:
        raise ValueError(f"paths must have L = {x.shape[1]} columns, got {tuple(paths.shape)}")
    return paths.shape[0]


@overload
def path_selective_scan(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def path_selective_scan(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...


def path_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    *,
    paths: Tensor,
    reverse: Sequence[bool] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run K selective scans, each along its own path through the tokens, add them, then gate.

    Tokens stay in natural order: nothing is permuted in memory. With `grid_paths(H, W)` it is
    VMamba's SS2D. Every floating input has a gradient; precision is that of `selective_scan`.
    Values of `paths` are read once per tensor, so keep it between calls. A CUDA graph clamps them
    to 0 .. L - 1 instead: there, a wrong path gives wrong numbers but touches no other memory.

    Args:
        x: Inputs that all directions share, (B, L, D).
        dt: Time steps, (B, L, K, D).
        A: Decay rates, (K, D, N), real; stable for A <= 0.
        B: Input vectors, (B, L, K, N), or (B, L, K, G, N) for G groups of D / G channels.
        C: Read-out vectors, as B.
        D: Skip weights, (K, D).
        z: Gate of the sum, (B, L, D).
        dt_bias: Added to dt, (K, D).
        dt_softplus: delta = softplus(dt + dt_bias) instead of dt + dt_bias.
        paths: Token of every step, (K, L) int32 or int64 (converted in every call); each row a
            permutation of the tokens, when packed of those of each sequence by itself.
        reverse: Which directions run from their path's end to its start; none by default.
        initial_state: States before the first steps, (K, B, D, N), or (K, S, D, N) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the states after the last steps.

    Returns:
        Outputs (B, L, D) in the dtype of x; with `return_final_state` also the states, as
        `initial_state`, float32 or float64.

    Raises:
        ValueError: a shape, dtype or device does not fit, or paths or cu_seqlens is not valid.

    Source: Liu et al. 2024 (VMamba), arXiv 2401.10166, section 4.2, for its four orders of a grid.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"x must be (B, L, D), got {_got(x)}")
    check_tensor("x", x, tuple(x.shape), x, "(B, L, D)")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    batch, length, dim = x.shape
    count = _check_paths(paths, x)
    check_tensor("dt", dt, (batch, length, count, dim), x, "(B, L, K, D)")
    if not isinstance(A, Tensor) or A.ndim != 3:
        raise ValueError(f"A must be (K, D, N), got {_got(A)}")
    if A.is_complex():
        raise ValueError(f"A must be real, got {A.dtype}")
    state = A.shape[2]
    check_tensor("A", A, (count, dim, state), x, "(K, D, N)")
    if state < 1:
        raise ValueError(f"A must have at least one state, got {tuple(A.shape)}")
    if not isinstance(B, Tensor) or B.ndim not in (4, 5):
        raise ValueError(f"B must be (B, L, K, N) or (B, L, K, G, N), got {_got(B)}")
    groups = (B.shape[3],) if B.ndim == 5 else ()
    letters = "(B, L, K, G, N)" if groups else "(B, L, K, N)"
    for name, v in (("B", B), ("C", C)):
        check_tensor(name, v, (batch, length, count, *groups, state), x, letters)
    if groups and (groups[0] < 1 or dim % groups[0]):
        raise ValueError(f"B must have groups that divide the {dim} channels, got {groups[0]}")
    for name, v in (("D", D), ("dt_bias", dt_bias)):
        if v is not None:
            check_tensor(name, v, (count, dim), x, "(K, D)")
    if z is not None:
        check_tensor("z", z, (batch, length, dim), x, "(B, L, D)")
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(K, B, D, N)" if cu_seqlens is None else "(K, S, D, N)"
        check_tensor("initial_state", initial_state, (count, rows, dim, state), x, letters)
    if reverse is not None and (isinstance(reverse, bool) or len(reverse) != count):
        got = reverse if isinstance(reverse, bool) else f"{len(reverse)} items"
        raise ValueError(f"reverse must have one item for each of {count} paths, got {got}")
    back = (False,) * count if reverse is None else tuple(bool(v) for v in reverse)
    if not groups:
        B, C = B.unsqueeze(3), C.unsqueeze(3)
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, z)
    training = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    settings = (paths, cu_seqlens, back, bool(dt_softplus), training)
    out, final = PathSelectiveScan.apply(*settings, *told_apart(inputs))
    return (out, final) if return_final_state else out
