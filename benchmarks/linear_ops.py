"""Measured ops on the diagonal recurrence: complex and constant decays, RWKV-4, long convolutions.

`primitives.py` has the real scan with decays of every step. Functions of core are imported when
they run: with `--against`, core may be older than they are.

Letters: B batch, L length, D channels, N state.
"""

import torch
from torch import Tensor

from .floor import Work
from .inputs import Draw, Inputs, Op
from .reference import Exact
from .shapes import Shape


def _grads(inputs: Inputs, out: Tensor, dout: Tensor) -> Exact:
    """The op in float64, which its tests compare with the definition."""
    found = torch.autograd.grad(out, list(inputs.tensors.values()), dout)
    return Exact(out.detach(), dict(zip(inputs.tensors, found, strict=True)), "portable float64")


def _leaves(shape: Shape, tensors: dict[str, Tensor], device: torch.device) -> Inputs:
    cu_seqlens = None
    if shape.is_packed:
        cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()}, cu_seqlens)


def _log_decays(draw: Draw, *size: int) -> Tensor:
    """Memories of 10 to 100 steps, float32."""
    uniform = torch.rand(*size, generator=draw.rng, device=draw.device)
    return -torch.exp(uniform * 2.3 - 4.6)


def _make_constant(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    x = draw(shape.batch, shape.length, shape.dim)
    return _leaves(shape, {"x": x, "log_a": _log_decays(draw, shape.dim)}, device)


def _run_constant(inputs: Inputs) -> Tensor:
    from scanweave.core import linear_scan

    t = inputs.tensors
    return linear_scan(t["x"], t["log_a"], cu_seqlens=inputs.cu_seqlens)


def _constant_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    moved = shape.batch * shape.length * shape.dim * dtype.itemsize
    # x, out; then x, dout, dx
    return Work(2 * moved, shape.dim), Work(3 * moved, shape.dim)


def _make_average(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    k, v = (draw(shape.batch, shape.length, shape.dim) for _ in range(2))
    decays = _log_decays(draw, shape.dim)
    bonus = draw(shape.dim, dtype=torch.float32)
    return _leaves(shape, {"k": k, "v": v, "log_decay": decays, "bonus": bonus}, device)


def _run_average(inputs: Inputs) -> Tensor:
    from scanweave.core import wkv

    t = inputs.tensors
    return wkv(t["k"], t["v"], t["log_decay"], t["bonus"], cu_seqlens=inputs.cu_seqlens)


def _average_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.length * shape.dim
    moved = elements * dtype.itemsize
    # k, v, out; then k, v, dout, dk, dv. A token: 4 exponentials, and 4 more for its gradients
    return Work(3 * moved, 4 * elements), Work(5 * moved, 8 * elements)


def _make_conv(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    x = draw(shape.batch, shape.length, shape.dim)
    steps = torch.arange(shape.length, device=device)
    fading = torch.exp(_log_decays(draw, shape.dim, 1) * steps)
    kernel = draw(shape.dim, shape.length, dtype=torch.float32) * fading
    return _leaves(shape, {"x": x, "kernel": kernel.detach()}, device)


def _run_conv(inputs: Inputs) -> Tensor:
    from scanweave.core import fft_conv

    return fft_conv(inputs.tensors["x"], inputs.tensors["kernel"])


def _conv_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    moved = shape.batch * shape.length * shape.dim * dtype.itemsize
    kernel = 4 * shape.dim * shape.length
    return Work(2 * moved + kernel, 0), Work(3 * moved + 2 * kernel, 0)


def _exact_constant(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_constant(inputs), dout)


def _exact_average(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_average(inputs), dout)


def _exact_conv(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_conv(inputs), dout)


LINEAR_OPS: tuple[Op, ...] = (
    Op("linear_scan_constant", _make_constant, _run_constant, _exact_constant, _constant_work),
    Op("wkv", _make_average, _run_average, _exact_average, _average_work),
    Op("fft_conv", _make_conv, _run_conv, _exact_conv, _conv_work),
)
