"""Selective scan as a torch operator: registration and gradients.

One registered op runs any number of directions over the same tokens and adds them. The device of
the tensors decides how: float32, bfloat16 and float16 run through the Triton kernels on a GPU and
through `compiled.py` on a CPU with a C compiler, everything else through `portable.py`. Equations
and letters: `reference.py`.

Registered by `Library.define` + `impl` with an `autograd.Function` around it, not by
`custom_op`: 8 us against 24 us a call on a CPU, and a roll-out is many small calls. The same
Function is the op's Autograd implementation, for programs that call the op itself (exported ones).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import (
    check_cu_seqlens_values,
    computing_dtype,
    on_kernels,
    runs_now,
)
from . import backward, compiled, forward_kernel, portable
from .kernels import checkpoints_shape

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
        return forward_kernel.forward(
            directions, start, z, cu_seqlens, reverse, dt_softplus, keep_states=training
        )
    if dtype == torch.float32 and compiled.takes([*x, *dt, *B, *C, *([] if z is None else [z])]):
        return compiled.forward(directions, start, z, cu_seqlens, reverse, dt_softplus, training)
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
        grads, dz = backward.backward(
            dout,
            dfinal,
            directions,
            bool(initial_state),
            z,
            cu_seqlens,
            reverse,
            dt_softplus,
            y,
            checkpoints,
        )
    elif dtype == torch.float32 and compiled.takes(
        [dout, *x, *dt, *B, *C, *([] if z is None else [z])]
    ):
        grads, dz = compiled.backward(
            dout,
            dfinal,
            directions,
            initial_state or [None] * len(x),
            z,
            cu_seqlens,
            reverse,
            dt_softplus,
            y,
        )
    else:
        with torch.autocast(x[0].device.type, enabled=False):
            dy, dz = dout.to(dtype), None
            if z is not None:
                dy, dz = portable.through_gate(dout, y, z, dtype)
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
    fused = on_kernels(x0) and dtype == torch.float32
    y_shape = x0.shape if training and z is not None else (0,)
    y = x0.new_empty(y_shape, dtype=x0.dtype if fused else dtype)
    kept_shape: tuple[int, ...] = (0,)
    if training and fused:
        kept_shape = checkpoints_shape(len(x), x0, A[0], cu_seqlens)
    return out, y, final, x0.new_empty(kept_shape, dtype=dtype)


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


class SelectiveScan(torch.autograd.Function):
    """Any number of directions; tensors come flat, in the op's order, so that autograd sees them.

    `has` says whether D, dt_bias, initial_state and z are among them.
    """

    @staticmethod
    def forward(ctx, reverse, dt_softplus, has, training, cu_seqlens, *tensors):  # noqa: D102
        lists, z = _unflatten(tensors, len(reverse), has)
        run: Callable[..., Any] = _forward if runs_now(tensors[0]) else _forward_op
        out, y, final, kept = run(*lists, z, cu_seqlens, list(reverse), dt_softplus, training)
        ctx.save_for_backward(cu_seqlens, y, kept, *tensors)
        ctx.reverse, ctx.dt_softplus, ctx.has = reverse, dt_softplus, has
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        cu_seqlens, y, kept, *tensors = ctx.saved_tensors
        lists, z = _unflatten(tensors, len(ctx.reverse), ctx.has)
        if dout is None:
            dout = torch.zeros_like(tensors[0])
        run: Callable[..., Any] = _backward if runs_now(dout) else _backward_op
        grads = run(
            dout, dfinal, *lists, z, cu_seqlens, list(ctx.reverse), ctx.dt_softplus, y, kept
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


def _differentiable(
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
    tensors = [*x, *dt, *A, *B, *C, *D, *dt_bias, *initial_state, *([] if z is None else [z])]
    if not (torch.is_grad_enabled() and any(v.requires_grad for v in tensors)):
        inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(*inputs, z, cu_seqlens, reverse, dt_softplus, training)
    has = (bool(D), bool(dt_bias), bool(initial_state), z is not None)
    out, final = SelectiveScan.apply(tuple(reverse), dt_softplus, has, True, cu_seqlens, *tensors)
    # what only the backward reads stays inside the Function
    return out, out.new_empty(0), final, out.new_empty(0)


_lib.impl("selective_scan", _differentiable, "Autograd")
