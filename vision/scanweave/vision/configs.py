"""What timm is told of weights: sizes, normalisation, names of first and last layers.

patch_cfg   of a model of patches, trained on ImageNet
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def patch_cfg(**kwargs: Any) -> dict[str, Any]:
    """A configuration as timm's `generate_default_cfgs` takes; `kwargs` replace its entries."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        **kwargs,
    }
