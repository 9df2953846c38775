"""Outputs and gradients in float64, by the definition of the scan and autograd where it can be.

The definition is a loop over time. Its graph is cut into segments, from whose states it restarts,
so memory and time are linear in the length. Where there are more steps than MAX_STEPS the loop
takes minutes; there the portable PyTorch op in float64 stands in, which the tests compare with the
definition.

Letters: B batch, L length, D channels, N state.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scanweave.core.ops.selective import selective_scan, selective_scan_ref

# 0.3 to 0.5 ms a step with gradients, on CPUs and GPUs alike: at most 4 s a direction
MAX_STEPS = 8192
# steps whose intermediate values autograd keeps at a time
SEGMENT = 128
# elements of x (B, L, D) differentiated at a time: 2 GB a tensor
ROWS = 1 << 28
_NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
_PER_TOKEN = ("x", "dt", "B", "C")


@dataclass
class Exact:
    """What an implementation should give; `grads` by input name, `by` says where it is from."""

    out: Tensor
    grads: dict[str, Tensor]
    by: str


class _Definition:
    """One direction of the scan, without gate, in segments of time."""

    def __init__(
        self, tensors: dict[str, Tensor], reverse: bool, cu_seqlens: Tensor | None
    ) -> None:
        self.tensors, self.reverse, self.cu_seqlens = tensors, reverse, cu_seqlens
        length = tensors["x"].shape[1]
        size = length if cu_seqlens is not None else SEGMENT
        spans = [(start, min(start + size, length)) for start in range(0, length, size)]
        self.spans = spans[::-1] if reverse else spans
        self.starts: list[Tensor | None] = []

    def _run(self, tensors: dict[str, Tensor], h: Tensor | None) -> tuple[Tensor, Tensor]:
        y, last = selective_scan_ref(
            *(tensors[name] for name in _NAMES[:-1]),
            dt_bias=tensors["dt_bias"],
            reverse=self.reverse,
            initial_state=h,
            cu_seqlens=self.cu_seqlens,
            return_final_state=True,
        )
        return y, last

    def _cut(self, span: tuple[int, int]) -> dict[str, Tensor]:
        return {
            name: (v[:, slice(*span)] if name in _PER_TOKEN else v).detach()
            for name, v in self.tensors.items()
        }

    @torch.no_grad()
    def forward(self) -> Tensor:
        h = None
        parts = {}
        for span in self.spans:
            self.starts.append(h)
            parts[span], h = self._run(self._cut(span), h)
        return torch.cat([parts[span] for span in sorted(parts)], 1)

    def backward(self, dy: Tensor) -> dict[str, Tensor]:
        grads = {name: torch.zeros_like(v) for name, v in self.tensors.items()}
        dh = None
        for span, start in zip(reversed(self.spans), reversed(self.starts), strict=True):
            leaves = {name: v.requires_grad_() for name, v in self._cut(span).items()}
            h0 = None if start is None else start.detach().requires_grad_()
            y, h = self._run(leaves, h0)
            wanted = [*leaves.values(), *([] if h0 is None else [h0])]
            outputs, douts = ([y], [dy[:, slice(*span)]])
            if dh is not None:
                outputs, douts = [*outputs, h], [*douts, dh]
            found = torch.autograd.grad(outputs, wanted, douts)
            for name, grad in zip(leaves, found, strict=False):
                if name in _PER_TOKEN:
                    grads[name][:, slice(*span)] = grad
                else:
                    grads[name] += grad
            dh = found[-1] if h0 is not None else None
        return grads


class _Portable:
    """The same through the op in float64."""

    def __init__(
        self, tensors: dict[str, Tensor], reverse: bool, cu_seqlens: Tensor | None
    ) -> None:
        self.leaves = {name: v.detach().requires_grad_() for name, v in tensors.items()}
        self.y = selective_scan(
            *(self.leaves[name] for name in _NAMES[:-1]),
            dt_bias=self.leaves["dt_bias"],
            reverse=reverse,
            cu_seqlens=cu_seqlens,
        )

    def forward(self) -> Tensor:
        return self.y.detach()

    def backward(self, dy: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(self.y, list(self.leaves.values()), dy)
        return dict(zip(self.leaves, found, strict=True))


def _rows(
    tensors: dict[str, Tensor],
    dout: Tensor,
    cu_seqlens: Tensor | None,
    suffixes: tuple[str, ...],
) -> Exact:
    """Every direction, added and gated, of some rows of the batch."""
    by_definition = dout.shape[1] <= MAX_STEPS
    directions = [
        (_Definition if by_definition else _Portable)(
            {name: tensors[name + suffix] for name in _NAMES}, suffix != "", cu_seqlens
        )
        for suffix in suffixes
    ]
    y = torch.stack([d.forward() for d in directions]).sum(0).requires_grad_()
    z = tensors.get("z")
    out = y if z is None else y * F.silu(z)
    dy, *dz = torch.autograd.grad(out, [y] if z is None else [y, z], dout)
    grads: dict[str, Tensor] = {}
    for direction, suffix in zip(directions, suffixes, strict=True):
        grads |= {name + suffix: grad for name, grad in direction.backward(dy).items()}
    if z is not None:
        grads["z"] = dz[0]
    return Exact(out.detach(), grads, "definition" if by_definition else "portable float64")


def scan_gradients(
    tensors: dict[str, Tensor],
    dout: Tensor,
    cu_seqlens: Tensor | None,
    suffixes: tuple[str, ...],
) -> Exact:
    """Output and gradients of the scans of all directions, added, then gated by z if given.

    Args:
        tensors: float64 inputs by name, each direction's with its suffix; "" runs forward.
        dout: Gradient of the output, (B, L, D) float64.
        cu_seqlens: Starts of packed sequences, or None.
        suffixes: One per direction.
    """
    batch, length, dim = dout.shape
    count = max(1, ROWS // max(1, length * dim))
    parts = []
    for start in range(0, batch, count):
        rows = slice(start, start + count)
        cut = {k: v[rows] if v.ndim >= 3 else v for k, v in tensors.items()}
        parts.append(_rows(cut, dout[rows], cu_seqlens, suffixes))
    grads = {
        name: torch.cat([p.grads[name] for p in parts])
        if grad.ndim >= 3
        else torch.stack([p.grads[name] for p in parts]).sum(0)
        for name, grad in parts[0].grads.items()
    }
    return Exact(torch.cat([p.out for p in parts]), grads, parts[0].by)


def scan_step(tensors: dict[str, Tensor], state: Tensor) -> Exact:
    """One token by the definition: the output, and the new state in place of a gradient."""
    t = {
        name: v.detach().unsqueeze(1) if name in (*_PER_TOKEN, "z") else v.detach()
        for name, v in tensors.items()
    }
    x, dt, A, B, C, D, dt_bias = (t[name] for name in _NAMES)
    out, after = selective_scan_ref(
        x, dt, A, B, C, D, t["z"], dt_bias, initial_state=state, return_final_state=True
    )
    return Exact(out.squeeze(1), {"state": after}, "definition")
