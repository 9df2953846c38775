"""Both directions of the short convolution in one launch, as a block of Vim runs them.

One direction alone is `causal_conv1d` at the same shape. Functions of core are imported when they
run: with `--against`, core may be older than they are.

Letters: B batch, L length, D channels, W taps.
"""

from typing import Any

import torch
from torch import Tensor

from .floor import Work
from .inputs import BACK, Draw, Inputs, Op
from .reference import Exact
from .shapes import Shape

_REVERSE = [False, True]
_WEIGHTS = ("weight", "weight" + BACK, "bias", "bias" + BACK)


class _Both(torch.autograd.Function):
    """Outputs (2, B, L, D) from x, taps and biases of both directions."""

    @staticmethod
    def forward(ctx: Any, cu_seqlens: Tensor | None, x: Tensor, *weights: Tensor) -> Tensor:
        from scanweave.core.ops.conv import pair

        given = (x, weights[:2], weights[2:])
        ctx.save_for_backward(cu_seqlens, x, *weights)
        if pair.takes(*given, _REVERSE):
            return pair.pair_forward(*given, cu_seqlens)
        return torch.stack(pair.convolve(*given, cu_seqlens, _REVERSE))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from scanweave.core.ops.conv import pair

        cu_seqlens, x, *weights = ctx.saved_tensors
        given = (x, weights[:2], weights[2:])
        dx, dtaps, dbiases = pair.gradients(dout.unbind(0), *given, cu_seqlens, _REVERSE)
        return None, dx, *dtaps, *dbiases


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    tensors = {"x": draw(shape.batch, shape.length, shape.dim)}
    for name in _WEIGHTS:
        size = (shape.dim, shape.width) if name.startswith("weight") else (shape.dim,)
        tensors[name] = draw(*size, dtype=torch.float32)
    cu_seqlens = None
    if shape.is_packed:
        cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()}, cu_seqlens)


def _run(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    return _Both.apply(inputs.cu_seqlens, t["x"], *(t[name] for name in _WEIGHTS))


def _exact(inputs: Inputs, dout: Tensor) -> Exact:
    from scanweave.core.ops.conv import causal_conv1d_ref

    t, cu_seqlens = inputs.tensors, inputs.cu_seqlens
    outputs = []
    for end, reverse in (("", False), (BACK, True)):
        given = (t["x"], t["weight" + end], t["bias" + end], "silu")
        outputs.append(causal_conv1d_ref(*given, reverse=reverse, cu_seqlens=cu_seqlens))
    out = torch.stack(outputs)
    grads = torch.autograd.grad(out, list(t.values()), dout)
    return Exact(out.detach(), dict(zip(t, grads, strict=True)), "definition")


def _work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.length * shape.dim
    weights = 2 * 4 * shape.dim * (shape.width + 1)
    size = dtype.itemsize
    # forward: x, two outputs; backward: x, two gradients of outputs, dx; 2 for each SiLU
    return (
        Work(3 * size * elements + weights, 4 * elements),
        Work(4 * size * elements + 2 * weights, 4 * elements),
    )


PAIR_CONV = Op("bidirectional_conv", _make, _run, _exact, _work, outputs=2)
