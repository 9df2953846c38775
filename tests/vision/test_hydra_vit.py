"""Hydra-ViT: configurations, names, any image size, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scanweave.vision import HydraVit, SsmVit
from scanweave.vision.hydra_vit import checkpoint_filter_fn

SMALL = {"embed_dim": 32, "depth": 2, "num_classes": 5}


def _small(**kwargs: Any) -> HydraVit:
    return timm.create_model("test_hydra_vit", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [
        ("hydra_vit_tiny_patch16_224", {}, 7_076_632),
        ("hydra_vit_small_patch16_224", {}, 24_941_128),
        ("hydra_vit_base_patch16_224", {}, 93_184_168),
        ("hydra_vit_base_patch16_224", {"depth": 12, "mlp_ratio": 4}, 103_950_664),
    ],
)
def test_parameter_counts(name: str, arguments: dict[str, Any], count: int) -> None:
    """The counts that README quotes, and the paper's mixer: N = 64, P = 64, 7 taps."""
    model = timm.create_model(name, device="meta", **arguments)
    assert sum(p.numel() for p in model.parameters()) == count
    mixer = model.layers[0].mixer
    assert (mixer.d_state, mixer.headdim, mixer.d_conv) == (64, 64, 7)
    assert mixer.d_inner == 2 * model.embed_dim
    assert {"pos_embed", "cls_token"}.isdisjoint(model.state_dict())


def test_one_layer_of_the_base_model_has_the_official_count() -> None:
    """3,825,224 parameters in the official block of width 768."""
    model = timm.create_model("hydra_vit_base_patch16_224", device="meta")
    assert sum(p.numel() for p in model.layers[0].mixer.parameters()) == 3_825_224


def test_mixer_has_the_official_names(goldens: Path) -> None:
    """An official block's state dict loads strictly into every layer."""
    tensors = load_file(goldens / "hydra_mixer_defaults.safetensors")
    weights = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
    model = _small(embed_dim=weights["out_proj.weight"].shape[0])
    for layer in model.layers:
        layer.mixer.load_state_dict(weights, strict=True)
    got = model.layers[1].mixer(tensors["input"])
    torch.testing.assert_close(got, tensors["output"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (16, 16)])
def test_any_image_size(size: tuple[int, int]) -> None:
    """No positions: what the patches divide is taken, and images do not see each other."""
    model, x = _small(), _image(2, 3, *size)
    alone = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-5)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert maps[-1].shape == (2, 32, size[0] // 16, size[1] // 16)


def test_every_token_sees_every_token() -> None:
    """Both directions are at work in one layer."""
    model, x = _small(depth=1).double(), _image(1, 3, 48, 48).double().requires_grad_()
    for token in (0, 4, 8):
        (grad,) = torch.autograd.grad(model.forward_features(x)[0, token].sum(), x)
        assert (grad.abs().amax(1).unfold(1, 16, 16).unfold(2, 16, 16).amax((-1, -2)) > 0).all()


def test_positions_and_class_token_are_options() -> None:
    """As in Vim: learned positions, which then are resized, and a token to pool."""
    model = _small(pos_embed="learn", class_token=True, img_size=64)
    assert (model.global_pool, model.pos_embed.shape) == ("token", (1, 17, 32))
    assert model(_image(1, 3, 96, 48)).shape == (1, 5)


@pytest.mark.parametrize("train", [False, True])
def test_compiles_as_one_graph(train: bool) -> None:
    """Without graph breaks, with the same values."""
    model, x = _small().train(train), _image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_half_precision_at_depth_24() -> None:
    """Autocast and a converted model stay finite and near float32."""
    model, x = _small(depth=24), _image()
    with torch.no_grad():
        expected = model.forward_features(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model.forward_features(x).float()
        converted = model.to(torch.bfloat16).forward_features(x.bfloat16()).float()
    for features in (cast, converted):
        assert torch.isfinite(features).all()
        assert (features - expected).norm() < 2e-2 * expected.norm()


def test_weight_decay_spares_decays_steps_and_skips() -> None:
    """By name, as timm asks."""
    names = _small(depth=1).no_weight_decay()
    assert names == {f"layers.0.mixer.{n}" for n in ("A_log", "D", "dt_bias")}


def test_checkpoints(tmp_path: Path) -> None:
    """Wrapped ones and safetensors load strictly, those of another model are named."""
    source, target = _small(), _small()
    target.load_state_dict(checkpoint_filter_fn({"model_ema": source.state_dict()}, target))
    x = _image()
    assert torch.equal(target(x), source(x))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 5}
    again = _small(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(again(x), source(x))
    vim = timm.create_model("test_vim", **SMALL).state_dict()
    with pytest.raises(ValueError, match="state_dict must be of a HydraVit with this mixer"):
        checkpoint_filter_fn(vim, target)


def test_same_mixer_in_the_plain_family() -> None:
    """`ssm_vit` with this mixer has the same layers."""
    plain: SsmVit = timm.create_model("test_ssm_vit", mixer="hydra", path="raster", **SMALL)
    model = _small()
    plain.layers.load_state_dict(model.layers.state_dict(), strict=True)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(plain.layers[0](x), model.layers[0](x))
