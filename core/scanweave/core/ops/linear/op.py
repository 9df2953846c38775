"""Linear scan as a torch operator: registration and gradients.

The device of the tensors decides how it runs: float32, bfloat16, float16 and complex64 through the
Triton kernels on a GPU, the real ones through `compiled.py` on a CPU with a C compiler, everything
else through `portable.py`. Registered as `selective/op.py` says. Equation: `reference.py`.
"""

import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_cu_seqlens_values
from . import backward_kernel, compiled, forward_kernel, portable
from .kernels import checkpoints_shape
from .reference import state_dtype

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = "Tensor x, Tensor log_a, Tensor? initial_state, Tensor? cu_seqlens, bool reverse"
_lib.define(
    f"linear_scan({_INPUTS}, bool training) -> (Tensor h, Tensor final_state, Tensor checkpoints)"
)
_lib.define(
    f"linear_scan_backward(Tensor dh, Tensor? dfinal, {_INPUTS}, Tensor checkpoints) -> "
    "(Tensor dx, Tensor dlog_a, Tensor dinitial)"
)
_forward_op = torch.ops.scanweave.linear_scan.default
_backward_op = torch.ops.scanweave.linear_scan_backward.default


def _on_kernels(x: Tensor, dtype: torch.dtype) -> bool:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and dtype in (torch.float32, torch.complex64)


def _forward(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, x.shape[1])
    dtype = state_dtype(x, log_a, initial_state)
    if _on_kernels(x, dtype):
        return forward_kernel.forward(x, log_a, initial_state, cu_seqlens, reverse, training)
    if dtype == torch.float32 and compiled.takes((x, log_a)):
        h, final = compiled.forward(x, log_a, initial_state, cu_seqlens, reverse)
    else:
        h, final = portable.scan_forward(x, log_a, initial_state, cu_seqlens, reverse)
    # an output may not be an input, as `to` of an empty x would be
    return h.to(x.dtype, copy=h is x), final, final.new_empty(0)


def _backward(
    dh: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(x, log_a, initial_state)
    given = (dh, dfinal, x, log_a, initial_state, cu_seqlens, reverse)
    if _on_kernels(x, dtype):
        grads = backward_kernel.backward(*given, checkpoints)
    elif dtype == torch.float32 and compiled.takes((dh, x, log_a)):
        grads = compiled.backward(*given)
    else:
        grads = portable.scan_backward(*given)
    dx, dlog_a, dinitial = grads
    absent = initial_state is None
    dinitial = dinitial.new_empty(0) if absent else dinitial.to(initial_state.dtype)
    return dx.to(x.dtype, copy=dx is x), dlog_a.to(log_a.dtype), dinitial


def _states_shape(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    return (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[2])


def _forward_fake(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = state_dtype(x, log_a, initial_state)
    kept: tuple[int, ...] = (0,)
    kept_dtype = dtype
    if _on_kernels(x, dtype):
        kept_dtype = torch.float32
        if training:
            kept = checkpoints_shape(x, cu_seqlens)
    final = x.new_empty(_states_shape(x, cu_seqlens), dtype=dtype)
    return x.new_empty(x.shape), final, x.new_empty(kept, dtype=kept_dtype)


def _backward_fake(
    dh: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if initial_state is None:
        dinitial = x.new_empty(0, dtype=state_dtype(x, log_a))
    else:
        dinitial = initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), log_a.new_empty(log_a.shape), dinitial


for _device in ("CPU", "CUDA"):
    _lib.impl("linear_scan", _forward, _device)
    _lib.impl("linear_scan_backward", _backward, _device)
torch.library.register_fake("scanweave::linear_scan", _forward_fake, lib=_lib)
torch.library.register_fake("scanweave::linear_scan_backward", _backward_fake, lib=_lib)


class LinearScan(torch.autograd.Function):
    """h and the final state of checked (B, L, D) tensors, with gradients to all of them."""

    @staticmethod
    def forward(ctx, x, log_a, initial_state, cu_seqlens, reverse, training):  # noqa: D102
        h, final, kept = _forward_op(x, log_a, initial_state, cu_seqlens, reverse, training)
        ctx.save_for_backward(x, log_a, initial_state, cu_seqlens, kept)
        ctx.reverse = reverse
        ctx.set_materialize_grads(False)
        return h, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dh, dfinal):  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        x, log_a, initial_state, cu_seqlens, kept = ctx.saved_tensors
        if dh is None:
            dh = torch.zeros_like(x)
        dx, dlog_a, dinitial = _backward_op(
            dh, dfinal, x, log_a, initial_state, cu_seqlens, ctx.reverse, kept
        )
        return dx, dlog_a, None if initial_state is None else dinitial, None, None, None


def _differentiable(
    x: Tensor,
    log_a: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (x, log_a, initial_state)
    if not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given)):
        with torch._C._AutoDispatchBelowAutograd():
            return _forward_op(*given, cu_seqlens, reverse, training)
    h, final = LinearScan.apply(*given, cu_seqlens, reverse, True)
    # what only the backward reads stays inside the Function
    return h, final, h.new_empty(0)


_lib.impl("linear_scan", _differentiable, "Autograd")
