"""Inputs of the scan along paths, and its definition in three steps a direction.

path_inputs   leaves by argument name, the same values on every device
path_ref      gather along the path, the definition of the scan, scatter back
random_paths  permutations of the tokens, of each packed sequence by itself

Letters: B batch, L length, D channels, N state, G groups, K directions, S packed sequences.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tests.core.op_cases import WEIGHTS, Inputs, leaf
from torch import Tensor

from scanweave.core.ops.selective import selective_scan_ref


def path_inputs(
    batch: int,
    length: int,
    dim: int,
    state: int,
    directions: int = 4,
    *,
    groups: int | None = None,
    sequences: int | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `path_selective_scan` but for `paths`; `groups` None leaves their axis out."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tokens, group = (batch, length), () if groups is None else (groups,)
    rows = batch if sequences is None else sequences
    values = {
        "x": draw(*tokens, dim),
        "dt": 0.7 * draw(*tokens, directions, dim) - 1,
        "A": -torch.exp(0.5 * draw(directions, dim, state)),
        "B": draw(*tokens, directions, *group, state),
        "C": draw(*tokens, directions, *group, state),
        "D": draw(directions, dim),
        "z": draw(*tokens, dim),
        "dt_bias": 0.3 * draw(directions, dim),
        "initial_state": draw(directions, rows, dim, state),
    }
    return {
        name: leaf(v, (weights or dtype) if name in WEIGHTS else dtype, device)
        for name, v in values.items()
        if name not in without
    }


def random_paths(
    directions: int,
    length: int,
    *,
    lengths: Sequence[int] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Tensor:
    """(K, L) int32."""
    rng = torch.Generator().manual_seed(seed)
    ends = [0, *itertools.accumulate((length,) if lengths is None else lengths)]
    rows = [
        torch.cat([a + torch.randperm(b - a, generator=rng) for a, b in itertools.pairwise(ends)])
        for _ in range(directions)
    ]
    return torch.stack(rows).to(device, torch.int32)


def path_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    *,
    paths: Tensor,
    reverse: Sequence[bool] | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`path_selective_scan` as it is defined."""
    out = torch.zeros_like(x)
    finals = []
    for k, path in enumerate(paths.long()):
        y, final = selective_scan_ref(
            x[:, path],
            dt[:, path, k],
            A[k],
            B[:, path, k],
            C[:, path, k],
            None if D is None else D[k],
            None,
            None if dt_bias is None else dt_bias[k],
            dt_softplus,
            reverse=reverse is not None and reverse[k],
            initial_state=None if initial_state is None else initial_state[k],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        out = out.index_add(1, path, y)
        finals.append(final)
    if z is not None:
        out = out * F.silu(z)
    return (out, torch.stack(finals)) if return_final_state else out
