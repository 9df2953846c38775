"""One token of the selective scan, for decoding and acting. Equations: `reference.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_tensor, computing_dtype


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
) -> Tensor:
    """Advance `selective_scan` by one token; `state` is updated in place.

    No gradient: for inference. `selective_scan` with L = 1 and the same state has one.

    Args:
        state: State before the token, (B, D, N) float32 or float64; updated.
        x: Input, (B, D).
        dt: Time step before bias and softplus, (B, D).
        A: Decay rates, (D, N).
        B: Input vector, (B, N) or (B, G, N).
        C: Read-out vector, as B.
        D: Skip weights, (D,).
        z: Gate, (B, D).
        dt_bias: Added to dt, (D,).
        dt_softplus: delta = softplus(dt + dt_bias).

    Returns:
        Output, (B, D), in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if not isinstance(x, Tensor) or x.ndim != 2:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, D), got {got}")
    if not isinstance(A, Tensor) or A.ndim != 2:
        got = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise ValueError(f"A must be (D, N), got {got}")
    (batch, dim), width = x.shape, A.shape[1]
    check_tensor("dt", dt, (batch, dim), x, "(B, D)")
    check_tensor("A", A, (dim, width), x, "(D, N)")
    check_tensor("state", state, (batch, dim, width), x, "(B, D, N)")
    if not isinstance(B, Tensor) or B.ndim not in (2, 3):
        got = tuple(B.shape) if isinstance(B, Tensor) else type(B).__name__
        raise ValueError(f"B must be (B, N) or (B, G, N), got {got}")
    groups = B.shape[1:-1]
    letters = "(B, G, N)" if groups else "(B, N)"
    check_tensor("B", B, (batch, *groups, width), x, letters)
    check_tensor("C", C, (batch, *groups, width), x, letters)
    if groups and (groups[0] < 1 or dim % groups[0]):
        raise ValueError(f"B must have groups that divide the {dim} channels, got {groups[0]}")
    for name, v in (("D", D), ("dt_bias", dt_bias)):
        if v is not None:
            check_tensor(name, v, (dim,), x, "(D,)")
    if z is not None:
        check_tensor("z", z, (batch, dim), x, "(B, D)")
    with torch.no_grad():
        dtype = computing_dtype(x, dt, A, B, C, D, z, dt_bias, state)
        xs, delta, Bs, Cs = (v.to(dtype) for v in (x, dt, B, C))
        if dt_bias is not None:
            delta = delta + dt_bias.to(dtype)
        if dt_softplus:
            delta = F.softplus(delta)
        if groups:
            Bs, Cs = (v.repeat_interleave(dim // groups[0], 1) for v in (Bs, Cs))
        else:
            Bs, Cs = Bs.unsqueeze(1), Cs.unsqueeze(1)
        decay = torch.exp(delta.unsqueeze(-1) * A.to(dtype))
        h = decay.mul_(state).addcmul_((delta * xs).unsqueeze(-1), Bs)
        state.copy_(h)
        y = (h * Cs).sum(-1)
        if D is not None:
            y = y + D.to(dtype) * xs
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(x.dtype)
