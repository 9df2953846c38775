"""LSSL: a dense HiPPO matrix run by the trapezoidal rule, the ancestor of S4 and its oracle.

    x'(t) = A x(t) + B u(t)                                 one A (N, N) and B (N,) for all channels
    h[t]  = (I - dt A / 2)^-1 ((I + dt A / 2) h[t-1] + dt B u[t])         dt of every channel
    y[t]  = C h[t] + D u[t]                                 M readouts a channel
    out   = output_linear(gelu(y))

Letters: B batch, L length, D channels, N state, M readouts. Names and shapes of the parameters are
those of the published code where it has them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype, without_autocast
from ..ops.dense import dense_ssm, state_powers
from .base import Mixer, State, register_mixer
from .hippo import HippoName, hippo
from .matrix_state import check_sizes, check_steps, keep_from_decay
from .time_invariant import draw_log_steps, keep_slow, lags

# what the published code lets the dense matrices learn at
MATRIX_RATE = 1e-4


class DenseKernel(nn.Module):
    """A dense state-space model shared by all channels, each with its time step.

    Args:
        dim: Channels D.
        size: States N.
        init: The HiPPO matrix that A and B start from.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        device: Of the parameters.
        dtype: Of the parameters, which keep at least float32.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        init: HippoName,
        dt_min: float,
        dt_max: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init: HippoName = init
        self.dt_min, self.dt_max = dt_min, dt_max
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.log_dt = nn.Parameter(torch.empty(dim, device=device, dtype=full))
        self.A = nn.Parameter(torch.empty(size, size, device=device, dtype=full))
        self.B = nn.Parameter(torch.empty(size, device=device, dtype=full))

    def reset_parameters(self) -> None:
        """Set A and B to HiPPO's, and draw the time steps."""
        keep_slow(self.log_dt)
        keep_from_decay(self.A, self.B)
        for p in (self.A, self.B):
            p._optim = {"lr_max": MATRIX_RATE}  # type: ignore[attr-defined]
        with torch.no_grad():
            for p, v in zip((self.A, self.B), hippo(self.init, len(self.B)), strict=True):
                p.copy_(v)
        draw_log_steps(self.log_dt, self.dt_min, self.dt_max)

    def forward(self) -> tuple[Tensor, Tensor]:
        """State matrices less the identity (D, N, N), and discretised B (D, N)."""
        dtype = computing_dtype(self.A)
        A, B, dt = self.A.to(dtype), self.B.to(dtype), self.log_dt.to(dtype).exp()
        # without the identity's digits: (I - dt A / 2)^-1 (I + dt A / 2) - I
        step = dt[:, None, None] * A
        left = torch.eye(len(B), device=A.device, dtype=dtype) - 0.5 * step
        right = torch.cat([step, (dt[:, None] * B).unsqueeze(-1)], -1)
        with without_autocast(A):
            solved, _ = torch.linalg.solve_ex(left, right)
        return solved[..., :-1], solved[..., -1]


@register_mixer(
    "lssl",
    primitive="dense_ssm",
    paper="Gu et al. 2021, arXiv 2110.13985",
    parity="1e-15 (float64; equations)",
)
class LSSL(Mixer):
    """The linear state-space layer: causal, with a state of fixed size; for small N.

    Nothing keeps a learned A stable; its learning rate is limited to 1e-4.

    Args:
        d_model: Channels D of the sequence.
        d_state: States N a channel.
        channels: Readouts M a channel.
        init: HiPPO matrix that A and B start from; "fout" and "foud" need an even N.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        device: Of the parameters.
        dtype: Of the parameters; A, B, D and log_dt keep at least float32.

    Raises:
        ValueError: a size is not positive or does not fit, or init is unknown.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 32,
        channels: int = 1,
        init: HippoName = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"d_model": d_model, "d_state": d_state, "channels": channels})
        check_steps(dt_min, dt_max)
        hippo(init, d_state)  # says what does not fit
        self.d_model, self.d_state, self.channels = d_model, d_state, channels
        dd = {"device": device, "dtype": dtype}
        self.kernel = DenseKernel(d_model, d_state, init, dt_min, dt_max, **dd)
        full = self.kernel.A.dtype
        self.C = nn.Parameter(torch.empty(d_model, channels, d_state, **dd))
        self.D = nn.Parameter(torch.empty(d_model, channels, device=device, dtype=full))
        self.output_linear = nn.Linear(d_model * channels, d_model, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        keep_from_decay(self.D)
        self.kernel.reset_parameters()
        nn.init.normal_(self.C)
        nn.init.normal_(self.D)
        self.output_linear.reset_parameters()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, the coefficients of every channel."""
        return {"h": ((self.d_model, self.d_state), computing_dtype(self.C))}

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        """Outputs of readouts `y` (..., D, M)."""
        y = (y + (self.D * x.unsqueeze(-1)).to(y.dtype)).to(x.dtype).flatten(-2)
        return self.output_linear(F.gelu(y))

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        E, B = self.kernel()
        y, last = dense_ssm(
            *(x, E, B, self.C),
            initial_state=None if state is None else state["h"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        return self._out(y, x), None if last is None else {"h": last}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; the state stays as it is, also without gradients."""
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        h = state["h"]
        with without_autocast(x):
            E, B = self.kernel()
            dtype = computing_dtype(h, x, E)
            h, E, B = h.to(dtype), E.to(dtype), B.to(dtype)
            moved = torch.bmm(E, h.permute(1, 2, 0)).permute(2, 0, 1)
            h = h + moved + B * x.to(dtype).unsqueeze(-1)
            y = (self.C.to(dtype) * h.unsqueeze(-2)).sum(-1)
        return self._out(y, x), {"h": h}

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: every channel's input, M times, and what is read, without D."""
        E, B = self.kernel()
        y, _ = dense_ssm(x, E, B, self.C)
        values = x.to(y.dtype).repeat_interleave(self.channels, -1)
        return values.transpose(1, 2).unsqueeze(-1), y.flatten(2).transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        y = outputs.squeeze(-1).transpose(1, 2)
        return self._out(y.unflatten(-1, (-1, self.channels)), x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the kernel at t - s, a readout each; the same for all x."""
        kernel = self.taps(x.shape[1]).flatten(0, 1)
        matrix = kernel[:, lags(x.shape[1], x.device).clamp(min=0)].tril()
        return matrix.expand(x.shape[0], -1, -1, -1)

    def taps(self, length: int) -> Tensor:
        """The kernel C (I + E)^j B, (D, M, length)."""
        E, B = self.kernel()
        with without_autocast(E):
            into, _, _ = state_powers(E, B, self.C.to(E.dtype), max(length - 1, 0).bit_length())
            return self.C.to(E.dtype) @ into[..., :length]
