"""The kernel of S4: a diagonal matrix minus one of low rank, its steps and its spectrum.

    A = Lambda - P P^H, over N / 2 states and their conjugates      P: R vectors
    (I - dt A / 2) h[t] = (I + dt A / 2) h[t-1] + dt B u[t]         the trapezoidal rule

Real parts and imaginary parts of the N / 2 states are N real ones, on which A acts as a real
matrix: Lambda in blocks of two, minus 2 p p^T. With P P^H on both sides alike and real parts of
Lambda below 0, no power of its discrete form grows, whatever is learned. Its inverse is Woodbury's:

    d = 1 / (1 - dt Lambda / 2),  G = (1 / dt + Re P^H d P)^-1          (R, R)
    (I - dt A / 2)^-1 v = d v - d P G Re(P^H d v)

The kernel of L taps is the inverse Fourier transform of, with s = (1 + w) / 2 at the roots w,

    g(x, y) = sum over both halves of dt x y / ((1 - w) - dt Lambda s)
    g(C', B) - s g(C', P) (I + s g(P*, P))^-1 g(P*, B),          C' = C (I - Abar^L)

which has no pole at w = -1, where the published form 2 / (1 + w) loses its digits.

Letters: D channels, N states, R rank, M readouts a channel, S copies of Lambda, P and B, L taps.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..ops.checks import computing_dtype, without_autocast
from .hippo import HippoName, NormalPlusLowRank, nplr
from .time_invariant import draw_log_steps, keep_slow

S4Init = Literal["legs", "legt", "fout", "lagt", "hippo"]
# S4's bound of the imaginary part of B
CLIP = 2.0
# rates of decay of Lambda, where the normal part of a HiPPO matrix has none
FLOOR = 1e-4


class Discrete(NamedTuple):
    """The trapezoidal rule of all channels.

    Attributes:
        grow: 2 (d - 1), complex (D, N / 2): the diagonal of Abar - I.
        left: d P, complex (D, R, N / 2).
        right: conj(d) P, complex (D, R, N / 2).
        G: The small inverse, (D, R, R).
        B: Discretised, complex (D, N / 2).
        C: Readouts, complex (M, D, N / 2).
    """

    grow: Tensor
    left: Tensor
    right: Tensor
    G: Tensor
    B: Tensor
    C: Tensor


def _parts(v: Tensor) -> Tensor:
    """Real parts, then imaginary ones."""
    return torch.cat([v.real, v.imag], -1)


def initial(init: S4Init, size: int, copies: int) -> list[NormalPlusLowRank]:
    """What each copy starts from; "hippo" is legs for the first half of them, then fout.

    Raises:
        ValueError: the name is unknown, or a size does not fit.
    """
    if init not in get_args(S4Init):
        raise ValueError(f"init must be one of {', '.join(get_args(S4Init))}, got {init!r}")
    if init == "hippo" and copies % 2:
        raise ValueError(f"copies must be even for hippo, got {copies}")
    names: list[HippoName] = []
    for i in range(copies):
        if init == "hippo":
            names.append("legs" if 2 * i < copies else "fout")
        else:
            names.append(init)
    return [nplr(name, size, clip=CLIP) for name in names]


class DPLRKernel(nn.Module):
    """Parameters of S4's kernel, by the names of the published code, and what follows from them.

    Args:
        dim: Channels D.
        size: States N, even.
        readouts: Readouts M a channel.
        init: HiPPO basis: "legs", "legt", "fout", "lagt", or "hippo" for legs and fout mixed.
        copies: Copies S of Lambda, P and B, each shared by D / S channels.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        rate: Multiplies all time steps.
        device: Of the parameters.
        dtype: Of C; the others keep at least float32.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        readouts: int,
        init: S4Init,
        copies: int,
        dt_min: float,
        dt_max: float,
        rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.size = dim, size
        self.init: S4Init = init
        self.dt_min, self.dt_max, self.rate = dt_min, dt_max, rate
        rank = len(initial(init, size, copies)[0].P)
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        at = {"device": device, "dtype": full}
        self.log_dt = nn.Parameter(torch.empty(dim, **at))
        self.A_real = nn.Parameter(torch.empty(copies, size // 2, **at))
        self.A_imag = nn.Parameter(torch.empty_like(self.A_real))
        self.P = nn.Parameter(torch.empty(rank, copies, size // 2, 2, **at))
        self.B = nn.Parameter(torch.empty(copies, size // 2, 2, **at))
        self.C = nn.Parameter(torch.empty(readouts, dim, size // 2, 2, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw every parameter anew; A_real is the logarithm of the rate of decay."""
        keep_slow(self.log_dt, self.A_real, self.A_imag, self.P, self.B)
        draw_log_steps(self.log_dt, self.dt_min, self.dt_max)
        parts = initial(self.init, self.size, len(self.A_real))
        values = torch.stack([p.eigenvalues for p in parts])
        with torch.no_grad():
            self.A_real.copy_((-values.real).clamp(min=FLOOR).log())
            self.A_imag.copy_(values.imag)
            self.P.copy_(torch.view_as_real(torch.stack([p.P for p in parts], 1)))
            self.B.copy_(torch.view_as_real(torch.stack([p.B for p in parts])))
            # both parts of variance 1 / 2
            self.C.normal_(std=0.5**0.5)

    def continuous(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Time steps (D,), Lambda (D, N / 2), P (D, R, N / 2), B (D, N / 2), C (M, D, N / 2)."""
        dtype = computing_dtype(self.A_real)
        A = torch.complex(-self.A_real.to(dtype).exp(), self.A_imag.to(dtype))
        P, B, C = (
            torch.view_as_complex(v.to(dtype).contiguous()) for v in (self.P, self.B, self.C)
        )
        # channel d has copy d mod S
        times = self.dim // len(self.A_real)
        A, B, P = A.repeat(times, 1), B.repeat(times, 1), P.repeat(1, times, 1)
        return self.rate * self.log_dt.to(dtype).exp(), A, P.transpose(0, 1), B, C

    def discrete(self) -> Discrete:
        """The trapezoidal rule, without the digits that its identity would cost."""
        with without_autocast(self.log_dt):
            dt, A, P, B, C = self.continuous()
            z = dt.unsqueeze(1) * A
            d = 1 / (1 - 0.5 * z)
            left, right = d.unsqueeze(1) * P, d.conj().unsqueeze(1) * P
            inner = torch.diag_embed((1 / dt).unsqueeze(1).expand(-1, P.shape[1]))
            inner = inner + _parts(P) @ _parts(left).transpose(1, 2)
            if inner.shape[-1] == 1:
                G = 1 / inner
            else:
                eye = torch.eye(inner.shape[-1], device=z.device, dtype=inner.dtype)
                G, _ = torch.linalg.solve_ex(inner, eye.expand_as(inner))
            # Re(P^H d B)
            seen = _parts(right) @ _parts(B).unsqueeze(-1)
            into = d * B - (left * (G @ seen).to(left.dtype)).sum(1)
            return Discrete(z * d, left, right, G, dt.unsqueeze(1) * into, C)

    def dense(self, rule: Discrete) -> tuple[Tensor, Tensor, Tensor]:
        """Abar - I (D, N, N), B (D, N) and C (D, M, N) of the real states."""
        with without_autocast(self.log_dt):
            re, im = torch.diag_embed(rule.grow.real), torch.diag_embed(rule.grow.imag)
            turn = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
            low = (rule.G @ _parts(rule.right)).transpose(1, 2) @ _parts(rule.left)
            out = 2 * torch.cat([rule.C.real, -rule.C.imag], -1)
            return turn - 2 * low.transpose(1, 2), _parts(rule.B), out.transpose(0, 1)

    def spectrum(self, length: int) -> Tensor:
        """Fourier transform of the first `length` taps, (M, D, length / 2 + 1), complex.

        Args:
            length: Taps L, a power of two.
        """
        with without_autocast(self.log_dt):
            dt, A, P, B, C = self.continuous()
            E, _, out = self.dense(self.discrete())
            for _ in range(length.bit_length() - 1):
                E = torch.baddbmm(E, E, E, beta=2)
            # C (I - Abar^L) = -C E, of complex states again
            re, im = (-0.5 * (out @ E)).transpose(0, 1).chunk(2, -1)
            C = torch.complex(re, -im)
            # the roots in float64: a few numbers on which all channels depend
            places = torch.arange(length // 2 + 1, device=dt.device, dtype=torch.float64)
            half = -torch.pi / length * places
            sine, cosine = torch.sin(half), torch.cos(half)
            s = torch.complex(cosine * cosine, cosine * sine).to(A.dtype)
            gap = torch.complex(2 * sine * sine, -2 * sine * cosine).to(A.dtype)
            # sums over both halves: of the states, and of their conjugates; (D, N, L / 2 + 1)
            both = torch.cat([A, A.conj()], 1)
            cauchy = dt[:, None, None] / (gap - (dt[:, None] * both).unsqueeze(-1) * s)
            x = torch.cat([C.transpose(0, 1), P.conj()], 1)
            y = torch.cat([B.unsqueeze(1), P], 1)
            pairs = x.unsqueeze(2) * y.unsqueeze(1)
            pairs = torch.cat([pairs, pairs.conj()], -1)
            g = (pairs.flatten(1, 2) @ cauchy).unflatten(1, pairs.shape[1:3])
            M = len(C)
            small = s * g[:, M:, 1:]
            if P.shape[1] == 1:
                fixed = g[:, M:, :1] / (1 + small)
            else:
                a, b, c, d = small.flatten(1, 2).unbind(1)
                det = (1 + a) * (1 + d) - b * c
                p, q = g[:, M, 0], g[:, M + 1, 0]
                fixed = torch.stack([(1 + d) * p - b * q, (1 + a) * q - c * p], 1) / det.unsqueeze(
                    1
                )
                fixed = fixed.unsqueeze(2)
            low = (g[:, :M, 1:] * fixed.transpose(1, 2)).sum(2)
            return (g[:, :M, 0] - s * low).transpose(0, 1)

    def taps(self, length: int) -> Tensor:
        """The kernel, (M, D, length), through its generating function.

        Source: Gu et al. 2022, arXiv 2111.00396, appendix C, rearranged.
        """
        whole = 2 ** max(length - 1, 1).bit_length()
        with without_autocast(self.log_dt):
            return torch.fft.irfft(self.spectrum(whole), n=whole)[..., :length]

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """One token in O(N).

        Args:
            x: Input, (B, D).
            h: Real parts and imaginary parts of the states, (B, D, N), float32 or float64.

        Returns:
            Readouts (B, M, D) and the new state.
        """
        with without_autocast(x):
            rule = self.discrete()
            state = torch.complex(*h.to(rule.G.dtype).chunk(2, -1))
            # Re(P^H d h)
            seen = torch.einsum("drn,bdn->bdr", rule.right.conj(), state).real
            low = torch.einsum(
                "drn,bdr->bdn",
                rule.left,
                torch.einsum("drq,bdq->bdr", rule.G, seen).to(state.dtype),
            )
            state = state + rule.grow * state - 2 * low + rule.B * x.to(h.dtype).unsqueeze(-1)
            y = 2 * torch.einsum("mdn,bdn->bmd", rule.C, state).real
            return y, _parts(state).to(h.dtype)
