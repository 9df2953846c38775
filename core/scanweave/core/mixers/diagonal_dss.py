"""DSS: diagonal state spaces whose rates all channels share, with a product of B and C a channel.

    Lambda = -exp(Lambda_log_neg_re) + i Lambda_im                   N rates
    z      = dt_re Re Lambda + i dt_im Im Lambda                     dt = exp(log_dt), two a channel
    K[j]   = Re sum_n W (exp(z) - 1) / Lambda exp(j z)
    y[t]   = sum_j K[j] x[t - j] + D x[t]
    out    = output_linear(gelu(y))

This is the exp form; the softmax form, whose rates Lambda may grow, has weights that sum to 1 over
the whole sequence of L tokens,

    K[j]   = Re sum_n W / Lambda exp(j z) / (exp(0) + exp(z) + ... + exp((L - 1) z))

Both directions: a second W for what lies ahead of a token.

Letters: B batch, L length, D channels, N states, S packed sequences. Parameter names are those of
DSS in ag1988/dss (src/models/sequence/ss/standalone/dss.py), so its weights load strictly.
"""

import math
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.linear import linear_scan
from ..ops.long_conv import fft_conv
from .base import register_mixer
from .diagonal import (
    BothDirections,
    DiagonalSSM,
    Mode,
    Terms,
    expm1,
    following,
    own_rate,
    toeplitz,
    transforms,
    zero_order_hold,
)
from .hippo import nplr
from .matrix_state import check_sizes, check_steps
from .retention import places

# bounds the inverse of a sum of weights that cancel
EPS = 1e-7


class DSSKernel(nn.Module):
    """Rates, time steps and weights of DSS.

    Args:
        dim: Channels D.
        d_state: States N.
        directions: Sets of weights, 1 or 2.
        decaying: Keep real parts of rates negative, as the exp form does.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        device: Of the parameters.
        dtype: Of the parameters; time steps and rates keep at least float32.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        directions: int,
        decaying: bool,
        dt_min: float,
        dt_max: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.log_range, self.decaying = (math.log(dt_min), math.log(dt_max)), decaying
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        df = {"device": device, "dtype": full}
        self.log_dt = nn.Parameter(torch.empty(dim, 2, **df))
        if decaying:
            self.Lambda_log_neg_re = nn.Parameter(torch.empty(d_state, **df))
            self.Lambda_im = nn.Parameter(torch.empty(d_state, **df))
        else:
            self.Lambda = nn.Parameter(torch.empty(d_state, 2, **df))
        self.W = nn.Parameter(torch.empty(directions, dim, d_state, 2, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw every parameter anew: rates of the skew part of HiPPO's LegS minus 1/2."""
        own_rate(*self.parameters())
        rates = nplr("legs", 2 * self.W.shape[2]).eigenvalues.flip(0)
        with torch.no_grad():
            dt = torch.empty_like(self.log_dt[:, :1]).uniform_(*self.log_range)
            self.log_dt.copy_(dt.expand_as(self.log_dt))
            if self.decaying:
                self.Lambda_log_neg_re.copy_(torch.log(-rates.real))
                self.Lambda_im.copy_(rates.imag)
            else:
                self.Lambda.copy_(torch.view_as_real(rates))
            self.W.normal_()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lambda (N,), z (D, N) and W (directions, D, N), complex."""
        dtype = computing_dtype(self.log_dt)
        if self.decaying:
            re = -torch.exp(self.Lambda_log_neg_re.to(dtype))
            rates = torch.complex(re, self.Lambda_im.to(dtype))
        else:
            rates = torch.view_as_complex(self.Lambda.to(dtype).contiguous())
        dt = torch.exp(self.log_dt.to(dtype))
        z = torch.complex(dt[:, :1] * rates.real, dt[:, 1:] * rates.imag)
        return rates, z, torch.view_as_complex(self.W.to(dtype).contiguous())


@register_mixer(
    "dss",
    primitive="diagonal_ssm",
    paper="Gupta et al. 2022, arXiv 2203.14343",
    reference="ag1988 DSS, version='exp', transposed=False",
    parity="1e-7 (float32), 1e-13 (float64)",
)
class DSS(DiagonalSSM):
    """Diagonal state spaces, exp form: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: Complex states N of a channel.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        mode: "conv", "scan" or "auto", which convolves from 64 tokens on and runs
            shorter sequences in chunks of matrix products; packed ones are never convolved.
        device: Of the parameters.
        dtype: Of the parameters; time steps, rates and D keep at least float32.

    Raises:
        ValueError: a size is not positive, or the mode is unknown.
    """

    directions = 1
    decaying = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        mode: Mode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"d_model": d_model, "d_state": d_state})
        check_steps(dt_min, dt_max)
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode}")
        self.d_model, self.d_state, self.mode = d_model, d_state, mode
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.D = nn.Parameter(torch.empty(1, d_model, device=device, dtype=full))
        self.kernel = DSSKernel(
            *(d_model, d_state, self.directions, self.decaying, dt_min, dt_max), **dd
        )
        self.output_linear = nn.Linear(d_model, d_model, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        nn.init.normal_(self.D)
        self.kernel.reset_parameters()
        self.output_linear.reset_parameters()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the complex states."""
        double = computing_dtype(self.D) == torch.float64
        dtype = torch.complex128 if double else torch.complex64
        return {"h": ((self.d_model, self.d_state), dtype)}

    def _terms(self) -> Terms:
        rates, z, W = self.kernel()
        # states are no pairs, where `diagonal_ssm` reads twice the real part
        C = W / 2 if self.directions == 2 else W[0] / 2
        return Terms(*zero_order_hold(rates, z), C)

    def _skip(self) -> Tensor:
        return self.D[0]

    def _join(self, y: Tensor, rest: Tensor) -> Tensor:
        return self.output_linear(F.gelu(y))


