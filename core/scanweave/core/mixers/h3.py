"""H3: a short memory of keys times values, a long memory of these products, read by queries.

    q, k, v = q_proj(x), k_proj(x), v_proj(x)
    k'[t]   = sum_j taps[j] k[t-j] + ssm_k_D k[t]       M taps: a shift register of M states
    h[t]    = a h[t-1] + B (k'[t] v[t]^T)               N / 2 pairs of states for each product
    y[t]    = q[t] (2 Re(C h[t]) + D k'[t] v[t]^T)
    out     = output_linear(y)

a and B are the bilinear discretisation of A and the step exp(log_dt), one model a head; taps[j] is
sum_n B[n] C[n + j] of the register.

Letters: B batch, L length, D channels, H heads of P channels, N state, M taps. Parameter names are
those of the official `H3`.
"""

import math

import torch
from torch import Tensor, nn

from ..ops.checks import computing_dtype, without_autocast
from ..ops.conv import causal_conv1d, causal_conv1d_step
from ..ops.long_conv import diagonal_ssm, diagonal_ssm_step, fft_conv, ssm_kernel
from .base import Mixer, State, register_mixer, with_state
from .diagonal import Mode, Terms, bilinear, own_rate, path, transforms
from .hyena_filter import toeplitz
from .matrix_state import check_sizes, check_steps

# more taps of long sequences are cheaper as a transform
SHORT = 16


