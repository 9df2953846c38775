"""The C file of an op on a CPU: compiled when the op first runs, and how its functions are called.

    Native                    one file; which tensors it runs, and why there is none
    threads, floats, pointer  arguments that all files take
    long_ends                 cu_seqlens as C reads it

Functions take one pointer to a struct of 8-byte fields, and return 0, or 1 without memory. Where
there is no compiler, ops run in PyTorch, and one line in the log of "scanweave" says why, for all
of them. SCANWEAVE_COMPILED=0 turns C off.
"""

import ctypes
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiler import BuildError, load_library

# as lanes.h numbers them
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_logger = logging.getLogger("scanweave")
_lock = threading.Lock()
_told: set[str] = set()


class _Loaded(NamedTuple):
    """The library, or None; the dtypes that it knows; a line about both."""

    functions: Any
    types: frozenset[torch.dtype]
    about: str


def _load(source: Path) -> _Loaded:
    if os.environ.get("SCANWEAVE_COMPILED") == "0":
        about = "off: SCANWEAVE_COMPILED is 0; unset it to compile C for the CPU"
        if about not in _told:
            _logger.info("ops on the CPU run in PyTorch (%s)", about)
        _told.add(about)
        return _Loaded(None, frozenset(), about)
    try:
        library, made_with = load_library(source)
    except BuildError as error:
        about = f"off: {error}"
        if about not in _told:
            _logger.warning(
                "ops on the CPU run in PyTorch, which is slower (%s); "
                "SCANWEAVE_COMPILED=0 silences this",
                about,
            )
        _told.add(about)
        return _Loaded(None, frozenset(), about)
    types = frozenset(v for v in TYPES if v != torch.float16 or library.scanweave_float16())
    parts = "OpenMP" if library.scanweave_openmp() else "one thread"
    about = f"on: {library.scanweave_lanes()} lanes, {parts}; {made_with}"
    return _Loaded(library, types, about)


class Native:
    """A C file that includes `selective/lanes.h`.

    Args:
        source: The file.
        op: Whom an error is about.
    """

    def __init__(self, source: Path, op: str) -> None:
        self.source = source
        self.op = op
        self._loaded: _Loaded | None = None

    def _library(self) -> _Loaded:
        if self._loaded is None:
            with _lock:
                if self._loaded is None:
                    self._loaded = _load(self.source)
        return self._loaded

    @property
    def types(self) -> frozenset[torch.dtype]:
        """Dtypes that it knows; none without a compiler."""
        return self._library().types

    def status(self) -> str:
        """One line: "on: ..." with how it was compiled, or "off: ..." with reason and cure."""
        return self._library().about

    def takes(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether it runs an op on these tensors; compiled if it has not been yet."""
        types: frozenset[torch.dtype] | None = None
        for v in tensors:
            if v is None:
                continue
            if not v.is_cpu:
                return False
            if types is None:
                types = self.types
            if v.dtype not in types:
                return False
        return bool(types)

    def run(self, function: str, arguments: Sequence[int]) -> None:
        """Call a function with the fields of its struct.

        Raises:
            MemoryError: it has no memory left.
        """
        # an array of int64 stands for the struct: ten times faster to fill than ctypes fields
        fields = (ctypes.c_int64 * len(arguments))(*arguments)
        if getattr(self._library().functions, function)(fields):
            raise MemoryError(f"{self.op} has no memory left for its sums; use smaller batches")


def threads(work: int, work_per_thread: int) -> int:
    """Threads that `work` is worth waking, of those that torch may use."""
    return max(1, min(torch.get_num_threads(), work // work_per_thread))


def floats(v: Tensor | None) -> Tensor | None:
    """`v` in float32 and contiguous."""
    return None if v is None else v.to(torch.float32).contiguous()


def pointer(v: Tensor | None) -> int:
    """Where the first element is; 0 without a tensor."""
    return 0 if v is None else v.data_ptr()


def long_ends(cu_seqlens: Tensor | None) -> Tensor | None:
    """`cu_seqlens` in int64 and contiguous."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
