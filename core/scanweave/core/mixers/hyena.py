"""Hyena: long convolutions with kernels that a small network draws, between products with gates.

    x[0], ..., x[n-1], v = short_filter(in_proj(x))        depthwise, W taps; n = order
    v   = k[j] * (v x[n-1-j]) + bias[j] (v x[n-1-j])       for j = 0 ... n - 2; * convolves
    out = out_proj(v x[0])

A network draws the kernels k (`hyena_filter.py`). Both directions: a second one draws the taps of
the future, and the W taps are centred.

Letters: B batch, L length, D channels, W taps, n order, K = l_max taps of a kernel, S packed
sequences. Parameter names are those of safari's `HyenaOperator` (standalone_hyena.py).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.checks import check_cu_seqlens_values
from ..ops.conv import causal_conv1d, symmetric_conv1d
from ..ops.long_conv import fft_conv
from .base import Mixer, State, register_mixer
from .hyena_filter import HyenaFilter, toeplitz
from .matrix_state import check_sizes


def _moved(v: Tensor, steps: Tensor | None) -> Tensor:
    """Rows (B, T, C) moved to the right by `steps` (B,), zeros coming in; None moves nothing."""
    if steps is None:
        return v
    place = torch.arange(v.shape[1], device=v.device) - steps.unsqueeze(1)
    moved = v.gather(1, place.clamp(min=0).unsqueeze(-1).expand_as(v))
    return torch.where((place >= 0).unsqueeze(-1), moved, 0.0)


class _HyenaBase(Mixer):
    def __init__(
        self,
        d_model: int,
        *,
        order: int = 2,
        l_max: int = 1024,
        d_conv: int = 3,
        emb_dim: int = 3,
        filter_width: int = 64,
        filter_depth: int = 2,
        frequency: float = 1.0,
        decay_range: tuple[float, float] = (0.3, 1.5),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "l_max": l_max, "d_conv": d_conv}
        check_sizes(sizes | {"filter_width": filter_width})
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim must be odd and at least 3, got {emb_dim}")
        if filter_depth < 0:
            raise ValueError(f"filter_depth must be at least 0, got {filter_depth}")
        if not 0 < decay_range[0] <= decay_range[1]:
            raise ValueError(f"decay_range must be (fast, slow) above 0, got {decay_range}")
        if not self.causal and d_conv % 2 == 0:
            raise ValueError(f"d_conv must be odd, got {d_conv}")
        self.d_model, self.order, self.l_max, self.d_conv = d_model, order, l_max, d_conv
        dd = {"device": device, "dtype": dtype}
        width = (order + 1) * d_model
        self.in_proj = nn.Linear(d_model, width, **dd)
        self.short_filter = nn.Conv1d(width, width, d_conv, groups=width, **dd)
        self.filter_fn = HyenaFilter(
            (order - 1) * d_model,
            emb_dim=emb_dim,
            l_max=l_max,
            width=filter_width,
            depth=filter_depth,
            frequency=frequency,
            decay_range=decay_range,
            two_sided=not self.causal,
            **dd,
        )
        self.out_proj = nn.Linear(d_model, d_model, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for part in (self.in_proj, self.short_filter, self.filter_fn, self.out_proj):
            part.reset_parameters()

    def _project(self, x: Tensor, conv: Tensor | None, real: Tensor | None) -> tuple[Tensor, ...]:
        """What the short filter reads, (B, L, (n + 1) D), and the gates and values it returns."""
        u = self.in_proj(x)
        weight, bias = self.short_filter.weight.squeeze(1), self.short_filter.bias
        if self.causal:
            return u, *causal_conv1d(u, weight, bias, initial_state=conv).split(self.d_model, -1)
        if real is not None:
            u = u.masked_fill(~real, 0)  # padding's bias
        return u, *symmetric_conv1d(u, weight, bias).split(self.d_model, -1)

    def _convolve(
        self, gates: Sequence[Tensor], v: Tensor, past: Tensor | None, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Values after all products and convolutions, and what the convolutions read.

        Args:
            gates: x[0] ... x[n-1], (B, L, D).
            v: Values, (B, L, D).
            past: What they read before, (B, T, (n - 1) D).
            real: True at real tokens, (B, L, 1); None is all.
        """
        before = 0 if past is None else past.shape[1]
        # no tap for no token has no gradient
        kernel, back = self.filter_fn(before + v.shape[1] or 1)
        kernels = kernel.split(self.d_model)
        backs = (None,) * len(kernels) if back is None else back.split(self.d_model)
        biases = self.filter_fn.bias.split(self.d_model)
        pasts = (None,) * len(kernels) if past is None else past.split(self.d_model, -1)
        v, read = v * gates[-1], []
        for j, gate in enumerate(reversed(gates[:-1])):
            if real is not None and not self.causal:
                v = v.masked_fill(~real, 0)
            earlier = pasts[j]
            if earlier is not None:
                v = torch.cat([earlier.to(v.dtype), v], 1)
            read.append(v)
            if earlier is None:
                v = fft_conv(v, kernels[j], biases[j], gate, kernel_back=backs[j])
            else:
                v = fft_conv(v, kernels[j], biases[j])[:, before:] * gate
        return v, torch.cat(read, -1)

    def _mix_rows(
        self, x: Tensor, state: State | None, real: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """`forward` over rows whose real tokens, where `real` (B, L) is True, come first."""
        lengths = None
        if real is not None:
            lengths, real = real.sum(1), real.unsqueeze(-1)
            x = x.masked_fill(~real, 0)
        conv = None if state is None else state["conv"]
        u, *gates, v = self._project(x, conv, real)
        y, read = self._convolve(gates, v, None if state is None else state["past"], real)
        y = self.out_proj(y)
        if not return_state:
            return y, None
        missing = None if lengths is None else x.shape[1] - lengths
        if conv is None:
            conv = u.new_zeros(u.shape[0], self.d_conv - 1, u.shape[2])
        taps = _moved(torch.cat([conv.to(u.dtype), u], 1), missing)
        read = _moved(read, missing)
        return y, {
            "conv": taps[:, taps.shape[1] - self.d_conv + 1 :],
            "past": read[:, max(read.shape[1] - self.l_max + 1, 0) :],
        }

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        if cu_seqlens is None:
            return self._mix_rows(x, state, None, return_state)
        check_cu_seqlens_values(cu_seqlens, x.shape[1])
        if x.shape[1] == 0:
            if state is None and return_state:
                state = self.init_state(cu_seqlens.shape[0] - 1, device=x.device)
            return x, state
        # a transform cannot stop at borders: rows as long as the longest sequence
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        place = torch.arange(int(lengths.max()), device=x.device)
        real = place < lengths.unsqueeze(1)
        token = (starts.unsqueeze(1) + place).clamp(max=x.shape[1] - 1)
        y, after = self._mix_rows(x[0, token], state, real, return_state)
        return y[real].unsqueeze(0), after

    def _mix_masked(
        self, x: Tensor, state: State | None, mask: Tensor, return_state: bool
    ) -> tuple[Tensor, State | None]:
        order = torch.argsort(~mask, dim=1, stable=True).unsqueeze(-1)
        rows = x.gather(1, order.expand_as(x))
        real = mask.gather(1, order.squeeze(-1))
        y, after = self._mix_rows(rows, state, real, return_state)
        y = y.gather(1, torch.argsort(order, dim=1).expand_as(y))
        return y.masked_fill(~mask.unsqueeze(-1), 0), after

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: the values v and what goes into out_proj, a channel each."""
        _, *gates, v = self._project(x, None, None)
        y, _ = self._convolve(gates, v, None, None)
        return v.transpose(1, 2).unsqueeze(-1), y.transpose(1, 2).unsqueeze(-1)

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """See `Mixer.finish`."""
        return self.out_proj(outputs.squeeze(-1).transpose(1, 2))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: Toeplitz matrices between diagonal ones, a channel each.

        Source: Poli et al. 2023, arXiv 2302.10866, section 3.2.
        """
        _, *gates, _ = self._project(x, None, None)
        kernel, back = self.filter_fn(x.shape[1])
        steps = toeplitz(kernel, x.shape[1])
        if back is not None:
            steps = steps + toeplitz(back, x.shape[1]).mT
        steps = steps + torch.diag_embed(self.filter_fn.bias.unsqueeze(-1).expand(-1, x.shape[1]))
        *first, last = (gate.transpose(1, 2).to(steps.dtype) for gate in gates)
        matrix = torch.diag_embed(last)
        for step, gate in zip(steps.split(self.d_model), reversed(first), strict=True):
            matrix = gate.unsqueeze(-1) * (step @ matrix)
        return matrix


@register_mixer(
    "hyena",
    primitive="fft_conv",
    paper="Poli et al. 2023, arXiv 2302.10866",
    reference="safari HyenaOperator (standalone)",
    parity="3e-7 (float32)",
)
class Hyena(_HyenaBase):
    """The Hyena operator, causal. Its state, what the convolutions have read, grows up to l_max.

    Packed sequences are laid out as rows of the longest one's length.

    Args:
        d_model: Channels D of the sequence.
        order: Projections n that are multiplied; n - 1 long convolutions.
        l_max: Taps K of these: what lies further back is not read, however long the sequence.
        d_conv: Taps W of the short convolution.
        emb_dim: Channels of the kernels' positional code, odd.
        filter_width: Channels of the network that draws the kernels.
        filter_depth: Its inner layers.
        frequency: Of its sines, at initialisation; larger is less smooth.
        decay_range: Shares of l_max after which the window of the fastest and of the slowest
            channel has fallen to 1 %.
        device: Of the parameters.
        dtype: Of the parameters; the positional code keeps at least float32.

    Raises:
        ValueError: a size is too small, emb_dim is even, or decay_range is not a range above 0.
    """

    causal = True

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """`conv` (B, W - 1, (n + 1) D), the short filter's last inputs, and no past (B, 0, C)."""
        weight = self.in_proj.weight
        options = {"device": device or weight.device, "dtype": weight.dtype}
        width = (self.order + 1) * self.d_model
        return {
            "conv": torch.zeros(batch, self.d_conv - 1, width, **options),
            "past": torch.zeros(batch, 0, width - 2 * self.d_model, **options),
        }

    def _check_state(self, state: State, x: Tensor, cu_seqlens: Tensor | None) -> None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state.keys() != {"conv", "past"}:
            raise ValueError(f"state must hold ['conv', 'past'], got {sorted(state)}")
        width = (self.order + 1) * self.d_model
        before = state["past"].shape[1] if state["past"].ndim > 1 else 0
        for name, shape in (
            ("conv", (rows, self.d_conv - 1, width)),
            ("past", (rows, before, width - 2 * self.d_model)),
        ):
            if state[name].shape != shape:
                raise ValueError(f"state[{name!r}] must be {shape}, got {tuple(state[name].shape)}")


@register_mixer(
    "hyena_bidirectional",
    primitive="fft_conv",
    paper="Poli et al. 2023, arXiv 2302.10866",
    parity="1e-7 (float32; equations)",
)
class BidirectionalHyena(_HyenaBase):
    """Hyena with kernels to both sides; arguments as `Hyena`, `d_conv` odd.

    Lag 0 is a tap of both sides, as where safari's convolution is given a reversed kernel.
    """

    causal = False
