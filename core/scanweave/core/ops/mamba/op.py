"""A whole Mamba block as one registered operator.

    u, z      = x W_in                              E channels each
    v_k       = silu(conv_k(u))                     for each of K directions
    r, B, C   = v_k W_x,k                           R + N + N channels
    y         = sum_k scan_k(v_k, r W_dt,k, ...)
    out       = (y silu(z)) W_out

It computes what the operators it is made of compute. The difference is what it keeps for the
backward: u and z, r B C, y and the scan's states. The convolutions' outputs, the time steps and
the gated output are computed anew there, which takes a few per cent of a training step and saves
5 of 13 activations of E channels; gradients meet inside matrix products instead of in sums.

A compiler must not see inside, or it would find that forward and backward compute the same and
keep it: hence an operator and not a composite.

Letters: B batch, L length, D model channels, E inner channels, N state, R rank of dt, W taps.
Why registered this way: `selective/op.py`.
Source: Zhu et al. 2024 (Vision Mamba), arXiv 2401.09417, section 3.4 (what is recomputed).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import selective
from ..checks import on_kernels, runs_now, without_autocast
from ..conv.pair import convolve, gradients, untraced
from ..inputs import told_apart
from .gate_kernel import gate

# whose operators are called below
assert selective

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor in_weight, Tensor? in_bias, Tensor[] conv_weight, Tensor[] conv_bias, "
    "Tensor[] x_weight, Tensor[] dt_weight, Tensor[] A, Tensor[] D, Tensor[] dt_bias, "
    "Tensor out_weight, Tensor? out_bias, Tensor? cu_seqlens, bool[] reverse"
)
_lib.define(
    f"mamba_block({_INPUTS}, bool training) -> "
    "(Tensor out, Tensor xz, Tensor projected, Tensor y, Tensor checkpoints)"
)
_lib.define(
    f"mamba_block_backward(Tensor dout, {_INPUTS}, Tensor xz, Tensor projected, Tensor y, "
    "Tensor checkpoints) -> Tensor[]"
)
_ops = torch.ops.scanweave
_forward_op = _ops.mamba_block.default
_backward_op = _ops.mamba_block_backward.default


def _projections(values: list[Tensor], weights: list[Tensor]) -> Tensor:
    """R B C of all directions, (K, B, L, R + 2 N)."""
    first = values[0]
    if not untraced(first):
        return torch.stack([F.linear(v, w) for v, w in zip(values, weights, strict=True)])
    # products write where a stack would copy them to
    size = (len(values), *first.shape[:2], weights[0].shape[0])
    projected = first.new_empty(size)
    for v, w, out in zip(values, weights, projected, strict=True):
        torch.mm(_rows(v), w.t(), out=_rows(out))
    return projected


def _parts(projected: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Time steps' r (B, L, R), B and C (B, L, 1, N), of what one direction's x_proj gives."""
    state = (projected.shape[-1] - rank) // 2
    r, B, C = projected.split([rank, state, state], -1)
    return r, B.unsqueeze(2), C.unsqueeze(2)


