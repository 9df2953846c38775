"""The controls: attention against PyTorch's layer, gated CNNs against timm's block of MambaOut."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scanweave.core import Mixer, create_mixer

Check = Callable[..., None]


def gradients(mixer: Mixer, y: Tensor, x: Tensor, g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *mixer.parameters()], g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["attention", "attention_bidirectional"])
def test_attention_equals_pytorch(assert_near: Check, name: str, dtype: torch.dtype):
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, dtype=dtype)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.5)
    ours = create_mixer(name, 16, num_heads=4, dtype=dtype)
    names = {n: n.replace("in_proj.", "in_proj_") for n, _ in ours.named_parameters()}
    ours.load_state_dict({n: theirs.get_parameter(t) for n, t in names.items()}, strict=True)
    x = torch.randn(2, 23, 16, dtype=dtype, requires_grad=True)
    later = torch.ones(23, 23, dtype=torch.bool).triu(1) if ours.causal else None
    expected, _ = theirs(x, x, x, attn_mask=later, need_weights=False)
    actual, g = ours(x), torch.randn_like(x)
    assert_near(actual, expected, factor=0.2)
    wanted = torch.autograd.grad(expected, [x, *map(theirs.get_parameter, names.values())], g)
    for a, e in zip(gradients(ours, actual, x, g), wanted, strict=True):
        assert_near(a, e, gradient=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("name", ["gated_cnn", "gated_cnn_bidirectional"])
def test_gated_cnn_equals_timm(assert_near: Check, name: str, ratio: float, dtype: torch.dtype):
    """On an image of one row, the middle row of its filters; no taps ahead if causal."""
    pytest.importorskip("timm")
    from timm.models.mambaout import GatedConvBlock

    theirs = GatedConvBlock(12, kernel_size=7, conv_ratio=ratio, dtype=dtype)
    theirs.norm = nn.Identity()  # it is the block's, not the mixer's
    taps = 4 if name == "gated_cnn" else 7
    with torch.no_grad():
        theirs.conv.weight[..., taps:] = 0
    ours = create_mixer(name, 12, conv_ratio=ratio, kernel_size=taps, dtype=dtype)
    weights = {n: v for n, v in theirs.state_dict().items() if n != "conv.weight"}
    weights["conv.weight"] = theirs.conv.weight.detach()[:, :, 3, :taps]
    ours.load_state_dict(weights, strict=True)
    x = torch.randn(2, 23, 12, dtype=dtype, requires_grad=True)
    expected = (theirs(x.unsqueeze(1)) - x.unsqueeze(1)).squeeze(1)
    actual, g = ours(x), torch.randn_like(x)
    assert_near(actual, expected, factor=0.2)
    parts = dict(theirs.named_parameters())
    own = [parts[n] for n, _ in ours.named_parameters()]
    for a, e in zip(
        gradients(ours, actual, x, g), torch.autograd.grad(expected, [x, *own], g), strict=True
    ):
        if e.ndim == 4:
            e = e[:, :, 3, :taps]
        assert_near(a, e, gradient=True)
