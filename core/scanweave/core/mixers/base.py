"""What every sequence mixer offers, and the registry that creates one by name.

Letters: B batch, L length, D model channels, S packed sequences.

    Mixer            the protocol, as a base class
    MixerInfo        one registry row; the documentation's table is made of these
    register_mixer   class decorator that adds a row
    create_mixer     name + model width -> module
    list_mixers      names, optionally only causal or recurrent ones
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..ops.checks import check_cu_seqlens

State = dict[str, Tensor]
# attributes of parameters that `scanweave.core.training.param_groups` reads
_MARKS = ("_no_weight_decay", "_optim")


class Mixer(nn.Module):
    """Maps a sequence (B, L, D) to a sequence (B, L, D).

    Subclasses take `(d_model, *, ..., device=None, dtype=None)` and set `d_model`, and the class
    attributes `causal` (output t reads inputs <= t) and `recurrent` (has a finite state, so that
    `step` costs the same at every position).

    Three ways to run over several sequences, which agree to rounding:
        a dense batch (B, L, D);
        a padded batch with `mask` (B, L), True at real tokens, padding on either side;
        a packed batch (1, T, D) with `cu_seqlens` (S + 1), where sequence i owns the tokens
        `cu_seqlens[i]:cu_seqlens[i + 1]`. States then have S rows instead of B.
    """

    causal: ClassVar[bool] = True
    recurrent: ClassVar[bool] = False
    info: ClassVar["MixerInfo"]
    d_model: int

    def forward(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Mix `x` along its length.

        Args:
            x: Inputs, (B, L, D).
            state: State before the first token, as `init_state` makes it; zero when absent.
            cu_seqlens: Starts of packed sequences, (S + 1,) int32, from 0 to L; B is then 1.
            mask: True at real tokens, (B, L) bool; not together with `cu_seqlens`.
            return_state: Also return the state after the last (real) token.

        Returns:
            Outputs (B, L, D), 0 at masked places; with `return_state` also the state.

        Raises:
            ValueError: an argument does not fit the others, or this mixer has no state.
        """
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, L, {self.d_model}), got {tuple(x.shape)}")
        if (state is not None or return_state) and not self.causal:
            raise ValueError(f"state needs a causal mixer, {self.info.name} reads the future")
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("mask must be None with cu_seqlens: pack only real tokens")
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask must be bool (B, L) = {tuple(x.shape[:2])}, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x)
        if state is not None:
            self._check_state(state, x, cu_seqlens)
        if mask is not None:
            y, after = self._mix_masked(x, state, mask, return_state)
        else:
            y, after = self._mix(x, state, cu_seqlens, return_state)
        return (y, after) if after is not None and return_state else y

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """`forward` without a mask, on checked arguments."""
        raise NotImplementedError

    def _mix_masked(
        self, x: Tensor, state: State | None, mask: Tensor, return_state: bool
    ) -> tuple[Tensor, State | None]:
        """`forward` with a mask, as a packed batch of fixed size.

        Every row becomes two sequences, its real tokens and then its padding, so that padding
        on any side can touch neither outputs nor states, and no size depends on values.
        """
        batch, length, _ = x.shape
        order = torch.argsort(~mask, dim=1, stable=True).unsqueeze(-1)
        # not take_along_dim, for which a compiler fixes batch and length
        packed = x.gather(1, order.expand_as(x)).flatten(0, 1).unsqueeze(0)
        starts = torch.arange(batch + 1, device=x.device) * length
        bounds = torch.stack([starts[:-1], starts[:-1] + mask.sum(1)], 1).flatten()
        cu_seqlens = torch.cat([bounds, starts[-1:]]).int()
        if state is not None:
            state = {
                name: torch.stack([v, torch.zeros_like(v)], 1).flatten(0, 1)
                for name, v in state.items()
            }
        y, after = self._mix(packed, state, cu_seqlens, return_state)
        y = y.reshape(batch, length, y.shape[-1])
        y = y.gather(1, torch.argsort(order, dim=1).expand_as(y))
        if after is not None:
            after = {name: v[::2] for name, v in after.items()}
        return y.masked_fill(~mask.unsqueeze(-1), 0), after

    def _check_state(self, state: State, x: Tensor, cu_seqlens: Tensor | None) -> None:
        rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        spec = self.state_spec()
        if state.keys() != spec.keys():
            raise ValueError(f"state must hold {sorted(spec)}, got {sorted(state)}")
        for name, (shape, _) in spec.items():
            if state[name].shape != (rows, *shape):
                raise ValueError(
                    f"state[{name!r}] must be {(rows, *shape)}, got {tuple(state[name].shape)}"
                )

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance one token.

        Args:
            x: One token per sequence, (B, D).
            state: What `init_state`, `forward` or the last `step` returned. May be updated in
                place; use the returned one.

        Returns:
            Output (B, D) and the new state.

        Raises:
            ValueError: x does not fit, or this mixer has no state.
        """
        result = self.forward(x.unsqueeze(1), state=state, return_state=True)
        if not isinstance(result, tuple):
            raise ValueError(f"step needs a mixer with a state, {self.info.name} has none")
        return result[0].squeeze(1), result[1]

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance a few tokens at once: as many `step`s, in fewer and larger products.

        Args:
            x: Tokens, (B, L, D).
            state: As for `step`; may be updated in place.

        Returns:
            Outputs (B, L, D) and the new state.

        Raises:
            ValueError: as `step`.
        """
        result = self.forward(x, state=state, return_state=True)
        assert isinstance(result, tuple)
        return result

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape without the batch axis and dtype of every state tensor.

        Raises:
            ValueError: this mixer has no state of fixed size.
        """
        raise ValueError(f"state needs a recurrent mixer, {self.info.name} is not one")

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """The state before the first token, for `batch` sequences."""
        if device is None:
            device = next(self.parameters()).device
        return {
            name: torch.zeros(batch, *shape, device=device, dtype=dtype)
            for name, (shape, dtype) in self.state_spec().items()
        }

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is mixed along the length, and the result: values and outputs (B, C, L, P)."""
        raise NotImplementedError

    def matrix(self, x: Tensor) -> Tensor:
        """The token-to-token matrix M, (B, C, L, L), for which `M @ values` is the core's output.

        M[t, s] says how much token s contributes to token t, per channel or head C; values and
        outputs are those of `core(x)`. Two directions are two sets of channels. L^2 memory a
        channel: for looking, not for training.
        """
        raise NotImplementedError

    def finish(self, x: Tensor, outputs: Tensor) -> Tensor:
        """What follows the core: `finish(x, core(x)[1])` is `forward(x)`.

        Args:
            x: Inputs, (B, L, D), which gates and skips read.
            outputs: The core's, or what somebody made of them, (B, C, L, P).

        Returns:
            Outputs, (B, L, D).
        """
        raise NotImplementedError

    def knock_out(
        self,
        x: Tensor,
        sources: Tensor,
        targets: Tensor | None = None,
        *,
        channels: Tensor | None = None,
    ) -> Tensor:
        """Run without what some tokens contribute to others, M[targets, sources] being 0.

        The core is linear in its values, so that this takes a product away from its outputs; what
        gates, normalisers and short convolutions carry stays. L^2 memory a channel.

        Args:
            x: Inputs, (B, L, D).
            sources: True at tokens that are not heard, (L,) or (B, L) bool.
            targets: True at tokens that do not hear them, as `sources`; None is all.
            channels: True at channels or heads C of `matrix` to do it in, (C,) bool; None is all.

        Returns:
            Outputs, (B, L, D).

        Raises:
            ValueError: a mask does not fit x.

        Source: Endy et al. 2025 (Mamba Knockout), arXiv 2505.24244.
        """
        values, outputs = self.core(x)
        for name, v in (("sources", sources), ("targets", targets)):
            shapes = (x.shape[1:2], x.shape[:2])
            if v is not None and (v.dtype != torch.bool or v.shape not in shapes):
                raise ValueError(
                    f"{name} must be bool (L,) or (B, L) = {tuple(x.shape[:2])}, "
                    f"got {v.dtype} {tuple(v.shape)}"
                )
        count = values.shape[1:2]
        if channels is not None and (channels.dtype != torch.bool or channels.shape != count):
            raise ValueError(
                f"channels must be bool (C,) = {tuple(count)}, "
                f"got {channels.dtype} {tuple(channels.shape)}"
            )
        # (B or 1, 1, L, 1), and behind it (C, 1, 1)
        heard = values.masked_fill(~_as_tokens(sources), 0)
        lost = self.matrix(x).to(values.dtype) @ heard
        if targets is not None:
            lost = lost.masked_fill(~_as_tokens(targets), 0)
        if channels is not None:
            lost = lost.masked_fill(~channels[:, None, None], 0)
        return self.finish(x, (outputs - lost).to(outputs.dtype))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mixer":
        """A copy whose parameters keep their optimiser's marks, which torch leaves behind."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for name, p in self.named_parameters():
            for mark in _MARKS:
                if hasattr(p, mark):
                    setattr(twin.get_parameter(name), mark, copy.copy(getattr(p, mark)))
        return twin


def with_state(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What an op returned and its final state, None where that was not asked for."""
    return result if isinstance(result, tuple) else (result, None)


