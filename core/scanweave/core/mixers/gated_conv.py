"""BaseConv: a convolution times a projection, the simplest gated convolution.

    out[t] = (bias + sum_j w[j] x[t - W + 1 + j]) (projection(x))[t] + x[t]      W taps, depthwise

BASED's form has more channels than the sequence, a map before and one behind:

    u, v   = in_proj(x)                                            E channels each
    out[t] = out_proj(silu(sum_j w[j] u[t - W + 1 + j]) v[t])

Both directions centre the taps. Letters: B batch, L length, D channels, E inner channels, W taps.
Parameter names are those of zoology's `BaseConv` with a short kernel, and of BASED's.

Source: Arora et al. 2023, arXiv 2312.04927, section 4; BASED's form as in its code
(HazyResearch/based, based/models/mixers/convolution.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.conv import causal_conv1d, causal_conv1d_step, symmetric_conv1d
from .base import Mixer, State, register_mixer, with_state
from .hyena_filter import toeplitz
from .matrix_state import check_sizes


class _BaseConvBase(Mixer):
    def __init__(
        self,
        d_model: int,
        *,
        kernel_size: int = 3,
        skip: bool = True,
        expand: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = d_model if expand is None else round(expand * d_model)
        check_sizes({"d_model": d_model, "kernel_size": kernel_size, "expand * d_model": inner})
        if not self.causal and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.d_model, self.kernel_size, self.skip = d_model, kernel_size, skip
        self.inner = inner
        dd = {"device": device, "dtype": dtype}
        if expand is None:
            self.projection = nn.Linear(d_model, d_model, **dd)
        else:
            self.in_proj = nn.Linear(d_model, 2 * inner, **dd)
        plain = expand is None
        taps = nn.Conv1d(inner, inner, kernel_size, groups=inner, bias=plain, **dd)
        self.conv = nn.ModuleDict({"conv": taps})
        self.out_proj = None if plain else nn.Linear(inner, d_model, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        (self.projection if self.out_proj is None else self.in_proj).reset_parameters()
        self._conv.reset_parameters()
        if self.out_proj is not None:
            self.out_proj.reset_parameters()

    @property
    def _conv(self) -> nn.Conv1d:
        conv = self.conv["conv"]
        assert isinstance(conv, nn.Conv1d)
        return conv

    def _taps(self) -> tuple[Tensor, Tensor | None, str | None]:
        """Taps (E, W), their bias, and what follows the convolution."""
        activation = None if self.out_proj is None else "silu"
        return self._conv.weight.squeeze(1), self._conv.bias, activation

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is convolved, and what it is multiplied by."""
        if self.out_proj is None:
            return x, self.projection(x)
        u, v = self.in_proj(x).chunk(2, -1)
        return u, v

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        if self.out_proj is not None:
            y = self.out_proj(y)
        return y + x.to(y.dtype) if self.skip else y

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        u, v = self._split(x)
        if not self.causal:
            c = symmetric_conv1d(u, *self._taps(), cu_seqlens=cu_seqlens)
            return self._out(c.to(v.dtype) * v, x), None
        convolved = causal_conv1d(
            u,
            *self._taps(),
            initial_state=None if state is None else state["conv"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        c, conv = with_state(convolved)
        dtype = computing_dtype(self._conv.weight)
        y = self._out(c.to(v.dtype) * v, x)
        return y, None if conv is None else {"conv": conv.to(dtype)}

    def _linear(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution without bias and activation, and what multiplies its outputs then."""
        weight, _, activation = self._taps()
        c = (causal_conv1d if self.causal else symmetric_conv1d)(u, weight)
        return c, torch.ones_like(c) if activation is None else F.sigmoid(c)

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: what is convolved, and the outputs without the convolution's bias."""
        u, v = self._split(x)
        c, gate = self._linear(u)
        y = c * gate * v
        if self.skip and self.out_proj is None:
            y = y + x
        return u.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        y, bias = outputs.squeeze(-1).transpose(1, 2), self._conv.bias
        return self._out(y, x) if bias is None else y + bias * self.projection(x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: a band of taps, each row times what multiplies its token."""
        u, v = self._split(x)
        weight, length = self._taps()[0], x.shape[1]
        left = self.kernel_size - 1 if self.causal else (self.kernel_size - 1) // 2
        band = toeplitz(weight[:, : left + 1].flip(1), length)
        # lag 0 is a tap of the past already
        ahead = torch.cat([torch.zeros_like(weight[:, :1]), weight[:, left + 1 :]], 1)
        band = band + toeplitz(ahead, length).mT
        matrix = (self._linear(u)[1] * v).transpose(1, 2).unsqueeze(-1) * band
        if not self.skip or self.out_proj is not None:
            return matrix
        return matrix + torch.eye(length, dtype=matrix.dtype, device=x.device)


@register_mixer(
    "base_conv",
    primitive="causal_conv1d",
    paper="Arora et al. 2023, arXiv 2312.04927",
    reference="zoology BaseConv",
    parity="6e-8 (float32); BASED's form 2e-15 (float64), in its whole stack",
)
class BaseConv(_BaseConvBase):
    """BaseConv with a short kernel: causal; its state is the convolution's last W - 1 inputs.

    Args:
        d_model: Channels D of the sequence.
        kernel_size: Taps W.
        skip: Add the input, as zoology's layer does.
        expand: Inner channels E = expand * d_model of BASED's form, which is 2 there, with `skip`
            False; None is zoology's layer.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    causal = True
    recurrent = True

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the last W - 1 inputs."""
        dtype = computing_dtype(self._conv.weight)
        return {"conv": ((self.kernel_size - 1, self.inner), dtype)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        u, v = self._split(x)
        c = causal_conv1d_step(u, state["conv"], *self._taps())
        return self._out(c.to(v.dtype) * v, x), state


@register_mixer(
    "base_conv_bidirectional",
    primitive="symmetric_conv1d",
    paper="Arora et al. 2023, arXiv 2312.04927",
    parity="8e-8 (float32; equations)",
)
class BidirectionalBaseConv(_BaseConvBase):
    """BaseConv with centred taps; arguments as `BaseConv`, `kernel_size` odd."""

    causal = False
