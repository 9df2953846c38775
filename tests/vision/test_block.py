"""The residual layer and its scripted form."""

import pytest
import torch

from scanweave.core import list_mixers
from scanweave.vision.block import MixerBlock


@pytest.mark.parametrize("mixer", list_mixers(causal=False))
def test_block_takes_every_mixer(mixer: str) -> None:
    """X + mixer(norm(x)), and out_proj shrunk by sqrt(depth) where there is one."""
    block = MixerBlock(32, mixer).eval()
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(block(x), x + block.mixer(block.norm(x)))
    out_proj = getattr(block.mixer, "out_proj", None)
    before = None if out_proj is None else out_proj.weight.clone()
    block.init_weights(depth=16, needs_reset=False)
    if before is not None:
        torch.testing.assert_close(out_proj.weight, before / 4)


def test_init_after_reset_is_a_fresh_draw() -> None:
    """`needs_reset` draws norm and mixer again, then scales."""
    block = MixerBlock(32, "bimamba")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    block.init_weights(depth=4)
    assert all(torch.isfinite(p).all() for p in block.parameters())
    assert block.mixer.out_proj.weight.abs().max() <= 64**-0.5 / 2


def test_drop_path_drops_the_mixer() -> None:
    """At rate 1 - eps the stream passes unchanged in training, and not in evaluation."""
    block = MixerBlock(16, "bimamba", drop_path=0.9999999).train()
    x = torch.randn(4, 5, 16)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


# torch deprecates TorchScript, which timm users still export with
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("mixer", "arguments"),
    [
        ("bimamba", {}),
        ("bimamba", {"average": False, "d_state": 3, "d_conv": 2}),
        ("bimamba", {"bias": True, "conv_bias": False}),
        ("hydra", {}),
        ("hydra", {"ngroups": 2, "headdim": 6, "d_state": 5, "d_conv": 3, "bias": True}),
        ("hydra", {"dt_limit": (0.01, 0.05), "conv_bias": False, "A_init_range": (1.0, 16.0)}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scripted_block_equals_eager(
    mixer: str, arguments: dict[str, object], dtype: torch.dtype, tmp_path: object
) -> None:
    """Outputs and every gradient; also after saving and loading."""
    block = MixerBlock(24, mixer, arguments, dtype=dtype)
    x = torch.randn(2, 9, 24, dtype=dtype, requires_grad=True)
    scripted = torch.jit.script(block)
    path = f"{tmp_path}/block.pt"
    torch.jit.save(scripted, path)
    limit = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-10, 1e-10)}[dtype]
    expected = block(x)
    torch.testing.assert_close(torch.jit.load(path)(x), expected, rtol=limit[0], atol=limit[1])
    inputs = [x, *block.parameters()]
    cotangent = torch.randn_like(expected)
    got = torch.autograd.grad(scripted(x), inputs, cotangent)
    want = torch.autograd.grad(expected, inputs, cotangent)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=limit[0], atol=limit[1])


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_scripting_another_mixer_names_the_reason() -> None:
    """Only bimamba and hydra have a scripted form."""
    with pytest.raises(RuntimeError, match="has no attribute"):
        torch.jit.script(MixerBlock(32, "attention_bidirectional"))