def _as_tokens(mask: Tensor) -> Tensor:
    """A mask of tokens, (L,) or (B, L), for (B, C, L, P)."""
    return mask.reshape(-1, 1, mask.shape[-1], 1)


@dataclass(frozen=True)
class MixerInfo:
    """One row of the registry.

    Attributes:
        name: What `create_mixer` takes.
        primitive: The op of `scanweave.core.ops` that does the mixing.
        causal: Output t reads only inputs up to t.
        recurrent: Has a finite state and a constant-time `step`.
        paper: Where the mixer is defined.
        reference: The public implementation whose parameters load strictly, if any.
        parity: Largest relative error that was measured against the reference, or against the
            paper's equations, with the dtype.
    """

    name: str
    primitive: str
    causal: bool
    recurrent: bool
    paper: str
    reference: str = ""
    parity: str = ""


_REGISTRY: dict[str, type[Mixer]] = {}
_M = TypeVar("_M", bound=type[Mixer])


def register_mixer(
    name: str, *, primitive: str, paper: str, reference: str = "", parity: str = ""
) -> Callable[[_M], _M]:
    """Class decorator: make a mixer available as `create_mixer(name, ...)`."""

    def add(cls: _M) -> _M:
        if name in _REGISTRY:
            raise ValueError(f"mixer name must be free, {name!r} is {_REGISTRY[name].__qualname__}")
        cls.info = MixerInfo(name, primitive, cls.causal, cls.recurrent, paper, reference, parity)
        _REGISTRY[name] = cls
        return cls

    return add


