"""The exponentially weighted average as a torch operator: registration and gradients.

float32, bfloat16 and float16 run through the Triton kernels on a GPU and through `compiled.py` on a
CPU with a C compiler, everything else through `portable.py`. Registered as `selective/op.py` says.
Equations and letters: `reference.py`.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_cu_seqlens_values, computing_dtype, on_kernels
from . import backward_kernel, compiled, kernels, portable

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = (
    "Tensor k, Tensor v, Tensor log_decay, Tensor? bonus, Tensor? initial_state, "
    "Tensor? cu_seqlens, bool reverse"
)
_lib.define(f"wkv({_INPUTS}, bool training) -> (Tensor y, Tensor final_state, Tensor checkpoints)")
_lib.define(
    f"wkv_backward(Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor checkpoints) -> "
    "(Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dbonus, Tensor dinitial)"
)
_forward_op = torch.ops.scanweave.wkv.default
_backward_op = torch.ops.scanweave.wkv_backward.default


def _forward(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, k.shape[1])
    given = (k, v, log_decay, bonus, initial_state, cu_seqlens, reverse)
    if on_kernels(k, v, log_decay, bonus, initial_state):
        return kernels.forward(*given, training)
    single = computing_dtype(k, v, log_decay, bonus, initial_state) == torch.float32
    code = compiled if single and compiled.takes((k, v, log_decay)) else portable
    y, final = code.forward(*given)
    return y.to(v.dtype), final, final.new_empty(0)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (dy, dfinal, k, v, log_decay, bonus, initial_state, cu_seqlens, reverse)
    if on_kernels(k, v, log_decay, bonus, initial_state):
        dk, dv, dw, du, dstate = backward_kernel.backward(*given, checkpoints)
    else:
        single = computing_dtype(k, v, log_decay, bonus, initial_state) == torch.float32
        code = compiled if single and compiled.takes((dy, k, v, log_decay)) else portable
        dk, dv, dw, du, dstate = code.backward(*given)
    du = du.new_empty(0) if bonus is None else du.to(bonus.dtype)
    dstate = dstate.new_empty(0) if initial_state is None else dstate.to(initial_state.dtype)
    return dk.to(k.dtype), dv.to(v.dtype), dw.to(log_decay.dtype), du, dstate


def _forward_fake(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = computing_dtype(k, v, log_decay, bonus, initial_state)
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    kept: tuple[int, ...] = (0,)
    if training and on_kernels(k, v, log_decay, bonus, initial_state):
        kept = kernels.checkpoints_shape(k, cu_seqlens)
    final = k.new_empty((rows, 3, k.shape[2]), dtype=dtype)
    return v.new_empty(v.shape), final, k.new_empty(kept, dtype=dtype)


def _backward_fake(
    dy: Tensor,
    dfinal: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = computing_dtype(k, v, log_decay, bonus, initial_state)
    absent = k.new_empty(0, dtype=dtype)
    return (
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        log_decay.new_empty(log_decay.shape),
        absent if bonus is None else bonus.new_empty(bonus.shape),
        absent.clone() if initial_state is None else initial_state.new_empty(initial_state.shape),
    )


for _device in ("CPU", "CUDA"):
    _lib.impl("wkv", _forward, _device)
    _lib.impl("wkv_backward", _backward, _device)
torch.library.register_fake("scanweave::wkv", _forward_fake, lib=_lib)
torch.library.register_fake("scanweave::wkv_backward", _backward_fake, lib=_lib)


class Wkv(torch.autograd.Function):
    """y and the final state of checked tensors, with gradients to all floating ones."""

    @staticmethod
    def forward(ctx, k, v, log_decay, bonus, initial_state, cu_seqlens, reverse, training):  # noqa: D102
        given = (k, v, log_decay, bonus, initial_state, cu_seqlens)
        y, final, kept = _forward_op(*given, reverse, training)
        ctx.save_for_backward(*given, kept)
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        *given, kept = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(given[1])
        dk, dv, dw, du, dstate = _backward_op(dy, dfinal, *given, ctx.reverse, kept)
        bonus, initial_state = given[3:5]
        optional = (None if bonus is None else du, None if initial_state is None else dstate)
        return dk, dv, dw, *optional, None, None, None


def _differentiable(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (k, v, log_decay, bonus, initial_state)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(*given, cu_seqlens, reverse, training)
    y, final = Wkv.apply(*given, cu_seqlens, reverse, True)
    # what only the backward reads stays inside the Function
    return y, final, y.new_empty(0)


_lib.impl("wkv", _differentiable, "Autograd")
