"""Rotation of channel pairs as a torch operator. Equations: `reference.py`.

One call turns one tensor, or queries and keys by the same angles. Why registered this way:
`selective/op.py`.

Letters: B batch, L length, H heads, P channels, R pairs that turn.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_tensor, on_kernels
from ..inputs import told_apart
from . import kernels, portable

# the most pairs that a program of the kernel holds
MAX_KERNEL_PAIRS = 4096

_lib = torch.library.Library("scanweave", "FRAGMENT")
_lib.define("rotate_pairs(Tensor[] x, Tensor angles, bool halves) -> Tensor[]")
_lib.define(
    "rotate_pairs_backward(Tensor[] dout, Tensor[] x, Tensor angles, bool halves, bool slopes) "
    "-> Tensor[]"
)
_forward_op = torch.ops.scanweave.rotate_pairs.default
_backward_op = torch.ops.scanweave.rotate_pairs_backward.default


def _fused(x: list[Tensor], angles: Tensor) -> bool:
    return on_kernels(*x, angles) and angles.shape[-1] <= MAX_KERNEL_PAIRS


def _forward(x: list[Tensor], angles: Tensor, halves: bool) -> list[Tensor]:
    path = kernels if _fused(x, angles) else portable
    return path.forward(x, angles, halves)


def _backward(
    dout: list[Tensor], x: list[Tensor], angles: Tensor, halves: bool, slopes: bool
) -> list[Tensor]:
    path = kernels if _fused([*dout, *x], angles) else portable
    grads, dangles = path.backward(dout, x, angles, halves, slopes)
    return grads if dangles is None else [*grads, dangles]


for _device in ("CPU", "CUDA"):
    _lib.impl("rotate_pairs", _forward, _device)
    _lib.impl("rotate_pairs_backward", _backward, _device)


@torch.library.register_fake("scanweave::rotate_pairs", lib=_lib)
def _(x: list[Tensor], angles: Tensor, halves: bool) -> list[Tensor]:
    return [u.new_empty(u.shape) for u in x]


@torch.library.register_fake("scanweave::rotate_pairs_backward", lib=_lib)
def _(
    dout: list[Tensor], x: list[Tensor], angles: Tensor, halves: bool, slopes: bool
) -> list[Tensor]:
    return [u.new_empty(u.shape) for u in ([*x, angles] if slopes else x)]


class _RotatePairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, halves, angles, *x):
        ctx.save_for_backward(angles, *x)
        ctx.halves = halves
        return tuple(_forward_op(list(x), angles, halves))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dout):  # pyright: ignore[reportIncompatibleMethodOverride]
        angles, *x = ctx.saved_tensors
        slopes = ctx.needs_input_grad[1]
        grads = list(_backward_op(list(dout), x, angles, ctx.halves, slopes))
        dangles = grads.pop() if slopes else None
        return None, dangles, *grads


@torch.library.impl(_lib, "rotate_pairs", "Autograd")
def _(x: list[Tensor], angles: Tensor, halves: bool) -> list[Tensor]:
    if torch.is_grad_enabled() and any(v.requires_grad for v in (*x, angles)):
        return list(_RotatePairs.apply(halves, angles, *x))
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(x, angles, halves)


def _check(name: str, x: Tensor, like: Tensor, angles: Tensor, halves: bool) -> None:
    """Raise unless `angles` fit `x`, whose device `like` has."""
    if not isinstance(x, Tensor) or not 1 <= x.ndim <= 4:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be (P,), (H, P), (L, H, P) or (B, L, H, P), got {got}")
    check_tensor(name, x, tuple(x.shape), like, "(..., P)")
    if not isinstance(angles, Tensor) or angles.ndim < 1:
        got = tuple(angles.shape) if isinstance(angles, Tensor) else type(angles).__name__
        raise ValueError(f"angles must be (..., R), got {got}")
    check_tensor("angles", angles, tuple(angles.shape), like, "(..., R)")
    dim, count = x.shape[-1], angles.shape[-1]
    if not halves and dim % 2:
        raise ValueError(f"{name} must have an even number of channels, got {dim}")
    if not 1 <= count <= dim // 2:
        raise ValueError(f"angles must turn 1 to {dim // 2} pairs of channels, got {count}")
    lead = x.shape[:-1]
    own = angles.shape[:-1]
    if len(own) > len(lead) or any(
        a not in (1, n) for a, n in zip(reversed(own), reversed(lead), strict=False)
    ):
        raise ValueError(
            f"angles must broadcast to {name} {tuple(x.shape)} but for the last axis, "
            f"got {tuple(angles.shape)}"
        )


def rotate_pairs(x: Tensor, angles: Tensor, *, halves: bool = False) -> Tensor:
    """Turn the first R pairs of channels: (x1, x2) <- (x1 + i x2) exp(i angle).

    Both inputs have gradients. Computed in float32 (float64 if an input is); negated angles turn
    back. Tensors are read where they are, whatever their strides.

    Args:
        x: Inputs, (..., P) of at most 4 axes.
        angles: In radians, (..., R) with R up to P / 2, broadcast along the other axes; float32
            whatever x is, as 16 bits leave no angle above 256.
        halves: Channels j and j + R are a pair, as in rotary positions of most language models;
            2 j and 2 j + 1 otherwise.

    Returns:
        As x, contiguous; channels from 2 R on as they were.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Su et al. 2021, arXiv 2104.09864, section 3.4.2.
    """
    _check("x", x, x, angles, halves)
    return _RotatePairs.apply(halves, *told_apart((angles, x)))[0]


def rotate_both(
    q: Tensor, k: Tensor, angles: Tensor, *, halves: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by the same angles, in one pass on a GPU.

    Every input has a gradient. See `rotate_pairs`.

    Args:
        q: Queries, (..., H, P) of at most 4 axes.
        k: Keys, (..., G, P); G is H, or angles have one head.
        angles: In radians, (..., R), broadcast.
        halves: As in `rotate_pairs`.

    Returns:
        As q and as k, contiguous.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check("q", q, q, angles, halves)
    _check("k", k, q, angles, halves)
    if (*k.shape[:-2], k.shape[-1]) != (*q.shape[:-2], q.shape[-1]):
        raise ValueError(
            f"k must match q but for its heads, got {tuple(k.shape)}, q is {tuple(q.shape)}"
        )
    q, k = _RotatePairs.apply(halves, *told_apart((angles, q, k)))
    return q, k
