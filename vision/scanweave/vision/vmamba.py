"""VMamba: four stages of SS2D blocks on ever smaller grids.

Paper: Liu et al. 2024, VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166.
Official code, MIT:
https://github.com/MzeroMiko/VMamba/blob/2ed52ead062a51a64521ed3871d52914bf532876/classification/models/vmamba.py

Parameter names are those of the released checkpoints. What differs from the official code is
numbered in `vision/README.md`.

    VMamba                                    the model
    checkpoint_filter_fn                      what timm applies to a state dict before it loads it
    vmamba_*, vanilla_vmamba_*, local_vmamba_*, test_vmamba   entry points, registered with timm
"""

import re
from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from .hierarchical import HierarchicalModel
from .loading import some, unwrapped
from .local import directions_of

__all__ = ["VMamba"]

# names of older and other versions of the official code, and the released models' names
_RENAMED = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.(x_proj|dt_projs)\.weight$", r".\1_weight"),
    (r"^(norm|head)\.", r"classifier.\1."),
)
_MERGING = (
    (r"\.downsample\.1\.", ".downsample.norm."),
    (r"\.downsample\.2\.", ".downsample.reduction."),
)


class VMamba(HierarchicalModel):
    """VMamba; arguments and methods are those of `HierarchicalModel`."""


def checkpoint_filter_fn(state_dict: dict[str, Any], model: VMamba) -> dict[str, Tensor]:
    """Make a checkpoint fit `model`: unwrap it, give its tensors the released models' names.

    Args:
        state_dict: As `unwrapped` takes; of any version of the official code or of ours, with or
            without head. Norms that a detector adds to the stages' outputs are left out.
        model: What will load it.

    Returns:
        The state dict to load, strictly.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    own = model.state_dict()
    renamed = _RENAMED + (_MERGING if "layers.0.downsample.norm.weight" in own else ())
    out: dict[str, Tensor] = {}
    for name, value in unwrapped(state_dict).items():
        if name.startswith("outnorm"):
            continue
        for pattern, new in renamed:
            name = re.sub(pattern, new, name)
        target = own.get(name)
        # stacked linear layers as one, and 1 x 1 convolutions
        same = target is not None and value.numel() == target.numel()
        if target is not None and same and value.shape != target.shape and value.ndim > 1:
            value = value.reshape(target.shape)
        out[name] = value
    _check_blocks(out, own)
    return out


def _check_blocks(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a state dict whose stages are not the model's."""
    expected = {k: v for k, v in own.items() if k.startswith("layers.")}
    found = {k: v for k, v in state_dict.items() if k.startswith("layers.")}
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
        raise ValueError(
            f"state_dict must be of a VMamba with these arguments, got {some(state_dict)}; "
            f"not in both: {some(odd)}"
        )
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"state_dict must be of a VMamba of this size: {name} must be "
                f"{tuple(value.shape)}, got {tuple(found[name].shape)}"
            )


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_model_with_cfg(
        VMamba,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={
            "out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)),
            "feature_cls": "getter",
        },
        **kwargs,
    )


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "classifier.head",
        "license": "mit",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        **kwargs,
    }


_LOCAL_PAPER = {
    "license": "apache-2.0",
    "paper_ids": "arXiv:2403.09338",
    "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
    "origin_url": "https://github.com/hunto/LocalMamba",
}

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8.untrained": _cfg(),
        "vmamba_tiny_s2l5.untrained": _cfg(),
        "vmamba_small_s1l20.untrained": _cfg(),
        "vmamba_small_s2l15.untrained": _cfg(),
        "vmamba_base_s1l20.untrained": _cfg(),
        "vmamba_base_s2l15.untrained": _cfg(),
        "vanilla_vmamba_tiny.untrained": _cfg(),
        "vanilla_vmamba_small.untrained": _cfg(),
        "vanilla_vmamba_base.untrained": _cfg(),
        "local_vmamba_tiny.untrained": _cfg(**_LOCAL_PAPER),
        "local_vmamba_small.untrained": _cfg(**_LOCAL_PAPER),
        "test_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95),
    }
)

