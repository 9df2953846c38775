"""The kernels of Hyena: a small network with sines for activations draws them under a window.

    tap i = f(z[i]) exp(-t |delta|)     t = i / (K - 1); z[i] = [t, cos, -sin of multiples of i]

Letters: C channels, K taps, L length. Names of parameters are those of safari's `HyenaFilter`.

Source: Poli et al. 2023, arXiv 2302.10866, section 3.3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import computing_dtype, without_autocast
from .matrix_state import keep_from_decay

# the window of the slowest and of the fastest channel falls to this at l_max times their share
FALLS_TO = 1e-2
# of the positional code: its multiples of the longest wave are to change slowly
POSITION_LR = 1e-5


class Sine(nn.Module):
    """sin(freq x), with a learned frequency for every channel."""

    def __init__(
        self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.empty(1, dim, device=device, dtype=dtype))


class PositionalCode(nn.Module):
    """z[i], (1, K, emb_dim), learned from cosines and sines on."""

    def __init__(
        self, emb_dim: int, l_max: int, device: torch.device | str | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.empty(1, l_max, emb_dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Write the code: place, cosines, negative sines."""
        _, count, emb_dim = self.z.shape
        options = {"device": self.z.device, "dtype": torch.float64}
        waves = torch.linspace(1e-4, (emb_dim - 1) // 2 - 1, (emb_dim - 1) // 2, **options)
        angle = waves * (2 * math.pi / count) * torch.arange(count, **options).unsqueeze(1)
        place = torch.linspace(0, 1, count, **options).unsqueeze(1)
        with torch.no_grad():
            self.z.copy_(torch.cat([place, angle.cos(), -angle.sin()], 1).unsqueeze(0))


class HyenaFilter(nn.Module):
    """Draws the kernels of C channels, and holds their weight of lag 0, `bias`.

    Args:
        channels: Channels C.
        emb_dim: Channels of the positional code, odd and at least 3.
        l_max: Taps K.
        width: Channels of the network's inner layers.
        depth: Inner layers of the network.
        frequency: Of its sines, at initialisation.
        decay_range: Shares of K after which the windows of the fastest and of the slowest channel
            have fallen to 1 %.
        two_sided: Draw taps of the future as well.
        device: Of the parameters.
        dtype: Of the parameters; the positional code keeps at least float32.
    """

    def __init__(
        self,
        channels: int,
        *,
        emb_dim: int,
        l_max: int,
        width: int,
        depth: int,
        frequency: float,
        decay_range: tuple[float, float],
        two_sided: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.frequency, self.decay_range, self.depth = frequency, decay_range, depth
        dd = {"device": device, "dtype": dtype}
        full = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.bias = nn.Parameter(torch.empty(channels, **dd))
        self.pos_emb = PositionalCode(emb_dim, l_max, device, full)

        def network() -> nn.ModuleDict:
            """Layers under the numbers that they have in safari's sequence."""
            layers: dict[str, nn.Module] = {"0": nn.Linear(emb_dim, width, **dd)}
            layers["1"] = Sine(width, device, dtype)
            for i in range(depth):
                layers[str(2 * i + 2)] = nn.Linear(width, width, **dd)
            layers[str(2 * depth + 2)] = nn.Linear(width, channels, bias=False, **dd)
            return nn.ModuleDict(layers)

        self.implicit_filter = network()
        self.implicit_filter_rev = network() if two_sided else None

    def reset_parameters(self) -> None:
        """Draw every parameter anew and mark them: none decays, and the code learns slowly."""
        nn.init.normal_(self.bias)
        self.pos_emb.reset_parameters()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, Sine):
                nn.init.constant_(module.freq, self.frequency)
        keep_from_decay(*self.parameters())
        self.pos_emb.z._optim = {"lr": POSITION_LR, "weight_decay": 0.0}  # type: ignore[attr-defined]

    def _rates(self, like: Tensor) -> Tensor:
        """|delta|, (C,)."""
        fast, slow = self.decay_range
        options = {"device": like.device, "dtype": like.dtype}
        target = -math.log(FALLS_TO)
        return torch.linspace(target / slow, target / fast, self.bias.shape[0], **options)

    def _taps(self, network: nn.ModuleDict, length: int) -> Tensor:
        count = self.pos_emb.z.shape[1]
        dtype = computing_dtype(self.pos_emb.z, self.bias)
        z = self.pos_emb.z[0, :length].to(dtype)
        sine = network["1"]
        assert isinstance(sine, Sine)
        freq = sine.freq.to(dtype)
        # positions of a thousand places do not fit into 16 bits
        with without_autocast(z):
            h = z
            for i in range(0, 2 * self.depth + 4, 2):
                layer = network[str(i)]
                assert isinstance(layer, nn.Linear)
                bias = None if layer.bias is None else layer.bias.to(dtype)
                h = F.linear(h, layer.weight.to(dtype), bias)
                if bias is not None:
                    h = torch.sin(freq * h)
            place = torch.linspace(0, 1, count, device=z.device, dtype=dtype)[:length]
            return (h * torch.exp(-place.unsqueeze(1) * self._rates(z))).t()

    def forward(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The kernels' first taps, (C, min(length, K)): of the past, and of the future or None."""
        back = self.implicit_filter_rev
        past = self._taps(self.implicit_filter, length)
        return past, None if back is None else self._taps(back, length)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Take safari's: a frequency under every sine's number, and two constants."""
        for i in range(1, self.depth + 1):
            state_dict.pop(f"{prefix}implicit_filter.{2 * i + 1}.freq", None)
        state_dict.pop(f"{prefix}pos_emb.t", None)
        deltas = state_dict.pop(f"{prefix}modulation.deltas", None)
        if deltas is not None:
            rates = self._rates(deltas)
            if deltas.numel() != rates.numel() or not torch.allclose(deltas.abs().flatten(), rates):
                error_msgs.append(f"{prefix}modulation.deltas are not those of {self.decay_range}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def toeplitz(taps: Tensor, length: int) -> Tensor:
    """The matrix that convolves with `taps` (C, K), (C, L, L): entry (t, s) is tap t - s."""
    place = torch.arange(length, device=taps.device)
    lag = place.unsqueeze(1) - place
    inside = (lag >= 0) & (lag < taps.shape[1])
    return torch.where(inside, taps[:, lag.clamp(0, taps.shape[1] - 1)], 0.0)