def list_mixers(*, causal: bool | None = None, recurrent: bool | None = None) -> list[str]:
    """Names of all registered mixers, sorted; `causal` and `recurrent` filter."""
    return sorted(
        name
        for name, cls in _REGISTRY.items()
        if (causal is None or cls.causal == causal)
        and (recurrent is None or cls.recurrent == recurrent)
    )


def mixer_info(name: str) -> MixerInfo:
    """The registry row of one mixer.

    Raises:
        ValueError: no mixer has this name.
    """
    return _lookup(name).info


def create_mixer(name: str, d_model: int, **config: object) -> Mixer:
    """Create a mixer by name.

    Args:
        name: One of `list_mixers()`.
        d_model: Channels of the sequence.
        config: The mixer's own arguments, and `device`, `dtype`.

    Raises:
        ValueError: no mixer has this name.
        TypeError: the mixer does not take one of the arguments.

    Example:
        >>> create_mixer("mamba", 8)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """
    cls = _lookup(name)
    known = inspect.signature(cls).parameters
    unknown = sorted(set(config) - set(known))
    if unknown:
        options = ", ".join(p for p in known if p != "d_model")
        raise TypeError(f"mixer {name!r} does not take {', '.join(unknown)}; it takes {options}")
    return cls(d_model, **config)  # type: ignore[call-arg]


def _lookup(name: str) -> type[Mixer]:
    if name not in _REGISTRY:
        raise ValueError(
            f"mixer must be one of {', '.join(list_mixers())}, got {name!r}; hybrids by name are "
            "patterns of 'stack'"
        )
    return _REGISTRY[name]
