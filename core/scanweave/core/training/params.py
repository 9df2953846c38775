"""Parameter groups: which parameters are decayed, and which have a learning rate of their own."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# last components of names of parameters that are scales, rates or positions although some are
# matrices: the state matrix and skip of every scan direction, biases, learned positions, tokens
SPARED_NAMES = (
    "A_log*",
    "A_*log*",
    "D",
    "D_*",
    "Ds",
    "bias",
    "*_bias",
    "*pos_embed*",
    "*_token",
)


def param_groups(
    model: nn.Module, weight_decay: float, *, lr: float | None = None
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into an optimiser's groups.

    Not decayed: parameters of at most one axis, biases, normalisation layers, embeddings, state
    matrices and skips (`SPARED_NAMES`), parameters with the attribute `_no_weight_decay`, and
    the names or patterns (`*`, `?`) that `no_weight_decay()` of the model or of any module in it
    returns. A parameter's attribute `_optim`, such as `{"lr": 1e-4, "weight_decay": 0.0}`,
    overrides its group's values. A tied parameter appears once.

    Args:
        model: The model, before it is wrapped for several processes.
        weight_decay: Decay of the remaining parameters.
        lr: Learning rate to write into every group; absent leaves the optimiser's default.

    Returns:
        Groups with the keys params, weight_decay, and what `lr` and `_optim` set.

    Raises:
        ValueError: nothing is trainable, or `weight_decay` is negative.
    """
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    patterns = list(_patterns(model))
    spared = {id(p) for p in _parameters_of_spared_modules(model)}
    groups: dict[str, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        keep = (
            param.ndim <= 1
            or id(param) in spared
            or getattr(param, "_no_weight_decay", False)
            or any(fnmatchcase(name.rpartition(".")[2], pattern) for pattern in SPARED_NAMES)
            or any(fnmatchcase(name, pattern) for pattern in patterns)
        )
        options: dict[str, Any] = {"weight_decay": 0.0 if keep else weight_decay}
        if lr is not None:
            options["lr"] = lr
        options.update(getattr(param, "_optim", {}))
        # values may be unhashable (a list of betas), their text is not
        group = groups.setdefault(repr(sorted(options.items())), {"params": [], **options})
        group["params"].append(param)
    if not groups:
        raise ValueError("model must have parameters that require gradients, got none")
    return list(groups.values())


def _patterns(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        method: Callable[[], Iterable[str]] | None = getattr(module, "no_weight_decay", None)
        if callable(method):
            yield from (f"{prefix}.{pattern}" if prefix else pattern for pattern in method())


def _parameters_of_spared_modules(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        # by name, because timm, PyG and users bring normalisation classes of their own
        if "Norm" in type(module).__name__ or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            yield from module.parameters(recurse=False)
