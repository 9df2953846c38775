"""Mixers made of mixers: side by side, and in both directions.

    parallel        merge(a(x), b(x), ...)
    bidirectional   forth(x) + reverse(back(reverse(x))), reversed within each sequence

They follow the mixers' protocol, so a domain uses them as it uses any mixer.

Letters: B batch, L length, D model channels, E inner channels, S packed sequences.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..mixers import Mixer, State, create_mixer, register_mixer
from ..mixers.attention import Attention
from ..mixers.mamba import Mamba
from ..mixers.rms_norm import RMSNorm

Merge = Literal["add", "norm", "concat"]
# a mixer's name, alone or with its arguments
Named = str | Sequence[Any]


def named(entry: Named) -> tuple[str, dict[str, Any]]:
    """Name and arguments of an entry that is a name, or a pair of a name and arguments.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(entry, str):
        return entry, {}
    name, config = entry if len(entry) == 2 else (None, None)
    if not isinstance(name, str) or not isinstance(config, Mapping):
        raise ValueError(f"entry must be a name or (name, arguments), got {entry!r}")
    return name, dict(config)


class Through(nn.Module):
    """Stands where a projection was that somebody else does."""

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` as it is."""
        return x


def sub_state(state: State | None, part: int) -> State | None:
    """The entries of `state` that belong to one part."""
    if state is None:
        return None
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def check_parts(
    state: State, parts: Mapping[str, Mixer], x: Tensor, cu_seqlens: Tensor | None
) -> None:
    """Check a state that holds those of several mixers, each under its place and a dot.

    Raises:
        ValueError: it holds something else, or a part's state does not fit.
    """
    found: dict[str, State] = {place: {} for place in parts}
    strange = False
    for name, v in state.items():
        place = next((p for p in parts if name.startswith(f"{p}.")), None)
        if place is None:
            strange = True
        else:
            found[place][name.removeprefix(f"{place}.")] = v
    if strange or not all(found.values()):
        wanted = [f"{p}.{name}" for p, mixer in parts.items() for name in mixer.init_state(1)]
        raise ValueError(f"state must hold {sorted(wanted)}, got {sorted(state)}")
    for place, mixer in parts.items():
        mixer._check_state(found[place], x, cu_seqlens)


def joined_core(mixers: Sequence[tuple[Mixer, Tensor]]) -> tuple[Tensor, Tensor]:
    """`core` of several mixers on their inputs as that of one: channels after each other.

    Channels of fewer numbers are filled up with zeros.
    """
    parts = [mixer.core(x) for mixer, x in mixers]
    width = max(values.shape[-1] for values, _ in parts)
    fill = [(0, width - values.shape[-1]) for values, _ in parts]
    pairs = list(zip(parts, fill, strict=True))
    values = torch.cat([nn.functional.pad(v, by) for (v, _), by in pairs], 1)
    return values, torch.cat([nn.functional.pad(y, by) for (_, y), by in pairs], 1)


def joined_matrix(mixers: Sequence[tuple[Mixer, Tensor]]) -> Tensor:
    """`matrix` of several mixers on their inputs as that of one."""
    return torch.cat([mixer.matrix(x) for mixer, x in mixers], 1)


@register_mixer(
    "parallel",
    primitive="those of its mixers",
    paper="Dong et al. 2024, arXiv 2411.13676",
    parity="2e-15 (float64), in the whole stacks of Hymba and SPADE",
)
class Parallel(Mixer):
    """Several mixers that read the same input; their outputs are merged.

    Three merges: "add" adds the outputs; "norm" averages RMS norms of the mixers' inner outputs
    and projects once (Hymba; inner outputs where all mixers are attention or Mamba of one inner
    width, else outputs); "concat" projects the layer norms of all outputs together (SPADE).

    Args:
        d_model: Channels D of the sequence.
        mixers: Names of causal mixers, each alone or as (name, arguments).
        merge: "add", "norm" or "concat".
        norm_eps: Added to the mean square in the norms.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: there are no mixers, one is not causal, or `merge` is unknown.

    Source: Dong et al. 2024 (Hymba), arXiv 2411.13676, section 2.1; Zuo et al. 2022 (SPADE),
    arXiv 2212.08136, section 3.
    """

    causal = True
    recurrent = True

    def __init__(
        self,
        d_model: int,
        *,
        mixers: Sequence[Named] = ("mamba", "local_attention"),
        merge: Merge = "add",
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if merge not in ("add", "norm", "concat"):
            raise ValueError(f"merge must be 'add', 'norm' or 'concat', got {merge!r}")
        if not mixers:
            raise ValueError("mixers must be at least one, got none")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        made = []
        for entry in mixers:
            name, config = named(entry)
            made.append(create_mixer(name, d_model, **config, **dd))
            if self.causal and not made[-1].causal:
                raise ValueError(f"mixers must be causal, got {name!r}")
        self.d_model, self.merge = d_model, merge
        self.recurrent = all(m.recurrent for m in made)  # pyright: ignore[reportAttributeAccessIssue]
        width = d_model
        if merge == "norm" and all(isinstance(m, Attention | Mamba) for m in made):
            widths = {m.out_proj.in_features for m in made}
            if len(widths) == 1:
                (width,) = widths
                for m in made:
                    m.out_proj = Through()
        self.mixers = nn.ModuleList(made)
        if merge == "norm":
            self.norms = nn.ModuleList([RMSNorm(width, eps=norm_eps, **dd) for _ in made])
            self.out_proj = nn.Linear(width, d_model, bias=False, **dd)
        elif merge == "concat":
            self.norms = nn.ModuleList([nn.LayerNorm(width, **dd) for _ in made])
            self.out_proj = nn.Linear(len(made) * width, d_model, **dd)

    @property
    def parts(self) -> list[Mixer]:
        """The mixers."""
        return [m for m in self.mixers if isinstance(m, Mixer)]

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        for module in (*self.mixers, *getattr(self, "norms", ())):
            module.reset_parameters()  # type: ignore[operator]
        if self.merge != "add":
            self.out_proj.reset_parameters()

    def _merged(self, outputs: list[Tensor]) -> Tensor:
        if self.merge == "add":
            return sum(outputs[1:], outputs[0])
        normed = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        if self.merge == "concat":
            return self.out_proj(torch.cat(normed, -1))
        return self.out_proj(sum(normed[1:], normed[0]) / len(normed))

    def _run(
        self, x: Tensor, state: State | None, return_state: bool, **where: Tensor | None
    ) -> tuple[Tensor, State | None]:
        outputs, after = [], {}
        for i, mixer in enumerate(self.parts):
            if not return_state and state is None:
                outputs.append(mixer(x, **where))
                continue
            y, own = mixer(x, state=sub_state(state, i), return_state=True, **where)
            outputs.append(y)
            after.update({f"{i}.{name}": v for name, v in own.items()})
        return self._merged(outputs), after if return_state else None

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        return self._run(x, state, return_state, cu_seqlens=cu_seqlens)

    def _mix_masked(
        self, x: Tensor, state: State | None, mask: Tensor, return_state: bool
    ) -> tuple[Tensor, State | None]:
        y, after = self._run(x, state, return_state, mask=mask)
        return y.masked_fill(~mask.unsqueeze(-1), 0), after

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Mixer.step`."""
        outputs, after = [], {}
        for i, mixer in enumerate(self.parts):
            own = sub_state(state, i)
            assert own is not None
            y, own = mixer.step(x, own)
            outputs.append(y)
            after.update({f"{i}.{name}": v for name, v in own.items()})
        return self._merged(outputs), after

    def state_spec(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The mixers' states, each under its place in the list: "0.h"."""
        specs = [mixer.state_spec() for mixer in self.parts]
        return {f"{i}.{name}": v for i, spec in enumerate(specs) for name, v in spec.items()}

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> State:
        """The state before the first token, for `batch` sequences."""
        states = [mixer.init_state(batch, device=device) for mixer in self.parts]
        return {f"{i}.{name}": v for i, own in enumerate(states) for name, v in own.items()}

    def _check_state(self, state: State, x: Tensor, cu_seqlens: Tensor | None) -> None:
        check_parts(state, {str(i): m for i, m in enumerate(self.parts)}, x, cu_seqlens)

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: those of all mixers, channels after each other."""
        return joined_core([(mixer, x) for mixer in self.parts])

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: those of all mixers, channels after each other."""
        return joined_matrix([(mixer, x) for mixer in self.parts])


