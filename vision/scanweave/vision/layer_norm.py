"""Layer norm of a residual stream on GPUs, in one launch with the sum before it and the cast after.

Under autocast PyTorch widens what it normalises to float32 and gives float32, which the next
projection rounds; on rows of a few hundred channels its kernel is far from the memory's speed.
Elsewhere (CPUs, float64, compilers, tracers, TorchScript) PyTorch's own operators run.

    LayerNorm       the module
    add_and_norm    x + branch, and the norm of that
    is_watched      whether a module has to be called as it is
"""

# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from scanweave.core.ops.norm.cast import runs_kernels
from scanweave.core.ops.norm.layer import add_layer_norm_cast, layer_norm_cast


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


def is_watched(module: nn.Module) -> bool:
    """Whether somebody would miss a call: hooks, a compiled module, another forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or module._compiled_call_impl is not None or "forward" in vars(module)


def add_and_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Add a branch to a stream, (..., D) each, and give the sum and its norm.

    A norm that somebody put in the place of ours, or watches, is called.
    """
    if type(norm) is LayerNorm and not is_watched(norm):
        weight, bias = norm.weight, norm.bias
        if runs_kernels(x, weight, bias, branch) and x.dtype == torch.promote_types(
            x.dtype, branch.dtype
        ):
            dtype = _given_dtype(x, norm.rounded)
            return add_layer_norm_cast(x, branch, weight, bias, norm.eps, dtype)
    x = x + branch
    return x, norm(x)


# a leaf for torch.fx, so that traced models launch the kernel too
register_notrace_module(LayerNorm)
