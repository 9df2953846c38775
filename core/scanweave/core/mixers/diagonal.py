"""Diagonal state-space models of continuous time, and mixers around one.

    zero-order hold:  a = exp(dt A)                         B = (a - 1) / A
    bilinear:         a = (1 + dt A / 2) / (1 - dt A / 2)   B = dt / (1 - dt A / 2)
    h[t] = a h[t-1] + B x[t]
    y[t] = 2 Re(C h[t]) + D x[t]                            C h[t] + D x[t] if all is real

Both directions add what another model reads of the future: with a lag of 1 of later tokens only,
so that a token itself counts once, else of the present one too.

Letters: B batch, L length, D channels, N states of a channel (pairs, if complex), S packed
sequences.
Source: Gu et al. 2022 (S4D), arXiv 2206.11893, section 3.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import exporting
from ..ops.long_conv import diagonal_ssm, diagonal_ssm_step, fft_conv, ssm_kernel
from .base import Mixer, State
from .retention import places

Mode = Literal["auto", "conv", "scan"]
# with gradients the transforms are faster from here on, and never need (B, L, D, N) states
# (1.5x at L60, 5x at L197, B8 D32 N32, a CPU)
CONVOLVE_FROM = 64
# longer two-sided kernels would take (D, N, L) powers at once
ONE_KERNEL_UP_TO = 2048


class Terms(NamedTuple):
    """A discrete diagonal model, as `diagonal_ssm` takes it: each (D, N)."""

    log_a: Tensor
    B: Tensor
    C: Tensor


def expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 without loss for small z, real or complex."""
    if not z.is_complex():
        return torch.expm1(z)
    half = torch.sin(z.imag / 2)
    real = torch.expm1(z.real) * torch.cos(z.imag) - 2 * half * half
    return torch.complex(real, torch.exp(z.real) * torch.sin(z.imag))


