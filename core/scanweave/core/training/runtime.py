"""Seeds and random states of Python, NumPy and torch, and the end of a group of processes.

seed_everything        start all generators from one number
seed_host              the same without the GPU
derive_seed            independent seeds for different purposes from one number
random_state           every generator's state, as tensors
set_random_state       go back to such a state
isolated_random_state  a block of code that leaves the generators as they were
leave_group_at_exit    end torch's process group before the interpreter ends
"""

import atexit
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# NumPy's global generator is legacy, but the data sets and transforms of users draw from it;
# this file is the one place that names it
_numpy_random: Any = np.random


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and the current GPU).

    Args:
        seed: 0 <= seed < 2**64; NumPy gets the lower 32 bits.

    Raises:
        ValueError: `seed` is out of range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    torch.manual_seed(seed)
    seed_host(seed)


def derive_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for one purpose; other paths give statistically independent seeds.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(0, 2)
        (True, False)
    """
    # as a spawn key: SeedSequence takes (1,) and (1, 0) for the same entropy
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0])


def random_state() -> dict[str, Tensor]:
    """The state of every generator, as tensors of fixed shapes, at least one axis each.

    "cuda" is the current device's and is there only if CUDA has been used.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = _numpy_random.get_state()
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Set every generator to what `random_state` returned.

    Raises:
        ValueError: a generator's state is missing.
    """
    names = ("python", "python_gauss", "numpy", "numpy_position", "numpy_gauss", "torch")
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"state must hold every generator, missing {', '.join(missing)}")
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].item()
    random.setstate((version, tuple(words), None if math.isnan(gauss) else gauss))
    keys = state["numpy"].numpy().astype(np.uint32)
    position, has_gauss = state["numpy_position"].tolist()
    cached = state["numpy_gauss"].item()
    _numpy_random.set_state(("MT19937", keys, position, has_gauss, cached))
    # copies: torch 2.15 reads a view's state from the start of its memory, or crashes
    torch.set_rng_state(state["torch"].clone())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].clone())


@contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Run a block whose random draws change nothing outside it.

    Args:
        seed: Seed the generators for the block; absent starts from the present state.
    """
    saved = random.getstate(), _numpy_random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        if seed is not None:
            seed_host(seed)
            if cuda is not None:
                torch.cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(saved[0])
        _numpy_random.set_state(saved[1])
        torch.set_rng_state(saved[2])
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def seed_host(seed: int) -> None:
    """Seed Python, NumPy and torch on the CPU.

    Called per batch: `torch.manual_seed` formats a stack trace each time while CUDA is unused.
    """
    random.seed(seed)
    _numpy_random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def leave_group_at_exit() -> None:
    """End torch's process group, if there is one, before the interpreter ends.

    Threads of a group that is still there then can need an interpreter that is gone, which aborts
    the process after its work is done.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit.unregister(_leave_group)
        atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
