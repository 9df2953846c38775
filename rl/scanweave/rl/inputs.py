"""Shapes of what models read, checked once for all of them.

    Readable       what `check_inputs` needs to know of a model
    action_shape   shape of one action as a model reads it
    check_inputs   windows that fit a model and each other
    take_steps     steps of every window in another order
    as_sizes       an int or a sequence of ints -> tuple
    plain          back again, for JSON

Letters: B batch, K steps, S state channels, A action channels, M choices made at once.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Readable(Protocol):
    """Sizes of a model's inputs.

    Attributes:
        state_shape: Of one state: (S,), or an image's.
        act_dim: Channels of a continuous action, or options of all choices together.
        discrete: Actions are choices.
        choices: Options of each of M > 1 choices made at once; empty otherwise.
    """

    state_shape: tuple[int, ...]
    act_dim: int
    discrete: bool
    choices: tuple[int, ...]


def action_shape(model: Readable) -> tuple[int, ...]:
    """(A,) of continuous actions, () of one choice, (M,) of several."""
    if model.choices:
        return (len(model.choices),)
    return () if model.discrete else (model.act_dim,)


def check_inputs(
    model: Readable,
    states: Tensor,
    actions: Tensor,
    returns_to_go: Tensor,
    timesteps: Tensor,
    mask: Tensor | None,
) -> int:
    """Steps K of inputs that fit the model and each other.

    Raises:
        ValueError: a shape does not fit, or `mask` is not bool.
    """
    if states.shape[2:] != model.state_shape:
        wanted = ", ".join(map(str, ("B", "K", *model.state_shape)))
        raise ValueError(f"states must be ({wanted}), got {tuple(states.shape)}")
    batch, steps = states.shape[:2]
    given = {"actions": actions, "returns_to_go": returns_to_go, "timesteps": timesteps}
    shapes = {
        "actions": (batch, steps, *action_shape(model)),
        "returns_to_go": (batch, steps, 1),
        "timesteps": (batch, steps),
    }
    if mask is not None:
        given["mask"], shapes["mask"] = mask, (batch, steps)
    for name, tensor in given.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {shapes[name]}, got {tuple(tensor.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    return steps


def take_steps(values: Tensor, order: Tensor) -> Tensor:
    """Steps (B, K, ...) in the order (B, K)."""
    return values.take_along_dim(order.view(*order.shape, *[1] * (values.ndim - 2)), dim=1)


def as_sizes(value: int | Sequence[int]) -> tuple[int, ...]:
    """A tuple of sizes, of one for an int."""
    return (value,) if isinstance(value, int) else tuple(int(size) for size in value)


def plain(sizes: tuple[int, ...]) -> int | list[int]:
    """The int of a tuple of one, otherwise a list."""
    return sizes[0] if len(sizes) == 1 else list(sizes)
