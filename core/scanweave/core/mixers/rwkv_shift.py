"""Token shift: what the RWKV family sees of a token's neighbours, and its initial values.

    causal            the token before, of the same sequence (0 before the first, or the state's)
    both directions   in the first half of the channels the token before, in the rest the one after

Letters: B batch, L length, D channels, S packed sequences, Z inputs of the projections.
Source: Peng et al. 2023 (RWKV), arXiv 2305.13048, section 3.1; halves: Duan et al. 2024
(Vision-RWKV), arXiv 2403.02308, its Q-Shift along one axis.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.conv import causal_conv1d, symmetric_conv1d


def token_before(
    x: Tensor, before: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Every token's predecessor, and the last token of every sequence.

    Args:
        x: Tokens, (B, L, D).
        before: Token before the first one, (B, D), or (S, D) when packed; 0 when absent.
        cu_seqlens: Starts of packed sequences, (S + 1,).

    Returns:
        Predecessors (B, L, D), and last tokens (B, D) or (S, D): `before` where there is none.
    """
    if cu_seqlens is not None:
        taps = F.pad(x.new_ones(x.shape[-1], 1), (0, 1))
        shifted, last = causal_conv1d(
            *(x, taps),
            initial_state=None if before is None else before.unsqueeze(1),
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        return shifted, last.squeeze(1)
    if before is None:
        longer = F.pad(x, (0, 0, 1, 0))
    else:
        longer = torch.cat([before.to(x.dtype).unsqueeze(1), x], 1)
    return longer[:, :-1], longer[:, -1]


def tokens_around(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Half of the channels of the token before, the rest of the token after, 0 past the ends."""
    first = (x.shape[-1] + 1) // 2
    if cu_seqlens is None:
        longer = F.pad(x, (0, 0, 1, 1))
        return torch.cat([longer[:, :-2, :first], longer[:, 2:, first:]], -1)
    back = (torch.arange(x.shape[-1], device=x.device) < first).to(x.dtype)
    taps = torch.stack([back, torch.zeros_like(back), 1 - back], -1)
    return symmetric_conv1d(x, taps, cu_seqlens=cu_seqlens)


def mixed(x: Tensor, near: Tensor, shares: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Share x + (1 - share) near, for every share (1, 1, D): Z tensors shaped as x."""
    stacked = torch.stack([s.flatten() for s in shares])
    stacked = stacked.unflatten(0, (-1, *(1,) * (x.ndim - 1)))
    return (near + (x - near) * stacked).unbind(0)


def check_layer(layer: int, num_layers: int) -> None:
    """Raise unless `layer` is one of `num_layers`."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer must be from 0 to num_layers - 1 = {num_layers - 1}, got {layer}")


def depths(layer: int, num_layers: int) -> tuple[float, float]:
    """How deep a layer lies, from 0 to 1, and how much of the stack follows, from 1 to 1 / n."""
    return layer / max(num_layers - 1, 1), 1 - layer / num_layers


def fill_shares(share: nn.Parameter, power: float, more: float = 0.0) -> None:
    """Fill (1, 1, D) with (i / D)^power + more."""
    size = share.numel()
    ramp = torch.arange(size, device=share.device, dtype=torch.float64) / size
    with torch.no_grad():
        share.copy_((ramp**power + more).view_as(share))


def ramp_of(like: Tensor) -> Tensor:
    """Flat values i / (n - 1), as many as `like` has, float64."""
    size = like.numel()
    return torch.arange(size, device=like.device, dtype=torch.float64) / max(size - 1, 1)


def fill_decays(decay: nn.Parameter, low: float, span: float, depth: float) -> None:
    """Fill with low + span (i / (n - 1))^(0.7 + 1.3 depth), the logarithm of -log decay."""
    with torch.no_grad():
        decay.copy_((low + span * ramp_of(decay) ** (0.7 + 1.3 * depth)).view_as(decay))


def learn_faster(*rates: tuple[nn.Parameter, float]) -> None:
    """Mark parameters with factors of their learning rate, which decays have when published."""
    for p, scale in rates:
        p._optim = {"lr_scale": scale}  # type: ignore[attr-defined]


def zigzag_of(like: Tensor) -> Tensor:
    """0, 1, -1, 0, 1, -1, ... as many as `like` has values, flat."""
    count = torch.arange(like.numel(), device=like.device)
    return ((count + 1) % 3 - 1).to(torch.float64)


def renamed(state_dict: dict[str, Tensor], prefix: str, names: Mapping[str, str]) -> None:
    """Rename entries of a state dict in place; "1 - name" says that shares are complements."""
    for old, new in names.items():
        if prefix + old in state_dict:
            value = state_dict.pop(prefix + old)
            complement = new.startswith("1 - ")
            state_dict[prefix + new.removeprefix("1 - ")] = 1 - value if complement else value
