"""What the time-invariant mixers share: discretisation, initial time steps, marks, Toeplitz.

    x'(t) = A x(t) + B u(t)  ->  h[t] = exp(log_a) h[t-1] + factor B u[t]      A diagonal

    zoh        log_a = dt A                                  factor = (exp(dt A) - 1) / A
    bilinear   log_a = log (1 + dt A / 2) / (1 - dt A / 2)   factor = dt / (1 - dt A / 2)

Letters: L length, D channels.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from .matrix_state import keep_from_decay

Discretisation = Literal["zoh", "bilinear"]
# the most that the papers let what makes up a kernel learn at
KERNEL_RATE = 1e-3


def discretise(A: Tensor, dt: Tensor, method: Discretisation) -> tuple[Tensor, Tensor]:
    """Logarithms of the decays and factors of B of a diagonal system.

    Without cancellation: decays close to 1 keep their distance from it to rounding.

    Args:
        A: Rates, complex, any shape; real parts below 0.
        dt: Time steps, positive, broadcastable to A.
        method: "zoh" holds the input for a step, "bilinear" is the trapezoidal rule.

    Returns:
        log_a and factor, of the shape and dtype of A.

    Raises:
        ValueError: the method is unknown.
    """
    z = A * dt
    if method == "zoh":
        # exp(z) - 1, by parts
        grown = torch.expm1(z.real)
        half = torch.sin(0.5 * z.imag)
        real = grown - 2 * (grown + 1) * half * half
        imag = (grown + 1) * torch.sin(z.imag)
        return z, torch.complex(real, imag) / A
    if method != "bilinear":
        raise ValueError(f"discretisation must be 'zoh' or 'bilinear', got {method!r}")
    re, im = 0.5 * z.real, 0.5 * z.imag
    below = (1 - re).square() + im.square()
    # |1 + z / 2|^2 / |1 - z / 2|^2 - 1; no farther down than where its logarithm is finite
    beyond = (4 * re / below).clamp(min=-1 + torch.finfo(re.dtype).eps)
    angle = torch.atan2(im, 1 + re) + torch.atan2(im, 1 - re)
    return torch.complex(0.5 * torch.log1p(beyond), angle), dt / (1 - 0.5 * z)


def check_discretisation(method: str) -> None:
    """Raise unless the method is one of `discretise`."""
    if method not in ("zoh", "bilinear"):
        raise ValueError(f"discretisation must be 'zoh' or 'bilinear', got {method!r}")


def draw_log_steps(log_dt: Tensor, dt_min: float, dt_max: float) -> None:
    """Fill with logarithms of time steps, uniform between those of the bounds."""
    with torch.no_grad():
        log_dt.uniform_(math.log(dt_min), math.log(dt_max))


def keep_slow(*parameters: nn.Parameter) -> None:
    """Mark what makes up a kernel: not decayed, and a learning rate of at most 1e-3."""
    keep_from_decay(*parameters)
    for p in parameters:
        p._optim = {"lr_max": KERNEL_RATE}  # type: ignore[attr-defined]


def lags(length: int, device: torch.device) -> Tensor:
    """How many tokens t lies behind s, t - s, (L, L)."""
    places = torch.arange(length, device=device)
    return places[:, None] - places
