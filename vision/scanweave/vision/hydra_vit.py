"""Hydra-ViT: a ViT whose attention and MLPs are replaced by Hydra, twice as many layers.

Paper: Hwang et al. 2024, Hydra: Bidirectional State Space Models Through Generalized Matrix
Mixers, https://arxiv.org/abs/2407.09941. The official code, MIT, has the mixer, whose parameter
names these are, but neither its ImageNet model nor weights of it:
https://github.com/goombalab/hydra/tree/55bef74

    x <- x + hydra(rms_norm(x)), 24 layers; mean over patches; linear classifier

The paper puts Hydra with its default arguments into a ViT-B without class token and positions, and
reports 91 M parameters. 12 layers with MLPs of ratio 4 would have 104 M, 24 layers without MLPs
have 93 M (its language model has 23 for BERT's 12). So `hydra_vit_base_patch16_224` is an inference
from the numbers; `depth=12, mlp_ratio=4` makes the other one.

    HydraVit                     the model
    checkpoint_filter_fn         what timm applies to a state dict before it loads it
    hydra_vit_*, test_hydra_vit  entry points, registered with timm
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from .configs import patch_cfg
from .isotropic import IsotropicModel
from .loading import fit_state_dict

__all__ = ["HydraVit"]


class HydraVit(IsotropicModel):
    """Hydra on patches; arguments and methods are those of `IsotropicModel`."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: HydraVit) -> dict[str, Tensor]:
    """Make a checkpoint fit `model`, see `fit_state_dict`.

    Args:
        state_dict: Of this family, with or without head, alone or in a training checkpoint; its
            mixers have the official names.
        model: What will load it.

    Returns:
        The state dict to load, strictly.

    Raises:
        ValueError: the checkpoint is of another model, or its position grid is unknown.
    """
    return fit_state_dict(state_dict, model, "HydraVit")


def _create_hydra_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> HydraVit:
    out_indices = kwargs.pop("out_indices", 3)
    # without positions nothing depends on the image size
    plain: dict[str, Any] = {
        "mixer": "hydra",
        "class_token": False,
        "global_pool": "token" if kwargs.get("class_token") else "avg",
        "pos_embed": "none",
        "dynamic_img_size": True,
    }
    return build_model_with_cfg(
        HydraVit,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**plain, **kwargs},
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    paper = {
        "fixed_input_size": False,
        "paper_ids": "arXiv:2407.09941",
        "paper_name": "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers",
        "origin_url": "https://github.com/goombalab/hydra",
    }
    return patch_cfg(**{**paper, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "hydra_vit_tiny_patch16_224.untrained": _cfg(),
        "hydra_vit_small_patch16_224.untrained": _cfg(),
        "hydra_vit_base_patch16_224.untrained": _cfg(),
        "test_hydra_vit.untrained": _cfg(input_size=(3, 160, 160), crop_pct=0.95),
    }
)


@register_model
def hydra_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> HydraVit:
    """D = 192, 24 layers."""
    args: dict[str, Any] = {"embed_dim": 192, "depth": 24}
    return _create_hydra_vit("hydra_vit_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def hydra_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> HydraVit:
    """D = 384, 24 layers."""
    args: dict[str, Any] = {"embed_dim": 384, "depth": 24}
    return _create_hydra_vit("hydra_vit_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def hydra_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> HydraVit:
    """D = 768, 24 layers: the paper's ImageNet model, as far as its numbers tell."""
    args: dict[str, Any] = {"embed_dim": 768, "depth": 24}
    return _create_hydra_vit("hydra_vit_base_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def test_hydra_vit(pretrained: bool = False, **kwargs: Any) -> HydraVit:  # noqa: PT028
    """A small model for tests."""
    args: dict[str, Any] = {"embed_dim": 64, "depth": 4}
    return _create_hydra_vit("test_hydra_vit", pretrained, **{**args, **kwargs})
