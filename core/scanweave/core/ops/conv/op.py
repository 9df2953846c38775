"""Short depthwise convolution as a torch operator: registration, gradients, public functions.

    causal_conv1d        taps on the past (or, reversed, on the future)
    symmetric_conv1d     centred taps
    causal_conv1d_step   one token, state updated in place

Equations and letters: `reference.py`. Why registered this way: `selective/op.py`.
"""

from typing import Any, Literal, overload

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
    runs_now,
)
from ..inputs import told_apart
from . import compiled, kernels, portable
from .step_kernel import conv_step

MAX_WIDTH = 256

_lib = torch.library.Library("scanweave", "FRAGMENT")
_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? cu_seqlens, "
    "int left, bool reverse, bool silu"
)
_lib.define(f"short_conv({_INPUTS}) -> Tensor")
_lib.define(f"short_conv_backward(Tensor dy, {_INPUTS}) -> Tensor[]")
_forward_op = torch.ops.scanweave.short_conv.default
_backward_op = torch.ops.scanweave.short_conv_backward.default


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> Tensor:
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, x.shape[1])
    fused = on_kernels(x, weight, bias, state) and weight.shape[1] <= kernels.MAX_WIDTH
    native = not fused and compiled.fits(weight) and compiled.takes((x, weight, bias, state))
    code = kernels if fused else compiled if native else portable
    return code.conv_forward(x, weight, bias, state, cu_seqlens, left, reverse, silu)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> list[Tensor]:
    fused = on_kernels(x, weight, bias, state) and weight.shape[1] <= kernels.MAX_WIDTH
    native = not fused and compiled.fits(weight) and compiled.takes((dy, x, weight, bias, state))
    code = kernels if fused else compiled if native else portable
    return code.conv_backward(dy, x, weight, bias, state, cu_seqlens, left, reverse, silu)


for _device in ("CPU", "CUDA"):
    _lib.impl("short_conv", _forward, _device)
    _lib.impl("short_conv_backward", _backward, _device)


@torch.library.register_fake("scanweave::short_conv", lib=_lib)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("scanweave::short_conv_backward", lib=_lib)
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> list[Tensor]:
    return [v.new_empty(v.shape) for v in (x, weight, bias, state) if v is not None]


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, state, cu_seqlens, left, reverse, silu):
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens)
        ctx.config = (left, reverse, silu)
        run = _forward if runs_now(x) else _forward_op
        return run(x, weight, bias, state, cu_seqlens, left, reverse, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, state, cu_seqlens = ctx.saved_tensors
        run = _backward if runs_now(dy) else _backward_op
        grads = list(run(dy, x, weight, bias, state, cu_seqlens, *ctx.config))
        dstate = grads.pop() if state is not None else None
        dbias = grads.pop() if bias is not None else None
        return (*grads, dbias, dstate, None, None, None, None)


@torch.library.impl(_lib, "short_conv", "Autograd")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    left: int,
    reverse: bool,
    silu: bool,
) -> Tensor:
    tensors = (x, weight, bias, state)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in tensors):
        return _ShortConv.apply(*tensors, cu_seqlens, left, reverse, silu)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*tensors, cu_seqlens, left, reverse, silu)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, L, D), got {got}")
    check_tensor("x", x, tuple(x.shape), x, "(B, L, D)")
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must be (D, W), got {got}")
    dim, width = x.shape[2], weight.shape[1]
    check_tensor("weight", weight, (dim, width), x, "(D, W)")
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"weight must have 1 to {MAX_WIDTH} taps, got {width}")
    if bias is not None:
        check_tensor("bias", bias, (dim,), x, "(D,)")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x)
    if initial_state is not None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        letters = "(B, W - 1, D)" if cu_seqlens is None else "(S, W - 1, D)"
        check_tensor("initial_state", initial_state, (rows, width - 1, dim), x, letters)


@overload
def causal_conv1d(
    *args: Any, return_final_state: Literal[False] = False, **kwargs: Any
) -> Tensor: ...


