"""Checks of arguments that several ops share; each raises a ValueError that names the argument.

Letters: B batch, L length, S packed sequences.
"""

import itertools
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# cu_seqlens tensors whose values were read, and their version then: reading values from a GPU
# stalls it, so it is done once per tensor and not once per layer
_READ_CU_SEQLENS: WeakIdKeyDictionary = WeakIdKeyDictionary()
# what is no tracer's stand-in
_PLAIN = (Tensor, torch.nn.Parameter)


def describe(tensor: Tensor) -> str:
    """Shape, dtype and device, as error messages show them."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Keep the dtypes that an op chooses; the meta device knows no autocast."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, letters: str
) -> None:
    """Raise unless `tensor` is floating point of this shape on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {letters}, got {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as x is, got {tensor.device}")


def check_cu_seqlens(cu_seqlens: Tensor, x: Tensor) -> None:
    """Raise unless `cu_seqlens` has the form (S + 1,) integer and `x` is one packed batch row.

    The values are checked where the op runs (`check_cu_seqlens_values`): tracing compilers
    see no values.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x must be (B, L, D), got {got}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        got = tuple(cu_seqlens.shape) if isinstance(cu_seqlens, Tensor) else type(cu_seqlens)
        raise ValueError(f"cu_seqlens must be a tensor (S + 1,), got {got}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device} as x is, got {cu_seqlens.device}")
    if x.shape[0] != 1:
        raise ValueError(f"x must have batch 1 with cu_seqlens, got {tuple(x.shape)}")


def check_cu_seqlens_values(cu_seqlens: Tensor, length: int) -> None:
    """Raise unless `cu_seqlens` never falls and runs from 0 to `length`."""
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    # an inference tensor has no version, so nothing tells whether it has changed since
    key = None if cu_seqlens.is_inference() else (cu_seqlens._version, length)
    if key is not None and _READ_CU_SEQLENS.get(cu_seqlens) == key:
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at the length {length}, "
            f"got {ends[0]} and {ends[-1]}"
        )
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        if end < start:
            raise ValueError(
                f"cu_seqlens must not fall, got {start} then {end} at positions {i}, {i + 1}"
            )
    if key is not None:
        _READ_CU_SEQLENS[cu_seqlens] = key


def trust_cu_seqlens(cu_seqlens: Tensor, length: int) -> None:
    """Say that the values are right, so that no op reads them back from a device.

    For those who have just computed them from lengths; wrong values crash kernels.
    """
    if not cu_seqlens.is_inference():
        _READ_CU_SEQLENS[cu_seqlens] = (cu_seqlens._version, length)


def computing_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32: what states and sums are kept in."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def on_kernels(*tensors: Tensor | None) -> bool:
    """Whether Triton runs an op: on a GPU, or interpreted anywhere (`TRITON_INTERPRET=1`).

    float64 never does: kernels keep their sums in float32.
    """
    first = tensors[0]
    assert first is not None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (first.is_cuda or interpreted) and computing_dtype(*tensors) == torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast gives a projection of `x` where it is on."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def exporting() -> bool:
    """Whether a program for any length, and perhaps another runtime, is being written."""
    # what torch 2.6 lacks
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


def is_real(x: Tensor) -> bool:
    """Whether `x` is no stand-in of a compiler or tracer, and nothing is traced."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return False
    return torch._C._get_tracing_state() is None


def runs_now(x: Tensor) -> bool:
    """Whether code that meets `x` may do its work without a registered operator.

    Not where a compiler traces, for a tracer's stand-in, nor if somebody watches operators. Being
    dispatched takes 5 to 10 us.
    """
    if not (is_real(x) and (x.is_cuda or x.is_cpu)):
        return False
    profiled = torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
    return not (profiled or torch._C._len_torch_dispatch_stack() > 0)
