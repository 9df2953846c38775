"""Checks the values of paths once per tensor: an index out of bounds must reach no kernel."""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from ..checks import check_cu_seqlens_values

# paths whose values were read, with all that the result depends on: reading a GPU's values stalls
# it, so it is done once per tensor and not once per layer
_READ_PATHS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_paths_values(paths: Tensor, cu_seqlens: Tensor | None, length: int) -> None:
    """Raise unless every row is a permutation of the tokens, within every packed sequence."""
    key = None
    # an inference tensor has no version, so nothing tells whether it has changed since
    if not paths.is_inference() and (cu_seqlens is None or not cu_seqlens.is_inference()):
        packing = None if cu_seqlens is None else (WeakIdRef(cu_seqlens), cu_seqlens._version)
        key = (paths._version, length, packing)
        if _READ_PATHS.get(paths) == key:
            return
    tokens = torch.arange(length, device=paths.device)
    ordered = paths.sort(1).values
    wrong = (ordered != tokens).any(1)
    strays = torch.zeros_like(paths, dtype=torch.bool)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].to(tokens.dtype), tokens, right=True)
        # clamped: an index out of bounds would end a GPU's context before it could be reported
        strays = sequence[paths.clamp(0, max(length - 1, 0)).long()] != sequence
        wrong = wrong | strays.any(1)
    rows = wrong.nonzero().flatten().tolist()
    if rows:
        row = ordered[rows[0]]
        outside = row[(row < 0) | (row >= length)].tolist()
        twice = row[1:][row[1:] == row[:-1]].tolist()
        if outside or twice:
            got = f"{outside[0]}" if outside else f"{twice[0]} twice"
            raise ValueError(
                f"paths must visit every token from 0 to {length - 1} once, "
                f"got {got} in row {rows[0]}"
            )
        step = int(strays[rows[0]].nonzero()[0])
        raise ValueError(
            "paths must stay within each packed sequence, "
            f"got token {int(paths[rows[0], step])} at step {step} of row {rows[0]}"
        )
    if key is not None:
        _READ_PATHS[paths] = key


def readable(paths: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """Checked paths as the kernels read them.

    A CUDA graph reads values only when it is replayed, and they may be others by then. They are
    clamped there: a path that is none gives wrong numbers but reads no foreign memory.
    """
    if paths.is_cuda and torch.cuda.is_current_stream_capturing():
        return paths.clamp(0, max(length - 1, 0)).to(torch.int32).contiguous()
    if cu_seqlens is not None:
        check_cu_seqlens_values(cu_seqlens, length)
    check_paths_values(paths, cu_seqlens, length)
    return paths.to(torch.int32).contiguous()
