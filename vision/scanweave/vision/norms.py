"""Norms of a residual stream on GPUs, in one launch with the sum before and the cast after.

Under autocast PyTorch widens what it normalises to float32 and gives float32, which the next
projection rounds; on rows of a few hundred channels its kernels are far from the memory's speed.
Elsewhere (CPUs, float64, compilers, tracers, TorchScript) PyTorch's own operators run.

    LayerNorm          the module, VMamba's
    RmsNorm            the module, of Vim and others: float32 inside, whatever comes in
    add_and_norm       x + branch, and the norm of that
    chained            a layer after which the sum is the next norm's to make
    at_least_float32   what a residual stream is kept in
    is_watched         whether a module has to be called as it is
"""

# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch._jit_internal import is_scripting
from torch.nn.modules.module import _has_any_global_hook

from scanweave.core.ops.checks import autocast_dtype
from scanweave.core.ops.norm.cast import add_rms_norm_cast, rms_norm_cast, runs_kernels
from scanweave.core.ops.norm.layer import add_layer_norm_cast, layer_norm_cast


# a leaf for torch.fx: the target dtype is known only when it runs
@torch.fx.wrap
@register_notrace_function
def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis of (..., D).

    Args:
        dim: Channels D.
        eps: Added to the variance.
        rounded: Under autocast on a GPU, give what a projection reads, values of 16 bits; else
            float32, as a residual stream is kept.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        rounded: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.rounded = rounded

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis of (..., D)."""
        x = input
        # functions and not methods: those of a scripted module are not bound
        if not is_scripting():  # noqa: SIM102  (TorchScript leaves out a whole branch only)
            if runs_kernels(x, self.weight, self.bias):
                dtype = _given_dtype(x, self.rounded)
                return layer_norm_cast(x, self.weight, self.bias, self.eps, dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _given_dtype(x: Tensor, rounded: bool) -> torch.dtype:
    """What the norm of `x` has where the kernel runs."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if rounded else torch.float32


class RmsNorm(nn.RMSNorm):
    """RMS norm over the last axis of (..., D), computed in float32 or wider.

    Args:
        dim: Channels D.
        eps: Added to the mean square.
        rounded: Under autocast, give what a projection reads, values of 16 bits; else, and
            elsewhere always, the weight's dtype.
        device: Where the parameters are made.
        dtype: Type of the parameters.
    """

    eps: float  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        rounded: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.rounded = rounded

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of (..., D), of any floating dtype."""
        if not is_scripting():
            dtype = _rms_dtype(x, self.rounded)
            if dtype is not None or runs_kernels(x, self.weight):
                return rms_norm_cast(x, self.weight, self.eps, dtype or self.weight.dtype)
        x = at_least_float32(x)
        y = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


def _rms_dtype(x: Tensor, rounded: bool) -> torch.dtype | None:
    """What autocast makes of the norm of `x`, if anything."""
    return autocast_dtype(x) if rounded else None


def is_watched(module: nn.Module) -> bool:
    """Whether somebody would miss a call: hooks, on all modules too, a compiler, a new forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    changed = module._compiled_call_impl is not None or "forward" in vars(module)
    return any(hooks) or changed or bool(_has_any_global_hook())


def _takes_sum(x: Tensor, branch: Tensor, norm: LayerNorm | RmsNorm) -> bool:
    runs = runs_kernels(x, norm.weight, branch) and not is_watched(norm)
    return runs and x.dtype == torch.promote_types(x.dtype, branch.dtype)


def add_and_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Add a branch to a stream, (..., D) each, and give the sum and its norm.

    A norm that somebody put in the place of ours, or watches, is called.
    """
    if type(norm) is RmsNorm and _takes_sum(x, branch, norm):
        dtype = _rms_dtype(x, norm.rounded) or norm.weight.dtype
        return add_rms_norm_cast(x, branch, norm.weight, norm.eps, dtype)
    if type(norm) is LayerNorm and _takes_sum(x, branch, norm):
        dtype = _given_dtype(x, norm.rounded)
        return add_layer_norm_cast(x, branch, norm.weight, norm.bias, norm.eps, dtype)
    x = x + branch
    return x, norm(x)


def chained(
    layer: nn.Module, leaves: bool, x: Tensor, pending: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A stream and what is still to be added to it, after `layer`, of the same two before.

    Args:
        layer: Called with the stream and `rest`; if it `leaves` its last sum to others, and nobody
            watches it, its `with_branch` is.
        leaves: Whether `layer` has `with_branch` and sums are a norm's to make here.
        x: Stream, (..., D).
        pending: Its last branch, (..., D), or None if that is in the stream.
        rest: Further arguments of the layer.
    """
    if leaves and not is_watched(layer):
        return layer.with_branch(x, pending, *rest)  # type: ignore[operator]
    return layer(x if pending is None else x + pending, *rest), None


# leaves for torch.fx, so that traced models launch the kernel too
register_notrace_module(LayerNorm)
register_notrace_module(RmsNorm)
