"""The matrix-state scan as a torch operator: registration and gradients.

One registered op runs one or two directions over the same values and adds them. The device of the
tensors decides how, as for the selective scan: Triton kernels on a GPU (`fused.py`, and with a
decay of every key channel `vector.py`), `compiled.py` on a CPU with a C compiler, `portable.py`
elsewhere and in float64. Only `vector.py` knows the bonus of a single direction, the others get it
as a skip. Equations and letters: `reference.py`. Why registered this way: `selective/op.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_cu_seqlens_values, computing_dtype, runs_now
from . import compiled, fused, portable, vector
from .bonus import bonus_gradients, with_bonus

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = (
    "Tensor[] q, Tensor[] k, Tensor v, Tensor[] g, Tensor[] write, Tensor? skip, "
    "Tensor[] initial_state, Tensor? cu_seqlens, bool[] reverse, bool exclusive, bool shift"
)
_lib.define(
    f"gated_linear_scan({_INPUTS}, bool final, Tensor? bonus=None)"
    " -> (Tensor out, Tensor final_state)"
)
_lib.define(
    f"gated_linear_scan_backward(Tensor dout, Tensor? dfinal, {_INPUTS}, Tensor? bonus=None)"
    " -> Tensor[]"
)
_forward_op = torch.ops.scanweave.gated_linear_scan.default
_backward_op = torch.ops.scanweave.gated_linear_scan_backward.default


def _flat(
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    bonus: Tensor | None,
) -> list[Tensor]:
    """All tensors with gradients, in the order of the op's arguments."""
    given = [[] if u is None else [u] for u in (skip, bonus)]
    return [*q, *k, v, *g, *write, *given[0], *initial_state, *given[1]]


def _native(dtype: torch.dtype, *tensors: Tensor) -> bool:
    return dtype == torch.float32 and compiled.takes(tensors)


def _forward(
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    final: bool,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, v.shape[1])
    lists = (q, k, v, g, write, skip, initial_state)
    dtype = computing_dtype(*_flat(*lists, bonus))
    if dtype == torch.float32 and vector.takes(v, g):
        return vector.forward(*lists, bonus, cu_seqlens, reverse, exclusive, shift, final)
    if bonus is not None:
        skip = with_bonus(skip, q[0], k[0], bonus)
    if dtype == torch.float32 and fused.takes(v, g):
        lists = (q, k, v, g, write, skip, initial_state)
        return fused.forward(*lists, cu_seqlens, reverse, exclusive, shift, final)
    code = compiled if _native(dtype, *q, *k, v, *g, *write) else portable
    none = [None] * len(q)
    directions = zip(q, k, g or none, write or none, initial_state or none, reverse, strict=True)
    with torch.autocast(v.device.type, enabled=False):
        total, finals = None, []
        for q_d, k_d, g_d, write_d, state, back in directions:
            y, last = code.forward(
                q_d, k_d, v, g_d, write_d, state, cu_seqlens, back, exclusive, shift, dtype
            )
            total = y if total is None else total.add_(y)
            finals.append(last)
        assert total is not None
        if skip is not None:
            total.addcmul_(skip.to(dtype).unsqueeze(-1), v.to(dtype))
        return total.to(v.dtype), torch.stack(finals) if final else total.new_empty(0)


def _backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    bonus: Tensor | None = None,
) -> list[Tensor]:
    lists = (q, k, v, g, write, skip, initial_state)
    inputs = _flat(*lists, bonus)
    dtype = computing_dtype(*inputs)
    if dtype == torch.float32 and vector.takes(v, g):
        flat = vector.backward(dout, dfinal, *lists, bonus, cu_seqlens, reverse, exclusive, shift)
        return [grad.to(x.dtype) for grad, x in zip(flat, inputs, strict=True)]
    if bonus is not None:
        lists = (q, k, v, g, write, with_bonus(skip, q[0], k[0], bonus), initial_state)
    if dtype == torch.float32 and fused.takes(v, g):
        flat = fused.backward(dout, dfinal, *lists, cu_seqlens, reverse, exclusive, shift)
    else:
        flat = _one_by_one_backward(
            dout, dfinal, *lists, cu_seqlens, reverse, exclusive, shift, dtype
        )
    if bonus is not None:
        # behind what q, k, v, g and write have
        at = 3 + len(g) + len(write)
        dskip = flat[at]
        dq, dk, dbonus = bonus_gradients(dskip, q[0], k[0], bonus)
        flat[:2] = [flat[0] + dq, flat[1] + dk]
        flat[at : at + 1] = [] if skip is None else [dskip]
        flat.append(dbonus)
    return [grad.to(x.dtype) for grad, x in zip(flat, inputs, strict=True)]


