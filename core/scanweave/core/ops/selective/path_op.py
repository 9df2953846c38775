"""Selective scans along paths as a torch operator: registration and gradients.

One registered op runs all K directions over the same x. What differs between directions comes
stacked, as a projection of the tokens gives it, so that gradients leave it stacked as well and
that of x is one sum. Nothing is permuted in memory by the Triton kernels and by `scan.c`, which
read and write rows where the path says; `portable.py` runs on permuted copies. Which of the three
runs is decided as in `op.py`. Equations and letters: `reference.py`; K directions.

On a GPU all directions are one launch, a scan of K D channels, and then added: four times the
programs are worth more than a pass over memory.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import computing_dtype, on_kernels
from . import backward, compiled, forward_kernel, portable
from .add_kernel import add_directions
from .kernels import checkpoints_shape
from .path_values import readable

Direction = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? z, Tensor paths, Tensor? cu_seqlens, bool[] reverse, "
    "bool dt_softplus"
)
_lib.define(
    f"path_selective_scan({_INPUTS}, bool training) -> "
    "(Tensor out, Tensor y, Tensor final_state, Tensor checkpoints)"
)
_lib.define(
    f"path_selective_scan_backward(Tensor dout, Tensor? dfinal, {_INPUTS}, Tensor y, "
    "Tensor checkpoints) -> Tensor[]"
)
_forward_op = torch.ops.scanweave.path_selective_scan.default
_backward_op = torch.ops.scanweave.path_selective_scan_backward.default


def _directions(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> list[Direction]:
    """One tuple of views a direction, as the functions that run several directions take them."""
    count = A.shape[0]
    columns = (dt.unbind(2), A.unbind(0), B.unbind(2), C.unbind(2))
    optional = ([None] * count if v is None else v.unbind(0) for v in (D, dt_bias))
    return [(x, *one) for one in zip(*columns, *optional, strict=True)]


def _states(v: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if v is None else v.unbind(0)


def _stacked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
) -> Direction:
    """All directions as one of K D channels in K G groups."""
    D, dt_bias = (None if v is None else v.flatten() for v in (D, dt_bias))
    return x, dt.flatten(2), A.flatten(0, 1), B.flatten(2, 3), C.flatten(2, 3), D, dt_bias


def _beside(states: Tensor) -> Tensor:
    """(K, S, D, N) -> (S, K D, N)."""
    return states.transpose(0, 1).flatten(1, 2)


def _apart(states: Tensor, A: Tensor) -> Tensor:
    """(S, K D, N) -> (K, S, D, N)."""
    return states.view(states.shape[0], *A.shape).transpose(0, 1).contiguous()


def _turned(paths: Tensor, reverse: list[bool], cu_seqlens: Tensor | None) -> Tensor:
    """Paths from their end to their start where `reverse`, within every packed sequence."""
    if not any(reverse):
        return paths
    steps = torch.arange(paths.shape[1], device=paths.device)
    if cu_seqlens is None:
        back = paths.shape[1] - 1 - steps
    else:
        sequence = torch.searchsorted(cu_seqlens[1:], steps.to(cu_seqlens.dtype), right=True)
        back = cu_seqlens[sequence] + cu_seqlens[sequence + 1] - 1 - steps
    turned = paths.index_select(1, back)
    return torch.stack([turned[k] if r else paths[k] for k, r in enumerate(reverse)])


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    z: Tensor | None,
    paths: Tensor,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    paths = readable(paths, cu_seqlens, x.shape[1])
    dtype = computing_dtype(x, dt, A, B, C, D, dt_bias, initial_state, z)
    if on_kernels(x) and dtype == torch.float32:
        stacked = _stacked(x, dt, A, B, C, D, dt_bias)
        turned = _turned(paths, reverse, cu_seqlens)
        h0 = None if initial_state is None else _beside(initial_state)
        parts, _, final, kept = forward_kernel.forward(
            [stacked], [h0], None, cu_seqlens, [False], dt_softplus, training, turned
        )
        y, out = add_directions(parts, A.shape[0], z)
        return out, y if training and z is not None else y.new_empty(0), _apart(final[0], A), kept
    directions = _directions(x, dt, A, B, C, D, dt_bias)
    start = _states(initial_state, len(directions))
    if dtype == torch.float32 and compiled.takes([x, dt, B, C, *([] if z is None else [z])]):
        return compiled.forward(
            directions, start, z, cu_seqlens, reverse, dt_softplus, training, paths
        )
    with torch.autocast(x.device.type, enabled=False):
        total, finals = x.new_zeros(x.shape, dtype=dtype), []
        for one, h0, back, path in zip(directions, start, reverse, paths.long(), strict=True):
            y, final = portable.scan_forward(
                *_along(path, one), h0, cu_seqlens, dt_softplus, back, dtype
            )
            total.index_add_(1, path, y)
            finals.append(final)
        out = total if z is None else total * F.silu(z.to(dtype))
        y = total if training and z is not None else total.new_empty(0)
        return out.to(x.dtype), y, torch.stack(finals), total.new_empty(0)


def _along(path: Tensor, direction: Direction) -> Direction:
    """Inputs in the order of a path."""
    x, dt, A, B, C, D, dt_bias = direction
    x, dt, B, C = (v.index_select(1, path) for v in (x, dt, B, C))
    return x, dt, A, B, C, D, dt_bias


def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    z: Tensor | None,
    paths: Tensor,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    y: Tensor,
    checkpoints: Tensor,
) -> list[Tensor]:
    paths = readable(paths, cu_seqlens, x.shape[1])
    dtype = computing_dtype(x, dt, A, B, C, D, dt_bias, initial_state, z)
    if on_kernels(x) and dtype == torch.float32:
        dz = None
        if z is not None:
            dout, dz = portable.through_gate(dout, y, z, dtype)
        stacked = _stacked(x, dt, A, B, C, D, dt_bias)
        turned = _turned(paths, reverse, cu_seqlens)
        dh = None if dfinal is None else _beside(dfinal).unsqueeze(0)
        (g,), _ = backward.backward(
            dout,
            dh,
            [stacked],
            initial_state is not None,
            None,
            cu_seqlens,
            [False],
            dt_softplus,
            dout,
            checkpoints,
            turned,
        )
        dx, _ = add_directions(g.x, A.shape[0], None)
        flat = [dx, g.dt, g.A, g.B, g.C, g.D, g.dt_bias, _apart(g.state, A), dz]
        given = (x, dt, A, B, C, D, dt_bias, initial_state, z)
        return [
            d.view(v.shape).to(v.dtype)
            for d, v in zip(flat, given, strict=True)
            if d is not None and v is not None
        ]
    directions = _directions(x, dt, A, B, C, D, dt_bias)
    start = _states(initial_state, len(directions))
    ddt = dt.new_empty(dt.shape)
    parts = ddt.unbind(2)
    gates = [] if z is None else [z]
    if dtype == torch.float32 and compiled.takes([dout, x, dt, B, C, *gates]):
        grads, dz = compiled.backward(
            dout, dfinal, directions, start, z, cu_seqlens, reverse, dt_softplus, y, paths, parts
        )
    else:
        with torch.autocast(x.device.type, enabled=False):
            dy, dz = dout.to(dtype), None
            if z is not None:
                dy, dz = portable.through_gate(dout, y, z, dtype)
            dx, grads = x.new_zeros(x.shape, dtype=dtype), []
            for k, (path, back) in enumerate(zip(paths.long(), reverse, strict=True)):
                g = portable.scan_backward(
                    dy.index_select(1, path),
                    None if dfinal is None else dfinal[k],
                    *_along(path, directions[k]),
                    start[k],
                    cu_seqlens,
                    dt_softplus,
                    back,
                    dtype,
                )
                dx.index_add_(1, path, g.x)
                parts[k].index_copy_(1, path, g.dt.to(dt.dtype))
                g.x, g.dt = dx, parts[k]
                g.B, g.C = (torch.empty_like(v).index_copy_(1, path, v) for v in (g.B, g.C))
                grads.append(g)
    flat = [
        grads[0].x.to(x.dtype),
        ddt,
        torch.stack([g.A for g in grads]).to(A.dtype),
        torch.stack([g.B for g in grads], 2).to(B.dtype),
        torch.stack([g.C for g in grads], 2).to(C.dtype),
    ]
    if D is not None:
        flat.append(torch.stack([g.D for g in grads if g.D is not None]).to(D.dtype))
    if dt_bias is not None:
        bias = torch.stack([g.dt_bias for g in grads if g.dt_bias is not None])
        flat.append(bias.to(dt_bias.dtype))
    if initial_state is not None:
        flat.append(torch.stack([g.state for g in grads]).to(initial_state.dtype))
    if z is not None:
        assert dz is not None
        flat.append(dz.to(z.dtype))
    return flat


def _forward_fake(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    z: Tensor | None,
    paths: Tensor,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = computing_dtype(x, dt, A, B, C, D, dt_bias, initial_state, z)
    count, dim, state = A.shape
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fused = on_kernels(x) and dtype == torch.float32
    y_shape = x.shape if training and z is not None else (0,)
    kept_shape: tuple[int, ...] = (0,)
    if training and fused:
        kept_shape = checkpoints_shape(1, dt.flatten(2), A[0], cu_seqlens)
    return (
        x.new_empty(x.shape),
        x.new_empty(y_shape, dtype=x.dtype if fused else dtype),
        x.new_empty((count, rows, dim, state), dtype=dtype),
        x.new_empty(kept_shape, dtype=dtype),
    )


def _backward_fake(
    dout: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    z: Tensor | None,
    paths: Tensor,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    y: Tensor,
    checkpoints: Tensor,
) -> list[Tensor]:
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, z)
    return [v.new_empty(v.shape) for v in inputs if v is not None]


for _device in ("CPU", "CUDA"):
    _lib.impl("path_selective_scan", _forward, _device)
    _lib.impl("path_selective_scan_backward", _backward, _device)
torch.library.register_fake("scanweave::path_selective_scan", _forward_fake, lib=_lib)
torch.library.register_fake("scanweave::path_selective_scan_backward", _backward_fake, lib=_lib)


class PathSelectiveScan(torch.autograd.Function):
    """The op with gradients of its nine floating-point inputs, of which the last four may lack."""

    @staticmethod
    def forward(ctx, paths, cu_seqlens, reverse, dt_softplus, training, *inputs):  # noqa: D102
        out, y, final, kept = _forward_op(
            *inputs, paths, cu_seqlens, list(reverse), dt_softplus, training
        )
        ctx.save_for_backward(paths, cu_seqlens, y, kept, *inputs)
        ctx.reverse, ctx.dt_softplus = reverse, dt_softplus
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        paths, cu_seqlens, y, kept, *inputs = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(inputs[0])
        settings = (paths, cu_seqlens, list(ctx.reverse), ctx.dt_softplus, y, kept)
        grads = iter(_backward_op(dout, dfinal, *inputs, *settings))
        return *(None,) * 5, *(None if v is None else next(grads) for v in inputs)


def _differentiable(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    z: Tensor | None,
    paths: Tensor,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    dt_softplus: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, z)
    if not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(*inputs, paths, cu_seqlens, reverse, dt_softplus, training)
    settings = (paths, cu_seqlens, tuple(reverse), dt_softplus, True)
    out, final = PathSelectiveScan.apply(*settings, *inputs)
    # what only the backward reads stays inside the Function
    return out, out.new_empty(0), final, out.new_empty(0)


_lib.impl("path_selective_scan", _differentiable, "Autograd")
