"""Selective scan as a torch operator: registration, gradients and the public functions.

    selective_scan                 one direction
    bidirectional_selective_scan   both directions with their own parameters, added
    selective_scan_step            one token, state updated in place

One registered op runs any number of directions over the same tokens and adds them; the device of
the tensors decides how: CUDA float32, bfloat16 and float16 through `kernels.py`, everything else
through `portable.py`. Equations and letters: `reference.py`.

Registered by `Library.define` + `impl` with an `autograd.Function` around it, not by
`custom_op`: 8 us against 24 us a call on a CPU, and a roll-out is many small calls. The price:
`torch.ops.scanweave.selective_scan` called directly has no gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import (
    check_cu_seqlens,
    check_cu_seqlens_values,
    check_tensor,
    computing_dtype,
    on_kernels,
)
from . import kernels, portable

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = (
    "Tensor[] x, Tensor[] dt, Tensor[] A, Tensor[] B, Tensor[] C, Tensor[] D, Tensor[] dt_bias, "
    "Tensor[] initial_state, Tensor? z, Tensor? cu_seqlens, bool[] reverse, bool dt_softplus"
)
_lib.define(
    f"selective_scan({_INPUTS}, bool training) -> "
    "(Tensor out, Tensor y, Tensor final_state, Tensor checkpoints)"
)
_lib.define(
    f"selective_scan_backward(Tensor dout, Tensor? dfinal, {_INPUTS}, Tensor y, "
    "Tensor checkpoints) -> Tensor[]"
)
_forward_op = torch.ops.scanweave.selective_scan.default
_backward_op = torch.ops.scanweave.selective_scan_backward.default


def _directions(
    x: list[Tensor],
    dt: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """One tuple of inputs a direction, absent ones None."""
    none = [None] * len(x)
    return list(zip(x, dt, A, B, C, D or none, dt_bias or none, strict=True))


def _states_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int]:
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (rows, A.shape[0], A.shape[1])


def _forward(
    x: list[Tensor],
    dt: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    initial_state: list[Tensor],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, x[0].shape[1])
    dtype = computing_dtype(*x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state, z)
    directions = _directions(x, dt, A, B, C, D, dt_bias)
    start = initial_state or [None] * len(x)
    if on_kernels(x[0]) and dtype == torch.float32:
        return kernels.forward(
            directions, start, z, cu_seqlens, reverse, dt_softplus, keep_states=training
        )
    with torch.autocast(x[0].device.type, enabled=False):
        total, finals = None, []
        for inputs, h0, back in zip(directions, start, reverse, strict=True):
            y, final = portable.scan_forward(*inputs, h0, cu_seqlens, dt_softplus, back, dtype)
            total = y if total is None else total.add_(y)
            finals.append(final)
        assert total is not None
        out = total if z is None else total * F.silu(z.to(dtype))
        y = total if training and z is not None else total.new_empty(0)
        return out.to(x[0].dtype), y, torch.stack(finals), total.new_empty(0)


def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: list[Tensor],
    dt: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    initial_state: list[Tensor],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    y: Tensor,
    checkpoints: Tensor,
) -> list[Tensor]:
    dtype = computing_dtype(*x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state, z)
    directions = _directions(x, dt, A, B, C, D, dt_bias)
    inputs = [*x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state, *([] if z is None else [z])]
    if on_kernels(x[0]) and dtype == torch.float32:
        grads, dz = kernels.backward(
            dout, dfinal, directions, z, cu_seqlens, reverse, dt_softplus, y, checkpoints
        )
    else:
        with torch.autocast(x[0].device.type, enabled=False):
            dy, dz = dout.to(dtype), None
            if z is not None:
                zc = z.to(dtype)
                gate = torch.sigmoid(zc)
                dz = dy * y * gate * (1 + zc * (1 - gate))
                dy = dy * zc * gate
            grads = [
                portable.scan_backward(
                    dy,
                    None if dfinal is None else dfinal[k],
                    *inputs_k,
                    initial_state[k] if initial_state else None,
                    cu_seqlens,
                    dt_softplus,
                    back,
                    dtype,
                )
                for k, (inputs_k, back) in enumerate(zip(directions, reverse, strict=True))
            ]
    names = ["x", "dt", "A", "B", "C"]
    names += ["D"] * bool(D) + ["dt_bias"] * bool(dt_bias) + ["state"] * bool(initial_state)
    flat = [getattr(g, name) for name in names for g in grads]
    if z is not None:
        assert dz is not None
        flat.append(dz)
    return [g.to(v.dtype) for g, v in zip(flat, inputs, strict=True)]


def _forward_fake(
    x: list[Tensor],
    dt: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    initial_state: list[Tensor],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = computing_dtype(*x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state, z)
    x0, rows = x[0], _states_shape(x[0], A[0], cu_seqlens)
    out = x0.new_empty(x0.shape)
    final = x0.new_empty((len(x), *rows), dtype=dtype)
    y = kept = x0.new_empty(0, dtype=dtype)
    if training and on_kernels(x0) and dtype == torch.float32:
        kept = x0.new_empty(kernels.checkpoints_shape(len(x), x0, rows), dtype=dtype)
    if training and z is not None:
        y = x0.new_empty(
            x0.shape, dtype=x0.dtype if on_kernels(x0) and dtype == torch.float32 else dtype
        )
    return out, y, final, kept.clone()


def _backward_fake(
    dout: Tensor,
    dfinal: Tensor | None,
    x: list[Tensor],
    dt: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    initial_state: list[Tensor],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    y: Tensor,
    checkpoints: Tensor,
) -> list[Tensor]:
    inputs = [*x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state, *([] if z is None else [z])]
    return [v.new_empty(v.shape) for v in inputs]


for _device in ("CPU", "CUDA"):
    _lib.impl("selective_scan", _forward, _device)
    _lib.impl("selective_scan_backward", _backward, _device)
torch.library.register_fake("scanweave::selective_scan", _forward_fake, lib=_lib)
torch.library.register_fake("scanweave::selective_scan_backward", _backward_fake, lib=_lib)


class _SelectiveScan(torch.autograd.Function):
    """K directions, then z and cu_seqlens; tensors come flat so that autograd sees them."""

    @staticmethod
    def forward(ctx, reverse, dt_softplus, has, training, cu_seqlens, *tensors):
        lists, z = _unflatten(tensors, len(reverse), has)
        out, y, final, kept = _forward_op(*lists, z, cu_seqlens, reverse, dt_softplus, training)
        ctx.save_for_backward(cu_seqlens, y, kept, *tensors)
        ctx.reverse, ctx.dt_softplus, ctx.has = reverse, dt_softplus, has
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):
        cu_seqlens, y, kept, *tensors = ctx.saved_tensors
        lists, z = _unflatten(tensors, len(ctx.reverse), ctx.has)
        if dout is None:
            dout = torch.zeros_like(tensors[0])
        grads = _backward_op(
            dout, dfinal, *lists, z, cu_seqlens, ctx.reverse, ctx.dt_softplus, y, kept
        )
        return None, None, None, None, None, *grads


def _unflatten(
    tensors: Sequence[Tensor], count: int, has: tuple[bool, bool, bool, bool]
) -> tuple[list[list[Tensor]], Tensor | None]:
    """Flat tensors -> the seven lists of the op, absent ones empty, and z."""
    has_D, has_bias, has_state, has_z = has
    lists: list[list[Tensor]] = []
    start = 0
    for present in (True, True, True, True, True, has_D, has_bias, has_state):
        stop = start + count * present
        lists.append(list(tensors[start:stop]))
        start = stop
    return lists, tensors[start] if has_z else None


class _Direction(NamedTuple):
    """Checked inputs of one direction, B and C with their group axis."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None


