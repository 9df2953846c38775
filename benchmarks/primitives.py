"""Measured ops beside the selective scans: the linear scan and the norms.

Functions of core are imported when they run: with `--against`, core may be older than they are.

Letters: B batch, L length, D channels.
"""

import torch
from torch import Tensor

from .floor import Work
from .inputs import Draw, Inputs, Op
from .reference import Exact
from .shapes import Shape


def _grads(inputs: Inputs, out: Tensor, dout: Tensor, by: str) -> Exact:
    found = torch.autograd.grad(out, list(inputs.tensors.values()), dout)
    return Exact(out.detach(), dict(zip(inputs.tensors, found, strict=True)), by)


def _make_scan(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    x, gate = (draw(shape.batch, shape.length, shape.dim) for _ in range(2))
    # decays of a gated recurrence: 0.95 in the middle
    log_a = torch.nn.functional.logsigmoid(gate.float() + 3.0).to(dtype)
    tensors = {"x": x.requires_grad_(), "log_a": log_a.requires_grad_()}
    cu_seqlens = None
    if shape.is_packed:
        cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)
    return Inputs(shape, tensors, cu_seqlens)


def _run_scan(inputs: Inputs) -> Tensor:
    from scanweave.core.ops.linear import linear_scan

    t = inputs.tensors
    return linear_scan(t["x"], t["log_a"], cu_seqlens=inputs.cu_seqlens)


def _exact_scan(inputs: Inputs, dout: Tensor) -> Exact:
    """The op in float64, which its tests compare with the definition."""
    return _grads(inputs, _run_scan(inputs), dout, "portable float64")


def _scan_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.length * shape.dim
    moved = elements * dtype.itemsize
    # x, log_a, out; then out, log_a, dout, dx, dlog_a
    return Work(3 * moved, elements), Work(5 * moved, elements)


def _make_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    x, z = (draw(shape.batch, shape.length, shape.dim) for _ in range(2))
    weight = 1 + 0.1 * draw(shape.dim, dtype=torch.float32)
    tensors = {"x": x, "weight": weight, "z": z}
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()})


def _run_norm(inputs: Inputs) -> Tensor:
    from scanweave.core.ops.norm import rms_norm_gated

    t = inputs.tensors
    return rms_norm_gated(t["x"], t["weight"], t["z"])


def _exact_norm(inputs: Inputs, dout: Tensor) -> Exact:
    from scanweave.core.ops.norm import rms_norm_gated_ref

    t = inputs.tensors
    return _grads(inputs, rms_norm_gated_ref(t["x"], t["weight"], t["z"]), dout, "definition")


def _norm_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.length * shape.dim
    moved = elements * dtype.itemsize
    # x, z, out; then x, z, dout, dx, dz; 2 for the gate each
    return Work(3 * moved, 2 * elements), Work(5 * moved, 2 * elements)


def _make_sum_norm(
    shape: Shape, dtype: torch.dtype, device: torch.device, parameters: tuple[str, ...]
) -> Inputs:
    draw = Draw(dtype, device)
    size = (shape.batch, shape.length, shape.dim)
    # a residual stream keeps float32 where its branches have 16 bits
    tensors = {"x": draw(*size, dtype=torch.float32), "branch": draw(*size)}
    tensors |= {k: 1 + 0.1 * draw(shape.dim, dtype=torch.float32) for k in parameters}
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()})


def _make_layer_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _make_sum_norm(shape, dtype, device, ("weight", "bias"))


def _make_rms_norm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _make_sum_norm(shape, dtype, device, ("weight",))


def _run_layer_norm(inputs: Inputs) -> Tensor:
    from scanweave.core.ops.norm.layer import add_layer_norm_cast

    t = inputs.tensors
    values = (t["x"], t["branch"], t["weight"], t["bias"])
    return add_layer_norm_cast(*values, 1e-5, t["branch"].dtype)[1]


def _exact_layer_norm(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_layer_norm(inputs), dout, "PyTorch float64")


def _run_rms_norm(inputs: Inputs) -> Tensor:
    from scanweave.core.ops.norm.cast import add_rms_norm_cast

    t = inputs.tensors
    return add_rms_norm_cast(t["x"], t["branch"], t["weight"], 1e-5, t["branch"].dtype)[1]


def _exact_rms_norm(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_rms_norm(inputs), dout, "PyTorch float64")


def _sum_norm_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.length * shape.dim
    # x and the sum in float32, branch, norm; then the sum, dnorm, dx, dbranch
    moved = elements * (2 * 4 + 2 * dtype.itemsize)
    return Work(moved, 0), Work(moved, 0)


LINEAR_SCAN = Op("linear_scan", _make_scan, _run_scan, _exact_scan, _scan_work)
NORM = Op("rms_norm_gated", _make_norm, _run_norm, _exact_norm, _norm_work)
LAYER_NORM = Op("layer_norm", _make_layer_norm, _run_layer_norm, _exact_layer_norm, _sum_norm_work)
RMS_NORM = Op("rms_norm", _make_rms_norm, _run_rms_norm, _exact_rms_norm, _sum_norm_work)
