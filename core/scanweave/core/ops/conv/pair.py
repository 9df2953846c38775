"""Causal convolutions of one input in several directions, each with taps of its own and SiLU.

    convolve     outputs of all directions
    gradients    of the input, of all taps and of all biases

A forward and a reverse direction go through one launch of `pair_kernel.py` where Triton runs, and
anything else through the registered operator, a direction at a time. Both functions are for inside
of an operator: they record no gradients, and a tracer sees the registered operator only.
"""

# launch options that are no parameters of a kernel
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_cu_seqlens_values, is_real, on_kernels
from ..launch import adjacent, batch_stride, ceil_div, on_device, power_of_2
from .kernels import MAX_WIDTH, MOST_PARTS, Pace, grid_of, sequences_of
from .pair_backward_kernel import conv_pair_backward_kernel, conv_pair_sum_kernel
from .pair_kernel import conv_pair_kernel

# H200, B128 L197 D768, bfloat16, 4 taps: forward 38 us with 2 channels a thread in spans of 16 to
# 40 steps, 42 with 4 channels, 60 by two launches; backward 61 us in one span and so in one wave of
# programs, 69 in two, 116 by two launches and a sum
FORWARD = Pace(8, 8, 40, 16)
BACKWARD = Pace(8, 16, 256, 12)
# sequences of tokens are compared row by row: 177 registers with 4 rows, 255 with 8
PACKED_BACKWARD = Pace(4, 16, 256, 11)
Biases = Sequence[Tensor | None]


def untraced(x: Tensor) -> bool:
    """Whether `x` has values and nobody watches what is made of them."""
    return is_real(x) and not x.is_meta and torch._C._len_torch_dispatch_stack() == 0


def _on_kernels(x: Tensor, *weights: Tensor | None) -> bool:
    return untraced(x) and on_kernels(x, *weights)


def takes(x: Tensor, weights: Sequence[Tensor], biases: Biases, reverse: Sequence[bool]) -> bool:
    """Whether one launch serves these directions."""
    if list(reverse) != [False, True]:
        return False
    width = weights[0].shape[1]
    alike = width == weights[1].shape[1] <= MAX_WIDTH
    alike = alike and (biases[0] is None) == (biases[1] is None)
    return alike and _on_kernels(x, *weights, *biases)


def convolve(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Biases,
    cu_seqlens: Tensor | None,
    reverse: Sequence[bool],
) -> list[Tensor]:
    """SiLU of every direction's convolution of x (B, L, D), with taps (D, W); (B, L, D) each."""
    if takes(x, weights, biases, reverse):
        if cu_seqlens is not None:
            check_cu_seqlens_values(cu_seqlens, x.shape[1])
        return list(pair_forward(x, weights, biases, cu_seqlens).unbind(0))
    return [
        torch.ops.scanweave.short_conv(x, w, b, None, cu_seqlens, w.shape[1] - 1, back, True)
        for w, b, back in zip(weights, biases, reverse, strict=True)
    ]


def gradients(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Biases,
    cu_seqlens: Tensor | None,
    reverse: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Of x (B, L, D); of taps (D, W) each; of the biases that there are."""
    if takes(x, weights, biases, reverse):
        return pair_backward(dys, x, weights, biases, cu_seqlens)
    dx, dweights, dbiases = None, [], []
    for dy, w, b, back in zip(dys, weights, biases, reverse, strict=True):
        settings = (None, cu_seqlens, w.shape[1] - 1, back, True)
        dk, dw, *db = torch.ops.scanweave.short_conv_backward(dy, x, w, b, *settings)
        dx = dk if dx is None else dx.add_(dk)
        dweights.append(dw)
        dbiases += db
    assert dx is not None
    return dx, dweights, dbiases


def _given(weights: Sequence[Tensor], biases: Biases) -> list[Tensor | None]:
    """Taps and bias of each direction as kernels read them."""
    return [
        v
        for w, b in zip(weights, biases, strict=True)
        for v in (w.contiguous(), None if b is None else adjacent(b))
    ]


def pair_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Biases, cu_seqlens: Tensor | None
) -> Tensor:
    """Y (2, B, L, D), forward and reverse."""
    batch, tokens, dim = x.shape
    width = weights[0].shape[1]
    y = torch.empty((2, *x.shape), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = adjacent(x)
    grid = grid_of(x, width, FORWARD, width - 1, widest=64)
    with on_device(x):
        conv_pair_kernel[(batch * grid.blocks_l * grid.blocks_d,)](
            x,
            *_given(weights, biases),
            sequences_of(cu_seqlens, tokens),
            y[0],
            y[1],
            tokens,
            dim,
            grid.span,
            grid.blocks_l,
            grid.blocks_d,
            batch_stride(x),
            x.stride(1),
            WIDTH=width,
            HAS_BIAS=biases[0] is not None,
            PACKED=cu_seqlens is not None,
            BLOCK_L=FORWARD.rows,
            BLOCK_D=grid.block_d,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return y


def pair_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Biases,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As `gradients`."""
    batch, tokens, dim = x.shape
    width, has_bias = weights[0].shape[1], biases[0] is not None
    given = [b for b in biases if b is not None]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel() == 0:
        return dx, [w.new_zeros(w.shape) for w in weights], [b.new_zeros(b.shape) for b in given]
    pace = BACKWARD if cu_seqlens is None else PACKED_BACKWARD
    grid = grid_of(x, width, pace, widest=64 if width <= 4 or cu_seqlens is None else 32)
    parts, rows = batch * grid.blocks_l, 2 * (width + has_bias)
    partial = x.new_empty(parts, rows, dim, dtype=torch.float32)
    dweights = [torch.empty(w.shape, dtype=w.dtype, device=x.device) for w in weights]
    dbiases = [torch.empty(dim, dtype=b.dtype, device=x.device) for b in given]
    x, dy, dy_r = adjacent(x), adjacent(dys[0]), adjacent(dys[1])
    with on_device(x):
        conv_pair_backward_kernel[(parts * grid.blocks_d,)](
            x,
            *_given(weights, biases),
            sequences_of(cu_seqlens, tokens),
            dy,
            dy_r,
            dx,
            partial,
            tokens,
            dim,
            grid.span,
            grid.blocks_l,
            grid.blocks_d,
            *(f(v) for v in (x, dy, dy_r) for f in (batch_stride, _token_stride)),
            WIDTH=width,
            HAS_BIAS=has_bias,
            PACKED=cu_seqlens is not None,
            WHOLE=grid.blocks_l == 1,
            BLOCK_L=pace.rows,
            BLOCK_D=grid.block_d,
            num_warps=1,
            enable_fp_fusion=True,
        )
        if parts > MOST_PARTS:
            partial = partial.sum(0, keepdim=True)
        outputs = [v for k in range(2) for v in (dweights[k], dbiases[k] if given else None)]
        conv_pair_sum_kernel[(ceil_div(dim, 32) * rows,)](
            partial,
            *outputs,
            partial.shape[0],
            dim,
            WIDTH=width,
            HAS_BIAS=has_bias,
            BLOCK_P=min(128, power_of_2(partial.shape[0])),
            BLOCK_D=32,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return dx, dweights, dbiases


def _token_stride(v: Tensor) -> int:
    return v.stride(1)
