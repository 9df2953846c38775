"""Scans in the part of Python that TorchScript knows.

The registered scans get their gradients from an `autograd.Function`, which TorchScript cannot call.
These it can compile, differentiate, save, and run where only libtorch is installed. The first costs
a few launches a token, the second a matrix of L x L for every head; outside scripted models the
operators of `scanweave.core` run instead.

    scan_in_steps     both directions of a selective scan at once, one token at a time
    quasi_separable   both directions of Hydra's scan as one matrix
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


def _shifted_scan_matrix(C: Tensor, B: Tensor, g: Tensor, write: Tensor) -> Tensor:
    """What a forward scan gives token t + 1 of token s, (B, H, L, L)."""
    total = g.transpose(1, 2).cumsum(-1)
    # log decay between s and t, at most 0 where s <= t
    span = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
    pairs = torch.einsum("btgn,bsgn->bgts", C, B)
    pairs = pairs.repeat_interleave(g.shape[2] // C.shape[2], 1)
    matrix = (pairs * torch.exp(span)).tril() * write.transpose(1, 2).unsqueeze(-2)
    return F.pad(matrix[:, :, :-1], [0, 0, 1, 0])


def quasi_separable(
    C: tuple[Tensor, Tensor],
    B: tuple[Tensor, Tensor],
    v: Tensor,
    g: tuple[Tensor, Tensor],
    write: tuple[Tensor, Tensor],
    skip: Tensor,
) -> Tensor:
    """Mix v by one matrix: a forward scan below its diagonal, a reverse one above, skip on it.

    Letters: B batch, L length, H heads, P head channels, G groups, N state.

    Args:
        C: Read-out vectors of the forward and the reverse scan, each (B, L, G, N).
        B: Input vectors, as C.
        v: Values, (B, L, H, P), float32 or wider: the dtype of the matrix.
        g: Log decays, each (B, L, H); all pairs alike in natural order.
        write: Factors of what is written, each (B, L, H).
        skip: Weight of a token itself, (B, L, H).

    Returns:
        Outputs (B, L, H, P) in the dtype of `v`.

    Source: as `scanweave.core.bidirectional_gated_linear_scan(form="quasi_separable")`, which the
        tests hold it to.
    """
    kind = v.dtype
    lower = _shifted_scan_matrix(C[0].to(kind), B[0].to(kind), g[0].to(kind), write[0].to(kind))
    upper = _shifted_scan_matrix(
        C[1].flip(1).to(kind),
        B[1].flip(1).to(kind),
        g[1].flip(1).to(kind),
        write[1].flip(1).to(kind),
    )
    y = torch.matmul(lower + upper.flip([-1, -2]), v.transpose(1, 2)).transpose(1, 2)
    return y + skip.to(kind).unsqueeze(-1) * v
