"""Mamba-Reg: registers among the patches, their positions, their neck."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from scanweave.vision import Vim
from scanweave.vision.embed import class_rows, insert_tokens, split_tokens
from scanweave.vision.vim import checkpoint_filter_fn

SMALL = {"embed_dim": 32, "depth": 2, "img_size": 64, "num_classes": 5}


def _small(**kwargs: Any) -> Vim:
    return timm.create_model("test_mambar", **{**SMALL, **kwargs}).eval()


@pytest.mark.parametrize("patches", [196, 16, 15, 4, 2])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_registers_stand_evenly(patches: int, count: int) -> None:
    """One after every M // (n + 1) patches; in and out again."""
    step = patches // (count + 1)
    rows = class_rows(patches, "even", count)
    assert rows == list(range(step, step * (count + 1) + count, step + 1))[:count]
    x, tokens = torch.randn(2, patches, 3), torch.randn(1, count, 3)
    both = insert_tokens(x, tokens, rows)
    assert torch.equal(both[:, rows], tokens.expand(2, -1, -1))
    out, rest = split_tokens(both, rows)
    assert torch.equal(out, tokens.expand(2, -1, -1))
    assert torch.equal(rest, x)


@pytest.mark.parametrize(
    ("name", "depth", "width", "registers", "reduce"),
    [
        ("mambar_tiny_patch16_224", 24, 192, 12, 1),
        ("mambar_small_patch16_224", 24, 384, 12, 2),
        ("mambar_base_patch16_224", 24, 768, 12, 4),
        ("mambar_large_patch16_224", 48, 1024, 16, 8),
    ],
)
def test_published_names_and_shapes(
    name: str, depth: int, width: int, registers: int, reduce: int
) -> None:
    """Tables, neck and head of the released models; layers are Vim's."""
    state = timm.create_model(name, device="meta").state_dict()
    outside = {k: tuple(v.shape) for k, v in state.items() if not k.startswith("layers.")}
    joined = registers * width // reduce
    expected = {
        "cls_token": (1, registers, width),
        "pos_embed": (1, 196, width),
        "pos_embed_cls": (1, registers, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm_f.weight": (width,),
        "head.weight": (1000, joined),
        "head.bias": (1000,),
    }
    if reduce > 1:
        expected |= {"neck.weight": (width // reduce, width), "norm_neck.weight": (joined,)}
    assert outside == expected
    assert f"layers.{depth - 1}.mixer.A_b_log" in state
    assert f"layers.{depth}.norm.weight" not in state


def _by_hand(model: Vim, image: Tensor) -> Tensor:
    patches = model.patch_embed(image) + model.pos_embed
    tokens = (model.cls_token + model.pos_embed_cls).expand(len(image), -1, -1)
    # 16 patches, 3 registers: one after every fourth patch
    parts = [t for i in range(3) for t in (patches[:, 4 * i : 4 * i + 4], tokens[:, i : i + 1])]
    x = torch.cat([*parts, patches[:, 12:]], 1)
    for layer in model.layers:
        x = x + layer.mixer(layer.norm(x))
    x = model.norm_f(x)[:, [4, 9, 14]]
    x = torch.cat([model.neck(x[:, i]) for i in range(3)], 1)
    return model.head(model.norm_neck(x))


def test_logits_are_those_of_the_description() -> None:
    """Patches get positions, registers theirs, and the joined registers are classified."""
    model, x = _small(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), _by_hand(model, x))
    taps = model.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    assert [(m.shape, t.shape) for m, t in taps] == [((2, 32, 4, 4), (2, 3, 32))] * 2


def test_pool_decides_on_the_neck() -> None:
    """Means of patches need none; going back makes a new one, with the head to match."""
    model, x = _small(), torch.randn(2, 3, 64, 64)
    assert (model.head_hidden_size, model.forward_head(x=model.forward_features(x)).shape) == (
        48,
        (2, 5),
    )
    model.reset_classifier(7, "avg")
    assert (model.head_hidden_size, model(x).shape) == (32, (2, 7))
    assert not any("neck" in name for name in model.state_dict())
    model.reset_classifier(7, "token")
    model.reset_classifier(0)
    assert (model.head_hidden_size, model(x).shape) == (48, (2, 48))
    plain = _small(num_classes=0)
    features = plain.forward_features(x)
    assert plain.head_hidden_size == 32
    torch.testing.assert_close(plain(x), features[:, [4, 9, 14]].mean(1))
    plain.reset_classifier(7)
    assert (plain.head_hidden_size, plain(x).shape) == (48, (2, 7))


@pytest.mark.parametrize("path", ["raster", "cross"])
def test_sizes_are_free(path: str) -> None:
    """Dynamic sizes, set sizes and resized checkpoints agree; registers keep their tables."""
    source = _small(path=path, dynamic_img_size=True)
    target = _small(path=path, img_size=(48, 80))
    target.load_state_dict(checkpoint_filter_fn({"model": source.state_dict()}, target))
    assert torch.equal(target.pos_embed_cls, source.pos_embed_cls)
    x = torch.randn(2, 3, 48, 80)
    torch.testing.assert_close(source(x), target(x))
    again = _small(path=path)
    again.load_state_dict(source.state_dict())
    again.set_input_size((48, 80))
    torch.testing.assert_close(again(x), target(x))


def test_no_weight_decay_on_tables() -> None:
    """Registers and their positions are exempt."""
    assert {"cls_token", "pos_embed", "pos_embed_cls"} <= _small().no_weight_decay()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"registers": 1}, "registers must be 0, or at least 2 with class_token=True, got 1"),
        ({"registers": -2}, "registers must be 0, or at least 2 .*, got -2"),
        ({"class_token": False}, "registers must be 0, .* with class_token=False"),
        ({"register_reduce": 3}, "register_reduce must divide embed_dim 32, got 3"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """At creation."""
    with pytest.raises(ValueError, match=message):
        _small(**arguments)
