"""Our small models, as timm lists them: a new family's `test_*` model is tested without a word."""

import inspect
from typing import Any

import timm
from timm.models import _registry
from torch import nn

import scanweave.vision  # noqa: F401  (registers the models)

# families that must not get lost
FAMILIES = {"test_vim", "test_ssm_vit", "test_vmamba", "test_hydra_vit"}


def _module(name: str) -> str:
    return _registry.model_entrypoint(name).__module__


TEST_MODELS = sorted(
    n for n in timm.list_models("test_*") if _module(n).startswith("scanweave.vision")
)


def takes(name: str, argument: str) -> bool:
    """Whether the model's class has an argument of this name."""
    model = timm.create_model(name, device="meta")
    return argument in inspect.signature(type(model).__init__).parameters


def small(name: str, **arguments: Any) -> nn.Module:
    """The model with 5 classes at 64 x 64 pixels, in evaluation mode."""
    size = {"img_size": 64} if takes(name, "img_size") else {}
    return timm.create_model(name, **{"num_classes": 5, **size, **arguments}).eval()


def layers(name: str, each: int, stages: tuple[int, int, int, int]) -> dict[str, Any]:
    """Argument for `each` layers, or for `stages` in a model that counts them by stages."""
    return {"depth": each} if takes(name, "depth") else {"depths": stages}
