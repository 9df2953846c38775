"""The bidirectional block of Graph Mamba Networks to the letter of its algorithm.

SeparateBiMamba   two complete Mamba blocks, one for each direction, and a common last layer
"""

import torch
from torch import Tensor, nn

from scanweave.core import Mixer, MixerInfo, create_mixer

from .packing import mirrored

State = dict[str, Tensor]


class SeparateBiMamba(Mixer):
    """out = W (mamba_f(x) + reversed mamba_b(reversed x)): nothing is shared but W.

    The default mixer, `bimamba`, shares the projections and the gate, as the paper's figure has
    it; this is its algorithm, at nearly twice the parameters. Layers take it by the name
    `"bimamba_separate"`.

    Args:
        d_model: Channels D of the sequence.
        d_state: State N a channel.
        d_conv: Taps W of the convolutions.
        expand: Inner channels E = expand * d_model.
        device: Of the parameters.
        dtype: Of the parameters.

    Source: Behrouz & Hashemi 2024, arXiv 2402.08678, algorithm 2.
    """

    causal = False
    recurrent = False
    info = MixerInfo(
        name="bimamba_separate",
        primitive="selective_scan",
        causal=False,
        recurrent=False,
        paper="Behrouz & Hashemi 2024, arXiv 2402.08678",
        reference="",
    )

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        sizes = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.forth = create_mixer("mamba", d_model, **sizes, device=device, dtype=dtype)
        self.back = create_mixer("mamba", d_model, **sizes, device=device, dtype=dtype)
        self.out = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in (self.forth, self.back, self.out):
            module.reset_parameters()

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        mirror = mirrored(x.size(1), cu_seqlens, x.device)
        back = self.back(x.index_select(1, mirror), cu_seqlens=cu_seqlens)
        return self.out(self.forth(x, cu_seqlens=cu_seqlens) + back.index_select(1, mirror)), None