def _check_direction(
    direction: _Direction, cu_seqlens: Tensor | None, suffix: str = ""
) -> _Direction:
    """Raise a ValueError that names the argument (with `suffix`) unless all of them fit."""
    x, dt, A, B, C, D, dt_bias, initial_state = direction
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x{suffix} must be (B, L, D), got {got}")
    check_tensor(f"x{suffix}", x, tuple(x.shape), x, "(B, L, D)")
    batch, length, dim = x.shape
    check_tensor(f"dt{suffix}", dt, (batch, length, dim), x, "(B, L, D)")
    if not isinstance(A, Tensor) or A.ndim != 2:
        got = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f"A{suffix} must be (D, N), got {got}")
    if A.is_complex():
        raise ValueError(f"A{suffix} must be real, got {A.dtype}")
    state = A.shape[1]
    check_tensor(f"A{suffix}", A, (dim, state), x, "(D, N)")
    if state < 1:
        raise ValueError(f"A{suffix} must have at least one state, got {tuple(A.shape)}")
    if not isinstance(B, Tensor) or B.ndim not in (3, 4):
        got = tuple(B.shape) if isinstance(B, Tensor) else type(B).__name__
        raise ValueError(f"B{suffix} must be (B, L, N) or (B, L, G, N), got {got}")
    groups = (B.shape[2],) if B.ndim == 4 else ()
    letters = "(B, L, G, N)" if groups else "(B, L, N)"
    check_tensor(f"B{suffix}", B, (batch, length, *groups, state), x, letters)
    check_tensor(f"C{suffix}", C, (batch, length, *groups, state), x, letters)
    if groups and (groups[0] < 1 or dim % groups[0]):
        raise ValueError(
            f"B{suffix} must have groups that divide the {dim} channels, got {groups[0]}"
        )
    if D is not None:
        check_tensor(f"D{suffix}", D, (dim,), x, "(D,)")
    if dt_bias is not None:
        check_tensor(f"dt_bias{suffix}", dt_bias, (dim,), x, "(D,)")
    if initial_state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(B, D, N)" if cu_seqlens is None else "(S, D, N)"
        name = f"initial_state{suffix}"
        check_tensor(name, initial_state, (rows, dim, state), x, letters)
    if not groups:
        B, C = B.unsqueeze(2), C.unsqueeze(2)
    return _Direction(x, dt, A, B, C, D, dt_bias, initial_state)


