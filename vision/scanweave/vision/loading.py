"""Checkpoints: unwrapped, checked, and made to fit.

fit_state_dict   what `checkpoint_filter_fn` of every family of one width does
unwrapped        the state dict in a training checkpoint
some             a few names of many, for messages
"""
# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from timm.layers import resample_patch_embed
from torch import Tensor

from .embed import PatchEmbed, resample_pos_embed
from .isotropic import IsotropicModel


def fit_state_dict(
    state_dict: Mapping[str, Any], model: IsotropicModel, family: str
) -> dict[str, Tensor]:
    """Make a checkpoint fit `model`: unwrap it, resize positions and the patches' kernel.

    Args:
        state_dict: As `unwrapped` takes; of the family, with or without head.
        model: What will load it.
        family: What errors call the model.

    Returns:
        The state dict to load, strictly.

    Raises:
        ValueError: the checkpoint is of another model, or its position grid is unknown.
    """
    out = unwrapped(state_dict)
    _check_layers(out, model, family)
    kernel, patch = out.get("patch_embed.proj.weight"), list(model.patch_embed.patch_size)
    if kernel is not None and list(kernel.shape[2:]) != patch:
        out["patch_embed.proj.weight"] = resample_patch_embed(kernel, patch, verbose=True)
    # tables of angles belong to the grid, nothing of them is learned
    out |= {k: v for k, v in model.state_dict().items() if k in out and k.startswith("rope.")}
    table = out.get("pos_embed")
    own = model.pos_embed
    if own is not None and table is not None and table.shape[1] != own.shape[1]:
        grid = _stored_grid(table.shape[1] - (1 if model.table_position else 0), model)
        out["pos_embed"] = resample_pos_embed(
            table,
            list(model.patch_embed.grid_size),
            list(grid),
            model.table_position,
            official=model.official_pos_resize,
        )
    return out


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a training checkpoint, without the prefixes of DDP and `torch.compile`.

    Args:
        state_dict: A state dict, or what holds one as "model", "state_dict", "model_ema" or
            "state_dict_ema"; the first of these that is there counts.
    """
    for key in ("model", "state_dict", "model_ema", "state_dict_ema"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in state_dict.items()}


def _check_layers(state_dict: Mapping[str, Tensor], model: IsotropicModel, family: str) -> None:
    """Refuse a state dict with another first layer or another number of layers."""
    expected = {k: v for k, v in model.state_dict().items() if k.startswith("layers.0.")}
    found = {k: v for k, v in state_dict.items() if k.startswith("layers.0.")}
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
        raise ValueError(
            f"state_dict must be of a {family} with this mixer, got {some(state_dict)}; "
            f"not in both: {some(odd)}"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"state_dict must be of a {family} of this size: {name} must be "
                f"{tuple(value.shape)}, got {tuple(found[name].shape)}"
            )
    depth = len({k.split(".")[1] for k in state_dict if k.startswith("layers.")})
    if depth != len(model.layers):
        raise ValueError(f"state_dict must have {len(model.layers)} layers, got {depth}; see depth")
    if ("cls_token" in state_dict) != (model.cls_token is not None):
        raise ValueError(
            f"state_dict must {'lack' if model.cls_token is None else 'hold'} cls_token for this "
            "model; see class_token"
        )


def some(names: Iterable[str]) -> str:
    """The first three, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stored_grid(patches: int, model: IsotropicModel) -> tuple[int, int]:
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
