"""Inputs of the ops for tests, and one comparison of every output and every gradient.

scan_inputs, pair_inputs, conv_inputs   leaves by argument name, the same values on every device
evaluate, compare                       outputs and gradients of an op, against a float64 reference
bidirectional_ref, conv_ref             references with the signature of the public functions
layouts                                 the same values behind other strides, with NaN in between

Letters: B batch, L length, D channels, N state, G groups, W taps, S packed sequences.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scanweave.core.ops.conv import causal_conv1d_ref
from scanweave.core.ops.selective import selective_scan_ref

# arguments by name; a pair for what both directions have, a tensor otherwise
Inputs = dict[str, Any]
# of five packed sequences, 11 tokens
LENGTHS = (3, 0, 1, 6, 1)
OPTIONAL = ("D", "z", "dt_bias", "initial_state")
# activations may be 16 bit; these stay float32 then, as in a Mamba block
WEIGHTS = ("A", "D", "dt_bias", "initial_state")


def leaf(v: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return v.to(device, dtype).requires_grad_()


def pack(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """cu_seqlens, (S + 1,) int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def scan_inputs(
    batch: int,
    length: int,
    dim: int,
    state: int,
    *,
    groups: int | None = None,
    sequences: int | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `selective_scan`; `groups` None leaves the group axis out."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    tokens, group = (batch, length), () if groups is None else (groups,)
    values = {
        "x": draw(*tokens, dim),
        "dt": 0.7 * draw(*tokens, dim) - 1,
        "A": -torch.exp(0.5 * draw(dim, state)),
        "B": draw(*tokens, *group, state),
        "C": draw(*tokens, *group, state),
        "D": draw(dim),
        "z": draw(*tokens, dim),
        "dt_bias": 0.3 * draw(dim),
        "initial_state": draw(batch if sequences is None else sequences, dim, state),
    }
    return {
        name: leaf(v, (weights or dtype) if name in WEIGHTS else dtype, device)
        for name, v in values.items()
        if name not in without
    }


def pair_inputs(
    batch: int,
    length: int,
    dim: int,
    state: int,
    *,
    groups: int | None = None,
    sequences: int | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `bidirectional_selective_scan`."""
    options: dict[str, Any] = {
        "groups": groups,
        "sequences": sequences,
        "without": without,
        "dtype": dtype,
        "weights": weights,
        "device": device,
    }
    both = [scan_inputs(batch, length, dim, state, seed=seed + k, **options) for k in range(2)]
    pairs: Inputs = {name: (both[0][name], both[1][name]) for name in both[0]}
    if "z" in pairs:
        pairs["z"] = both[0]["z"]
    return pairs


def conv_inputs(
    batch: int,
    length: int,
    dim: int,
    width: int,
    *,
    sequences: int | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    weights: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Arguments of `causal_conv1d`."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    values = {
        "x": draw(batch, length, dim),
        "weight": draw(dim, width),
        "bias": draw(dim),
        "initial_state": draw(batch if sequences is None else sequences, width - 1, dim),
    }
    return {
        name: leaf(v, (weights or dtype) if name in ("weight", "bias") else dtype, device)
        for name, v in values.items()
        if name not in without
    }


def flat(inputs: Inputs) -> dict[str, Tensor]:
    """Pairs as two entries, `x[0]` and `x[1]`."""
    tensors: dict[str, Tensor] = {}
    for name, v in inputs.items():
        if isinstance(v, Tensor):
            tensors[name] = v
        else:
            tensors |= {f"{name}[{k}]": part for k, part in enumerate(v)}
    return tensors


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """`change` of every tensor, as new leaves."""

    def one(v: Tensor) -> Tensor:
        return change(v.detach()).detach().requires_grad_()

    return {
        k: one(v) if isinstance(v, Tensor) else (one(v[0]), one(v[1])) for k, v in inputs.items()
    }


def _outputs(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    assert isinstance(result, tuple)
    return [v for part in result for v in _outputs(part)]


def evaluate(
    op: Callable[..., object],
    inputs: Inputs,
    *,
    rounded_to: Sequence[torch.dtype] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs by place, and the gradient of every input under fixed random cotangents.

    `rounded_to` rounds the cotangents, so that a reference gets those of the op.
    """
    leaves = flat(inputs)
    outputs = _outputs(op(**inputs, **options))
    cotangents = []
    for i, v in enumerate(outputs):
        rng = torch.Generator().manual_seed(100 + i)
        g = torch.randn(v.shape, generator=rng, dtype=torch.float64)
        dtype = v.dtype if rounded_to is None else rounded_to[i]
        cotangents.append(g.to(dtype).to(v.device, v.dtype))
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    values = {f"output {i}": v.detach() for i, v in enumerate(outputs)}
    return values | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}


def assert_all_near(
    assert_near: Callable[..., None],
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    *,
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
) -> None:
    """Every value within the table's row of `dtype`.

    By default of its own, so float32 results of 16-bit inputs too. Tensor cores multiply what is
    rounded to 16 bits: there `dtype` is that of the operands.
    """
    assert actual.keys() == expected.keys()
    for name, v in actual.items():
        gradient = name.startswith("gradient")
        near = {"dtype": dtype, "gradient": gradient, "name": name, "factor": factor}
        assert_near(v, expected[name], **near)


def compare(
    assert_near: Callable[..., None],
    op: Callable[..., object],
    reference: Callable[..., object],
    inputs: Inputs,
    *,
    factor: float = 1.0,
    near_as: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Every output and gradient of `op` against `reference` in float64 on the same inputs.

    `near_as` is the dtype of `assert_all_near`.
    """
    actual = evaluate(op, inputs, **options)
    dtypes = [v.dtype for name, v in actual.items() if name.startswith("output")]
    exact = evaluate(reference, each(inputs, Tensor.double), rounded_to=dtypes, **options)
    for name, v in flat(inputs).items():
        assert actual[f"gradient of {name}"].dtype == v.dtype, name
    assert_all_near(assert_near, actual, exact, factor=factor, dtype=near_as)
    return actual


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert actual.keys() == expected.keys()
    for name, v in actual.items():
        torch.testing.assert_close(v, expected[name], rtol=0, atol=0, msg=name)


def bidirectional_ref(
    x: tuple[Tensor, Tensor],
    dt: tuple[Tensor, Tensor],
    A: tuple[Tensor, Tensor],
    B: tuple[Tensor, Tensor],
    C: tuple[Tensor, Tensor],
    D: tuple[Tensor, Tensor] | None = None,
    z: Tensor | None = None,
    dt_bias: tuple[Tensor, Tensor] | None = None,
    dt_softplus: bool = True,
    *,
    initial_state: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Two reference scans, added and gated."""
    results = [
        selective_scan_ref(
            x[k],
            dt[k],
            A[k],
            B[k],
            C[k],
            D=None if D is None else D[k],
            dt_bias=None if dt_bias is None else dt_bias[k],
            dt_softplus=dt_softplus,
            reverse=k == 1,
            initial_state=None if initial_state is None else initial_state[k],
            cu_seqlens=cu_seqlens,
            return_final_state=True,
        )
        for k in range(2)
    ]
    out = results[0][0] + results[1][0]
    if z is not None:
        out = out * F.silu(z)
    return (out, results[0][1], results[1][1]) if return_final_state else out


def conv_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    reverse: bool = False,
    symmetric: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_ref`, and the last W - 1 inputs of every sequence."""
    y = causal_conv1d_ref(
        x,
        weight,
        bias,
        activation,
        reverse=reverse,
        symmetric=symmetric,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
    )
    if not return_final_state:
        return y
    count = weight.shape[1] - 1
    if cu_seqlens is None:
        parts = [x[i : i + 1] for i in range(x.shape[0])]
    else:
        parts = [x[:, a:b] for a, b in itertools.pairwise(cu_seqlens.tolist())]
    states = []
    for i, part in enumerate(parts):
        part = part.flip(1) if reverse else part
        if initial_state is None:
            head = x.new_zeros(1, count, x.shape[2])
        else:
            head = initial_state[i : i + 1]
        states.append(torch.cat([head, part], 1)[:, part.shape[1] :])
    return y, torch.cat(states) if states else x.new_zeros(0, count, x.shape[2])


def widened(v: Tensor) -> Tensor:
    """The middle of a wider tensor, as a chunk of a projection is."""
    junk = torch.full_like(v, float("nan"))
    return torch.cat([junk, v, junk], -1).split(v.shape[-1], -1)[1]


def stepped(v: Tensor) -> Tensor:
    """Every second element of the last axis."""
    junk = torch.full_like(v, float("nan"))
    return torch.stack([v, junk], -1).flatten(-2)[..., ::2]


def transposed(v: Tensor) -> Tensor:
    """Last two axes swapped in memory, as (B, D, L) code hands over."""
    if v.ndim < 2:
        return v
    return v.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)


def batch_last(v: Tensor) -> Tensor:
    """First axis innermost in memory."""
    return v.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)


LAYOUTS = {f.__name__: f for f in (widened, stepped, transposed, batch_last)}