def _apply(
    directions: list[_Direction],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: tuple[bool, ...],
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    x = directions[0].x
    if z is not None:
        check_tensor("z", z, tuple(x.shape), x, "(B, L, D)")
    columns = list(zip(*directions, strict=True))
    present = [column for column in columns if column[0] is not None]
    has = (*(columns[i][0] is not None for i in (5, 6, 7)), z is not None)
    tensors = [v for column in present for v in column] + ([] if z is None else [z])
    training = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)
    return _SelectiveScan.apply(reverse, dt_softplus, has, training, cu_seqlens, *tensors)


def selective_scan(
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
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the Mamba scan h[t] = exp(delta A) h[t-1] + delta B x, y = C h + D x, out = y silu(z).

    Every floating input has a gradient, the initial state and the final one included. State and
    sums are float32 (float64 if an input is), whatever the dtype of the activations.

    Args:
        x: Inputs, (B, L, D).
        dt: Time steps before bias and softplus, (B, L, D).
        A: Decay rates, (D, N), real; stable for A <= 0.
        B: Input vectors, (B, L, N), or (B, L, G, N) for G groups of D / G channels.
        C: Read-out vectors, as B.
        D: Skip weights, (D,).
        z: Gate, (B, L, D).
        dt_bias: Added to dt, (D,).
        dt_softplus: delta = softplus(dt + dt_bias) instead of dt + dt_bias.
        reverse: Run from the end to the start instead (of every packed sequence).
        initial_state: State before the first step, (B, D, N), or (S, D, N) when packed.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the state after the last step.

    Returns:
        Outputs (B, L, D) in the dtype of x; with `return_final_state` also the state, (B, D, N)
        or (S, D, N), float32 or float64.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Gu & Dao 2023, arXiv 2312.00752, algorithm 2 and section 3.3.
    """
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    direction = _Direction(x, dt, A, B, C, D, dt_bias, initial_state)
    direction = _check_direction(direction, cu_seqlens)
    out, final = _apply([direction], z, cu_seqlens, (bool(reverse),), bool(dt_softplus))
    return (out, final[0]) if return_final_state else out


Pair = tuple[Tensor, Tensor]


def bidirectional_selective_scan(
    x: Pair,
    dt: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: Pair | None = None,
    z: Tensor | None = None,
    dt_bias: Pair | None = None,
    dt_softplus: bool = True,
    *,
    initial_state: Pair | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Pair]:
    """Run a forward and a reverse selective scan, add them, then gate: (y_f + y_r) silu(z).

    Args:
        x: Inputs of the forward and of the reverse scan, each (B, L, D), both in natural order.
        dt: Time steps, a pair as `x`; so are A, B, C, D, dt_bias and initial_state, each of
            the shape that `selective_scan` takes.
        A: Decay rates, a pair.
        B: Input vectors, a pair.
        C: Read-out vectors, a pair.
        D: Skip weights, a pair.
        z: The gate that both directions share, (B, L, D).
        dt_bias: Added to dt, a pair.
        dt_softplus: delta = softplus(dt + dt_bias).
        initial_state: States before the first step of the forward scan and before the last
            token of the reverse one.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32; B must be 1.
        return_final_state: Also return the pair of states after each scan's last step.

    Returns:
        Outputs (B, L, D), and the pair of final states if asked.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Zhu et al. 2024 (Vision Mamba), arXiv 2401.09417, algorithm 1.
    """
    pairs = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state)
    for name, pair in pairs.items():
        if pair is not None and (isinstance(pair, Tensor) or len(pair) != 2):
            got = "a tensor" if isinstance(pair, Tensor) else f"{len(pair)} items"
            raise ValueError(f"{name} must be a pair (forward, reverse), got {got}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x[0])
    directions = []
    for k, suffix in enumerate(("[0]", "[1]")):
        inputs = _Direction(**{n: None if p is None else p[k] for n, p in pairs.items()})
        directions.append(_check_direction(inputs, cu_seqlens, suffix))
    first, second = directions
    if first.x.shape != second.x.shape or first.A.shape != second.A.shape:
        raise ValueError(
            "x and A must have one shape in both directions, got "
            f"{tuple(first.x.shape)}, {tuple(second.x.shape)} and "
            f"{tuple(first.A.shape)}, {tuple(second.A.shape)}"
        )
    out, final = _apply(directions, z, cu_seqlens, (False, True), bool(dt_softplus))
    return (out, (final[0], final[1])) if return_final_state else out
