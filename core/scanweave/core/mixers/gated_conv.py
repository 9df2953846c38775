"""BaseConv: a convolution times a projection, the simplest gated convolution.

    out[t] = (bias + sum_j w[j] x[t - W + 1 + j]) (projection(x))[t] + x[t]      W taps, depthwise

Both directions centre the taps. Letters: B batch, L length, D channels, W taps. Parameter names are
those of zoology's `BaseConv` with a short kernel.
"""

import torch
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes({"d_model": d_model, "kernel_size": kernel_size})
        if not self.causal and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.d_model, self.kernel_size, self.skip = d_model, kernel_size, skip
        dd = {"device": device, "dtype": dtype}
        self.projection = nn.Linear(d_model, d_model, **dd)
        taps = nn.Conv1d(d_model, d_model, kernel_size, groups=d_model, **dd)
        self.conv = nn.ModuleDict({"conv": taps})

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.projection.reset_parameters()
        self._conv.reset_parameters()

    @property
    def _conv(self) -> nn.Conv1d:
        conv = self.conv["conv"]
        assert isinstance(conv, nn.Conv1d)
        return conv

    def _taps(self) -> tuple[Tensor, Tensor]:
        bias = self._conv.bias
        assert bias is not None
        return self._conv.weight.squeeze(1), bias

    def _gate(self, c: Tensor, x: Tensor) -> Tensor:
        p = self.projection(x)
        y = c.to(p.dtype) * p
        return y + x.to(p.dtype) if self.skip else y

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if not self.causal:
            return self._gate(symmetric_conv1d(x, *self._taps(), cu_seqlens=cu_seqlens), x), None
        convolved = causal_conv1d(
            x,
            *self._taps(),
            initial_state=None if state is None else state["conv"],
            cu_seqlens=cu_seqlens,
            return_final_state=return_state,
        )
        c, conv = with_state(convolved)
        dtype = computing_dtype(self.projection.weight)
        return self._gate(c, x), None if conv is None else {"conv": conv.to(dtype)}

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the inputs, and the outputs without the convolution's bias."""
        weight, bias = self._taps()
        conv = causal_conv1d if self.causal else symmetric_conv1d
        y = self._gate(conv(x, weight, torch.zeros_like(bias)), x)
        return x.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        y = outputs.squeeze(-1).transpose(1, 2)
        return y + self._taps()[1] * self.projection(x)

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: a band of taps, each row times its token's projection."""
        weight, length = self._taps()[0], x.shape[1]
        left = self.kernel_size - 1 if self.causal else (self.kernel_size - 1) // 2
        band = toeplitz(weight[:, : left + 1].flip(1), length)
        # lag 0 is a tap of the past already
        ahead = torch.cat([torch.zeros_like(weight[:, :1]), weight[:, left + 1 :]], 1)
        band = band + toeplitz(ahead, length).mT
        matrix = self.projection(x).transpose(1, 2).unsqueeze(-1) * band
        if not self.skip:
            return matrix
        return matrix + torch.eye(length, dtype=matrix.dtype, device=x.device)


@register_mixer(
    "base_conv",
    primitive="causal_conv1d",
    paper="Arora et al. 2023, arXiv 2312.04927",
    reference="zoology BaseConv",
    parity="6e-8 (float32)",
)
class BaseConv(_BaseConvBase):
    """BaseConv with a short kernel: causal; its state is the convolution's last W - 1 inputs.

    Args:
        d_model: Channels D of the sequence.
        kernel_size: Taps W.
        skip: Add the input, as zoology's layer does.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    causal = True
    recurrent = True

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the last W - 1 inputs."""
        dtype = computing_dtype(self.projection.weight)
        return {"conv": ((self.kernel_size - 1, self.d_model), dtype)}

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if torch.is_grad_enabled():
            return super().step(x, state)
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        self._check_state(state, x, None)
        return self._gate(causal_conv1d_step(x, state["conv"], *self._taps()), x), state


@register_mixer(
    "base_conv_bidirectional",
    primitive="symmetric_conv1d",
    paper="Arora et al. 2023, arXiv 2312.04927",
    parity="8e-8 (float32; equations)",
)
class BidirectionalBaseConv(_BaseConvBase):
    """BaseConv with centred taps; arguments as `BaseConv`, `kernel_size` odd."""

    causal = False
