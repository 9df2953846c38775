"""Whether an implementation is right: every output and gradient against float64, or no timing."""

import torch
from torch import Tensor

from .ops import Inputs, Op
from .peers import Prepared
from .reference import Exact

# largest norm of the difference over the norm of the exact value, on the same rounded inputs.
# Rounding of the outputs alone gives 1.7e-3 (bfloat16) and 2.1e-4 (float16); in float32 the
# hardware's exponential, off by 2^-22, adds up along the memory of a state
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 6e-3,
}
# a whole block rounds its intermediate values as well, and their gradients
BLOCK_FACTOR = 8.0
# other implementations round where ours do not; what is wrong is off by far more
PEER_FACTOR = 10.0


class CheckError(Exception):
    """An implementation disagrees with float64: its time would mean nothing."""


def output_gradient(op: Op, inputs: Inputs) -> Tensor:
    """A random gradient of the output; each has the shape and dtype of the first input."""
    x = next(iter(inputs.tensors.values()))
    rng = torch.Generator(x.device).manual_seed(1)
    size = x.shape if op.outputs == 1 else (op.outputs, *x.shape)
    return torch.randn(size, generator=rng, device=x.device, dtype=x.dtype)


def exact(op: Op, inputs: Inputs, dout: Tensor) -> Exact:
    """Run the op's float64 definition on the same values."""
    return op.exact(inputs.double(), dout.double())


def errors(reference: Exact, prepared: Prepared, dout: Tensor) -> dict[str, tuple[float, float]]:
    """Run an implementation once and compare.

    Args:
        reference: What it should give.
        prepared: The implementation on its inputs.
        dout: Gradient of our output.

    Returns:
        By name of output and gradients: the norm of the difference over the norm of the exact
        value, and the largest difference over the largest exact value. NaN where a value is.
    """
    if not prepared.leaves:
        with torch.no_grad(), prepared.context():
            found = {"out": prepared.back(prepared.call(), "out")}
        if prepared.state is not None:
            found["state"] = prepared.state
    else:
        with prepared.context():
            out = prepared.call()
            grads = torch.autograd.grad(out, list(prepared.leaves.values()), prepared.to(dout))
        found = {"out": prepared.back(out.detach(), "out")}
        pairs = zip(prepared.leaves, grads, strict=True)
        found |= {name: prepared.back(grad, name) for name, grad in pairs}
    wanted = {"out": reference.out} | reference.grads
    assert found.keys() == wanted.keys(), f"{found.keys()} is not {wanted.keys()}"
    return {name: _error(found[name], wanted[name]) for name in wanted}


def _error(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    assert found.shape == wanted.shape, f"{found.shape} is not {wanted.shape}"
    off = found.double() - wanted
    tiny = torch.finfo(torch.float32).tiny
    relative = off.norm().item() / max(wanted.norm().item(), tiny)
    largest = off.abs().max().item() / max(wanted.abs().max().item(), tiny)
    return relative, largest


def require(
    found: dict[str, tuple[float, float]], dtype: torch.dtype, factor: float = 1.0
) -> float:
    """Largest error, if every one is within the tolerance.

    Raises:
        CheckError: one is not, or is NaN; names the tensors.
    """
    limit = factor * TOLERANCES[dtype]
    # "not <=" so that NaN fails
    wrong = {name: error for name, (error, _) in found.items() if not error <= limit}
    if wrong:
        listed = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
        raise CheckError(f"off by more than {limit:.2g} from float64: {listed}")
    return max(error for error, _ in found.values())
