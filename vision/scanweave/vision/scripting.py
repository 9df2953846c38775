"""The bidirectional scan in the part of Python that TorchScript knows.

The registered scan gets its gradients from an `autograd.Function`, which TorchScript cannot call.
This loop it can compile, differentiate, save, and run where only libtorch is installed. It costs
a few launches a token; outside scripted models the operators of `scanweave.core` run instead.

    scan_in_steps   both directions at once, one token at a time
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_in_steps(
    u: tuple[Tensor, Tensor],
    dt: tuple[Tensor, Tensor],
    A: tuple[Tensor, Tensor],
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    D: tuple[Tensor, Tensor],
    z: Tensor,
) -> Tensor:
    """Run a forward and a reverse selective scan, add them, gate: (y_f + y_r) silu(z).

    Letters: B batch, L length, E channels, N state.

    Args:
        u: Inputs of the forward and the reverse scan, each (B, L, E), both in natural order.
        dt: Time steps with their biases, before softplus, each (B, L, E); all pairs alike.
        A: Decay rates, each (E, N), float32 or wider: the dtype of the state.
        B: Input vectors, each (B, L, N).
        C: Read-out vectors, each (B, L, N).
        D: Skip weights, each (E,).
        z: Gate, (B, L, E).

    Returns:
        Outputs (B, L, E) in the dtype of `u`.

    Source: as `scanweave.core.bidirectional_selective_scan`, which the tests hold it to.
    """
    kind = A[0].dtype
    rates = torch.stack([A[0], A[1]]).unsqueeze(1)  # (2, 1, E, N)
    values = torch.stack([u[0], u[1].flip(1)]).to(kind)  # (2, B, L, E)
    delta = F.softplus(torch.stack([dt[0], dt[1].flip(1)]).to(kind))
    inputs = torch.stack([B[0], B[1].flip(1)]).to(kind).unsqueeze(3)  # (2, B, L, 1, N)
    reads = torch.stack([C[0], C[1].flip(1)]).to(kind).unsqueeze(3)
    h = torch.zeros_like(delta[:, :, 0].unsqueeze(-1) * rates)  # (2, B, E, N)
    ys: list[Tensor] = []
    for t in range(u[0].shape[1]):
        d = delta[:, :, t].unsqueeze(-1)
        h = torch.exp(d * rates) * h + d * values[:, :, t].unsqueeze(-1) * inputs[:, :, t]
        ys.append((h * reads[:, :, t]).sum(-1))
    y = torch.stack(ys, 2) + torch.stack([D[0], D[1]]).to(kind)[:, None, None] * values
    out = (y[0] + y[1].flip(1)) * F.silu(z.to(kind))
    return out.to(u[0].dtype)
