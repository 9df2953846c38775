"""Patches of any stride, the class token's place, position tables."""

from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch._subclasses.fake_tensor import FakeTensorMode

from scanweave.vision import embed as code
from scanweave.vision.embed import (
    PatchEmbed,
    class_index,
    insert_token,
    resample_pos_embed,
    split_token,
)


def _embed(**kwargs: Any) -> PatchEmbed:
    return PatchEmbed(**{"img_size": 32, "patch_size": 8, "embed_dim": 6, **kwargs})


@pytest.mark.parametrize(
    ("size", "patch", "stride", "grid"),
    [
        (224, 16, None, (14, 14)),
        (224, 16, 8, (27, 27)),
        ((64, 96), 16, 16, (4, 6)),
        ((65, 97), (16, 8), (16, 4), (4, 23)),
        (16, 16, 8, (1, 1)),
        (32, 4, 6, (5, 5)),
    ],
)
def test_grid_is_that_of_the_convolution(
    size: int | tuple[int, int],
    patch: int | tuple[int, int],
    stride: int | None,
    grid: tuple[int, int],
) -> None:
    """Counted and measured; a token holds the pixels of its own patch."""
    embed = _embed(img_size=size, patch_size=patch, stride=stride)
    assert embed.grid_size == grid
    assert embed.num_patches == grid[0] * grid[1]
    x = torch.randn(2, 3, *embed.img_size)
    tokens = embed(x)
    assert tokens.shape == (2, grid[0] * grid[1], 6)
    top, left = (grid[0] - 1) * embed.stride[0], (grid[1] - 1) * embed.stride[1]
    last = x[:, :, top : top + embed.patch_size[0], left : left + embed.patch_size[1]]
    expected = torch.einsum("bchw,dchw->bd", last, embed.proj.weight) + embed.proj.bias
    torch.testing.assert_close(tokens[:, -1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [8, 5, (3, 10)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_product_is_the_convolution(
    stride: int | tuple[int, int], layout: torch.memory_format
) -> None:
    """Tokens and every gradient of what runs on a GPU, and its dtype under autocast."""
    embed = _embed(img_size=(34, 29), stride=stride, in_chans=2).double()
    x = torch.randn(2, 2, 34, 29, dtype=torch.float64).contiguous(memory_format=layout)
    x.requires_grad_()
    inputs = [x, *embed.parameters()]
    wanted, found = embed(x), embed._projected(x)
    torch.testing.assert_close(found, wanted)
    g = torch.randn_like(wanted)
    grads = (torch.autograd.grad(y, inputs, g) for y in (found, wanted))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)
    half = embed.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = half._projected(x.detach().float())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, rtol=0.02, atol=0.02)


def test_where_the_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers see it for a GPU; programs that are written for other runtimes, tracers do not."""
    module = _embed()
    with FakeTensorMode():
        x = torch.empty(2, 3, 32, 32, device="cuda")
    assert not module._as_product(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(code, "exporting", lambda: False)
    assert module._as_product(x)
    assert not module._as_product(torch.empty(2, 3, 32, 32))
    hook = module.proj.register_forward_hook(lambda *_: None)
    assert not module._as_product(x)
    hook.remove()
    monkeypatch.setattr(code, "exporting", lambda: True)
    assert not module._as_product(x)


@pytest.mark.gpu
def test_product_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless somebody watches the convolution, or has put another in its place."""
    embed = _embed().cuda()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    wanted = embed.cpu()(x.cpu())
    torch.testing.assert_close(embed.cuda()(x).cpu(), wanted, rtol=1e-3, atol=1e-3)
    calls = []
    monkeypatch.setattr(embed, "_projected", lambda x: calls.append(1))
    embed(x)
    assert calls == [1]
    embed.proj.register_forward_hook(lambda *_: None)
    assert embed(x) is not None
    assert calls == [1]


@pytest.mark.parametrize("size", [(32, 32), (33, 39), (40, 8), (8, 9)])
def test_padding_covers_the_image(size: tuple[int, int]) -> None:
    """With `dynamic_img_pad` every pixel is read, and the announced grid is the real one."""
    embed = _embed(stride=4, strict_img_size=False, dynamic_img_pad=True)
    x = torch.randn(1, 3, *size, requires_grad=True)
    tokens = embed(x)
    high, wide = embed.dynamic_feat_size(size)
    assert tokens.shape == (1, high * wide, 6)
    tokens.square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "patch_size must be one or two positive integers, got 0"),
        ({"stride": (8, -1)}, r"stride must be one or two positive integers, got \(8, -1\)"),
        ({"img_size": (32, 32, 32)}, "img_size must be one or two positive integers"),
        ({"img_size": (32, 7)}, r"img_size must be at least patch_size \(8, 8\), got \(32, 7\)"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    """At creation."""
    with pytest.raises(ValueError, match=message):
        _embed(**arguments)


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (1, 3, 32, 24), "image width must be 32, got 24; see img_size"),
        ({}, (1, 4, 32, 32), "image must have 3 channels, got 4"),
        ({}, (3, 32, 32), "image must be .B, C, H, W"),
        ({"strict_img_size": False}, (1, 3, 36, 32), "height must be 8 . a multiple of 8, got 36"),
        ({"strict_img_size": False}, (1, 3, 32, 35), "width must be 8 . a multiple of 8, got 35"),
        ({"strict_img_size": False}, (1, 3, 7, 32), "image height must be >= 8, got 7"),
        ({"strict_img_size": False}, (1, 3, 32, 7), "image width must be >= 8, got 7"),
    ],
)
def test_bad_images_are_refused(
    arguments: dict[str, Any], shape: tuple[int, ...], message: str
) -> None:
    """By `torch._assert`, which tracing keeps."""
    with pytest.raises(AssertionError, match=message):
        _embed(**arguments)(torch.zeros(shape))


