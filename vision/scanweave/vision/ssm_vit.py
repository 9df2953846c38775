"""SSM-ViT: a plain stack of any mixer over patches, read along any path. One argument away.

    x <- x + mixer(rms_norm(x)), tokens read in the order of the layer's path
    x <- x + mlp(rms_norm(x)), only with mlp_ratio > 0

Not from a paper: a ViT (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929) whose attention
and MLP are replaced by mixers, as Vim does, made for comparing mixers and paths at equal terms. No
class token and mean pooling, so that no mixer or path is favoured by a token's place.

    timm.create_model("ssm_vit_tiny_patch16_224", mixer="hydra", path="hilbert")

A mixer that is not causal reads every layer's tokens along one direction of the path, and sees all
of them. A causal one sees only what comes earlier on the path: "raster" runs it as it is, and every
kind with reversed directions ("bidirectional", "cross", "hilbert", ...) in two, in turns from layer
to layer; directions never share a layer, nor its parameters.

    SsmVit                     the model
    checkpoint_filter_fn       what timm applies to a state dict before it loads it
    ssm_vit_*, test_ssm_vit    entry points, registered with timm
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from .configs import patch_cfg
from .isotropic import IsotropicModel
from .loading import fit_state_dict

__all__ = ["SsmVit"]


class SsmVit(IsotropicModel):
    """Plain stack of one mixer; arguments and methods are those of `IsotropicModel`."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: SsmVit) -> dict[str, Tensor]:
    """Make a checkpoint fit `model`, see `fit_state_dict`.

    Args:
        state_dict: Of this family, with or without head, alone or in a training checkpoint.
        model: What will load it.

    Returns:
        The state dict to load, strictly.

    Raises:
        ValueError: the checkpoint is of another model or mixer, or its position grid is unknown.
    """
    return fit_state_dict(state_dict, model, "SsmVit")


def _create_ssm_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> SsmVit:
    out_indices = kwargs.pop("out_indices", 3)
    plain = {"class_token": False, "global_pool": "avg"}
    if kwargs.get("class_token"):
        plain["global_pool"] = "token"
    return build_model_with_cfg(
        SsmVit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**plain, **kwargs},
    )


default_cfgs = generate_default_cfgs(
    {
        "ssm_vit_tiny_patch16_224.untrained": patch_cfg(),
        "ssm_vit_small_patch16_224.untrained": patch_cfg(),
        "ssm_vit_base_patch16_224.untrained": patch_cfg(),
        "test_ssm_vit.untrained": patch_cfg(input_size=(3, 160, 160), crop_pct=0.95),
    }
)


@register_model
def ssm_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> SsmVit:
    """D = 192, 24 layers; 7.1 M parameters with bimamba."""
    args: dict[str, Any] = {"embed_dim": 192, "depth": 24}
    return _create_ssm_vit("ssm_vit_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def ssm_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> SsmVit:
    """D = 384, 24 layers; 25.8 M parameters with bimamba."""
    args: dict[str, Any] = {"embed_dim": 384, "depth": 24}
    return _create_ssm_vit("ssm_vit_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def ssm_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> SsmVit:
    """D = 768, 24 layers; 97.6 M parameters with bimamba."""
    args: dict[str, Any] = {"embed_dim": 768, "depth": 24}
    return _create_ssm_vit("ssm_vit_base_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def test_ssm_vit(pretrained: bool = False, **kwargs: Any) -> SsmVit:  # noqa: PT028
    """A small model for tests, along a path of four directions."""
    args: dict[str, Any] = {"embed_dim": 64, "depth": 4, "path": "cross"}
    return _create_ssm_vit("test_ssm_vit", pretrained, **{**args, **kwargs})
