"""S4: a state-space model per channel, started from HiPPO, and a gated projection.

    x'(t) = (Lambda - P P^H) x(t) + B u(t)              N states of every channel
    h[t]  = Abar h[t-1] + Bbar u[t]                     the trapezoidal rule, dt of every channel
    y[t]  = C h[t] + D u[t]                             M readouts a channel
    both directions: plus C' h'[t+1] of the states h' from the end, so that a token counts once
    out   = a sigmoid(b),  a, b = output_linear(gelu(y));  without the gate y itself

Letters: B batch, L length, D channels, N states, M readouts. `s4_kernel.py` has the kernel; its
parameters are named as in the published code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import autocast_dtype, computing_dtype
from ..ops.dense import dense_ssm, state_powers
from ..ops.long_conv import fft_conv
from .base import Mixer, State, register_mixer
from .matrix_state import check_sizes, check_steps, keep_from_decay
from .s4_kernel import DPLRKernel, S4Init, initial
from .time_invariant import lags

# up to here chunks cost less than transforms of twice the length
CHUNKS_UP_TO = 512


@register_mixer(
    "s4",
    primitive="dense_ssm",
    paper="Gu et al. 2022, arXiv 2111.00396",
    parity="2e-7 (float32; fout 3e-5, its own error), s4's S4Block; 5e-15 (float64; equations); "
    "SPADE's form 2e-15 (float64), in its whole stack",
)
class S4(Mixer):
    """The S4 layer with its gated projection: causal, with a state of fixed size.

    With "legs", sequences of more than 512 tokens that are neither packed nor continued are
    convolved with the kernel of the generating function; all others run in chunks through matrix
    products.

    Args:
        d_model: Channels D of the sequence.
        d_state: States N a channel, even.
        channels: Readouts M a channel.
        init: HiPPO basis: "legs", "legt", "fout", "lagt", or "hippo" for legs and fout mixed.
        copies: Learned copies of Lambda, P and B, each shared by d_model / copies channels.
        dt_min: Smallest time step at initialisation.
        dt_max: Largest time step at initialisation.
        rate: Multiplies all time steps: 0.5 for inputs sampled twice as finely as in training.
        gated: End in the gated projection. Without it M must be 1, and the output is y (SPADE's
            layer; https://github.com/microsoft/EfficientLongSequenceModeling).
        device: Of the parameters.
        dtype: Of the parameters; D and the kernel but for C keep at least float32.

    Raises:
        ValueError: a size is not positive or does not fit, or an option is unknown.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        channels: int = 1,
        init: S4Init = "legs",
        copies: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        rate: float = 1.0,
        gated: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"d_model": d_model, "channels": channels, "copies": copies})
        check_steps(dt_min, dt_max)
        initial(init, d_state, copies)  # says what does not fit
        if d_model % copies:
            raise ValueError(f"copies must divide d_model {d_model}, got {copies}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        if not gated and channels != 1:
            raise ValueError(f"channels must be 1 without the gated projection, got {channels}")
        self.d_model, self.d_state, self.channels = d_model, d_state, channels
        dd = {"device": device, "dtype": dtype}
        readouts = channels if self.causal else 2 * channels
        self.kernel = DPLRKernel(
            *(d_model, d_state, readouts, init, copies, dt_min, dt_max, rate), **dd
        )
        full = self.kernel.log_dt.dtype
        self.D = nn.Parameter(torch.empty(channels, d_model, device=device, dtype=full))
        self.output_linear = nn.Linear(d_model * channels, 2 * d_model, **dd) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        keep_from_decay(self.D)
        self.kernel.reset_parameters()
        nn.init.normal_(self.D)
        if self.output_linear is not None:
            self.output_linear.reset_parameters()

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`h`, real parts of N / 2 complex states of every channel, then imaginary parts."""
        return {"h": ((self.d_model, self.d_state), computing_dtype(self.kernel.C))}

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        """Outputs of readouts `y` (..., M, D)."""
        y = (y + (self.D * x.unsqueeze(-2)).to(y.dtype)).to(x.dtype).flatten(-2)
        if self.output_linear is not None:
            return F.glu(self.output_linear(F.gelu(y)), -1)
        # as a projection's result would be
        return y.to(autocast_dtype(x) or y.dtype)

    def _read(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What is read without D, (B, L, M, D), and the last state."""
        plain = state is None and cu_seqlens is None and not return_state
        # other bases start from eigenvalues on the axis, all but poles of the spectrum, where
        # float32 leaves gradients of the rates one digit (five through powers)
        if plain and x.shape[1] > CHUNKS_UP_TO and self.kernel.init == "legs":
            return self._convolved(x, self.kernel.taps(x.shape[1])), None
        y, last = self._chunked(x, state, cu_seqlens, return_state)
        return y.transpose(-1, -2), last

    def _convolved(self, x: Tensor, taps: Tensor) -> Tensor:
        y = fft_conv(x.repeat(1, 1, self.channels).to(taps.dtype), taps.flatten(0, 1))
        return y.unflatten(-1, (self.channels, -1))

    def _chunked(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        return dense_ssm(
            *(x, *self.kernel.dense(self.kernel.discrete())),
            initial_state=state,
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        before = None if state is None else state["h"]
        y, last = self._read(x, before, cu_seqlens, return_state)
        return self._out(y, x), None if last is None else {"h": last}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; in O(N) a channel, and the state given stays as it is."""
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        y, h = self.kernel.step(x, state["h"])
        return self._out(y, x), {"h": h}

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: every channel's input, M times, and what is read, without D."""
        y, _ = self._read(x, None, None, False)
        values = x.repeat(1, 1, self.channels).to(y.dtype)
        return values.transpose(1, 2).unsqueeze(-1), y.flatten(2).transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        y = outputs.squeeze(-1).transpose(1, 2)
        return self._out(y.unflatten(-1, (self.channels, -1)), x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the kernel at t - s, a readout each; the same for all x."""
        lag = lags(x.shape[1], x.device)
        taps = self._taps(x.shape[1])
        matrix = taps[: self.channels].flatten(0, 1)[:, lag.clamp(min=0)].tril()
        if not self.causal:
            back = taps[self.channels :].flatten(0, 1)[:, (-lag - 1).clamp(min=0)]
            matrix = matrix + back.triu(1)
        return matrix.expand(x.shape[0], -1, -1, -1)

    def _taps(self, length: int) -> Tensor:
        """The kernel by powers of Abar, (M, D, length)."""
        E, B, C = self.kernel.dense(self.kernel.discrete())
        into, _, _ = state_powers(E, B, C, max(length - 1, 0).bit_length())
        return (C @ into[..., :length]).transpose(0, 1)


@register_mixer(
    "s4_bidirectional",
    primitive="dense_ssm",
    paper="Gu et al. 2022, arXiv 2111.00396",
    parity="7e-7 (float32), s4's S4Block; 9e-15 (float64; equations)",
)
class BidirectionalS4(S4):
    """S4 with a second readout, of what follows a token; not causal; arguments as `S4`."""

    causal = False
    recurrent = False

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Raise: there is no state."""
        return Mixer.state_spec(self)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Raise: there is no state."""
        return Mixer.step(self, x, state)

    def _convolved(self, x: Tensor, taps: Tensor) -> Tensor:
        ahead, back = (part.flatten(0, 1) for part in taps.chunk(2))
        # the kernel of what follows starts at a distance of 1
        back = F.pad(back, (1, -1))
        y = fft_conv(x.repeat(1, 1, self.channels).to(taps.dtype), ahead, kernel_back=back)
        return y.unflatten(-1, (self.channels, -1))

    def _chunked(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        E, B, C = self.kernel.dense(self.kernel.discrete())
        ahead, back = C.chunk(2, 1)
        y, _ = dense_ssm(x, E, B, ahead, cu_seqlens=cu_seqlens)
        after, _ = dense_ssm(x, E, B, back, exclusive=True, reverse=True, cu_seqlens=cu_seqlens)
        return y + after, None
