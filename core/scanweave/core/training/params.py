"""Parameter groups: which parameters are decayed, and which have a learning rate of their own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    model: nn.Module,
    weight_decay: float,
    *,
    lr: float | None = None,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into an optimiser's groups.

    Not decayed: parameters of at most one axis, biases, normalisation layers, embeddings, state
    matrices and skips (`SPARED_NAMES`), parameters with the attribute `_no_weight_decay`, and
    the names or patterns (`*`, `?`) that `no_weight_decay()` of the model or of any module in it
    returns. A parameter's attribute `_optim` overrides its group's values, such as
    `{"lr": 1e-4, "weight_decay": 0.0}`. Two of its keys are rules for the rate instead:
    `lr_scale` multiplies `lr`, and `lr_max` is the most it may be (that of S4's papers is 1e-3
    for what makes up its kernel). A tied parameter appears once.

    Args:
        model: The model, before it is wrapped for several processes.
        weight_decay: Decay of the remaining parameters.
        lr: Learning rate to write into every group; absent leaves the optimiser's default.
        scales: Factors of the rate by parameter name, as of layer-wise decay; 1 for others.

    Returns:
        Groups with the keys params, weight_decay, and what `lr` and `_optim` set.

    Raises:
        ValueError: nothing is trainable, `weight_decay` is negative, or rates have rules and
            there is no `lr`.
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
        _apply_rules(options, name, (scales or {}).get(name))
        # values may be unhashable (a list of betas), their text is not
        group = groups.setdefault(repr(sorted(options.items())), {"params": [], **options})
        group["params"].append(param)
    if not groups:
        raise ValueError("model must have parameters that require gradients, got none")
    return list(groups.values())


def _apply_rules(options: dict[str, Any], name: str, scale: float | None) -> None:
    """Turn `lr_scale`, `lr_max` and a factor from outside into one rate, in place."""
    factor, most = options.pop("lr_scale", None), options.pop("lr_max", None)
    if factor is None and most is None and scale is None:
        return
    if "lr" not in options:
        raise ValueError(f"lr must be given where rates have rules, got None ({name} has one)")
    rate = options["lr"] * (1.0 if factor is None else factor)
    rate = rate if most is None else min(rate, most)
    options["lr"] = rate * (1.0 if scale is None else scale)


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
