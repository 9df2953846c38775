"""A Mamba block's parameters as its operator reads them: one launch each way.

    W_in, W_x,k, W_dt,k    rounded to 16 bits under autocast
    W_out                  times a scale, rounded
    A_k = -exp(log_k)      float32

PyTorch takes a launch for every step, and one for each gradient: 11 and 13 for two directions
under autocast, 5 and 5 without, of some microseconds each.

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
    given: Weights, found: Weights, scale: float, rates: Sequence[Tensor] | None, rounds: bool
) -> None:
    """Fill `found`, if it is not rounded only `outer` and A; with `rates` as gradients."""
    ends = [[v[0], v[-1]] for v in (given.x, given.dt, found.x, found.dt, given.A, found.A)]
    x, dt, to_x, to_dt, A, to_A = ends
    of = A if rates is None else [rates[0], rates[-1]]
    sizes = [v.numel() for v in (given.inner, x[0], dt[0], given.outer, A[0])]
    if not rounds:
        sizes[:3] = 0, 0, 0
    tiles = [ceil_div(size, TILE) for size in sizes]
    count = len(given.A)
    programs = tiles[0] + tiles[3] + count * (tiles[1] + tiles[2] + tiles[4])
    with on_device(given.outer):
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


def _nested(flat: Sequence[Tensor], count: int) -> Weights:
    """Of K = `count` directions; without those that are not rounded `outer` stands for them."""
    outer, A = flat[0], list(flat[1 : count + 1])
    if len(flat) == count + 1:
        return Weights(outer, [outer], [outer], outer, A)
    inner, x, dt = flat[count + 1], flat[count + 2 : 2 * count + 2], flat[2 * count + 2 :]
    return Weights(inner, list(x), list(dt), outer, A)


def _flat(weights: Weights, rounds: bool) -> list[Tensor]:
    first = [weights.outer, *weights.A]
    return [*first, weights.inner, *weights.x, *weights.dt] if rounds else first


def _launched(
    flat: Sequence[Tensor], count: int, scale: float, dtype: torch.dtype | None
) -> list[Tensor]:
    found = [torch.empty_like(v, dtype=dtype) for v in flat]
    found[1 : count + 1] = [torch.empty_like(v) for v in flat[1 : count + 1]]
    _launch(_nested(flat, count), _nested(found, count), scale, None, dtype is not None)
    return found


class _Prepared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, scale, dtype, *flat):
        found = _launched(flat, count, scale, dtype)
        ctx.save_for_backward(*found[1 : count + 1])
        ctx.config = (count, scale, dtype is not None)
        ctx.of_outer = flat[0].dtype
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        count, scale, rounds = ctx.config
        given = [v.contiguous() for v in grads]
        found = [torch.empty_like(v, dtype=torch.float32) for v in given]
        found[0] = torch.empty_like(given[0], dtype=ctx.of_outer)
        nested = _nested(given, count), _nested(found, count)
        _launch(*nested, scale, ctx.saved_tensors, rounds)
        needed = zip(found, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(v if wanted else None for v, wanted in needed)


def fits(weights: Weights, dtype: torch.dtype | None) -> bool:
    """Whether `prepared` takes these parameters, to be rounded to `dtype` if that is not None."""
    flat = _flat(weights, dtype is not None)
    wide = flat if dtype is not None else weights.A
    return (
        dtype in (torch.bfloat16, torch.float16, None)
        and len(weights.A) <= 2
        and is_real(flat[0])
        and on_kernels(*flat)
        and all(v.dtype == torch.float32 for v in wide)
        and all(v.is_contiguous() for v in flat)
    )


def prepared(weights: Weights, scale: float, dtype: torch.dtype | None) -> Weights:
    """Round the weights, and make rates of logarithms.

    Args:
        weights: Parameters, `A` being logarithms of rates; see `fits`.
        scale: Factor of `outer`.
        dtype: Of the weights given back, if they are to be rounded; rates stay float32.

    Returns:
        The weights as `mamba_block` takes them.
    """
    flat, count = _flat(weights, dtype is not None), len(weights.A)
    if torch.is_grad_enabled():
        found = _nested(_Prepared.apply(count, scale, dtype, *flat), count)
    else:
        found = _nested(_launched(flat, count, scale, dtype), count)
    return found if dtype is not None else weights._replace(outer=found.outer, A=found.A)
