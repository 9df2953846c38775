"""Vim (Vision Mamba): patches and a class token in their middle through bidirectional Mamba blocks.

Paper: Zhu et al. 2024, Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model, https://arxiv.org/abs/2401.09417. Official code, Apache-2.0:
https://github.com/hustvl/Vim/blob/dd0358ad1e42701f22afbefa0717cc8825cf9f45/vim/models_mamba.py

    x <- x + mixer(rms_norm(x))      for every layer; there is no MLP

Parameter names are the official ones, so official state dicts load strictly. What differs from
the official code is numbered, with permalinks, in `vision/README.md`.

    Vim                    the model
    checkpoint_filter_fn   what timm applies to a state dict before it loads it
    vim_*, local_vim_*, mambar_*     entry points, registered with timm
"""

from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
)
from torch import Tensor

from .configs import patch_cfg
from .isotropic import IsotropicModel
from .loading import fit_state_dict
from .local import directions_of

__all__ = ["Vim"]


class Vim(IsotropicModel):
    """Vision Mamba; arguments and methods are those of `IsotropicModel`."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """Make a checkpoint fit `model`, see `fit_state_dict`.

    Args:
        state_dict: Of the official code or of ours, with or without head, alone or in a training
            checkpoint.
        model: What will load it.

    Returns:
        The state dict to load, strictly.

    Raises:
        ValueError: the checkpoint is of another model, or its position grid is unknown.
    """
    return fit_state_dict(state_dict, model, "Vim")


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        Vim,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    paper = {
        "crop_pct": 0.875,
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with "
        "Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
    }
    return patch_cfg(**{**paper, **kwargs})


def _local_cfg(**kwargs: Any) -> dict[str, Any]:
    paper = {
        "paper_ids": "arXiv:2403.09338",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "origin_url": "https://github.com/hunto/LocalMamba",
    }
    return _cfg(**{**paper, **kwargs})


# searched by LocalMamba's authors, layer by layer
_LOCAL_DIRECTIONS = directions_of(
    "h v_ w7 w7_, h_ w2_ w7 w7_, h h_ v w7, h h_ v v_, h h_ v v_,"
    "h h_ v v_, h_ v v_ w7, h_ v v_ w2_, h h_ v v_, h h_ v v_,"
    "h v v_ w2, h v v_ w2_, h h_ v_ w7, h_ v v_ w2, h h_ v v_,"
    "h v w2 w2_, v v_ w2 w7, h h_ v w2, h h_ w2_ w7, v v_ w2 w2_"
)


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.untrained": _cfg(),
        "vim_tiny_patch16_stride8_224.untrained": _cfg(),
        "vim_small_patch16_224.untrained": _cfg(),
        "vim_small_patch16_stride8_224.untrained": _cfg(),
        "vim_base_patch16_224.untrained": _cfg(),
        "vim_tiny_patch16_384.untrained": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "vim_small_patch16_384.untrained": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "vim_base_patch16_384.untrained": _cfg(input_size=(3, 384, 384), crop_pct=1.0),
        "local_vim_tiny_patch16_224.untrained": _local_cfg(),
        "local_vim_small_patch16_224.untrained": _local_cfg(),
        "local_vim_tiny_rope_patch16_224.untrained": _local_cfg(),
        "local_vim_small_rope_patch16_224.untrained": _local_cfg(),
        **{
            f"mambar_{size}_patch16_224.untrained": _cfg(
                crop_pct=1.0,
                paper_ids="arXiv:2405.14858",
                paper_name="Mamba-R: Vision Mamba ALSO Needs Registers",
                origin_url="https://github.com/wangf3014/Mamba-Reg",
            )
            for size in ("tiny", "small", "base", "large")
        },
        "test_mambar.untrained": _cfg(input_size=(3, 160, 160), crop_pct=1.0),
        "test_vim.untrained": _cfg(input_size=(3, 160, 160), crop_pct=0.95),
    }
)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 7.1 M parameters."""
    args: dict[str, Any] = {"embed_dim": 192, "depth": 24}
    return _create_vim("vim_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti with patches every 8 pixels, the fine-tuned Vim-Ti+ of the paper."""
    args: dict[str, Any] = {"stride": 8, "embed_dim": 192, "depth": 24}
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **{**args, **kwargs})


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 25.8 M parameters."""
    args: dict[str, Any] = {"embed_dim": 384, "depth": 24}
    return _create_vim("vim_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S with patches every 8 pixels, the fine-tuned Vim-S+ of the paper."""
    args: dict[str, Any] = {"stride": 8, "embed_dim": 384, "depth": 24}
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **{**args, **kwargs})


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 97.6 M parameters."""
    args: dict[str, Any] = {"embed_dim": 768, "depth": 24}
    return _create_vim("vim_base_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def vim_tiny_patch16_384(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti for images of 384 x 384, 577 tokens."""
    args: dict[str, Any] = {"img_size": 384, "embed_dim": 192, "depth": 24}
    return _create_vim("vim_tiny_patch16_384", pretrained, **{**args, **kwargs})


