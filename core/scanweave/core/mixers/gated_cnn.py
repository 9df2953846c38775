"""Gated CNN: Mamba's block without its scan, the control that every scan must beat.

    g, i, c = fc1(x)                            widths F, F - n, n ; F = expansion D, n = ratio F
    out     = fc2(gelu(g) * [i, conv(c)])       conv depthwise, W taps

Letters: B batch, L length, D model channels, F hidden channels, n convolved ones, W taps.

Source: Yu & Wang 2024 (MambaOut), arXiv 2405.07992, section 4, in one dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype
from ..ops.conv import causal_conv1d, symmetric_conv1d
from .base import Mixer, State, register_mixer, with_state


class _GatedCNNBase(Mixer):
    def __init__(
        self,
        d_model: int,
        *,
        expansion: float = 8 / 3,
        conv_ratio: float = 1.0,
        kernel_size: int = 7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = int(expansion * d_model)
        convolved = int(conv_ratio * d_model)
        if not 0 < convolved <= hidden:
            raise ValueError(
                f"conv_ratio * d_model must be from 1 to expansion * d_model = {hidden}, "
                f"got {convolved}"
            )
        if not self.causal and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.d_model, self.kernel_size = d_model, kernel_size
        self._widths = (hidden, hidden - convolved, convolved)
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(d_model, 2 * hidden, **dd)
        self.conv = nn.Conv1d(convolved, convolved, kernel_size, groups=convolved, **dd)
        self.fc2 = nn.Linear(hidden, d_model, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in (self.fc1, self.conv, self.fc2):
            module.reset_parameters()

    def _convolve(
        self, c: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, final: bool
    ) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.conv.weight.squeeze(1), self.conv.bias
        if not self.causal:
            return symmetric_conv1d(c, weight, bias, cu_seqlens=cu_seqlens), None
        convolved = causal_conv1d(
            c,
            weight,
            bias,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            return_final_state=final,
        )
        return with_state(convolved)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        g, i, c = self.fc1(x).split(self._widths, -1)
        before = None if state is None else state["conv"]
        c, conv = self._convolve(c, before, cu_seqlens, return_state)
        y = self.fc2(F.gelu(g) * torch.cat([i, c], -1))
        if conv is None:
            return y, None
        return y, {"conv": conv.to(computing_dtype(self.fc1.weight))}

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the convolution's inputs and outputs without bias."""
        c = self.fc1(x).split(self._widths, -1)[2]
        assert self.conv.bias is not None
        y = self._convolve(c, None, None, False)[0] - self.conv.bias
        return c.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        g, i, _ = self.fc1(x).split(self._widths, -1)
        assert self.conv.bias is not None
        c = outputs.squeeze(-1).transpose(1, 2) + self.conv.bias
        return self.fc2(F.gelu(g) * torch.cat([i, c], -1))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: the taps as a banded matrix, the same for every input."""
        batch, length, _ = x.shape
        taps = self.conv.weight.squeeze(1)
        left = self.kernel_size - 1 if self.causal else (self.kernel_size - 1) // 2
        lag = torch.arange(length, device=x.device)
        tap = lag - lag.unsqueeze(1) + left  # tap of column s in row t
        inside = (tap >= 0) & (tap < self.kernel_size)
        band = torch.where(inside, taps[:, tap.clamp(0, self.kernel_size - 1)], 0.0)
        return band.expand(batch, -1, -1, -1)


@register_mixer(
    "gated_cnn",
    primitive="causal_conv1d",
    paper="Yu & Wang 2024, arXiv 2405.07992",
    parity="3e-7 (float32), timm's GatedConvBlock on one row",
)
class GatedCNN(_GatedCNNBase):
    """Causal gated CNN; its state is the last W - 1 inputs of the convolution.

    Args:
        d_model: Channels D of the sequence.
        expansion: Hidden channels F = expansion * d_model.
        conv_ratio: Convolved channels n = conv_ratio * d_model.
        kernel_size: Taps W.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    causal = True
    recurrent = True

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`conv`, the last W - 1 inputs of the convolution."""
        shape = (self.kernel_size - 1, self._widths[2])
        return {"conv": (shape, computing_dtype(self.fc1.weight))}


@register_mixer(
    "gated_cnn_bidirectional",
    primitive="symmetric_conv1d",
    paper="Yu & Wang 2024, arXiv 2405.07992",
    parity="3e-7 (float32), timm's GatedConvBlock on one row",
)
class BidirectionalGatedCNN(_GatedCNNBase):
    """Gated CNN with centred taps; arguments as `GatedCNN`, `kernel_size` odd."""

    causal = False