def _one_by_one_backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    code = compiled if _native(dtype, dout, *q, *k, v, *g, *write) else portable
    none = [None] * len(q)
    directions = zip(q, k, g or none, write or none, initial_state or none, reverse, strict=True)
    with torch.autocast(v.device.type, enabled=False):
        dv, dskip, parts = None, None, []
        if skip is not None:
            dv = dout.to(dtype) * skip.to(dtype).unsqueeze(-1)
            dskip = (dout.to(dtype) * v.to(dtype)).sum(-1)
        for d, (q_d, k_d, g_d, write_d, state, back) in enumerate(directions):
            part = code.backward(
                dout,
                None if dfinal is None else dfinal[d],
                *(q_d, k_d, v, g_d, write_d, state, cu_seqlens, back, exclusive, shift, dtype),
            )
            dv = part.v if dv is None else dv.add_(part.v)
            parts.append(part)
        assert dv is not None
        flat = [*(p.q for p in parts), *(p.k for p in parts), dv]
        flat += [p.g for p in parts if g] + [p.write for p in parts if write]
        flat += [dskip] * (skip is not None) + [p.initial_state for p in parts if initial_state]
        return flat


def _forward_fake(
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    final: bool,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = computing_dtype(*_flat(q, k, v, g, write, skip, initial_state, bonus))
    rows = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (len(q), rows, v.shape[2], q[0].shape[3], v.shape[3]) if final else (0,)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=dtype)


def _backward_fake(
    dout: Tensor,
    dfinal: Tensor | None,
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    bonus: Tensor | None = None,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in _flat(q, k, v, g, write, skip, initial_state, bonus)]


for _device in ("CPU", "CUDA"):
    _lib.impl("gated_linear_scan", _forward, _device)
    _lib.impl("gated_linear_scan_backward", _backward, _device)
torch.library.register_fake("scanweave::gated_linear_scan", _forward_fake, lib=_lib)
torch.library.register_fake("scanweave::gated_linear_scan_backward", _backward_fake, lib=_lib)


class GatedLinearScan(torch.autograd.Function):
    """`apply(config, cu_seqlens, *tensors)` -> out, final_state."""

    @staticmethod
    def forward(ctx, config, cu_seqlens, *tensors):  # noqa: D102
        has, reverse, exclusive, shift, final = config
        *lists, bonus = _unflatten(tensors, len(reverse), has)
        run: Callable[..., Any] = _forward if runs_now(tensors[0]) else _forward_op
        out, state = run(*lists, cu_seqlens, list(reverse), exclusive, shift, final, bonus)
        ctx.save_for_backward(cu_seqlens, *tensors)
        ctx.config = config
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dfinal):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        cu_seqlens, *tensors = ctx.saved_tensors
        has, reverse, exclusive, shift, final = ctx.config
        *lists, bonus = _unflatten(tensors, len(reverse), has)
        if dout is None:
            dout = torch.zeros_like(tensors[2 * len(reverse)])
        run: Callable[..., Any] = _backward if runs_now(dout) else _backward_op
        grads = run(
            dout,
            dfinal if final else None,
            *lists,
            cu_seqlens,
            list(reverse),
            exclusive,
            shift,
            bonus,
        )
        return None, None, *grads


Lists = tuple[
    list[Tensor],
    list[Tensor],
    Tensor,
    list[Tensor],
    list[Tensor],
    Tensor | None,
    list[Tensor],
    Tensor | None,
]


def _unflatten(tensors: Sequence[Tensor], count: int, has: tuple[bool, ...]) -> Lists:
    """Inverse of `_flat`; `has` tells which of g, write, skip, state and bonus there are."""
    rest = list(tensors)

    def take(present: bool, many: int = count) -> list[Tensor]:
        found = rest[: many * present]
        del rest[: many * present]
        return found

    has_g, has_write, has_skip, has_state, has_bonus = has
    q, k, v = take(True), take(True), take(True, 1)[0]
    g, write, skip = take(has_g), take(has_write), take(has_skip, 1)
    state, bonus = take(has_state), take(has_bonus, 1)
    return q, k, v, g, write, skip[0] if skip else None, state, bonus[0] if bonus else None


def _differentiable(
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    g: list[Tensor],
    write: list[Tensor],
    skip: Tensor | None,
    initial_state: list[Tensor],
    cu_seqlens: Tensor | None,
    reverse: list[bool],
    exclusive: bool,
    shift: bool,
    final: bool,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    lists = (q, k, v, g, write, skip, initial_state)
    tensors = _flat(*lists, bonus)
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(*lists, cu_seqlens, reverse, exclusive, shift, final, bonus)
    has = (bool(g), bool(write), skip is not None, bool(initial_state), bonus is not None)
    config = (has, tuple(reverse), exclusive, shift, final)
    return GatedLinearScan.apply(config, cu_seqlens, *tensors)


_lib.impl("gated_linear_scan", _differentiable, "Autograd")
