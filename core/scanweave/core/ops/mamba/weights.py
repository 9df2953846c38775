"""A Mamba block's parameters as its operator reads them under autocast: one launch each way.

    W_in, W_x,k, W_dt,k    rounded to 16 bits
    W_out                  times a scale, rounded
    A_k = -exp(log_k)      float32

PyTorch takes a launch for every one of them, and one more for each gradient: 11 and 13 for two
directions, of some microseconds each.

Letters: D model channels, E inner channels, N state, R rank of dt, K directions, 1 or 2.
"""

# Triton's launch options
# pyright: reportCallIssue=false, reportArgumentType=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import is_real, on_kernels
from ..launch import LOG2_E, ceil_div, on_device

# elements of a program
TILE = 2048


class Weights(NamedTuple):
    """What `prepared` gives, or the gradients of that."""

    inner: Tensor  # (2 E, D)
    x: list[Tensor]  # (R + 2 N, E) each
    dt: list[Tensor]  # (E, R) each
    outer: Tensor  # (D, E)
    A: list[Tensor]  # (E, N) each


@triton.jit
def _convert(from_ptr, to_ptr, of_ptr, tile, size, scale, RATE: tl.constexpr, TILE: tl.constexpr):
    """A tile of a tensor times `scale`; of a rate -exp(v), or times the rate `of_ptr`."""
    at = tile * TILE + tl.arange(0, TILE)
    mask = at < size
    v = tl.load(from_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RATE == "rate":
        v = -tl.exp2(v * LOG2_E)
    elif RATE == "gradient":
        v *= tl.load(of_ptr + at, mask=mask, other=0.0)
    else:
        v *= scale
    tl.store(to_ptr + at, v.to(to_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weights_kernel(
    in_ptr,
    x0_ptr,
    x1_ptr,
    dt0_ptr,
    dt1_ptr,
    out_ptr,
    A0_ptr,
    A1_ptr,
    to_in_ptr,
    to_x0_ptr,
    to_x1_ptr,
    to_dt0_ptr,
    to_dt1_ptr,
    to_out_ptr,
    to_A0_ptr,
    to_A1_ptr,
    rate0_ptr,
    rate1_ptr,
    size_in,
    size_x,
    size_dt,
    size_out,
    size_A,
    scale,
    RATE: tl.constexpr,  # "rate", or of rates "gradient"
    DIRECTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tiles of W_in, then of W_out, and of W_x, W_dt and A of one direction after the other."""
    pid = tl.program_id(0)
    of_out = tl.cdiv(size_in, TILE)
    of_x = of_out + tl.cdiv(size_out, TILE)
    tiles_x = tl.cdiv(size_x, TILE)
    tiles_dt = tl.cdiv(size_dt, TILE)
    each = tiles_x + tiles_dt + tl.cdiv(size_A, TILE)
    if pid < of_out:
        _convert(in_ptr, to_in_ptr, in_ptr, pid, size_in, 1.0, "", TILE)
    elif pid < of_x:
        _convert(out_ptr, to_out_ptr, out_ptr, pid - of_out, size_out, scale, "", TILE)
    elif pid < of_x + each:
        at = pid - of_x
        if at < tiles_x:
            _convert(x0_ptr, to_x0_ptr, x0_ptr, at, size_x, 1.0, "", TILE)
        elif at < tiles_x + tiles_dt:
            _convert(dt0_ptr, to_dt0_ptr, dt0_ptr, at - tiles_x, size_dt, 1.0, "", TILE)
        else:
            at -= tiles_x + tiles_dt
            _convert(A0_ptr, to_A0_ptr, rate0_ptr, at, size_A, 1.0, RATE, TILE)
    elif DIRECTIONS == 2:
        at = pid - of_x - each
        if at < tiles_x:
            _convert(x1_ptr, to_x1_ptr, x1_ptr, at, size_x, 1.0, "", TILE)
        elif at < tiles_x + tiles_dt:
            _convert(dt1_ptr, to_dt1_ptr, dt1_ptr, at - tiles_x, size_dt, 1.0, "", TILE)
        else:
            at -= tiles_x + tiles_dt
            _convert(A1_ptr, to_A1_ptr, rate1_ptr, at, size_A, 1.0, RATE, TILE)


def _launch(
    given: Weights, found: Weights, scale: float, rates: Sequence[Tensor] | None
) -> Weights:
    """Fill `found`; with `rates` as gradients."""
    ends = [[v[0], v[-1]] for v in (given.x, given.dt, found.x, found.dt, given.A, found.A)]
    x, dt, to_x, to_dt, A, to_A = ends
    of = A if rates is None else [rates[0], rates[-1]]
    sizes = [v.numel() for v in (given.inner, x[0], dt[0], given.outer, A[0])]
    tiles = [ceil_div(size, TILE) for size in sizes]
    count = len(given.x)
    programs = tiles[0] + tiles[3] + count * (tiles[1] + tiles[2] + tiles[4])
    with on_device(given.inner):
        weights_kernel[(programs,)](
            given.inner,
            *x,
            *dt,
            given.outer,
            *A,
            found.inner,
            *to_x,
            *to_dt,
            found.outer,
            *to_A,
            *of,
            *sizes,
            scale,
            RATE="rate" if rates is None else "gradient",
            DIRECTIONS=count,
            TILE=TILE,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return found


def _nested(flat: Sequence[Tensor]) -> Weights:
    """Two single tensors and three lists, from tensors in the order of `_flat`."""
    count = (len(flat) - 2) // 3
    lists = [list(flat[start : start + count]) for start in range(2, len(flat), count)]
    return Weights(flat[0], lists[0], lists[1], flat[1], lists[2])


def _flat(weights: Weights) -> list[Tensor]:
    return [weights.inner, weights.outer, *weights.x, *weights.dt, *weights.A]


def _launched(flat: Sequence[Tensor], scale: float, dtype: torch.dtype) -> list[Tensor]:
    given = _nested(flat)
    few = len(flat) - len(given.A)
    found = [torch.empty_like(v, dtype=dtype) for v in flat[:few]]
    found += [torch.empty_like(v) for v in given.A]
    _launch(given, _nested(found), scale, None)
    return found


class _Prepared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, dtype, *flat):
        found = _launched(flat, scale, dtype)
        ctx.save_for_backward(*_nested(found).A)
        ctx.scale = scale
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        given = [v.contiguous() for v in grads]
        found = [torch.empty_like(v, dtype=torch.float32) for v in given]
        _launch(_nested(given), _nested(found), ctx.scale, ctx.saved_tensors)
        needed = ctx.needs_input_grad[2:]
        return None, None, *(v if wanted else None for v, wanted in zip(found, needed, strict=True))


def fits(weights: Weights, dtype: torch.dtype | None) -> bool:
    """Whether `prepared` takes these parameters, to be rounded to `dtype` if that is not None."""
    flat = _flat(weights)
    return (
        dtype in (torch.bfloat16, torch.float16)
        and len(weights.x) <= 2
        and is_real(flat[0])
        and on_kernels(*flat)
        and all(v.dtype == torch.float32 and v.is_contiguous() for v in flat)
    )


def prepared(weights: Weights, scale: float, dtype: torch.dtype) -> Weights:
    """Round the weights, and make rates of logarithms.

    Args:
        weights: Parameters, float32, `A` being logarithms of rates; see `fits`.
        scale: Factor of `outer`.
        dtype: Of the weights given back; rates stay float32.

    Returns:
        The weights as `mamba_block` takes them.
    """
    flat = _flat(weights)
    if torch.is_grad_enabled():
        return _nested(_Prepared.apply(scale, dtype, *flat))
    return _nested(_launched(flat, scale, dtype))
