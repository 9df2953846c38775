"""An implementation bound to inputs in its own layout, ready to be checked and timed."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs, Op


class Skip(Exception):
    """Why a peer does not run here, in a few words; none where there is nothing to compare."""


@dataclass
class Prepared:
    """An implementation bound to inputs in its own layout.

    Attributes:
        call: Runs it and returns the output.
        leaves: Its inputs by our names, empty where it has no gradients.
        to: Turns a gradient of our output into its layout.
        back: Turns its output, or the gradient of the named input, into our layout.
        state: What a step updates.
        context: What it runs in, its backward included.
    """

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    to: Callable[[Tensor], Tensor] = lambda v: v
    back: Callable[[Tensor, str], Tensor] = lambda v, name: v
    state: Tensor | None = None
    context: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Peer:
    """One other implementation of an op.

    Attributes:
        name: What tables show.
        package: Whose version tables show.
        prepare: Binds it to inputs; raises ImportError or `Skip`.
    """

    name: str
    package: str
    prepare: Callable[[Op, Inputs], Prepared]


def attribute(module: str, name: str) -> Any:
    """Import lazily, so that absent peers cost nothing."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == top
        raise Skip("not installed" if absent else f"import fails: {error}") from error
    if not hasattr(found, name):
        raise Skip(f"{module} has no {name}")
    return getattr(found, name)


def need_cuda(inputs: Inputs) -> None:
    """Skip unless the inputs are on a GPU."""
    if not next(iter(inputs.tensors.values())).is_cuda:
        raise Skip("needs CUDA")


class Layout:
    """(B, L, C), packed or not, to a padded batch, channel-first if asked; and back."""

    def __init__(self, inputs: Inputs, channel_first: bool) -> None:
        self.channel_first = channel_first
        self.place: Tensor | None = None
        if inputs.cu_seqlens is not None:
            ends = inputs.cu_seqlens.long()
            lengths = ends.diff()
            self.rows, self.longest = lengths.numel(), int(lengths.max())
            row = torch.repeat_interleave(torch.arange(self.rows, device=ends.device), lengths)
            token = torch.arange(int(ends[-1]), device=ends.device)
            self.place = row * self.longest + token - ends[row]

    def to(self, v: Tensor) -> Tensor:
        """A tensor of ours in this layout."""
        if self.place is not None:
            # zeros after a sequence: x = 0 leaves a state at zero, and dout = 0 its gradient
            padded = v.new_zeros(self.rows * self.longest, v.shape[-1])
            v = padded.index_copy_(0, self.place, v[0]).unflatten(0, (self.rows, self.longest))
        return v.transpose(1, 2).contiguous() if self.channel_first else v

    def back(self, v: Tensor) -> Tensor:
        """A tensor in this layout as ours."""
        v = v.transpose(1, 2) if self.channel_first else v
        return v if self.place is None else v.flatten(0, 1)[self.place].unsqueeze(0)
