"""Inputs of the matrix-state scan for tests: leaves by argument name.

Letters: B batch, L length, G groups, H heads, K keys, V values, S packed sequences.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tests.core.op_cases import Inputs, leaf
from torch import Tensor

from scanweave.core.ops.gated import gated_linear_scan_ref, quasi_separable_ref

# shapes of the log decay
KINDS = ("none", "heads", "tokens", "channels", "all")
# float32 whatever the dtype of the activations, as in a Mamba-2 block
WEIGHTS = ("g", "write", "skip", "initial_state")


def gated_inputs(
    batch: int,
    length: int,
    heads: int,
    keys: int,
    width: int,
    *,
    groups: int | None = None,
    kind: str = "tokens",
    sequences: int | None = None,
    without: Sequence[str] = (),
    decay: float = 0.5,
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `gated_linear_scan`; `decay` is the mean log decay of a step."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tokens, groups = (batch, length), groups or heads
    shapes = {
        "heads": (heads,),
        "channels": (heads, keys),
        "tokens": (*tokens, heads),
        "all": (*tokens, heads, keys),
    }
    values = {
        "q": draw(*tokens, groups, keys) / keys**0.5,
        "k": draw(*tokens, groups, keys),
        "v": draw(*tokens, heads, width),
        "write": 0.5 * draw(*tokens, heads) + 1,
        "skip": draw(*tokens, heads),
        "initial_state": draw(batch if sequences is None else sequences, heads, keys, width),
    }
    if kind != "none":
        drawn = torch.rand(*shapes[kind], generator=rng, dtype=torch.float64)
        values["g"] = -2 * decay * drawn
    return {
        name: leaf(v, (weights or dtype) if name in WEIGHTS else dtype, device)
        for name, v in values.items()
        if name not in without
    }


def gated_pairs(*shape: int, without: Sequence[str] = (), seed: int = 0, **options: Any) -> Inputs:
    """Arguments of `bidirectional_gated_linear_scan`."""
    both = [gated_inputs(*shape, without=without, seed=seed + d, **options) for d in range(2)]
    shared = ("v", "skip")
    pairs: Inputs = {
        name: both[0][name] if name in shared else (both[0][name], both[1][name])
        for name in both[0]
    }
    return pairs


def bidirectional_gated_ref(
    q: tuple[Tensor, Tensor],
    k: tuple[Tensor, Tensor],
    v: Tensor,
    g: tuple[Tensor, Tensor] | None = None,
    write: tuple[Tensor, Tensor] | None = None,
    skip: Tensor | None = None,
    *,
    form: str = "add",
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Two reference scans."""
    if form == "quasi_separable":
        return quasi_separable_ref(q, k, v, g, write, skip, cu_seqlens=cu_seqlens)
    results = [
        gated_linear_scan_ref(
            q[d],
            k[d],
            v,
            None if g is None else g[d],
            None if write is None else write[d],
            skip if d == 0 else None,
            exclusive=form == "exclusive",
            reverse=d == 1,
            initial_state=None if initial_state is None else initial_state[d],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        for d in range(2)
    ]
    out = results[0][0] + results[1][0]
    return (out, results[0][1], results[1][1]) if return_final_state else out


def pieces(
    op: Callable[..., Any], inputs: Inputs, cuts: Sequence[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """A forward scan in pieces, each from the state that the last one left."""
    rest = dict(inputs)
    state = rest.pop("initial_state", None)
    bounds = [0, *cuts, rest["v"].shape[1]]
    outputs = []
    for start, end in itertools.pairwise(bounds):
        part = {name: v[:, start:end] if v.ndim >= 3 else v for name, v in rest.items()}
        out, state = op(**part, initial_state=state, return_final_state=True, **options)
        outputs.append(out)
    assert state is not None
    return torch.cat(outputs, 1), state
