"""What timm is told of a model whose image size changed after it was made."""

from typing import Any

from torch import nn

try:
    from timm.models._input import update_model_input_size
except ModuleNotFoundError:
    # timm up to 1.0.26 keeps no record of it
    update_model_input_size = None


def record_input_size(model: nn.Module, size: tuple[int, int] | None, **arguments: Any) -> None:
    """Note the image size and changed arguments of the model, for timm to save with its weights.

    Args:
        model: A timm model.
        size: Height and width it takes now; None for any.
        **arguments: Arguments of its class that changed with it.
    """
    if update_model_input_size is not None:
        update_model_input_size(model, size, **arguments)
