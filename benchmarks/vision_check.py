"""Whether whole models agree, logits and gradients, before any of them is timed."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vision_models import CHECKED, Implementation

# largest norm of the difference over the norm, from float32: 24 layers of bfloat16 rounding
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    off = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    return off.item()


def _logits(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    model.eval()
    with torch.no_grad(), torch.autocast(x.device.type, dtype, dtype != torch.float32):
        return model(x)


def gradients(
    model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """Gradients of the loss in all parameters, under autocast unless `dtype` is float32."""
    with torch.autocast(x.device.type, dtype, dtype != torch.float32):
        loss = F.cross_entropy(model(x).float(), target)
    return torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True)


def flat(grads: Sequence[Tensor | None]) -> Tensor:
    """All gradients in one row, float32."""
    return torch.cat([g.flatten().float() for g in grads if g is not None])


def _named(found: Implementation, x: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients of all parameters under our names, in one row."""
    found.model.train()
    grads = gradients(found.model, x, target, dtype)
    names = [name for name, _ in found.model.named_parameters()]
    by_name = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
    own = found.renamed(by_name)
    return flat([own[name] for name in sorted(own)])


def check(
    found: Sequence[Implementation], x: Tensor, target: Tensor, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, str], str]:
    """Compare logits and gradients of every implementation with those in full precision.

    That is the official model in float32 where there is one (ours is then independent of it), on
    all images that will be timed; otherwise ours in float64, which runs other code, on the first.

    Returns:
        The larger error of each implementation that passes, why the others do not, and what they
        were compared with.
    """
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        # few images run other kernels than many, so all are taken where that costs little
        if len(found) == 1:
            x, target = x[:CHECKED], target[:CHECKED]
        if len(found) > 1:
            reference, by, wide = found[1], f"{found[1].name} float32", torch.float32
        else:
            double = copy.deepcopy(found[0].model).double()
            reference = Implementation(found[0].name, double, dict)
            by, wide = f"{found[0].name} float64", torch.float64
        with torch.autocast(x.device.type, enabled=False):
            wanted = _logits(reference.model, x.to(wide), torch.float32)
            slopes = _named(reference, x.to(wide), target, torch.float32)
        errors, refused = {}, {}
        limit = LIMITS[dtype]
        for one in found:
            error = relative(_logits(one.model, x, dtype), wanted)
            error = max(error, relative(_named(one, x, target, dtype), slopes))
            if not error <= limit:
                refused[one.name] = f"off by {error:.2g} from {by}, more than {limit}"
            else:
                errors[one.name] = error
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return errors, refused, by
