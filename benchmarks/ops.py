"""The registry of measured ops: how to make inputs, run, differentiate exactly, and count work.

Letters: B batch, L length, D channels, N state, W taps, T = B L tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scanweave.core import (
    bidirectional_selective_scan,
    causal_conv1d,
    create_mixer,
    selective_scan,
    selective_scan_step,
)
from scanweave.core.ops.conv import causal_conv1d_ref

from .conv_ops import PAIR_CONV
from .floor import Work
from .gated_ops import GATED_OPS
from .inputs import BACK, WEIGHTS, Draw, Inputs, Op, direction
from .linear_ops import LINEAR_OPS
from .paths import PATH_SCAN
from .primitives import LAYER_NORM, LINEAR_SCAN, NORM, RMS_NORM
from .reference import Exact, scan_gradients, scan_step
from .shapes import Shape
from .step_ops import STEP_OPS


def _scan_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, suffixes: tuple[str, ...]
) -> Inputs:
    draw = Draw(dtype, device)
    tensors: dict[str, Tensor] = {}
    for suffix in suffixes:
        tensors |= direction(draw, shape, suffix)
    if shape.gate:
        tensors["z"] = draw(shape.batch, shape.length, shape.dim)
    cu_seqlens = None
    if shape.is_packed:
        cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()}, cu_seqlens)


def _make_scan(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _scan_inputs(shape, dtype, device, ("",))


def _run_scan(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    x, dt, A, B, C, D = (t[name] for name in ("x", "dt", "A", "B", "C", "D"))
    return selective_scan(x, dt, A, B, C, D, t.get("z"), t["dt_bias"], cu_seqlens=inputs.cu_seqlens)


def _exact_scan(inputs: Inputs, dout: Tensor) -> Exact:
    return scan_gradients(inputs.tensors, dout, inputs.cu_seqlens, ("",))


def _make_pair(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _scan_inputs(shape, dtype, device, ("", BACK))


def _run_pair(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    x, dt, A, B, C, D, dt_bias = (
        (t[name], t[name + BACK]) for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")
    )
    return bidirectional_selective_scan(
        x, dt, A, B, C, D, t.get("z"), dt_bias, cu_seqlens=inputs.cu_seqlens
    )


def _exact_pair(inputs: Inputs, dout: Tensor) -> Exact:
    return scan_gradients(inputs.tensors, dout, inputs.cu_seqlens, ("", BACK))


def _scan_work(directions: int) -> Callable[[Shape, torch.dtype], tuple[Work, Work]]:
    """Every tensor read or written once; see `floor.py` for the rates."""

    def work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
        size, gate = dtype.itemsize, int(shape.gate)
        tokens = shape.batch * shape.length
        elements, rows = tokens * shape.dim, tokens * shape.state
        # A and its gradient, float32
        weights = 4 * shape.dim * (shape.state + 2) * directions
        forward = Work(
            # a direction: x, dt, B, C; once: out, z
            size * (elements * (2 * directions + 1 + gate) + 2 * rows * directions) + weights,
            # N decays and 2 for the softplus a direction, 2 for the gate
            elements * ((shape.state + 2) * directions + 2 * gate),
        )
        backward = Work(
            # a direction: x, dt, B, C and their gradients; once: dout, and z, y, dz
            size * (elements * (4 * directions + 1 + 3 * gate) + 4 * rows * directions)
            + 2 * weights,
            # decays once for the states and once for their gradients: none is kept
            elements * ((2 * shape.state + 4) * directions + 2 * gate),
        )
        return forward, backward

    return work


def _make_conv(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    tensors = {
        "x": draw(shape.batch, shape.length, shape.dim),
        "weight": draw(shape.dim, shape.width, dtype=torch.float32),
        "bias": draw(shape.dim, dtype=torch.float32),
    }
    cu_seqlens = None
    if shape.is_packed:
        cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()}, cu_seqlens)


def _run_conv(inputs: Inputs) -> Tensor:
    t = inputs.tensors
    return causal_conv1d(t["x"], t["weight"], t["bias"], "silu", cu_seqlens=inputs.cu_seqlens)


def _exact_conv(inputs: Inputs, dout: Tensor) -> Exact:
    t = inputs.tensors
    out = causal_conv1d_ref(t["x"], t["weight"], t["bias"], "silu", cu_seqlens=inputs.cu_seqlens)
    grads = torch.autograd.grad(out, list(inputs.tensors.values()), dout)
    return Exact(out.detach(), dict(zip(inputs.tensors, grads, strict=True)), "definition")


def _conv_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.length * shape.dim
    weights = 4 * shape.dim * (shape.width + 1)
    size = dtype.itemsize
    # forward: x, out; backward: x, dout, dx; 2 for the SiLU each
    return (
        Work(2 * size * elements + weights, 2 * elements),
        Work(3 * size * elements + 2 * weights, 2 * elements),
    )


def _make_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    tensors = direction(draw, shape, "") | {"z": draw(shape.batch, 1, shape.dim)}
    tensors = {k: v if k in WEIGHTS else v.squeeze(1) for k, v in tensors.items()}
    state = draw(shape.batch, shape.dim, shape.state, dtype=torch.float32)
    return Inputs(shape, tensors, state=state)


def _run_step(inputs: Inputs) -> Tensor:
    assert inputs.state is not None
    t = inputs.tensors
    x, dt, A, B, C, D = (t[name] for name in ("x", "dt", "A", "B", "C", "D"))
    return selective_scan_step(inputs.state, x, dt, A, B, C, D, t["z"], t["dt_bias"])


def _exact_step(inputs: Inputs, dout: Tensor) -> Exact:
    assert inputs.state is not None
    return scan_step(inputs.tensors, inputs.state)


def _step_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.dim
    # state read and written in float32; x, dt, z, out; A, D, dt_bias
    moved = elements * (8 * shape.state + 4 * dtype.itemsize) + 4 * shape.dim * (shape.state + 2)
    return Work(moved, elements * (shape.state + 4)), Work(0, 0)


def _make_mixer(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    torch.manual_seed(0)
    module = create_mixer(shape.mixer, shape.dim, device=device, dtype=dtype)
    x = Draw(dtype, device)(shape.batch, shape.length, shape.dim).requires_grad_()
    return Inputs(shape, {"x": x} | dict(module.named_parameters()), module=module)


def _run_mixer(inputs: Inputs) -> Tensor:
    assert inputs.module is not None
    return inputs.module(inputs.tensors["x"])


def _exact_mixer(inputs: Inputs, dout: Tensor) -> Exact:
    """The same block with float64 parameters: on a GPU that takes another path than float32."""
    out = _run_mixer(inputs)
    grads = torch.autograd.grad(out, list(inputs.tensors.values()), dout)
    return Exact(out.detach(), dict(zip(inputs.tensors, grads, strict=True)), "float64 block")


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("selective_scan", _make_scan, _run_scan, _exact_scan, _scan_work(1)),
        Op(
            "bidirectional_selective_scan",
            *(_make_pair, _run_pair, _exact_pair, _scan_work(2)),
            directions=2,
        ),
        PATH_SCAN,
        Op("causal_conv1d", _make_conv, _run_conv, _exact_conv, _conv_work),
        PAIR_CONV,
        Op(
            "selective_scan_step",
            *(_make_step, _run_step, _exact_step, _step_work),
            backward=False,
        ),
        *STEP_OPS,
        *GATED_OPS,
        LINEAR_SCAN,
        *LINEAR_OPS,
        NORM,
        LAYER_NORM,
        RMS_NORM,
        Op("mixer", _make_mixer, _run_mixer, _exact_mixer, None),
    )
}