class ParallelBoth(Parallel):
    """`Parallel` of mixers that may read the future."""

    causal = False


@register_mixer(
    "bidirectional",
    primitive="that of its mixer",
    paper="Goel et al. 2022, arXiv 2202.09729",
)
class Bidirectional(Mixer):
    """A causal mixer in both directions, each with weights of its own.

    Args:
        d_model: Channels D of the sequence.
        mixer: Name of a causal mixer.
        mixer_args: Its arguments.
        merge: "add" the directions, or project them together ("concat").
        tied: Let both directions share their weights.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: the mixer is not causal, or `merge` is unknown.

    Source: Goel et al. 2022 (SaShiMi), arXiv 2202.09729, section 4.2.
    """

    causal = False

    def __init__(
        self,
        d_model: int,
        *,
        mixer: str = "mamba",
        mixer_args: Mapping[str, Any] | None = None,
        merge: Literal["add", "concat"] = "add",
        tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if merge not in ("add", "concat"):
            raise ValueError(f"merge must be 'add' or 'concat', got {merge!r}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.merge = d_model, merge
        self.forth = create_mixer(mixer, d_model, **(mixer_args or {}), **dd)
        if not self.forth.causal:
            raise ValueError(f"mixer must be causal, got {mixer!r}")
        again = None if tied else create_mixer(mixer, d_model, **(mixer_args or {}), **dd)
        self.back = self.forth if again is None else again
        if merge == "concat":
            self.out_proj = nn.Linear(2 * d_model, d_model, **dd)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        self.forth.reset_parameters()
        self.back.reset_parameters()
        if self.merge == "concat":
            self.out_proj.reset_parameters()

    def _mix(
        self, x: Tensor, state: State | None, cu_seqlens: Tensor | None, return_state: bool
    ) -> tuple[Tensor, State | None]:
        forth = self.forth(x, cu_seqlens=cu_seqlens)
        if cu_seqlens is None:
            back = self.back(x.flip(1)).flip(1)
        else:
            place = torch.arange(x.shape[1], device=x.device)
            ends = cu_seqlens[1:].contiguous().long()
            owner = torch.searchsorted(ends, place, right=True)
            order = cu_seqlens[owner] + ends[owner] - 1 - place
            back = self.back(x[:, order], cu_seqlens=cu_seqlens)[:, order]
        if self.merge == "concat":
            return self.out_proj(torch.cat([forth, back], -1)), None
        return forth + back, None

    def core(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Mixer.core`: forward channels, then reverse ones."""
        forth, back = self.forth.core(x), self.back.core(x.flip(1))
        values, outputs = (torch.cat([f, b.flip(2)], 1) for f, b in zip(forth, back, strict=True))
        return values, outputs

    def matrix(self, x: Tensor) -> Tensor:
        """See `Mixer.matrix`: forward channels, then reverse ones."""
        forth, back = self.forth.matrix(x), self.back.matrix(x.flip(1))
        return torch.cat([forth, back.flip(-1, -2)], 1)
