"""One residual step of a stack.

    x + body(norm(x)),  or x + body(norm(x + t)) with t = source(norm(x))

Letters: B batch, L length, D model channels.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ..mixers import Mixer, State
from ..mixers.rms_norm import RMSNorm
from .moe import MoE
from .shared import SharedTransformer

NormKind = Literal["rms", "layer"]


def make_norm(
    kind: NormKind,
    d_model: int,
    eps: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A norm of D channels with weights: "rms", or "layer" with biases too.

    Raises:
        ValueError: there is no such norm.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"norm_kind must be 'rms' or 'layer', got {kind!r}")
    made = RMSNorm if kind == "rms" else nn.LayerNorm
    return made(d_model, eps=eps, device=device, dtype=dtype)


class Step(nn.Module):
    """One residual step: a norm before its body, and perhaps a source that joins the body's input.

    Args:
        d_model: Channels D.
        body: A mixer, a feed-forward, or a shared block.
        source: What is added to the body's input, and to nothing else.
        norm_eps: Added to the mean square in the norms.
        norm_kind: "rms" or "layer" norms.
        device: Of the norms.
        dtype: Of the norms.
    """

    def __init__(
        self,
        d_model: int,
        body: nn.Module,
        source: nn.Module | None = None,
        norm_eps: float = 1e-5,
        norm_kind: NormKind = "rms",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def norm(part: nn.Module | None) -> nn.Module | None:
            if part is None or isinstance(part, SharedTransformer):
                return None  # which has its own
            return make_norm(norm_kind, d_model, norm_eps, device, dtype)

        self.norm, self.norm_source = norm(body), norm(source)
        self.body, self.source = body, source

    def halves(self) -> list[tuple[str, nn.Module, nn.Module | None]]:
        """What runs, in order: name, module, norm before it."""
        halves = [("body", self.body, self.norm)]
        return (
            halves if self.source is None else [("source", self.source, self.norm_source), *halves]
        )

    def mixers(self) -> dict[str, Mixer]:
        """What has a state, under the name of its half."""
        found = {}
        for name, part, _ in self.halves():
            mixer = part.attention if isinstance(part, SharedTransformer) else part
            if isinstance(mixer, Mixer):
                found[name] = mixer
        return found

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for _, part, norm in self.halves():
            part.reset_parameters()  # type: ignore[operator]
            if norm is not None:
                norm.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        first: Tensor,
        states: dict[str, State] | None,
        keep: bool,
        where: dict[str, Tensor],
    ) -> tuple[Tensor, dict[str, State]]:
        """The stream (B, L, D) after this step, and the states after it if `keep`."""
        after, given = {}, x
        for name, part, norm in self.halves():
            state = None if states is None else states.get(name)
            if isinstance(part, SharedTransformer):
                y, own = part(given, first, state, keep, where)
            elif not isinstance(part, Mixer):
                inputs = given if norm is None else norm(given)
                mask = {"mask": where["mask"]} if "mask" in where and isinstance(part, MoE) else {}
                y, own = part(inputs, **mask), {}
            elif keep or state is not None:
                assert norm is not None
                y, own = part(norm(given), state=state, return_state=True, **where)
            else:
                assert norm is not None
                y, own = part(norm(given), **where), {}
            given = x + y
            if keep and name in self.mixers():
                after[name] = own
        return given, after

    def step(
        self, x: Tensor, first: Tensor, states: dict[str, State]
    ) -> tuple[Tensor, dict[str, State]]:
        """One token (B, D) of the stream, and the states after it."""
        after, given = {}, x
        for name, part, norm in self.halves():
            inputs = given if norm is None else norm(given)
            if isinstance(part, SharedTransformer):
                y, after[name] = part.step(inputs, first, states[name])
            elif isinstance(part, Mixer):
                y, after[name] = part.step(inputs, states[name])
            else:
                y = part(inputs)
            given = x + y
        return given, after


def by_place(state: State) -> dict[str, dict[str, State]]:
    """A flat state by step, then by half."""
    found: dict[str, dict[str, State]] = {}
    for name, v in state.items():
        layer, part, half, own = name.split(".", 3)
        found.setdefault(f"{layer}.{part}", {}).setdefault(half, {})[own] = v
    return found


def flat(place: str, states: dict[str, State]) -> State:
    """The states of one step as parts of a flat one."""
    return {f"{place}.{half}.{name}": v for half, own in states.items() for name, v in own.items()}