def test_set_input_size() -> None:
    """Overlapping patches keep their stride, others follow the patch size."""
    embed = _embed()
    embed.set_input_size(img_size=(40, 48), patch_size=4)
    assert (embed.stride, embed.grid_size) == ((4, 4), (10, 12))
    assert embed(torch.zeros(1, 3, 40, 48)).shape == (1, 120, 6)
    assert embed.feat_ratio() == 4
    embed.set_input_size(stride=2)
    embed.set_input_size(patch_size=6)
    assert (embed.stride, embed.grid_size) == ((2, 2), (18, 22))
    assert embed(torch.zeros(1, 3, 40, 48)).shape == (1, 18 * 22, 6)
    assert embed.feat_ratio(as_scalar=False) == (2, 2)


@pytest.mark.parametrize(("position", "index"), [("middle", 2), ("first", 0), ("last", 5)])
def test_token_goes_in_and_out(position: str, index: int) -> None:
    """Insert, then split, is where it started; the official middle is M // 2."""
    assert class_index(5, position) == index
    x, token = torch.randn(2, 5, 3), torch.randn(1, 1, 3)
    both = insert_token(x, token, index)
    assert torch.equal(both[:, index], token[:, 0].expand(2, -1))
    out, rest = split_token(both, index)
    assert torch.equal(out, token.expand(2, -1, -1))
    assert torch.equal(rest, x)


@pytest.mark.parametrize("position", ["middle", "first", "last", ""])
@pytest.mark.parametrize("antialias", [False, True])
def test_class_row_is_not_part_of_the_grid(position: str, antialias: bool) -> None:
    """Patches are interpolated as timm does, the class row moves unchanged."""
    patches, row = torch.randn(1, 4 * 6, 8), torch.randn(1, 1, 8)
    table = insert_token(patches, row, class_index(24, position)) if position else patches
    out = resample_pos_embed(table, [3, 5], [4, 6], position, antialias)
    expected = resample_abs_pos_embed(patches, [3, 5], [4, 6], 0, antialias=antialias)
    if position:
        kept, out = split_token(out, class_index(15, position))
        assert torch.equal(kept, row)
    torch.testing.assert_close(out, expected)


def test_same_grid_changes_nothing() -> None:
    """And a transposed grid of equal size does."""
    table = torch.randn(1, 25, 8)
    assert torch.equal(resample_pos_embed(table, [4, 6], [4, 6], "middle"), table)
    assert not torch.equal(resample_pos_embed(table, [6, 4], [4, 6], "middle"), table)
