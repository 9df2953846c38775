"""Single steps of the short convolution and of the matrix-state scan, as they are measured.

`ops.py` has the selective scan's. Functions of core are imported when they run: with `--against`,
core may be older than they are.

Letters: B batch, D channels, W taps, H heads, K keys, V values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .floor import Work
from .inputs import Draw, Inputs, Op
from .reference import Exact
from .shapes import Shape


def _make_conv(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    tensors = {
        "x": draw(shape.batch, shape.dim),
        "weight": draw(shape.dim, shape.width, dtype=torch.float32),
        "bias": draw(shape.dim, dtype=torch.float32),
    }
    return Inputs(shape, tensors, state=draw(shape.batch, shape.width - 1, shape.dim))


def _run_conv(inputs: Inputs) -> Tensor:
    from scanweave.core import causal_conv1d_step

    assert inputs.state is not None
    t = inputs.tensors
    return causal_conv1d_step(t["x"], inputs.state, t["weight"], t["bias"], "silu")


def _exact_conv(inputs: Inputs, dout: Tensor) -> Exact:
    assert inputs.state is not None
    t = inputs.tensors
    window = torch.cat([inputs.state, t["x"].unsqueeze(1)], 1)
    out = F.silu(torch.einsum("bwd,dw->bd", window, t["weight"]) + t["bias"])
    return Exact(out, {"state": window[:, 1:]}, "definition")


def _conv_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    elements = shape.batch * shape.dim
    # x, out, the state read and written; taps and bias
    moved = elements * 2 * shape.width * dtype.itemsize + 4 * shape.dim * (shape.width + 1)
    return Work(moved, 2 * elements), Work(0, 0)


def _make_gated(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """One group of q and k for all heads, a decay and a write factor of each, as in Mamba-2."""
    draw, heads = Draw(dtype, device), shape.dim // shape.head
    of_heads = (shape.batch, heads)
    tensors = {
        "q": draw(shape.batch, 1, shape.state),
        "k": draw(shape.batch, 1, shape.state),
        "v": draw(*of_heads, shape.head),
        "g": -draw(*of_heads, dtype=torch.float32).abs(),
        "write": draw(*of_heads, dtype=torch.float32),
        "skip": draw(*of_heads, dtype=torch.float32),
    }
    state = draw(*of_heads, shape.state, shape.head, dtype=torch.float32)
    return Inputs(shape, tensors, state=state)


def _run_gated(inputs: Inputs) -> Tensor:
    from scanweave.core import gated_linear_scan_step

    assert inputs.state is not None
    t = inputs.tensors
    return gated_linear_scan_step(
        inputs.state, *(t[name] for name in ("q", "k", "v", "g", "write", "skip"))
    )


def _exact_gated(inputs: Inputs, dout: Tensor) -> Exact:
    assert inputs.state is not None
    t = inputs.tensors
    written = (t["write"][..., None] * t["v"]).unsqueeze(-2)
    after = t["g"].exp()[..., None, None] * inputs.state + t["k"].unsqueeze(-1) * written
    out = (t["q"].unsqueeze(-1) * after).sum(-2) + t["skip"][..., None] * t["v"]
    return Exact(out, {"state": after}, "definition")


def _gated_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    heads = shape.batch * shape.dim // shape.head
    # the state read and written in float32; v, out; q, k; three numbers a head
    moved = heads * (8 * shape.state * shape.head + 2 * shape.head * dtype.itemsize + 12)
    return Work(moved + 2 * shape.batch * shape.state * dtype.itemsize, heads), Work(0, 0)


STEP_OPS = (
    Op(
        "causal_conv1d_step",
        *(_make_conv, _run_conv, _exact_conv, _conv_work),
        backward=False,
    ),
    Op(
        "gated_linear_scan_step",
        *(_make_gated, _run_gated, _exact_gated, _gated_work),
        backward=False,
    ),
)