@overload
def causal_conv1d(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...


@overload
def causal_conv1d(
    *args: Any, return_final_state: bool, **kwargs: Any
) -> Tensor | tuple[Tensor, Tensor]: ...


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps: c[t] = bias + sum_j w[j] x[t - W + 1 + j].

    Every floating input has a gradient, the initial state and the final one included. Sums are
    float32 (float64 if an input is).

    Args:
        x: Inputs, (B, L, D).
        weight: Taps, (D, W), the last one for the newest input; W from 1 to 256.
            Over 16 are slow: PyTorch, a pass a tap.
        bias: Added to the sum, (D,).
        activation: "silu" applies c sigmoid(c), None nothing.
        reverse: Mirror time: tap j meets x[t + W - 1 - j] (inside every packed sequence).
        initial_state: The W - 1 inputs before the first one, in the order they are met,
            (B, W - 1, D), or (S, W - 1, D) when packed; zero when absent.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.
        return_final_state: Also return the last W - 1 inputs.

    Returns:
        Outputs (B, L, D) in the dtype of x, and the state, shape of `initial_state`, if asked.

    Raises:
        ValueError: a shape, dtype or device does not fit, or cu_seqlens is not valid.

    Source: Gu & Dao 2023, arXiv 2312.00752, section 3.4 (the convolution of the Mamba block).
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    left, silu = weight.shape[1] - 1, activation == "silu"
    given = told_apart((x, weight, bias, initial_state))
    y = _ShortConv.apply(*given, cu_seqlens, left, reverse, silu)
    if not return_final_state:
        return y
    return y, _last_inputs(x, left, reverse, initial_state, cu_seqlens)


def symmetric_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """As `causal_conv1d` with centred taps: c[t] = bias + sum_j w[j] x[t - (W - 1) / 2 + j].

    Args:
        x: Inputs, (B, L, D).
        weight: Taps, (D, W), W odd and at most 255.
        bias: Added to the sum, (D,).
        activation: "silu" or None.
        cu_seqlens: Starts of S packed sequences, (S + 1,) int32 from 0 to L; B must be 1.

    Returns:
        Outputs, (B, L, D), in the dtype of x.

    Raises:
        ValueError: W is even, or a shape, dtype or device does not fit.

    Source: Hwang et al. 2024 (Hydra), arXiv 2407.09941, section 3.
    """
    _check(x, weight, bias, activation, None, cu_seqlens)
    width = weight.shape[1]
    if width % 2 == 0:
        raise ValueError(f"weight must have an odd number of taps, got {width}")
    silu = activation == "silu"
    return _ShortConv.apply(x, weight, bias, None, cu_seqlens, (width - 1) // 2, False, silu)


def _last_inputs(
    x: Tensor, count: int, reverse: bool, state: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The last `count` inputs of every sequence in scan order, older ones from `state`."""
    if cu_seqlens is None:
        length = x.shape[1]
        if state is None and length >= count and not torch.compiler.is_compiling():
            return x[:, :count].flip(1) if reverse else x[:, length - count :].clone()
        # compilers are told nothing about the length, and do not copy what is sliced off
        v = x.flip(1) if reverse else x
        head = x.new_zeros(x.shape[0], count, x.shape[2]) if state is None else state.to(x.dtype)
        return torch.cat([head, v], 1)[:, v.shape[1] :].contiguous()
    start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    step = (end - start).unsqueeze(1) - count + torch.arange(count, device=x.device)
    token = (end - 1).unsqueeze(1) - step if reverse else start.unsqueeze(1) + step
    inside = (step >= 0).unsqueeze(-1)
    rows = (
        x[0, token.clamp(0, max(x.shape[1] - 1, 0))]
        if x.shape[1]
        else x.new_zeros(*step.shape, x.shape[2])
    )
    if state is None:
        return torch.where(inside, rows, 0.0)
    older = (step + count).clamp(max=max(count - 1, 0))
    # not take_along_dim, for which a compiler fixes the number of sequences
    owner = torch.arange(state.shape[0], device=x.device).unsqueeze(1)
    return torch.where(inside, rows, state.to(x.dtype)[owner, older])


def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """One token of `causal_conv1d`; `state` is moved on in place. No gradient: for inference.

    Args:
        x: The newest input, (B, D).
        state: The W - 1 inputs before it, (B, W - 1, D); updated.
        weight: Taps, (D, W).
        bias: Added to the sum, (D,).
        activation: "silu" or None.

    Returns:
        Output, (B, D), in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if not isinstance(x, Tensor) or x.ndim != 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, D), got {got}")
    _check(x.unsqueeze(1), weight, bias, activation, None, None)
    shape = (x.shape[0], weight.shape[1] - 1, x.shape[1])
    check_tensor("state", state, shape, x, "(B, W - 1, D)")
    few = weight.shape[1] <= kernels.MAX_WIDTH
    if few and runs_now(x) and on_kernels(x, weight, bias, state):
        with torch.no_grad():
            return conv_step(x, state, weight, bias, activation == "silu")
    with torch.no_grad():
        window = torch.cat([state.to(x.dtype), x.unsqueeze(1)], 1)
        dtype = computing_dtype(x, weight, bias)
        c = (window.to(dtype) * weight.to(dtype).T).sum(1)
        if bias is not None:
            c = c + bias.to(dtype)
        state.copy_(window[:, 1:])
        return (F.silu(c) if activation == "silu" else c).to(x.dtype)