def in_parts(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    A: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The block's output, and what its backward keeps, empty unless `training`.

    By registered and PyTorch's operators: also what the block is to a tracer or another runtime.
    """
    with without_autocast(x):
        xz = F.linear(x, in_weight, in_bias)
        u, z = xz.chunk(2, -1)
        biases = conv_bias or [None] * len(reverse)
        values = convolve(u, conv_weight, biases, cu_seqlens, reverse)
        projected = _projections(values, x_weight)
        rank = dt_weight[0].shape[1]
        r, B, C = zip(*(_parts(p, rank) for p in projected.unbind(0)), strict=True)
        dt = [F.linear(v, w) for v, w in zip(r, dt_weight, strict=True)]
        inputs = (values, dt, A, list(B), list(C), D, dt_bias, [])
        y_out, y, _, kept = _ops.selective_scan(*inputs, z, cu_seqlens, reverse, True, training)
        out = F.linear(y_out, out_weight, out_bias)
        if not training:
            none = [x.new_empty(0) for _ in range(4)]
            return out, none[0], none[1], none[2], none[3]
        return out, xz, projected, y, kept


def _gated(y: Tensor, z: Tensor) -> Tensor:
    """Y silu(z), in the dtype of z."""
    if on_kernels(y, z):
        return gate(y, z)
    return (y * F.silu(z.to(y.dtype))).to(z.dtype)


def _rows(v: Tensor) -> Tensor:
    return v.flatten(0, 1)


def _backward(
    dout: Tensor,
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    A: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    xz: Tensor,
    projected: Tensor,
    y: Tensor,
    checkpoints: Tensor,
) -> list[Tensor]:
    with without_autocast(x):
        count, rank = len(reverse), dt_weight[0].shape[1]
        u, z = xz.chunk(2, -1)
        dout = dout.to(x.dtype)
        # dW = dout^T (y silu(z)), in the weight's own layout
        dout_weight = _rows(dout).t() @ _rows(_gated(y, z))
        dy = dout @ out_weight
        r, B, C = zip(*(_parts(p, rank) for p in projected.unbind(0)), strict=True)
        biases = conv_bias or [None] * count
        values = convolve(u, conv_weight, biases, cu_seqlens, reverse)
        dt = [F.linear(v, w) for v, w in zip(r, dt_weight, strict=True)]
        inputs = (values, dt, A, list(B), list(C), D, dt_bias, [])
        settings = (z, cu_seqlens, reverse, True, y, checkpoints)
        grads = _ops.selective_scan_backward(dy, None, *inputs, *settings)
        del dt, dy
        dvalues, ddt, dA, dB, dC, dD, dbias = (
            grads[i : i + count] for i in range(0, 7 * count, count)
        )
        dz = grads[-1]
        dvs, dx_weight, ddt_weight = [], [], []
        for k in range(count):
            dr = ddt[k] @ dt_weight[k]
            ddt_weight.append(_rows(ddt[k]).t() @ _rows(r[k]))
            dprojected = _rows(torch.cat([dr, dB[k].flatten(2), dC[k].flatten(2)], -1))
            dx_weight.append(dprojected.t() @ _rows(values[k]))
            dv = _rows(dvalues[k]).addmm_(dprojected, x_weight[k])
            dvs.append(dv.view(values[k].shape))
        del values
        du, dconv_weight, dconv_bias = gradients(dvs, u, conv_weight, biases, cu_seqlens, reverse)
        # two products instead of one of du and dz side by side, which would have to be copied
        inner = z.shape[-1]
        dx = _rows(du) @ in_weight[:inner]
        dx = dx.addmm_(_rows(dz), in_weight[inner:]).view(x.shape)
        din_weight = torch.empty_like(in_weight, memory_format=torch.contiguous_format)
        torch.mm(_rows(du).t(), _rows(x), out=din_weight[:inner])
        torch.mm(_rows(dz).t(), _rows(x), out=din_weight[inner:])
        flat = [dx, din_weight]
        if in_bias is not None:
            flat.append(torch.cat([_rows(v).sum(0) for v in (du, dz)]).to(in_bias.dtype))
        flat += [*dconv_weight, *dconv_bias, *dx_weight, *ddt_weight, *dA, *dD, *dbias]
        flat.append(dout_weight)
        if out_bias is not None:
            flat.append(_rows(dout).sum(0).to(out_bias.dtype))
        return flat


def _backward_fake(
    dout: Tensor,
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    A: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    xz: Tensor,
    projected: Tensor,
    y: Tensor,
    checkpoints: Tensor,
) -> list[Tensor]:
    lists = (conv_weight, conv_bias, x_weight, dt_weight, A, D, dt_bias)
    inputs = [x, in_weight, in_bias, *(v for one in lists for v in one), out_weight, out_bias]
    return [v.new_empty(v.shape) for v in inputs if v is not None]


for _device in ("CPU", "CUDA"):
    _lib.impl("mamba_block", in_parts, _device)
    _lib.impl("mamba_block_backward", _backward, _device)
# its parts know shapes by themselves
torch.library.register_fake("scanweave::mamba_block", in_parts, lib=_lib)
torch.library.register_fake("scanweave::mamba_block_backward", _backward_fake, lib=_lib)

# the op's tensors in order: single ones, lists of one tensor a direction
_ORDER = (1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1)


def _nested(tensors: Sequence[Tensor | None], count: int, lists: tuple[bool, ...]) -> list:
    """Flat tensors -> the op's arguments; `lists` says which lists are not empty."""
    found: list = []
    start, full = 0, iter(lists)
    for single in _ORDER:
        if single:
            found.append(tensors[start])
            start += 1
        else:
            stop = start + count * next(full)
            found.append(list(tensors[start:stop]))
            start = stop
    return found


class MambaBlock(torch.autograd.Function):
    """The op with gradients; tensors come flat, in the op's order, so that autograd sees them."""

    @staticmethod
    def forward(ctx, reverse, lists, training, cu_seqlens, *tensors):  # noqa: D102
        arguments = _nested(tensors, len(reverse), lists)
        run: Callable[..., Any] = in_parts if runs_now(tensors[0]) else _forward_op
        out, *kept = run(*arguments, cu_seqlens, list(reverse), training)
        ctx.save_for_backward(cu_seqlens, *kept, *tensors)
        ctx.reverse, ctx.lists = reverse, lists
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        cu_seqlens, xz, projected, y, checkpoints, *tensors = ctx.saved_tensors
        arguments = _nested(tensors, len(ctx.reverse), ctx.lists)
        kept = (xz, projected, y, checkpoints)
        run: Callable[..., Any] = _backward if runs_now(dout) else _backward_op
        grads = iter(run(dout, *arguments, cu_seqlens, list(ctx.reverse), *kept))
        return None, None, None, None, *(None if v is None else next(grads) for v in tensors)


def mamba_block(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    A: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
) -> Tensor:
    """Run a Mamba block in one or several directions, keeping little for the backward.

    Lists have one tensor a direction. Every floating input has a gradient.

    Args:
        x: Inputs, (B, L, D).
        in_weight: (2 E, D), dtype of x.
        in_bias: (2 E,).
        conv_weight: Taps, (E, W) each.
        conv_bias: (E,) each; an empty list for none.
        x_weight: (R + 2 N, E) each, dtype of x.
        dt_weight: (E, R) each, dtype of x.
        A: Decay rates, (E, N) each.
        D: Skip weights, (E,) each.
        dt_bias: (E,) each.
        out_weight: (D, E), dtype of x.
        out_bias: (D,).
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32; B must be 1.
        reverse: Whether a direction runs from the end to the start.

    Returns:
        Outputs, (B, L, D), in the dtype of x.
    """
    lists = (conv_weight, conv_bias, x_weight, dt_weight, A, D, dt_bias)
    flat = [x, in_weight, in_bias, *(v for one in lists for v in one), out_weight, out_bias]
    has = tuple(len(v) > 0 for v in lists)
    training = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in flat)
    return MambaBlock.apply(tuple(reverse), has, training, cu_seqlens, *told_apart(flat))


def _differentiable(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    A: list[Tensor],
    D: list[Tensor],
    dt_bias: list[Tensor],
    out_weight: Tensor,
    out_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lists = (conv_weight, conv_bias, x_weight, dt_weight, A, D, dt_bias)
    flat = [x, in_weight, in_bias, *(v for one in lists for v in one), out_weight, out_bias]
    if not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in flat)):
        with torch._C._AutoDispatchBelowAutograd():
            given = (x, in_weight, in_bias, *lists, out_weight, out_bias)
            return _forward_op(*given, cu_seqlens, reverse, training)
    has = tuple(len(v) > 0 for v in lists)
    out = MambaBlock.apply(tuple(reverse), has, True, cu_seqlens, *flat)
    # what only the backward reads stays inside the Function
    return out, *(out.new_empty(0) for _ in range(4))


_lib.impl("mamba_block", _differentiable, "Autograd")
