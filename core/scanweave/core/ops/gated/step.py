"""One token of the matrix-state scan, the state moved on in place. Equations: `reference.py`.

On a CPU one registered op, which is one C function, and on a GPU one kernel: a roll-out is many
small calls. Compilers see PyTorch's own operators, which they fuse.
"""

import torch
from torch import Tensor

from ..checks import check_tensor, computing_dtype, on_kernels, runs_now
from . import compiled
from .step_kernel import gated_step

_lib = torch.library.Library("scanweave", "FRAGMENT")
_lib.define(
    "gated_linear_scan_step(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor? g, "
    "Tensor? write, Tensor? skip, bool exclusive) -> Tensor"
)
_step_op = torch.ops.scanweave.gated_linear_scan_step.default


def _composed(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    skip: Tensor | None,
    exclusive: bool,
) -> Tensor:
    (batch, heads, _), groups = v.shape, q.shape[1]
    dtype = computing_dtype(q, k, v, g, write, skip, state)
    values = v.to(dtype)
    written = values if write is None else values * write.to(dtype).unsqueeze(-1)
    h = state.to(dtype).unflatten(1, (groups, -1))  # (B, G, U, K, V)
    read = q.to(dtype).unsqueeze(2).unsqueeze(3)  # (B, G, 1, 1, K)
    out = (read @ h).flatten(1, 3) if exclusive else None
    if g is not None:
        decay = torch.exp(g.to(dtype).reshape(batch, heads, -1, 1))
        h = h * decay.unflatten(1, (groups, -1))
    added = k.to(dtype).unsqueeze(2).unsqueeze(-1)
    h = h + added * written.unflatten(1, (groups, -1)).unsqueeze(-2)
    state.copy_(h.flatten(1, 2))
    if out is None:
        out = (read @ h).flatten(1, 3)
    if skip is not None:
        out = out + skip.to(dtype).unsqueeze(-1) * values
    return out.to(v.dtype)


@torch.library.impl(_lib, "gated_linear_scan_step", "CPU")
def _(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    skip: Tensor | None,
    exclusive: bool,
) -> Tensor:
    single = computing_dtype(q, k, v, g, write, skip, state) == state.dtype == torch.float32
    if single and state.is_contiguous() and compiled.takes((q, k, v, g, write)):
        out = compiled.step(state, q, k, v, g, write, exclusive)
        if skip is not None:
            out.addcmul_(skip.to(torch.float32).unsqueeze(-1), v.to(torch.float32))
        return out.to(v.dtype)
    return _composed(state, q, k, v, g, write, skip, exclusive)


@torch.library.register_fake("scanweave::gated_linear_scan_step", lib=_lib)
def _(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    write: Tensor | None,
    skip: Tensor | None,
    exclusive: bool,
) -> Tensor:
    return v.new_empty(v.shape)


def gated_linear_scan_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    write: Tensor | None = None,
    skip: Tensor | None = None,
    *,
    exclusive: bool = False,
) -> Tensor:
    """Advance `gated_linear_scan` by one token; `state` is updated in place.

    No gradient: for inference. `gated_linear_scan` with L = 1 and the same state has one.

    Args:
        state: State before the token, (B, H, K, V) float32 or float64; updated.
        q: Read-out vector, (B, G, K).
        k: Write vector, as q.
        v: Values, (B, H, V).
        g: Log decays, (B, H) or (B, H, K).
        write: Factor of what is written, (B, H).
        skip: Factor of v added to the output, (B, H).
        exclusive: Read the state before the token.

    Returns:
        Output, (B, H, V), in the dtype of v.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if not isinstance(v, Tensor) or v.ndim != 3:
        got = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v must be (B, H, V), got {got}")
    if not isinstance(q, Tensor) or q.ndim != 3:
        got = tuple(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise ValueError(f"q must be (B, G, K), got {got}")
    (batch, heads, width), (groups, keys) = v.shape, q.shape[1:]
    check_tensor("q", q, (batch, groups, keys), v, "(B, G, K)")
    check_tensor("k", k, (batch, groups, keys), v, "(B, G, K)")
    if groups < 1 or heads % groups:
        raise ValueError(f"q must have groups that divide the {heads} heads, got {groups}")
    check_tensor("state", state, (batch, heads, keys, width), v, "(B, H, K, V)")
    if g is not None:
        if not isinstance(g, Tensor) or tuple(g.shape[2:]) not in ((), (keys,)):
            got = tuple(g.shape) if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(f"g must be (B, H) or (B, H, K), got {got}")
        check_tensor("g", g, (batch, heads, *g.shape[2:]), v, "(B, H) or (B, H, K)")
    for name, u in (("write", write), ("skip", skip)):
        if u is not None:
            check_tensor(name, u, (batch, heads), v, "(B, H)")
    if runs_now(v) and on_kernels(q, k, v, g, write, skip, state):
        with torch.no_grad():
            return gated_step(state, q, k, v, g, write, skip, exclusive)
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
        code = _step_op if v.is_cpu else _composed
        return code(state, q, k, v, g, write, skip, exclusive)