@register_mixer(
    "dss_bidirectional",
    primitive="diagonal_ssm",
    paper="Gupta et al. 2022, arXiv 2203.14343",
    reference="ag1988 DSS, version='exp', transposed=False, bidirectional=True",
    parity="1e-7 (float32), 1e-13 (float64)",
)
class BidirectionalDSS(BothDirections, DSS):
    """DSS over the whole sequence, weights a direction; not causal; arguments as `DSS`."""


@register_mixer(
    "dss_softmax",
    primitive="linear_scan",
    paper="Gupta et al. 2022, arXiv 2203.14343",
    reference="ag1988 DSS, version='softmax', transposed=False, bidirectional=True",
    parity="1e-7 (float32), 1e-13 (float64)",
)
class SoftmaxDSS(BidirectionalDSS):
    """DSS, softmax form, in both directions; arguments as `DSS`.

    Its kernel depends on how long a sequence is, so it has no state and no causal form: a token's
    output changes when later ones are added. Rates may grow: what grows is counted from the end of
    a sequence. What is not convolved is scanned and keeps the states of all steps.
    """

    decaying = False

    def _pieces(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on how many `tokens` (...) a sequence has, and what does not.

        A weight of a lag j is weights exp(j log_decays + (j - tokens + 1) growth).

        Returns:
            Log decays (D, N), growth (D, N) and weights (2, ..., D, N).
        """
        rates, z, W = self.kernel()
        tokens = tokens.to(z.real.dtype)[..., None, None]
        grows = rates.real > 0
        growth = torch.where(grows, z.real, torch.zeros_like(z.real))
        phase = torch.where(grows, z.imag, torch.zeros_like(z.imag)) * (1 - tokens)
        turned = torch.where(grows, -z, z)
        total = expm1(turned * tokens) * rates
        inverse = total.conj() / (total.real.square() + total.imag.square() + EPS)
        inverse = inverse * torch.polar(torch.ones_like(phase), phase)
        W = W.view(2, *(1,) * (tokens.ndim - 2), *z.shape)
        return z - growth, growth, W * (expm1(turned) * inverse)

    def _kernels(self, length: int, device: torch.device) -> Tensor:
        """Taps of both directions, (2, D, L)."""
        log_decays, growth, weights = self._pieces(torch.full((), length, device=device))
        lag = torch.arange(length, device=device).to(growth.dtype)
        exponent = log_decays.unsqueeze(-1) * lag + growth.unsqueeze(-1) * (lag - lag[-1:])
        return torch.einsum("kdn,dnl->kdl", weights, torch.exp(exponent)).real

    def _scanned(self, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The sum over both directions, (B, L, D), without D."""
        place, row = places(v.shape[1], cu_seqlens, v.device)
        if cu_seqlens is None or row is None:
            tokens = torch.full((), v.shape[1], device=v.device)
            log_decays, growth, weights = self._pieces(tokens)
        else:
            tokens = cu_seqlens.diff()
            log_decays, growth, weights = self._pieces(tokens)
            # borders that end too early are refused below, by the scan
            row = row.clamp(max=tokens.shape[0] - 1)
            tokens, weights = tokens.index_select(0, row), weights.index_select(1, row)
        last = tokens - 1
        ways = []
        for way, at in enumerate((place, last - place)):
            at = at.to(growth.dtype)[:, None, None]
            x = v.to(growth.dtype).unsqueeze(-1) * torch.exp(-growth * at)
            h = linear_scan(x, log_decays, reverse=way == 1, cu_seqlens=cu_seqlens)
            grown = torch.exp(growth * (at - last.to(growth.dtype)[..., None, None]))
            ways.append((h * (weights[way] * grown)).sum(-1).real)
        return ways[0] + following(ways[1], cu_seqlens)

    def _run(
        self, v: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        if transforms(self.mode, v.shape[1], cu_seqlens is not None):
            kernel, back = self._kernels(max(v.shape[1], 1), v.device)
            back = F.pad(back[:, :-1], (1, 0))
            return fft_conv(v, kernel, self._skip(), kernel_back=back), None
        y = self._scanned(v, cu_seqlens)
        return (y + self._skip().to(y.dtype) * v).to(v.dtype), None

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the kernels of this length and D at t = s; the same for all x."""
        kernel, back = self._kernels(x.shape[1], x.device)
        matrix = toeplitz(kernel, back, self._skip())
        return matrix.expand(x.shape[0], -1, -1, -1)
