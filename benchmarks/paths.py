"""The scan along paths, as VMamba's SS2D: four orders of a grid, no gate.

Functions of core are looked up when they run: with `--against`, core may be older than they are.

Letters: B batch, L length, D channels, N state, K directions, T = B L tokens.
"""

import torch
from torch import Tensor

import scanweave.core

from .floor import Work
from .inputs import Draw, Inputs, Op, direction
from .reference import Exact, scan_gradients
from .shapes import Shape

DIRECTIONS = 4


def along(v: Tensor, paths: Tensor) -> Tensor:
    """(B, L, K, ...) in the order of the tokens -> the same in the order of every path."""
    return torch.stack([v[:, path, k] for k, path in enumerate(paths.long())], 2)


def natural(v: Tensor, paths: Tensor) -> Tensor:
    """Back from the order of every path to that of the tokens."""
    return along(v, paths.argsort(1))


def spread(v: Tensor, paths: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, K, D), in the order of every path."""
    return torch.stack([v[:, path] for path in paths.long()], 2)


def _make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    draw = Draw(dtype, device)
    found = [direction(draw, shape, "") for _ in range(DIRECTIONS)]
    tensors = {"x": found[0]["x"]}
    for name in ("dt", "A", "B", "C", "D", "dt_bias"):
        # the directions come after the tokens, or first where there are no tokens
        axis = 2 if name in ("dt", "B", "C") else 0
        tensors[name] = torch.stack([one[name] for one in found], axis)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    return Inputs(shape, leaves, paths=scanweave.core.grid_paths(*shape.grid, device=device))


def _run(inputs: Inputs) -> Tensor:
    assert inputs.paths is not None
    t = inputs.tensors
    x, dt, A, B, C, D = (t[name] for name in ("x", "dt", "A", "B", "C", "D"))
    return scanweave.core.path_selective_scan(
        x, dt, A, B, C, D, dt_bias=t["dt_bias"], paths=inputs.paths
    )


def _exact(inputs: Inputs, dout: Tensor) -> Exact:
    """One scan of K D channels in K groups, on permuted copies."""
    assert inputs.paths is not None
    t, paths = inputs.tensors, inputs.paths
    folded = {"x": spread(t["x"], paths).flatten(2), "dt": along(t["dt"], paths).flatten(2)}
    folded |= {name: along(t[name], paths) for name in ("B", "C")}
    folded |= {name: t[name].flatten(0, 1) for name in ("A", "D", "dt_bias")}
    found = scan_gradients(folded, spread(dout, paths).flatten(2), None, ("",))
    sizes = (len(paths), t["x"].shape[2])
    grads = {name: natural(found.grads[name], paths) for name in ("B", "C")}
    grads["dt"] = natural(found.grads["dt"].unflatten(2, sizes), paths)
    grads["x"] = natural(found.grads["x"].unflatten(2, sizes), paths).sum(2)
    grads |= {name: found.grads[name].unflatten(0, sizes) for name in ("A", "D", "dt_bias")}
    out = natural(found.out.unflatten(2, sizes), paths).sum(2)
    return Exact(out, {name: grads[name] for name in t}, found.by)


def _work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    size, count = dtype.itemsize, DIRECTIONS
    tokens = shape.batch * shape.length
    elements, rows = tokens * shape.dim, tokens * shape.state
    weights = 4 * shape.dim * (shape.state + 2) * count
    # a direction: dt, B, C; once: x, out. Backward also their gradients, and dout for out
    forward = size * (elements * (count + 2) + 2 * rows * count) + weights
    backward = size * (elements * (2 * count + 3) + 4 * rows * count) + 2 * weights
    # as in a scan of one direction, times the directions
    return (
        Work(forward, elements * count * (shape.state + 2)),
        Work(backward, elements * count * (2 * shape.state + 4)),
    )


PATH_SCAN = Op("path_selective_scan", _make, _run, _exact, _work)
