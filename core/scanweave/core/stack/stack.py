"""Stacks of layers, which are mixers themselves: whole hybrids by pattern or by name.

    x <- x + part(norm(x))            for every part of every layer
    x <- x + m(norm(x + t)),  t = a(norm(x)), or t = S(x, x0)       where the pattern says a>m, S>m
    y  = norm(x)

A stack has the mixers' protocol: state and single steps go through all layers, packed sequences and
masks too. So a domain that takes a mixer takes a stack.

Letters: B batch, L length, D model channels, M meta tokens, S packed sequences.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..mixers import Mixer, State, create_mixer, list_mixers, mixer_info, register_mixer
from ..mixers.base import _lookup as lookup_mixer
from ..mixers.channel_mix import BidirectionalChannelMix, ChannelMix
from .feed_forward import MLP, GatedMLP
from .moe import MoE
from .pattern import Part, format_pattern, parse_pattern
from .presets import LETTERS, PRESETS, Preset
from .shared import SharedTransformer
from .step import NormKind, Step, by_place, flat, make_norm
from .wrappers import (
    Merge,
    Named,
    Parallel,
    ParallelBoth,
    check_parts,
    joined_core,
    joined_matrix,
    named,
)

FEED_FORWARDS: dict[str, type[nn.Module]] = {
    "channel_mix": ChannelMix,
    "gated_mlp": GatedMLP,
    "mlp": MLP,
    "moe": MoE,
}
SHARED = "shared"
# what reads both ways in the place of a causal mixer, where that is not "<name>_bidirectional"
_BOTH_WAYS: dict[str, Named] = {
    "local_attention": ("attention_bidirectional", {"window": 64, "rope_fraction": 1.0}),
    "mamba": "bimamba",
}


class _Stack(Mixer):
    """What stacks in one and in both directions share."""

    def __init__(
        self,
        d_model: int,
        *,
        pattern: str = "(m f)(w f)",
        depth: int | None = None,
        letters: Mapping[str, Named] | None = None,
        merge: Merge | None = None,
        meta_tokens: int | None = None,
        norm_eps: float | None = None,
        norm_kind: NormKind | None = None,
        final_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        preset = PRESETS.get(pattern, Preset(pattern, ""))
        self.words: dict[str, Named] = {**LETTERS, **preset.letters, **(letters or {})}
        ties = {word.upper() for word in self.words if len(word) == 1}
        known = {*self.words, *ties, *FEED_FORWARDS, SHARED, *list_mixers()}
        try:
            layers = parse_pattern(preset.pattern, known)
        except ValueError as error:
            if not pattern.isidentifier():
                raise
            # one word may have been meant as a preset
            raise ValueError(f"{error}; presets are {', '.join(PRESETS)}") from None
        depth = preset.depth if depth is None else depth
        if depth is not None:
            if depth < 1:
                raise ValueError(f"depth must be at least 1, got {depth}")
            layers = [layers[i % len(layers)] for i in range(depth)]
        count = preset.meta_tokens if meta_tokens is None else meta_tokens
        if count < 0:
            raise ValueError(f"meta_tokens must be at least 0, got {count}")
        self.d_model, self.pattern = d_model, format_pattern(layers)
        self.merge: Merge = preset.merge if merge is None else merge
        self.norm_eps = preset.norm_eps if norm_eps is None else norm_eps
        self.norm_kind: NormKind = preset.norm_kind if norm_kind is None else norm_kind
        self._dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self._tied: dict[str, nn.Module] = {}
        self._places: list[SharedTransformer] = []
        self.layers = nn.ModuleList()
        for i, layer in enumerate(layers):
            self._depth = {"layer": i, "num_layers": len(layers)}
            self.layers.append(nn.ModuleList([self._step(part) for part in layer]))
        del self._tied, self._places, self._depth
        norm = {"kind": self.norm_kind, "eps": self.norm_eps, **self._dd}
        self.norm = make_norm(d_model=d_model, **norm) if final_norm else None
        self.meta_tokens = (
            nn.Parameter(torch.empty(1, count, d_model, **self._dd)) if count else None
        )
        self._draw_meta()
        self.recurrent = self.causal and all(m.recurrent for m in self._mixers().values())  # pyright: ignore[reportAttributeAccessIssue]

    def _step(self, part: Part) -> Step:
        norm = {"norm_eps": self.norm_eps, "norm_kind": self.norm_kind, **self._dd}
        if part.joint == ">":
            source, body = (self._part(name) for name in part.names)
            return Step(self.d_model, body, source, **norm)
        if part.joint == "|":
            entries = [self._mixer(name) for name in part.names]
            kind = Parallel if self.causal else ParallelBoth
            merged = {"merge": self.merge, "norm_eps": self.norm_eps, **self._dd}
            return Step(self.d_model, kind(self.d_model, mixers=entries, **merged), **norm)
        return Step(self.d_model, self._part(part.names[0]), **norm)

    def _entry(self, name: str) -> tuple[str, dict[str, Any]]:
        """Name of a mixer or feed-forward, and its arguments, of a word."""
        if name in self.words:
            return named(self.words[name])
        return name, {}

    def _mixer(self, name: str) -> tuple[str, dict[str, Any]]:
        """The mixer of a word, in both directions where the stack is."""
        kind, config = self._entry(name)
        if kind in FEED_FORWARDS or kind == SHARED:
            raise ValueError(f"pattern must have mixers around '|', got {name!r}")
        if self.causal == mixer_info(kind).causal:
            return kind, self._placed(kind, config)
        if self.causal:
            raise ValueError(f"pattern must have causal mixers only, got {kind!r}")
        twin, defaults = named(_BOTH_WAYS.get(kind, f"{kind}_bidirectional"))
        if twin in list_mixers():
            return twin, self._placed(twin, {**defaults, **config})
        return "bidirectional", {"mixer": kind, "mixer_args": self._placed(kind, config)}

    def _placed(self, made: str | type[nn.Module], config: dict[str, Any]) -> dict[str, Any]:
        """Arguments with the layer's number, where initial values depend on it (RWKV)."""
        takes = inspect.signature(lookup_mixer(made) if isinstance(made, str) else made).parameters
        return {**self._depth, **config} if self._depth.keys() <= takes.keys() else config

    def _part(self, name: str) -> nn.Module:
        if len(name) == 1 and name.isupper() and name not in self.words:
            # a capital ties what the small letter stands for
            if name not in self._tied:
                self._tied[name] = self._part(name.lower())
            return self._tied[name]
        kind, config = self._entry(name)
        if kind == SHARED:
            return self._shared(config)
        if kind in FEED_FORWARDS:
            made = FEED_FORWARDS[kind]
            takes = [p for p in inspect.signature(made).parameters if p != "d_model"]
            if not config.keys() <= set(takes):
                strange = ", ".join(sorted(config.keys() - set(takes)))
                raise TypeError(f"{kind!r} does not take {strange}; it takes {', '.join(takes)}")
            if made is ChannelMix and not self.causal:
                made = BidirectionalChannelMix
            return made(self.d_model, **self._placed(made, config), **self._dd)
        kind, config = self._mixer(name)
        return create_mixer(kind, self.d_model, **config, **self._dd)

    def _shared(self, config: dict[str, Any]) -> SharedTransformer:
        """The shared block at its next place; several blocks take turns."""
        config = dict(config)
        blocks = config.pop("num_blocks", 1)
        if blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {blocks}")
        turn = len(self._places) - blocks
        like = self._places[turn] if turn >= 0 else None
        config = {"norm_eps": self.norm_eps, "causal": self.causal, **config, **self._dd}
        self._places.append(SharedTransformer(self.d_model, like=like, **config))
        return self._places[-1]

    def _steps(self) -> list[tuple[str, Step]]:
        """All steps in their order, each with its place: "layer.part"."""
        return [
            (f"{i}.{j}", step)
            for i, layer in enumerate(self.layers)
            if isinstance(layer, nn.ModuleList)
            for j, step in enumerate(layer)
            if isinstance(step, Step)
        ]

    def _mixers(self) -> dict[str, Mixer]:
        """What has a state, by its place: "layer.part.half"."""
        return {
            f"{place}.{half}": mixer
            for place, step in self._steps()
            for half, mixer in step.mixers().items()
        }

    def _draw_meta(self) -> None:
        if self.meta_tokens is not None:
            nn.init.normal_(self.meta_tokens)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for _, step in self._steps():
            step.reset_parameters()
        if self.norm is not None:
            self.norm.reset_parameters()  # type: ignore[operator]
        self._draw_meta()

    def _run(
        self, x: Tensor, state: State | None, keep: bool, where: dict[str, Tensor]
    ) -> tuple[Tensor, State]:
        """All layers without the last norm; states after them if `keep`."""
        first, after = x, {}
        parts = None if state is None else by_place(state)
        for place, step in self._steps():
            own = None if parts is None else parts.get(place)
            x, made = step(x, first, own, keep, where)
            after.update(flat(place, made))
        return x, after

    def _out(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        where = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        return self._given(x, state, return_state, where)

    def _mix_masked(
        self, x: Tensor, state: State | None, mask: Tensor, return_state: bool
    ) -> tuple[Tensor, State | None]:
        padding = ~mask.unsqueeze(-1)
        # what padding holds must not reach weights' gradients
        y, after = self._given(x.masked_fill(padding, 0), state, return_state, {"mask": mask})
        return y.masked_fill(padding, 0), after

    def _given(
        self, x: Tensor, state: State | None, keep: bool, where: dict[str, Tensor]
    ) -> tuple[Tensor, State | None]:
        raise NotImplementedError

    def _watched(self, x: Tensor) -> list[tuple[Mixer, Tensor]]:
        """Every mixer with what it reads when the stack reads `x`."""
        seen: list[tuple[Mixer, Tensor]] = []

        def watch(mixer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(mixer, Mixer)
            seen.append((mixer, inputs[0]))

        # a channel mix has a state but no core
        mixers = {m for m in self._mixers().values() if type(m).core is not Mixer.core}
        hooks = [m.register_forward_pre_hook(watch) for m in mixers]
        try:
            self._run(x, None, False, {})
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: those of all mixers on what they read, channels after each other."""
        return joined_core(self._watched(x))

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: those of all mixers on what they read, channels after each other."""
        return joined_matrix(self._watched(x))


@register_mixer(
    "stack",
    primitive="those of its mixers",
    paper="Lieber et al. 2024, arXiv 2403.19887",
    parity="3e-7 (float32), transformers' RecurrentGemma, Jamba and Zamba models; 2e-14 (float64), "
    "H3's hybrid, BASED, SPADE, MoE-Mamba in llm-random and Mamba-2's hybrid in Megatron-LM",
)
class Stack(_Stack):
    """A causal stack of layers, made from a pattern or a preset's name.

    Its state holds those of all mixers, under "layer.part.half.name"; it is of fixed size, and the
    stack recurrent, if all mixers are. Meta tokens are learned tokens before every sequence.

    Args:
        d_model: Channels D of the stream.
        pattern: Layers as in `parse_pattern`, or a name in `PRESETS`.
        depth: Layers; the pattern is cut, or repeated. None is the pattern once, of a preset the
            fewest layers that hold every kind.
        letters: What words of the pattern stand for, over the preset's and `LETTERS`: a mixer or a
            feed-forward by name, or a pair of the name and arguments.
        merge: How mixers side by side are merged, see `Parallel`; None is the preset's, or "add".
        meta_tokens: Number M of meta tokens; None is the preset's, or 0.
        norm_eps: Added to the mean square in all norms; None is the preset's, or 1e-5.
        norm_kind: "rms" or "layer" norms; None is the preset's, or "rms".
        final_norm: Normalise the stream at the end.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: the pattern or an argument has no meaning, or a mixer is not causal.

    Source: Lieber et al. 2024 (Jamba), arXiv 2403.19887, and `PRESETS`.
    """

    causal = True
    recurrent = True

    def _given(
        self, x: Tensor, state: State | None, keep: bool, where: dict[str, Tensor]
    ) -> tuple[Tensor, State | None]:
        if state is None and self.meta_tokens is not None:
            packed = where.get("cu_seqlens")
            state = self.init_state(x.shape[0] if packed is None else packed.shape[0] - 1)
        y, after = self._run(x, state, keep, where)
        return self._out(y), after if keep else None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`; without gradients the state is updated in place."""
        if x.ndim != 2 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must be (B, {self.d_model}), got {tuple(x.shape)}")
        parts, first, after = by_place(state), x, {}
        for place, step in self._steps():
            x, own = step.step(x, first, parts.get(place, {}))
            after.update(flat(place, own))
        return self._out(x), after

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The states of all mixers."""
        return {
            f"{place}.{name}": v
            for place, mixer in self._mixers().items()
            for name, v in mixer.state_spec().items()
        }

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """The state before the first token, for `batch` sequences: that after the meta tokens."""
        rows = batch if self.meta_tokens is None else 1
        if device is None:
            device = next(self.parameters()).device
        state = {
            f"{place}.{name}": v
            for place, mixer in self._mixers().items()
            for name, v in mixer.init_state(rows, device=device).items()
        }
        if self.meta_tokens is None:
            return state
        _, state = self._run(self.meta_tokens, state, True, {})
        return {name: v.repeat_interleave(batch, 0) for name, v in state.items()}

    def _check_state(self, state: State, x: Tensor, cu_seqlens: Tensor | None) -> None:
        check_parts(state, self._mixers(), x, cu_seqlens)


@register_mixer(
    "stack_bidirectional",
    primitive="those of its mixers",
    paper="Lieber et al. 2024, arXiv 2403.19887",
)
class BidirectionalStack(_Stack):
    """A stack whose mixers read both ways; arguments as `Stack`.

    A causal mixer becomes its form in both directions where there is one ("mamba" is "bimamba",
    attention has no causal mask), else one for each direction, see `Bidirectional`.
    """

    causal = False

    def _given(
        self, x: Tensor, state: State | None, keep: bool, where: dict[str, Tensor]
    ) -> tuple[Tensor, State | None]:
        if self.meta_tokens is None:
            return self._out(self._run(x, None, False, where)[0]), None
        count, (batch, length, _) = self.meta_tokens.shape[1], x.shape
        starts = where.get("cu_seqlens")
        place = torch.arange(length, device=x.device)
        if starts is None:
            token, more = place + count, {}
            meta = torch.arange(count, device=x.device)
            if "mask" in where:
                more = {"mask": nn.functional.pad(where["mask"], (count, 0), value=True)}
        else:
            shift = count * torch.arange(starts.shape[0], device=x.device)
            more = {"cu_seqlens": starts + shift.to(starts.dtype)}
            owner = torch.searchsorted(starts[1:].contiguous().long(), place, right=True)
            token = place + count * (owner + 1)
            meta = (more["cu_seqlens"][:-1, None] + torch.arange(count, device=x.device)).flatten()
        whole = x.new_empty(batch, token.shape[0] + meta.shape[0], x.shape[-1])
        rows = self.meta_tokens.to(x.dtype).repeat(batch, meta.shape[0] // count, 1)
        whole = whole.index_copy(1, meta, rows).index_copy(1, token, x)
        y, _ = self._run(whole, None, False, more)
        return self._out(y[:, token]), None


def create_stack(
    pattern: str, d_model: int, *, bidirectional: bool = False, **config: Any
) -> _Stack:
    """Create a stack of layers.

    Args:
        pattern: Layers as in `parse_pattern`, or a name in `PRESETS`.
        d_model: Channels D of the stream.
        bidirectional: Let every mixer read both ways.
        config: Further arguments of `Stack`.

    Raises:
        ValueError: the pattern or an argument has no meaning, or a mixer is not causal.
        TypeError: `Stack` does not take one of the arguments.

    Example:
        >>> create_stack("griffin", 64)(torch.zeros(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """
    name = "stack_bidirectional" if bidirectional else "stack"
    stack = create_mixer(name, d_model, pattern=pattern, **config)
    assert isinstance(stack, _Stack)
    return stack
