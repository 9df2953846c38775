"""One token of the matrix-state scan, the state moved on in place. Equations: `reference.py`."""

import torch
from torch import Tensor

from ..checks import check_tensor, computing_dtype


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
    with torch.no_grad(), torch.autocast(v.device.type, enabled=False):
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
