"""Vim (Vision Mamba): patches and a class token in their middle through bidirectional Mamba blocks.

Paper: Zhu et al. 2024, Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model, https://arxiv.org/abs/2401.09417. Official code, Apache-2.0:
https://github.com/hustvl/Vim/blob/dd0358ad1e42701f22afbefa0717cc8825cf9f45/vim/models_mamba.py

    x <- x + mixer(rms_norm(x))      for every layer; there is no MLP

Parameter names are the official ones, so official state dicts load strictly. What differs from
the official code is numbered, with permalinks, in `vision/README.md`.

    Vim                    the model
    checkpoint_filter_fn   what timm applies to a state dict before it loads it
    vim_*, test_vim        entry points, registered with timm
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from .embed import PatchEmbed, resample_pos_embed
from .isotropic import IsotropicModel

__all__ = ["Vim"]


class Vim(IsotropicModel):
    """Vision Mamba; arguments and methods are those of `IsotropicModel`."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Vim) -> dict[str, Tensor]:
    """Make a checkpoint fit `model`: unwrap it, strip prefixes, resize positions.

    Args:
        state_dict: A Vim state dict of the official code or of ours, with or without head, alone
            or under "model", "state_dict" or "model_ema" of a training checkpoint.
        model: What will load it.

    Returns:
        The state dict to load, strictly.

    Raises:
        ValueError: the checkpoint is of another model, or its position grid is unknown.
    """
    for key in ("model", "state_dict", "model_ema"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = dict(state_dict[key])
            break
    out = {k.removeprefix("module."): v for k, v in state_dict.items()}
    _check_layers(out, model)
    table = out.get("pos_embed")
    own = model.pos_embed
    if own is not None and table is not None and table.shape[1] != own.shape[1]:
        grid = _stored_grid(table.shape[1] - model.num_prefix_tokens, model)
        out["pos_embed"] = resample_pos_embed(
            table, list(model.patch_embed.grid_size), list(grid), model.class_position
        )
    return out


def _check_layers(state_dict: Mapping[str, Tensor], model: Vim) -> None:
    """Refuse a state dict whose first layer is not the model's first layer."""
    expected = {k: v for k, v in model.state_dict().items() if k.startswith("layers.0.")}
    found = {k: v for k, v in state_dict.items() if k.startswith("layers.0.")}
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
        raise ValueError(
            f"state_dict must be of a Vim with this mixer, got {_some(state_dict)}; "
            f"not in both: {_some(odd)}"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"state_dict must be of a Vim of this size: {name} must be {tuple(value.shape)}, "
                f"got {tuple(found[name].shape)}"
            )
    if ("cls_token" in state_dict) != (model.cls_token is not None):
        raise ValueError(
            f"state_dict must {'lack' if model.cls_token is None else 'hold'} cls_token for this "
            "model; see class_token"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stored_grid(patches: int, model: Vim) -> tuple[int, int]:
    """Grid of a checkpoint's position table: what timm recorded when saving, or a square."""
    saved = getattr(model, "pretrained_model_args", {})
    if "img_size" in saved:
        patch = saved.get("patch_size", model.patch_embed.patch_size)
        source = PatchEmbed(
            saved["img_size"], patch, saved.get("stride"), embed_dim=1, device="meta"
        )
        if source.num_patches == patches:
            return source.grid_size
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise ValueError(
            f"pos_embed must hold a square grid to be resized, got {patches} patches; create the "
            "model at the checkpoint's img_size and call set_input_size"
        )
    return side, side


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


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with "
        "Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.untrained": _cfg(),
        "vim_tiny_patch16_stride8_224.untrained": _cfg(),
        "vim_small_patch16_224.untrained": _cfg(),
        "vim_small_patch16_stride8_224.untrained": _cfg(),
        "vim_base_patch16_224.untrained": _cfg(),
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
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:  # noqa: PT028
    """A small Vim for tests."""
    args: dict[str, Any] = {"embed_dim": 64, "depth": 4}
    return _create_vim("test_vim", pretrained, **{**args, **kwargs})
