"""What the inputs of an `autograd.Function` must be like for a compiler."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Given = TypeVar("Given", Tensor, Tensor | None)


def told_apart(tensors: Sequence[Given]) -> list[Given]:
    """Put views for repeated tensors where a compiler traces, which refuses one as two inputs.

    Args:
        tensors: Tensors of any shapes, or None; the same one may stand at several places.

    Returns:
        The same values, in a compiled graph without repetitions.
    """
    if not torch.compiler.is_compiling():
        return list(tensors)
    apart: list[Given] = []
    for i, u in enumerate(tensors):
        if u is not None and any(u is earlier for earlier in tensors[:i]):
            u = u.view_as(u)
        apart.append(u)
    return apart
