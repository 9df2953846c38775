"""Depthwise convolution with a kernel as long as the sequence, through the Fourier transform.

    y[t]   = sum_j kernel[j] x[t - j] + sum_j kernel_back[j] x[t + j] + D x[t]
    out[t] = y[t] gate[t]

O(L log L) in place of O(L^2). Composed of PyTorch's own transforms; second derivatives exist.
Transforms are float32, or float64 if an input is, under autocast too. Rounding in a transform
spreads over all of its length: outputs depend on later inputs by about 5e-7 of the largest one.

Letters: B batch, L length, D channels, K taps.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..checks import check_tensor, computing_dtype, without_autocast


def transform_size(length: int) -> int:
    """The least even size without prime factors over 5 that is at least `length`.

    Under a compiler `length + 1`, of which nothing must be known (2 L for a kernel of L taps).
    """
    if torch.compiler.is_compiling():
        return length + 1
    sizes = []
    for odd in (1, 3, 5, 9, 15):
        size = 2 * odd
        while size < length:
            size *= 2
        sizes.append(size)
    return min(sizes)


def _spectrum(kernel: Tensor, kernel_back: Tensor | None, size: int) -> Tensor:
    """The transform of taps of the past and of the future, (D, size / 2 + 1)."""
    spectrum = torch.fft.rfft(kernel, n=size)
    if kernel_back is None:
        return spectrum
    return spectrum + torch.fft.rfft(kernel_back, n=size).conj()


class _Convolution(torch.autograd.Function):
    """Keeps the inputs alone: PyTorch's graph keeps their transforms, which are twice as large."""

    @staticmethod
    def forward(ctx, x, kernel, kernel_back, size):
        ctx.save_for_backward(x, kernel, kernel_back)
        ctx.size = size
        # a channel's steps lie side by side once padded: half the time of strided transforms
        y = torch.fft.rfft(x.transpose(-1, -2), n=size) * _spectrum(kernel, kernel_back, size)
        return torch.fft.irfft(y, n=size)[..., : x.shape[-2]].transpose(-1, -2)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, kernel, kernel_back = ctx.saved_tensors
        size, g = ctx.size, torch.fft.rfft(dy.transpose(-1, -2), n=ctx.size)
        dx = dkernel = dback = None
        # x[t] reached y[t + j] through tap j, and tap j meets all pairs of that lag
        if ctx.needs_input_grad[0]:
            dx = torch.fft.irfft(g * _spectrum(kernel, kernel_back, size).conj(), n=size)
            dx = dx[..., : x.shape[-2]].transpose(-1, -2)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            pairs = g * torch.fft.rfft(x.transpose(-1, -2), n=size).conj()
            pairs = pairs.flatten(0, -3).sum(0)
            dkernel = torch.fft.irfft(pairs, n=size)[:, : kernel.shape[1]]
            if kernel_back is not None:
                dback = torch.fft.irfft(pairs.conj(), n=size)[:, : kernel_back.shape[1]]
        return dx, dkernel, dback, None


def convolve(x: Tensor, kernel: Tensor, kernel_back: Tensor | None, length: int) -> Tensor:
    """The convolution alone: the last `length` outputs.

    Args:
        x: Inputs, (..., T, D), float32 or float64.
        kernel: Taps of the past, (D, K).
        kernel_back: Taps of the future, (D, K').
        length: How many outputs.
    """
    total = x.shape[-2]
    kernel = kernel[:, :total]
    reach = kernel.shape[1]
    if kernel_back is not None:
        kernel_back = kernel_back[:, :total]
        reach = max(reach, kernel_back.shape[1])
    # what wraps around reaches only places that are cut off
    size = transform_size(total + max(reach - 1, 0))
    return _Convolution.apply(x, kernel, kernel_back, size)[..., total - length :, :]


@overload
def fft_conv(*args: Any, return_final_state: Literal[False] = False, **kwargs: Any) -> Tensor: ...


@overload
def fft_conv(
    *args: Any, return_final_state: Literal[True], **kwargs: Any
) -> tuple[Tensor, Tensor]: ...


def fft_conv(
    x: Tensor,
    kernel: Tensor,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    kernel_back: Tensor | None = None,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own kernel of any length, causally or to both sides.

    Args:
        x: Inputs, (B, L, D), real.
        kernel: Taps, (D, K): kernel[:, j] weighs the input j steps before.
        D: Skip weights, (D,), added to the tap of lag 0.
        gate: Multiplies the result, (B, L, D).
        kernel_back: Taps of the future, (D, K'): kernel_back[:, j] weighs the input j steps
            after; lag 0 is in both kernels. Not with states.
        reverse: Turn the direction around: kernel[:, j] weighs the input j steps after.
        initial_state: The K - 1 inputs before the first (with `reverse` those behind the last one,
            the farthest first), (B, K - 1, D).
        return_final_state: Also return the last K - 1 inputs, with which a next piece continues.

    Returns:
        Outputs (B, L, D) in the dtype of x; with `return_final_state` also (B, K - 1, D). For
        kernels of diagonal state-space models, `diagonal_ssm` has states that do not grow with K.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> fft_conv(torch.eye(4)[:1, :, None], torch.tensor([[1.0, 0.5]])).flatten().tolist()
        [1.0, 0.5, 0.0, 0.0]

    Source: Fu et al. 2023 (H3), arXiv 2212.14052, section 3.3; Poli et al. 2023 (Hyena),
    arXiv 2302.10866, section 3.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, L, D), got {got}")
    check_tensor("x", x, tuple(x.shape), x, "(B, L, D)")
    batch, length, dim = x.shape
    for name, v in (("kernel", kernel), ("kernel_back", kernel_back)):
        if v is None and name == "kernel_back":
            continue
        if not isinstance(v, Tensor) or v.ndim != 2 or v.shape[1] < 1:
            got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"{name} must be (D, K) with at least one tap, got {got}")
        check_tensor(name, v, (dim, v.shape[1]), x, "(D, K)")
    if D is not None:
        check_tensor("D", D, (dim,), x, "(D,)")
    if gate is not None:
        check_tensor("gate", gate, tuple(x.shape), x, "(B, L, D)")
    past = kernel.shape[1] - 1
    if kernel_back is not None and (initial_state is not None or return_final_state):
        raise ValueError("kernel_back must be None with states: a state holds only the past")
    if initial_state is not None:
        check_tensor("initial_state", initial_state, (batch, past, dim), x, "(B, K - 1, D)")
    dtype = computing_dtype(x, kernel, D, gate, kernel_back, initial_state)
    with without_autocast(x):
        xs = x.to(dtype)
        turned = xs.flip(1) if reverse else xs
        whole = turned
        if initial_state is not None:
            whole = torch.cat([initial_state.to(dtype), turned], 1)
        if x.numel() == 0:
            y = turned + kernel.sum()  # of no elements, but with a gradient of 0 for the kernel
        else:
            taps_back = None if kernel_back is None else kernel_back.to(dtype)
            y = convolve(whole, kernel.to(dtype), taps_back, length)
        if reverse:
            y = y.flip(1)
        if D is not None:
            y = y + D.to(dtype) * xs
        if gate is not None:
            y = y * gate.to(dtype)
        out = y.to(x.dtype)
        if not return_final_state:
            return out
        missing = past - whole.shape[1]
        if missing > 0:
            whole = torch.cat([whole.new_zeros(batch, missing, dim), whole], 1)
        return out, whole[:, whole.shape[1] - past :].to(x.dtype)