# searched by LocalMamba's authors, block by block
_LOCAL_TINY = directions_of(
    "h h_ w7 w7_, h_ v_ w2 w2_, h_ v_ w2_ w7, h_ v v_ w2, h h_ v_ w2_,"
    "h_ v_ w2 w2_, h w2_ w7 w7_, h h_ v v_, h v_ w7 w7_, h_ v w2 w7_,"
    "v v_ w2 w7_, h h_ v_ w2_, v_ w2_ w7 w7_, h_ v_ w2_ w7_, h_ v w7 w7_"
)
_LOCAL_SMALL = directions_of(
    "h v v_ w7_, h h_ v w7, h_ v v_ w7, h_ v w2_ w7, h_ v w2_ w7,"
    "h_ v_ w2 w7_, h_ v v_ w7, h v v_ w7, h v v_ w7, h v v_ w7_,"
    "h h_ v v_, h v v_ w2, v v_ w2_ w7, h h_ v w2, h_ v v_ w7_,"
    "h h_ v v_, h v v_ w7_, h v v_ w7_, h h_ v_ w7, h_ v_ w2_ w7,"
    "h_ v v_ w7_, v v_ w7 w7_, h v v_ w7_, h_ v v_ w2, h v v_ w2_,"
    "h h_ v w7, h h_ w7 w7_, h v_ w2 w2_, h v_ w2 w7, h v v_ w7_,"
    "h_ v w2_ w7, h_ v_ w7 w7_, h v w7 w7_"
)

# the models of the paper's first version
_VANILLA: dict[str, Any] = {
    "d_state": 16,
    "ssm_ratio": 2.0,
    "conv_bias": True,
    "gate": "silu",
    "mlp_ratio": 0.0,
    "stem": "v1",
    "downsample": "v1",
}


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, inner channels as wide as the model, 8 blocks in stage 3, 30.2 M parameters."""
    args: dict[str, Any] = {"depths": (2, 2, 8, 2), "dims": 96, "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **{**args, **kwargs})


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, inner channels twice as wide, 5 blocks in stage 3, 30.7 M parameters."""
    args: dict[str, Any] = {"depths": (2, 2, 5, 2), "dims": 96, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **{**args, **kwargs})


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, inner channels as wide as the model, 20 blocks in stage 3, 49.0 M parameters."""
    args: dict[str, Any] = {"depths": (2, 2, 20, 2), "dims": 96, "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_small_s1l20", pretrained, **{**args, **kwargs})


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, inner channels twice as wide, 15 blocks in stage 3, 50.1 M parameters."""
    args: dict[str, Any] = {"depths": (2, 2, 15, 2), "dims": 96, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_small_s2l15", pretrained, **{**args, **kwargs})


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, inner channels as wide as the model, 20 blocks in stage 3, 86.6 M parameters."""
    args: dict[str, Any] = {"depths": (2, 2, 20, 2), "dims": 128, "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_base_s1l20", pretrained, **{**args, **kwargs})


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, inner channels twice as wide, 15 blocks in stage 3, 88.6 M parameters."""
    args: dict[str, Any] = {"depths": (2, 2, 15, 2), "dims": 128, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_base_s2l15", pretrained, **{**args, **kwargs})


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of the paper's first version, 22.9 M parameters."""
    args: dict[str, Any] = {**_VANILLA, "depths": (2, 2, 9, 2), "dims": 96}
    return _create_vmamba("vanilla_vmamba_tiny", pretrained, **{**args, **kwargs})


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S of the paper's first version, 44.4 M parameters."""
    args: dict[str, Any] = {**_VANILLA, "depths": (2, 2, 27, 2), "dims": 96}
    return _create_vmamba("vanilla_vmamba_small", pretrained, **{**args, **kwargs})


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B of the paper's first version, 76.3 M parameters."""
    args: dict[str, Any] = {**_VANILLA, "depths": (2, 2, 27, 2), "dims": 128}
    return _create_vmamba("vanilla_vmamba_base", pretrained, **{**args, **kwargs})


@register_model
def local_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """LocalVMamba-T: the first version's model with four local scans a block, 25.5 M parameters."""
    args: dict[str, Any] = {**_VANILLA, "depths": (2, 2, 9, 2), "dims": 96}
    args["directions"] = _LOCAL_TINY
    return _create_vmamba("local_vmamba_tiny", pretrained, **{**args, **kwargs})


@register_model
def local_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """LocalVMamba-S: the first version's model with four local scans a block, 49.7 M parameters."""
    args: dict[str, Any] = {**_VANILLA, "depths": (2, 2, 27, 2), "dims": 96}
    args["directions"] = _LOCAL_SMALL
    return _create_vmamba("local_vmamba_small", pretrained, **{**args, **kwargs})


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:  # noqa: PT028
    """A small VMamba for tests."""
    args: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": 16}
    return _create_vmamba("test_vmamba", pretrained, **{**args, **kwargs})