class ShiftKernel(nn.Module):
    """A register that shifts by one place a step: M taps for every channel."""

    def __init__(
        self, dim: int, taps: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.empty(dim, taps, device=device, dtype=dtype))
        self.C = nn.Parameter(torch.empty(1, dim, taps, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Write into the first place; read as a convolution's initial taps."""
        with torch.no_grad():
            self.B.zero_()[:, 0] = 1
            self.C.uniform_(-(self.C.shape[-1] ** -0.5), self.C.shape[-1] ** -0.5)
        own_rate(self.B)

    def forward(self) -> Tensor:
        """The taps, (D, M): the correlation of what is written with what is read."""
        dtype = computing_dtype(self.B)
        B, C = self.B.to(dtype), self.C[0].to(dtype)
        count = B.shape[1]
        with without_autocast(B):
            # row n of all shifts of C at once: C[n + j] in column j, zeros behind the last place
            shifted = torch.nn.functional.pad(C, (0, count - 1)).unfold(1, count, 1)
            return torch.einsum("dn,djn->dj", B, shifted)


class DiagonalKernel(nn.Module):
    """A diagonal model of continuous time for every head."""

    def __init__(
        self,
        heads: int,
        pairs: int,
        dt_range: tuple[float, float],
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dt_range = dt_range
        dd = {"device": device, "dtype": dtype}
        self.C = nn.Parameter(torch.empty(1, heads, pairs, 2, **dd))
        self.log_dt = nn.Parameter(torch.empty(heads, **dd))
        self.B = nn.Parameter(torch.empty(heads, pairs, 2, **dd))
        self.inv_A_real = nn.Parameter(torch.empty(heads, pairs, **dd))
        self.A_imag = nn.Parameter(torch.empty(heads, pairs, **dd))

    def reset_parameters(self) -> None:
        """Draw every parameter anew: A = -1/2 + pi i n, B = 1, steps log-uniform."""
        own_rate(self.log_dt, self.B, self.inv_A_real, self.A_imag)
        low, high = (math.log(v) for v in self.dt_range)
        with torch.no_grad():
            self.C.normal_(std=0.5**0.5)
            self.log_dt.uniform_(low, high)
            self.B.zero_()[..., 0] = 1
            self.inv_A_real.fill_(math.log(0.5))
            places = torch.arange(self.A_imag.shape[1], device=self.A_imag.device)
            self.A_imag.copy_((math.pi * places).expand_as(self.A_imag))

    def forward(self) -> Terms:
        """The discrete model, each (H, N / 2) complex."""
        dtype = computing_dtype(self.log_dt)
        with without_autocast(self.log_dt):
            dt = self.log_dt.to(dtype).exp().unsqueeze(-1)
            real, imag = -self.inv_A_real.to(dtype).exp(), self.A_imag.to(dtype)
            log_a, weight = bilinear(dt, torch.complex(dt * real, dt * imag))
            B, C = (
                torch.complex(v[..., 0], v[..., 1]) for v in (self.B.to(dtype), self.C.to(dtype))
            )
            return Terms(log_a, weight * B, C[0])


@register_mixer(
    "h3",
    primitive="diagonal_ssm",
    paper="Fu et al. 2023, arXiv 2212.14052",
    reference="HazyResearch H3",
    parity="3e-7 (float32)",
)
class H3(Mixer):
    """The H3 layer: causal, with a state of fixed size.

    Args:
        d_model: Channels D of the sequence.
        d_state: State N of every product, even.
        d_conv: Taps M of the shift; by default as many as states.
        head_dim: Channels P of a head: products of all its keys with all its values, P^2 of them.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        mode: "conv" transforms, "scan" keeps all states; "auto" transforms from 64 tokens on
            and else takes chunks of matrix products. Packed sequences are never transformed.
        device: Of the parameters.
        dtype: Of the parameters; those of the diagonal model, D and ssm_k_D keep at least float32.

    Raises:
        ValueError: a size is not positive, d_state is odd, or head_dim does not divide D.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int | None = None,
        head_dim: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        mode: Mode = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        taps = d_state if d_conv is None else d_conv
        check_sizes({"d_model": d_model, "d_state": d_state, "d_conv": taps})
        check_steps(dt_min, dt_max)
        if d_state % 2:
            raise ValueError(f"d_state must be even, got {d_state}")
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"head_dim must divide d_model {d_model}, got {head_dim}")
        if mode not in ("auto", "conv", "scan"):
            raise ValueError(f"mode must be 'auto', 'conv' or 'scan', got {mode!r}")
        self.d_model, self.d_state, self.d_conv = d_model, d_state, taps
        self.head_dim = head_dim
        self.mode: Mode = mode
        self.heads = d_model // head_dim
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.q_proj = nn.Linear(d_model, d_model, **dd)
        self.k_proj = nn.Linear(d_model, d_model, **dd)
        self.v_proj = nn.Linear(d_model, d_model, **dd)
        self.ssm_k_kernel = nn.ModuleDict({"kernel": ShiftKernel(d_model, taps, **dd)})
        self.ssm_k_D = nn.Parameter(torch.empty(d_model, device=device, dtype=full))
        model = DiagonalKernel(self.heads, d_state // 2, (dt_min, dt_max), device, full)
        self.kernel = nn.ModuleDict({"kernel": model})
        self.D = nn.Parameter(torch.empty(self.heads, device=device, dtype=full))
        self.output_linear = nn.Linear(d_model, d_model, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for part in (
            *(self.q_proj, self.k_proj, self.v_proj, self.output_linear),
            *(self.ssm_k_kernel["kernel"], self.kernel["kernel"]),
        ):
            part.reset_parameters()  # type: ignore[operator]
        nn.init.normal_(self.ssm_k_D)
        nn.init.normal_(self.D)

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the last M - 1 keys, and `h`, the complex states of every product."""
        dtype = computing_dtype(self.q_proj.weight)
        kind = torch.complex128 if dtype == torch.float64 else torch.complex64
        products = self.d_model * self.head_dim
        return {
            "conv": ((self.d_conv - 1, self.d_model), dtype),
            "h": ((products, self.d_state // 2), kind),
        }

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _taps(self) -> Tensor:
        """The register's taps, with the skip in the first, (D, M)."""
        taps = self.ssm_k_kernel["kernel"]()
        skip = self.ssm_k_D.to(taps.dtype).unsqueeze(1)
        return torch.cat([taps[:, :1] + skip, taps[:, 1:]], 1)

    def _model(self) -> tuple[Tensor, ...]:
        """log_a, B, C and D of every product: those of its head."""
        terms = (*self.kernel["kernel"](), self.D)
        if self.head_dim == 1:
            return terms
        return tuple(v.repeat_interleave(self.head_dim**2, 0) for v in terms)

    def _shift(
        self, k: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        """k', and if asked the last M - 1 keys."""
        taps = self._taps()
        if self.d_conv > SHORT and self._transforms(k, cu_seqlens):
            return with_state(fft_conv(k, taps, initial_state=state, return_final_state=final))
        convolved = causal_conv1d(
            k,
            taps.flip(1),
            initial_state=state,
            cu_seqlens=cu_seqlens,
            return_final_state=final,
        )
        return with_state(convolved)

    def _transforms(self, v: Tensor, cu_seqlens: Tensor | None) -> bool:
        return transforms(self.mode, v.shape[1], cu_seqlens is not None)

    def _products(self, k: Tensor, v: Tensor) -> Tensor:
        """Every key of a head times every value, (..., D P)."""
        if self.head_dim == 1:
            return k * v
        split = (self.heads, self.head_dim)
        pairs = k.unflatten(-1, split).unsqueeze(-1) * v.unflatten(-1, split).unsqueeze(-2)
        return pairs.flatten(-3)

    def _answers(self, q: Tensor, y: Tensor) -> Tensor:
        """What the queries of a head read of its products, (..., D): the place before the head."""
        if self.head_dim == 1:
            return q * y
        pairs = y.unflatten(-1, (self.heads, self.head_dim, self.head_dim))
        read = (q.unflatten(-1, pairs.shape[-3:-1]).unsqueeze(-1) * pairs).sum(-2)
        return read.transpose(-1, -2).flatten(-2)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        q, k, v = self._project(x)
        before = None if state is None else state["conv"]
        k, conv = self._shift(k, before, cu_seqlens, return_state)
        y, h = self._remember(
            self._products(k, v), None if state is None else state["h"], cu_seqlens, return_state
        )
        after = None if conv is None or h is None else {"conv": conv.to(h.real.dtype), "h": h}
        return self.output_linear(self._answers(q, y)), after

    def _remember(
        self, kv: Tensor, h: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        given = (kv, *self._model())
        way = path(self.mode, kv.shape[1], cu_seqlens is not None)
        if not final:
            y = diagonal_ssm(*given, initial_state=h, cu_seqlens=cu_seqlens, mode=way)
            return y, None
        return diagonal_ssm(
            *given, initial_state=h, cu_seqlens=cu_seqlens, mode=way, return_final_state=True
        )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        q, k, v = self._project(x)
        k = causal_conv1d_step(k, state["conv"], self._taps().flip(1))
        y = diagonal_ssm_step(state["h"], self._products(k, v), *self._model())
        return self.output_linear(self._answers(q, y)), state

    def _by_head(self, v: Tensor) -> Tensor:
        """(B, L, D) with heads first in D, as (B, H, L, P)."""
        return v.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: values and what the queries read, a head each."""
        q, k, v = self._project(x)
        y, _ = self._remember(
            self._products(self._shift(k, None, None, False)[0], v), None, None, False
        )
        read = self._answers(q, y).unflatten(-1, (self.head_dim, self.heads))
        return self._by_head(v), read.permute(0, 3, 1, 2)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        # the place in its head comes first in a channel's number
        return self.output_linear(outputs.permute(0, 2, 3, 1).flatten(2))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: (q[t] . k'[s]) K[t - s], K the head's kernel with D at lag 0.

        Source: Fu et al. 2023, arXiv 2212.14052, section 3.1.
        """
        length = x.shape[1]
        q, k, _ = self._project(x)
        pairs = self._by_head(q) @ self._by_head(self._shift(k, None, None, False)[0]).mT
        terms: Terms = self.kernel["kernel"]()
        kernel = ssm_kernel(terms.log_a, terms.B, terms.C, length)
        eye = torch.eye(length, device=x.device, dtype=kernel.dtype)
        weights = toeplitz(kernel, length) + self.D.to(kernel.dtype)[:, None, None] * eye
        return pairs.to(kernel.dtype) * weights
