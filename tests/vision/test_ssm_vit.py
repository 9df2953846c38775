"""SSM-ViT: every mixer along every path, and what a path means."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from scanweave.core import grid_paths, list_mixers
from scanweave.vision import SsmVit
from scanweave.vision.ssm_vit import checkpoint_filter_fn

SMALL = {"embed_dim": 32, "depth": 4, "img_size": 64, "num_classes": 5}


def _small(**kwargs: Any) -> SsmVit:
    return timm.create_model("test_ssm_vit", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("ssm_vit_tiny_patch16_224", 7_147_624),
        ("ssm_vit_small_patch16_224", 25_795_816),
        ("ssm_vit_base_patch16_224", 97_596_904),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    """The counts that README quotes: those of Vim without class token and its position."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.num_prefix_tokens, model.global_pool, model.path) == (0, "avg", "raster")


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_is_a_backbone(mixer: str) -> None:
    """One argument away: logits, gradients of every parameter, maps."""
    model = _small(mixer=mixer).train()
    x = _image()
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 4


@pytest.mark.parametrize("mixer", ["mamba", "hydra"])
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(
    ("path", "window"), [("serpentine", None), ("hilbert", None), ("window", 2), ("raster", None)]
)
def test_layers_take_turns_on_the_path(
    mixer: str, token: bool, path: str, window: int | None
) -> None:
    """The stream is what mixers give that read hand-permuted sequences; 3 x 5 patches."""
    model = _small(mixer=mixer, path=path, window=window, img_size=(48, 80), class_token=token)
    x = _image(2, 3, 48, 80)
    stream = model._embed(x)
    directions = grid_paths(3, 5, path, window=window).long()
    for i, layer in enumerate(model.layers):
        y = layer.norm(stream)
        direction = directions[i % len(directions)]
        patches = [t for t in range(y.shape[1]) if not (token and t == 7)]
        read = y.clone()
        read[:, patches] = y[:, torch.tensor(patches)[direction]]
        mixed = layer.mixer(read)
        back = mixed.clone()
        back[:, torch.tensor(patches)[direction]] = mixed[:, patches]
        stream = stream + back
    torch.testing.assert_close(model.forward_features(x), model.norm_f(stream))


def _reached(model: SsmVit, image: Tensor) -> Tensor:
    """Which of the 16 patches the first patch's feature depends on."""
    image.requires_grad_()
    model.forward_features(image)[0, 0].sum().backward()
    assert image.grad is not None
    return image.grad.abs().amax(1).unfold(1, 16, 16).unfold(2, 16, 16).amax((-1, -2)).flatten() > 0


def test_causal_mixers_run_as_they_are_or_in_two_directions() -> None:
    """The first patch sees itself along "raster", everything along a path that also turns back."""
    alone = torch.arange(16) == 0
    assert torch.equal(_reached(_small(mixer="mamba", path="raster"), _image(1, 3, 64, 64)), alone)
    assert _reached(_small(mixer="mamba", path="bidirectional"), _image(1, 3, 64, 64)).all()
    assert _reached(_small(mixer="bimamba", path="raster"), _image(1, 3, 64, 64)).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_path_follows_dynamic_image_sizes(compiled: bool) -> None:
    """As `set_input_size` does once; also in one compiled graph."""
    dynamic = _small(dynamic_img_size=True, path="hilbert")
    run = torch.compile(dynamic, fullgraph=True, backend="aot_eager") if compiled else dynamic
    for size in ((96, 48), (64, 64), (64, 96)):
        x = _image(2, 3, *size)
        fixed = _small(path="hilbert")
        fixed.load_state_dict(dynamic.state_dict())
        fixed.set_input_size(size)
        with torch.no_grad():
            torch.testing.assert_close(run(x), fixed(x))


@pytest.mark.parametrize("mixer", ["mamba", "attention_bidirectional"])
def test_compiles_and_exports(mixer: str) -> None:
    """One graph, with the path as a constant; a batch of any size in an exported program."""
    model, x = _small(mixer=mixer), _image()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        dim = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(
            model, (_image(3, 3, 64, 64),), dynamic_shapes={"x": {0: dim}}
        )
        torch.testing.assert_close(program.module()(x), expected)


def test_mlp_is_trained_and_shrunk() -> None:
    """After the mixer, on its own norm, scaled like the mixer's way out."""
    model = _small(mlp_ratio=2.0, depth=4, embed_dim=64)
    mlp = model.layers[0].mlp
    assert mlp.fc1.weight.shape == (128, 64)
    assert 0.9 * 128**-0.5 / 2 < mlp.fc2.weight.abs().max() <= 128**-0.5 / 2
    layer, x = model.layers[0], torch.randn(2, 7, 64)
    mixed = x + layer.mixer(layer.norm(x))
    torch.testing.assert_close(layer(x), mixed + mlp(layer.norm2(mixed)))
    assert not any("mlp" in name or "norm2" in name for name in _small().state_dict())


def test_orders_are_no_weights_and_move_with_the_model() -> None:
    """Not in the state dict, whole after `to_empty`, integers after `.to(bfloat16)`."""
    model = _small()
    assert "orders" not in model.state_dict()
    empty = timm.create_model("test_ssm_vit", device="meta", **SMALL).to_empty(device="cpu")
    empty.orders.fill_(-1)
    empty.init_weights()
    assert torch.equal(empty.orders, model.orders)
    assert model.to(torch.bfloat16).orders.dtype == torch.int64
    assert model(_image().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mixer": "nope"}, ValueError, "mixer must be one of attention, .*, got 'nope'"),
        ({"path": "nope"}, ValueError, "kind must be one of raster, .*window, got 'nope'"),
        ({"path": "window"}, ValueError, "window must be given for kind 'window'"),
        ({"mixer": "hydra", "dt_rank": 3}, TypeError, "mixer 'hydra' does not take dt_rank"),
        ({"mixer_args": {"nope": 1}}, TypeError, "mixer 'bimamba' does not take nope"),
        ({"mlp_ratio": -1.0}, ValueError, "mlp_ratio must be at least 0, got -1.0"),
        ({"img_size": 8}, ValueError, "img_size must be at least patch_size"),
        ({"global_pool": "token"}, ValueError, "global_pool must be .* without class_token"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """At creation, with what may be given instead."""
    with pytest.raises(error, match=message):
        _small(**arguments)


def test_wrong_images_are_refused() -> None:
    """Of another size, and of a size that patches do not divide."""
    with pytest.raises(AssertionError, match="image height must be 64, got 48"):
        _small()(_image(1, 3, 48, 64))
    with pytest.raises(AssertionError, match=r"width must be 16 \+ a multiple of 16, got 65"):
        _small(dynamic_img_size=True)(_image(1, 3, 64, 65))


def test_checkpoints_of_other_mixers_are_refused() -> None:
    """Ours pass and are resized; another mixer's are named."""
    source, target = _small(), _small(img_size=96)
    target.load_state_dict(checkpoint_filter_fn({"model": source.state_dict()}, target))
    assert target.pos_embed.shape == (1, 36, 32)
    with pytest.raises(ValueError, match="state_dict must be of a SsmVit with this mixer"):
        checkpoint_filter_fn(_small(mixer="hydra").state_dict(), target)


@pytest.mark.parametrize("mixer", list_mixers())
def test_half_precision_at_depth_24(mixer: str) -> None:
    """Autocast stays finite, whatever the mixer."""
    model = _small(mixer=mixer, depth=24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(_image(1, 3, 64, 64))).all()