def zero_order_hold(A: Tensor, dt_A: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of a, and the integral of exp(A s) over a step, for inputs that are steps."""
    return dt_A, expm1(dt_A) / A


def bilinear(dt: Tensor, dt_A: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of a, and the input weights of the trapezoidal rule, complex."""
    half = dt_A / 2
    square = half.real.square() + half.imag.square()
    size = torch.log1p(2 * half.real + square) - torch.log1p(square - 2 * half.real)
    turn = torch.atan2(half.imag, 1 + half.real) + torch.atan2(half.imag, 1 - half.real)
    return torch.complex(size / 2, turn), dt / (1 - half)


def own_rate(*parameters: nn.Parameter) -> None:
    """Mark parameters of a kernel: no weight decay, and a learning rate of at most 1e-3."""
    for p in parameters:
        p._optim = {"lr_max": 1e-3, "weight_decay": 0.0}  # type: ignore[attr-defined]


def transforms(mode: Mode, length: int, packed: bool) -> bool:
    """Whether a sequence is convolved as a whole."""
    if packed or mode == "scan":
        return False
    if mode == "conv":
        return True
    # a program is exported for any length, and sizes of transforms are steps
    return not exporting() and length >= CONVOLVE_FROM


def path(mode: Mode, length: int, packed: bool) -> Literal["conv", "chunk", "scan"]:
    """How `diagonal_ssm` is to run: what is not convolved goes through chunks, unless scanned."""
    if transforms(mode, length, packed):
        return "conv"
    return "scan" if mode == "scan" else "chunk"


def following(y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What stands at the next token of the same sequence, or 0: (B, L, D)."""
    y = F.pad(y, (0, 0, 0, 1))[:, 1:]
    place, row = places(y.shape[1], cu_seqlens, y.device)
    if cu_seqlens is None or row is None:
        return y
    last = place + 1 == cu_seqlens.diff().index_select(0, row)
    return y.masked_fill(last[None, :, None], 0)


def both_directions(
    x: Tensor,
    forward: Terms,
    reverse: Terms,
    D: Tensor,
    *,
    lag: Literal[0, 1],
    mode: Mode,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Run one diagonal model forward and another in reverse, and add what they read.

    Args:
        x: Inputs, (B, L, D).
        forward: Reads tokens up to the present one.
        reverse: Reads the present token and later ones, or with a lag of 1 later ones only.
        D: Skip weights, (D,).
        lag: The least distance that the reverse model sees.
        mode: Of the mixer; packed sequences are never convolved.
        cu_seqlens: Starts of packed sequences, (S + 1,).
    """
    length = x.shape[1]
    way = path(mode, length, cu_seqlens is not None)
    if way == "conv" and length <= ONE_KERNEL_UP_TO:
        taps = max(length, 1)
        kernel_back = ssm_kernel(*reverse, taps)
        kernel_back = F.pad(kernel_back[:, : taps - lag], (lag, 0))
        return fft_conv(x, ssm_kernel(*forward, taps), D, kernel_back=kernel_back)
    y = diagonal_ssm(x, *forward, D, cu_seqlens=cu_seqlens, mode=way)
    back = diagonal_ssm(x, *reverse, reverse=True, cu_seqlens=cu_seqlens, mode=way)
    return y + (following(back, cu_seqlens) if lag else back)


def toeplitz(kernel: Tensor, kernel_back: Tensor | None, D: Tensor) -> Tensor:
    """The matrices (D, L, L) of a convolution and a skip; `kernel_back` (D, L) is at lag 1 on."""
    length = kernel.shape[1]
    place = torch.arange(length, device=kernel.device)
    past = torch.zeros_like(kernel) if kernel_back is None else kernel_back
    taps = torch.cat([past.flip(1)[:, 1:], kernel], 1)
    matrix = taps[:, (place[:, None] - place) + length - 1]
    return matrix + torch.diag_embed(D.to(kernel.dtype).unsqueeze(1).expand(-1, length))


class DiagonalSSM(Mixer):
    """A diagonal state-space model between what is computed token by token.

    Subclasses give the discrete model, and what comes before and after it.
    """

    causal = True
    recurrent = True
    mode: Mode

    def _terms(self) -> Terms:
        """The discrete model; C has a first axis of 2 for both directions."""
        raise NotImplementedError

    def _skip(self) -> Tensor:
        """D, one a channel of the model."""
        raise NotImplementedError

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the model runs over, and what `_join` needs of the tokens."""
        return x, x

    def _join(self, y: Tensor, rest: Tensor) -> Tensor:
        """Outputs from the model's and the rest."""
        raise NotImplementedError

    def _run(
        self, v: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The model's outputs, and its last state."""
        given = (v, *self._terms(), self._skip())
        way = path(self.mode, v.shape[1], cu_seqlens is not None)
        if final:
            return diagonal_ssm(
                *given,
                initial_state=h,
                cu_seqlens=cu_seqlens,
                return_final_state=True,
                mode=way,
            )
        return diagonal_ssm(*given, initial_state=h, cu_seqlens=cu_seqlens, mode=way), None

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        v, rest = self._split(x)
        y, h = self._run(v, None if state is None else state["h"], cu_seqlens, return_state)
        return self._join(y, rest), None if h is None else {"h": h}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled() or not self.recurrent:
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        v, rest = self._split(x)
        y = diagonal_ssm_step(state["h"], v, *self._terms(), self._skip())
        return self._join(y, rest), state

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the model's inputs and outputs, a channel each."""
        v = self._split(x)[0]
        y = self._run(v, None, None, False)[0]
        return v.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self._join(outputs.squeeze(-1).transpose(1, 2), self._split(x)[1])

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the kernel at t - s and D at t = s; the same for all x."""
        log_a, B, C = self._terms()
        ways = [C] if self.causal else list(C)
        kernels = [ssm_kernel(log_a, B, C, x.shape[1]) for C in ways]
        matrix = toeplitz(kernels[0], None if self.causal else kernels[1], self._skip())
        return matrix.expand(x.shape[0], -1, -1, -1)


class BothDirections(DiagonalSSM):
    """The model over the whole sequence, a read-out a direction; not causal, no state.

    Stands before a causal mixer among the bases of one for both directions.
    """

    causal = False
    recurrent = False
    directions = 2

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def _run(
        self, v: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        log_a, B, C = self._terms()
        ways = Terms(log_a, B, C[0]), Terms(log_a, B, C[1])
        y = both_directions(v, *ways, self._skip(), lag=1, mode=self.mode, cu_seqlens=cu_seqlens)
        return y, None
