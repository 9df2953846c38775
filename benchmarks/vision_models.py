"""Whole vision models to measure: ours, the official ones with the same weights, and timm's.

VisionModel   one model at one size
MODELS        all of them, by the name that `--models` takes
implementations   ours and the official one, with the same weights
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .prepared import Skip
from .vision_official import OFFICIAL

CLASSES = 1000
# images that are compared before the clock starts
CHECKED = 2


@dataclass(frozen=True)
class VisionModel:
    """One model at one size.

    Attributes:
        name: What `--models` takes and rows show.
        entry: timm's name.
        batch: Images at a time.
        size: Image side.
        official: Repository of the official code, "" if there is none.
        ours: Whether it is one of scanweave's, or timm's for orientation.
        layers: Attribute that holds the layers, which are compiled one by one.
    """

    name: str
    entry: str
    batch: int = 128
    size: int = 224
    official: str = ""
    ours: bool = True
    layers: str = "layers"

    def toy(self) -> "VisionModel":
        """The same kind of model, small enough to run everywhere."""
        family = next(
            entry
            for start, entry in (
                ("vim", "test_vim"),
                ("vmamba", "test_vmamba"),
                ("hydra", "test_hydra_vit"),
                ("deit", "test_vit2"),
                ("swin", "test_convnext"),
            )
            if self.entry.startswith(start)
        )
        return replace(self, entry=family, batch=CHECKED, size=64)

    def create(self, device: torch.device) -> nn.Module:
        """The model, float32, with the same random weights every time."""
        # registers the models
        importlib.import_module("scanweave.vision")
        torch.manual_seed(0)
        args: dict[str, Any] = {"num_classes": CLASSES}
        if self.entry != "test_convnext":
            args["img_size"] = self.size
        return timm.create_model(self.entry, **args).to(device)


MODELS = {
    model.name: model
    for model in (
        VisionModel("vim_small", "vim_small_patch16_224", official="Vim"),
        VisionModel("vmamba_tiny_s1l8", "vmamba_tiny_s1l8", official="VMamba"),
        VisionModel("vim_small_1024", "vim_small_patch16_224", 8, 1024, "Vim"),
        VisionModel("deit_small_1024", "deit_small_patch16_224", 8, 1024, "", False, "blocks"),
        VisionModel("vim_tiny", "vim_tiny_patch16_224", official="Vim"),
        VisionModel("vmamba_tiny_s2l5", "vmamba_tiny_s2l5", official="VMamba"),
        VisionModel("hydra_vit_small", "hydra_vit_small_patch16_224"),
        VisionModel("deit_small", "deit_small_patch16_224", ours=False, layers="blocks"),
        VisionModel("swin_tiny", "swin_tiny_patch4_window7_224", ours=False),
    )
}


@dataclass
class Implementation:
    """One model that can be checked and timed.

    Attributes:
        name: Whose it is.
        model: It, in training mode.
        renamed: Turns a dictionary by its parameters' names into one by ours.
    """

    name: str
    model: nn.Module
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def implementations(
    spec: VisionModel, device: torch.device, folder: Path | None
) -> tuple[list[Implementation], str]:
    """Ours, and the official model with the weights that ours then loads, strictly.

    Args:
        spec: The model.
        device: Where the models shall be.
        folder: Checkouts of the official repositories; None for ours only.

    Returns:
        The implementations, ours first, and why there is no official one, "" where there is.
    """
    own = spec.create(device)
    name = "scanweave" if spec.ours else "timm"
    first = Implementation(name, own, dict)
    if not spec.official or folder is None:
        return [first], ""
    try:
        torch.manual_seed(0)
        other = OFFICIAL[spec.official](folder, spec.entry, spec.size, CLASSES)
    except Skip as reason:
        return [first], str(reason)
    family = importlib.import_module(f"scanweave.vision.{spec.official.lower()}")

    def renamed(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return family.checkpoint_filter_fn(values, own)

    own.load_state_dict(renamed(other.state_dict()), strict=True)
    return [first, Implementation("official", other.to(device), renamed)], ""


def blocks_of(spec: VisionModel, model: nn.Module) -> list[nn.Module]:
    """The layers that repeat, of an isotropic model or of all stages."""
    found: list[nn.Module] = []
    for layer in getattr(model, spec.layers):
        blocks = getattr(layer, "blocks", None)
        found += [layer] if blocks is None else list(blocks)
    return found
