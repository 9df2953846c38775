"""What every kernel launcher needs, and the device functions that kernels share."""

import functools
import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.0 / math.log(2.0))
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) through the hardware's base-2 exponential."""
    return 1.0 / (1.0 + tl.exp2(-v * LOG2_E))


def ceil_div(a: int, b: int) -> int:
    """Divide and round up. Triton's own is also a kernel function and takes 4 us a call."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; under the interpreter as on an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


# entering the current device anew takes as long as a small launch
_HERE = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of `x`."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def adjacent(v: Tensor) -> Tensor:
    """`v` with adjacent channels; a copy only if it has to be."""
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def batch_stride(v: Tensor | None) -> int:
    """Stride of the first dimension; 0 where it is never stepped along.

    That of a packed row is its length times its width. A kernel that is told it would be compiled
    again for every new divisor.
    """
    return 0 if v is None or v.shape[0] == 1 else v.stride(0)


def register_limit(count: int | None) -> dict[str, int]:
    """Launch option that caps registers a thread, so that more warps fit; NVIDIA only."""
    if count is None or torch.version.cuda is None:
        return {}
    return {"maxnreg": count}
