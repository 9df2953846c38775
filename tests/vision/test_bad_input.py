"""Bad input to every `test_*` model: refused, with a word on what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from tests.vision.registered import TEST_MODELS, layers, small, takes
from timm.models._builder import load_pretrained
from torch import Tensor, nn

from scanweave.vision import hydra_vit, ssm_vit, vim, vmamba
from scanweave.vision.loading import unwrapped

each = pytest.mark.parametrize("name", TEST_MODELS)
PATCHES = [name for name in TEST_MODELS if takes(name, "patch_size")]
FILTERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    module.__name__.rpartition(".")[2]: module.checkpoint_filter_fn
    for module in (vim, ssm_vit, hydra_vit, vmamba)
}


def checked(model: nn.Module, state: dict[str, Any]) -> dict[str, Tensor]:
    return FILTERS[type(model).__module__.rpartition(".")[2]](state, model)


@each
@pytest.mark.parametrize("channels", [1, 4])
def test_channels(name: str, channels: int) -> None:
    with pytest.raises(AssertionError, match=f"must have 3 channels, got {channels}; see in_chans"):
        small(name)(torch.zeros(1, channels, 64, 64))


@each
@pytest.mark.parametrize("shape", [(3, 64, 64), (64, 64), (1, 1, 3, 64, 64)])
def test_what_is_no_image(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match=r"image must be \(B, C, H, W\)"):
        small(name)(torch.zeros(shape))


@pytest.mark.parametrize("name", PATCHES)
def test_images_smaller_than_a_patch(name: str) -> None:
    """When the model is made, when its size changes, and in a model that takes any size."""
    rule = r"img_size must be at least patch_size \(16, 16\), got \(8, 64\)"
    with pytest.raises(ValueError, match=rule):
        timm.create_model(name, img_size=(8, 64))
    with pytest.raises(ValueError, match=rule):
        small(name).set_input_size((8, 64))
    model = small(name, dynamic_img_size=True)
    with pytest.raises(AssertionError, match="image height must be >= 16, got 8"):
        model(torch.zeros(1, 3, 8, 64))
    with pytest.raises(AssertionError, match="image width must be >= 16, got 15"):
        model(torch.zeros(1, 3, 64, 15))


@pytest.mark.parametrize("name", PATCHES)
def test_sizes_that_do_not_divide(name: str) -> None:
    """A model of one size names its size; one of any size names the padding."""
    model = small(name, dynamic_img_size=False)
    with pytest.raises(AssertionError, match="height must be 64, got 70; see img_size, set_input"):
        model(torch.zeros(1, 3, 70, 64))
    with pytest.raises(AssertionError, match="width must be 64, got 72; see img_size, set_input"):
        model(torch.zeros(1, 3, 64, 72))
    model = small(name, dynamic_img_size=True)
    with pytest.raises(AssertionError, match=r"must be 16 \+ a multiple of 16, got 70; see dynam"):
        model(torch.zeros(1, 3, 70, 64))
    with pytest.raises(AssertionError, match=r"must be 16 \+ a multiple of 16, got 72; see dynam"):
        model(torch.zeros(1, 3, 64, 72))


@pytest.mark.parametrize("name", PATCHES)
def test_unknown_mixers_and_paths(name: str) -> None:
    """With those that exist."""
    with pytest.raises(ValueError, match=r"mixer must be one of .*mamba2.*, got 'mamba9'"):
        timm.create_model(name, mixer="mamba9")
    with pytest.raises(ValueError, match=r"path and window .* one of .*hilbert.*, got 'up'"):
        timm.create_model(name, path="up")
    with pytest.raises(TypeError, match=r"does not take headz; it takes .*"):
        timm.create_model(name, mixer_args={"headz": 1})


@each
def test_unknown_arguments(name: str) -> None:
    """The constructor swallows nothing."""
    with pytest.raises(TypeError, match="embed_dimm"):
        timm.create_model(name, embed_dimm=1)


@each
@pytest.mark.parametrize("other", [*TEST_MODELS, "test_vit", "test_resnet"])
def test_checkpoints_of_other_models(name: str, other: str) -> None:
    """Every one by the filter, before torch lists hundreds of keys; the same family is not one."""
    model = small(name)
    state = timm.create_model(other, num_classes=5).state_dict()
    # registers and a class token have names of their own outside of the layers
    if other == name:
        assert checked(model, state).keys() == model.state_dict().keys()
        return
    own, theirs = (timm.create_model(n, num_classes=5) for n in (name, other))
    if {k: v.shape for k, v in own.named_parameters() if k.startswith("layers.")} == {
        k: v.shape for k, v in theirs.named_parameters() if k.startswith("layers.")
    }:
        # the same layers under other tokens: Vim's, those with registers, those without any
        with pytest.raises((ValueError, RuntimeError), match=r"must|Missing key|size mismatch"):
            model.load_state_dict(checked(model, state))
        return
    with pytest.raises(ValueError, match="state_dict must be of a "):
        checked(model, state)


@pytest.mark.parametrize("name", PATCHES)
def test_checkpoints_of_another_size(name: str) -> None:
    """Width and depth by name."""
    state = small(name, depth=3).state_dict()
    with pytest.raises(ValueError, match="must have 4 layers, got 3; see depth"):
        checked(small(name), state)
    with pytest.raises(ValueError, match=r"of this size: layers.0.\S+ must be .*, got .*"):
        checked(small(name), small(name, embed_dim=128).state_dict())


@each
@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", "state_dict_ema", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_checkpoints(name: str, key: str, prefix: str) -> None:
    """By the filter alone, as `load_state_dict` needs it."""
    model = small(name, **layers(name, 1, (1, 1)))
    inside = {prefix + k: v for k, v in model.state_dict().items()}
    out = checked(model, {key: inside, "epoch": 3} if key else inside)
    assert out.keys() == model.state_dict().keys()
    assert all(torch.equal(out[k], v) for k, v in model.state_dict().items())


def test_weights_come_before_their_average() -> None:
    first, second = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    assert unwrapped({"model_ema": second, "model": first})["a"] is first["a"]


@pytest.mark.parametrize("name", PATCHES)
def test_patches_of_another_size(name: str) -> None:
    """Kernels are resampled, as timm's are; positions follow the grid."""
    state = small(name).state_dict()
    model = small(name, patch_size=8)
    model.load_state_dict(checked(model, state))
    assert model.patch_embed.proj.weight.shape[2:] == (8, 8)
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()
    back = small(name)
    back.set_input_size(patch_size=8)
    torch.testing.assert_close(
        back.patch_embed.proj.weight.shape, model.patch_embed.proj.weight.shape
    )


@each
def test_a_head_of_other_classes(name: str, tmp_path: Any) -> None:
    """Through timm's loader the classifier is drawn anew; everything else is loaded."""
    source = small(name)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    other = small(name, num_classes=9)
    overlay = {**other.pretrained_cfg, "file": str(tmp_path / "weights.pth"), "num_classes": 5}
    load_pretrained(other, overlay, num_classes=9, filter_fn=checked_for(name))
    head = other.pretrained_cfg["classifier"]
    for key, value in other.state_dict().items():
        assert key.startswith(head) or torch.equal(value, source.state_dict()[key]), key


def checked_for(name: str) -> Callable[..., dict[str, Tensor]]:
    return lambda state, model: checked(model, state)