@register_model
def vim_small_patch16_384(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S for images of 384 x 384, 577 tokens."""
    args: dict[str, Any] = {"img_size": 384, "embed_dim": 384, "depth": 24}
    return _create_vim("vim_small_patch16_384", pretrained, **{**args, **kwargs})


@register_model
def vim_base_patch16_384(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B for images of 384 x 384, 577 tokens."""
    args: dict[str, Any] = {"img_size": 384, "embed_dim": 768, "depth": 24}
    return _create_vim("vim_base_patch16_384", pretrained, **{**args, **kwargs})


@register_model
def local_vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """LocalVim-T with a class token in the middle: four local scans a layer."""
    args: dict[str, Any] = {"embed_dim": 192, "depth": 20, "directions": _LOCAL_DIRECTIONS}
    return _create_vim("local_vim_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def local_vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """LocalVim-S with a class token in the middle: four local scans a layer."""
    args: dict[str, Any] = {"embed_dim": 384, "depth": 20, "directions": _LOCAL_DIRECTIONS}
    return _create_vim("local_vim_small_patch16_224", pretrained, **{**args, **kwargs})


_ROPE: dict[str, Any] = {"class_token": False, "global_pool": "avg", "rope": True}


@register_model
def local_vim_tiny_rope_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """LocalVim-T with rotary positions and mean pooling."""
    args: dict[str, Any] = {"embed_dim": 192, "depth": 20, "directions": _LOCAL_DIRECTIONS, **_ROPE}
    return _create_vim("local_vim_tiny_rope_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def local_vim_small_rope_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """LocalVim-S with rotary positions and mean pooling."""
    args: dict[str, Any] = {"embed_dim": 384, "depth": 20, "directions": _LOCAL_DIRECTIONS, **_ROPE}
    return _create_vim("local_vim_small_rope_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def mambar_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Mamba-Reg tiny: 12 registers among the patches, joined for the classifier."""
    args: dict[str, Any] = {"embed_dim": 192, "depth": 24, "registers": 12}
    args["register_reduce"] = 1
    return _create_vim("mambar_tiny_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def mambar_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Mamba-Reg small: 12 registers among the patches, joined for the classifier."""
    args: dict[str, Any] = {"embed_dim": 384, "depth": 24, "registers": 12}
    args["register_reduce"] = 2
    return _create_vim("mambar_small_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def mambar_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Mamba-Reg base: 12 registers among the patches, joined for the classifier."""
    args: dict[str, Any] = {"embed_dim": 768, "depth": 24, "registers": 12}
    args["register_reduce"] = 4
    return _create_vim("mambar_base_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def mambar_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Mamba-Reg large: 16 registers among the patches, joined for the classifier."""
    args: dict[str, Any] = {"embed_dim": 1024, "depth": 48, "registers": 16}
    args["register_reduce"] = 8
    return _create_vim("mambar_large_patch16_224", pretrained, **{**args, **kwargs})


@register_model
def test_mambar(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028
    """A small Vim with registers for tests."""
    args: dict[str, Any] = {"embed_dim": 64, "depth": 4, "registers": 3, "register_reduce": 2}
    return _create_vim("test_mambar", pretrained, **{**args, **kwargs})


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028
    """A small Vim for tests."""
    args: dict[str, Any] = {"embed_dim": 64, "depth": 4}
    return _create_vim("test_vim", pretrained, **{**args, **kwargs})


# the official entries; timm warns and makes the model of the shorter name
_LONG = "bimambav2_final_pool_mean_abs_pos_embed_with"
register_model_deprecations(
    __name__,
    {
        f"vim_tiny_patch16_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_224",
        f"vim_tiny_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_tiny_patch16_stride8_224",
        f"vim_small_patch16_224_{_LONG}_midclstok_div2": "vim_small_patch16_224",
        f"vim_small_patch16_stride8_224_{_LONG}_midclstok_div2": "vim_small_patch16_stride8_224",
        f"vim_base_patch16_224_{_LONG}_middle_cls_token_div2": "vim_base_patch16_224",
        "local_vim_tiny": "local_vim_tiny_rope_patch16_224",
        "local_vim_small": "local_vim_small_rope_patch16_224",
        "local_vim_tiny_middle_cls_token": "local_vim_tiny_patch16_224",
    },
)
