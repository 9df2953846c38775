"""The matrix-state scan as it is measured, and its peers.

Mamba-2's scan and Hydra's both ways have one decay a head; gated linear attention (GLA) has one a
key channel, and so has RWKV-6, which reads before it writes and has a bonus.

mamba_ssm   state-spaces/mamba: Triton kernels of SSD; both directions as one batch, as Hydra's
            own code does, flips, concatenation and the shift in its time
fla         fla-org/flash-linear-attention: the same recurrence as gated linear attention, to which
            x delta is a value; its decays and values from time steps are in its time

Functions of core are imported when they run: with `--against`, core may be older than they are.

Letters: B batch, L length, H heads, P channels of a head, D = H P, N state; K = N, V = P.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .floor import Work
from .inputs import BACK, Draw, Inputs, Op
from .prepared import Peer, Prepared, Skip, attribute, need_cuda
from .reference import Exact
from .shapes import Shape

# steps of a chunk of mamba_ssm: the default of its blocks
_CHUNK = 256


def _make(
    shape: Shape, dtype: torch.dtype, device: torch.device, suffixes: tuple[str, ...]
) -> Inputs:
    """As in a freshly initialised block; directions share A, D, dt_bias, as in Hydra's."""
    draw, heads = Draw(dtype, device), shape.dim // shape.head
    tokens = (shape.batch, shape.length)
    uniform = torch.rand(2, heads, generator=draw.rng, device=device)
    # steps log-uniform in [0.001, 0.1], through the inverse of softplus
    step = torch.exp(uniform[0] * 4.6 - 6.9)
    tensors = {
        "x": draw(*tokens, heads, shape.head),
        "A": -(1 + 15 * uniform[1]),
        "D": draw(heads, dtype=torch.float32),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }
    for suffix in suffixes:
        tensors["dt" + suffix] = draw(*tokens, heads)
        for name in ("B", "C"):
            tensors[name + suffix] = draw(*tokens, 1, shape.state)
    cu_seqlens = None
    if shape.is_packed:
        cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()}, cu_seqlens)


def _make_one(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _make(shape, dtype, device, ("",))


def _make_both(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    return _make(shape, dtype, device, ("", BACK))


def _run_one(inputs: Inputs) -> Tensor:
    from scanweave.core import ssd

    t = inputs.tensors
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    return ssd(*(t[name] for name in names), cu_seqlens=inputs.cu_seqlens)


def _run_both(inputs: Inputs) -> Tensor:
    from scanweave.core import bidirectional_gated_linear_scan
    from scanweave.core.ops.gated import time_steps

    t = inputs.tensors
    steps = [time_steps(t["dt" + s], t["A"], t["dt_bias"]) for s in ("", BACK)]
    return bidirectional_gated_linear_scan(
        (t["C"], t["C" + BACK]),
        (t["B"], t["B" + BACK]),
        t["x"],
        (steps[0][1], steps[1][1]),
        (steps[0][0], steps[1][0]),
        t["D"],
        form="quasi_separable",
        cu_seqlens=inputs.cu_seqlens,
    )


def _grads(inputs: Inputs, out: Tensor, dout: Tensor) -> Exact:
    """The op in float64, which its tests compare with the definition."""
    found = torch.autograd.grad(out, list(inputs.tensors.values()), dout)
    return Exact(out.detach(), dict(zip(inputs.tensors, found, strict=True)), "portable float64")


def _exact_one(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_one(inputs), dout)


def _exact_both(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_both(inputs), dout)


def _make_attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Decays as GLA has them when training starts, memories of 20 steps and more."""
    draw, heads = Draw(dtype, device), shape.dim // shape.head
    keys = (shape.batch, shape.length, heads, shape.state)
    tensors = {
        "v": draw(*keys[:3], shape.head),
        "q": (draw(*keys) * shape.state**-0.5).to(dtype),
        "k": draw(*keys),
        "g": (F.logsigmoid(draw(*keys).float()) / 16).to(dtype),
    }
    cu_seqlens = None
    if shape.is_packed:
        cu_seqlens = torch.tensor(shape.ends(), dtype=torch.int32, device=device)
    return Inputs(shape, {k: v.requires_grad_() for k, v in tensors.items()}, cu_seqlens)


def _make_rwkv(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """From a channel that keeps 400 steps to one that keeps 3."""
    inputs = _make_attention(shape, dtype, device)
    t, heads = inputs.tensors, shape.dim // shape.head
    spread = torch.linspace(-6, -1, shape.state, device=device)
    t["g"] = (-torch.exp(spread + 0.3 * t["k"].detach().float())).to(dtype).requires_grad_()
    t["bonus"] = Draw(dtype, device)(heads, shape.state, dtype=torch.float32).requires_grad_()
    return inputs


def _run_attention(inputs: Inputs) -> Tensor:
    from scanweave.core import gated_linear_attention

    t = inputs.tensors
    attention: Callable[..., Any] = gated_linear_attention
    options = {"scale": 1.0, "bonus": t.get("bonus"), "cu_seqlens": inputs.cu_seqlens}
    return attention(t["q"], t["k"], t["v"], t["g"], **options)


def _exact_attention(inputs: Inputs, dout: Tensor) -> Exact:
    return _grads(inputs, _run_attention(inputs), dout)


def _attention_work(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    tokens, heads = shape.batch * shape.length, shape.dim // shape.head
    keys, values = (tokens * heads * n * dtype.itemsize for n in (shape.state, shape.head))
    exponentials = tokens * heads * shape.state
    # q, k, g, v, out; then those but out, dout, and four gradients
    return Work(3 * keys + 2 * values, exponentials), Work(6 * keys + 3 * values, exponentials)


def _work(shape: Shape, dtype: torch.dtype, directions: int) -> tuple[Work, Work]:
    tokens, heads = shape.batch * shape.length, shape.dim // shape.head
    # of a direction: B, C and dt; time steps and a decay of every token and head
    own = directions * tokens * (2 * shape.state + heads) * dtype.itemsize
    exponentials = directions * 3 * tokens * heads
    moved = tokens * shape.dim * dtype.itemsize
    # x, out; then x, dout, dx and the gradients of a direction's own
    return Work(2 * moved + own, exponentials), Work(3 * moved + 2 * own, exponentials)


def _work_one(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    return _work(shape, dtype, 1)


def _work_both(shape: Shape, dtype: torch.dtype) -> tuple[Work, Work]:
    return _work(shape, dtype, 2)


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {k: v.detach().requires_grad_() for k, v in inputs.tensors.items()}


def _sequences(inputs: Inputs) -> Tensor | None:
    """Sequence of every packed token, (1, L) int32."""
    if inputs.cu_seqlens is None:
        return None
    lengths = inputs.cu_seqlens.diff().long()
    rows = torch.arange(lengths.numel(), device=lengths.device, dtype=torch.int32)
    return torch.repeat_interleave(rows, lengths).unsqueeze(0)


def mamba_ssm_one(op: Op, inputs: Inputs) -> Prepared:
    """Mamba-2's scan by its authors."""
    need_cuda(inputs)
    function = attribute("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    return one_prepared(inputs, function)


def one_prepared(inputs: Inputs, scan: Callable[..., Tensor]) -> Prepared:
    """A scan `scan(x, dt, A, B, C, chunk_size=, D=, dt_bias=, dt_softplus=, seq_idx=)`."""
    t = _leaves(inputs)
    options = {"chunk_size": _CHUNK, "dt_softplus": True, "seq_idx": _sequences(inputs)}
    given = [t[name] for name in ("x", "dt", "A", "B", "C")]
    return Prepared(lambda: scan(*given, D=t["D"], dt_bias=t["dt_bias"], **options), t)


def transformers_one(op: Op, inputs: Inputs) -> Prepared:
    """Mamba-2's scan in PyTorch."""
    if inputs.cu_seqlens is not None:
        raise Skip("has no packed sequences")
    if inputs.tensors["x"].is_cuda:
        raise Skip("may run the kernels of mamba_ssm on a GPU")
    name = "transformers.models.mamba2.modeling_mamba2"
    return one_prepared(inputs, attribute(name, "mamba2_chunk_scan"))


def mamba_ssm_both(op: Op, inputs: Inputs) -> Prepared:
    """Both directions as one batch, moved by one token, as in Hydra's block."""
    need_cuda(inputs)
    function = attribute("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    return both_prepared(inputs, function)


def both_prepared(inputs: Inputs, scan: Callable[..., Tensor]) -> Prepared:
    """A scan of one direction, `scan(x, dt, A, B, C, chunk_size=, dt_bias=, dt_softplus=)`."""
    if inputs.cu_seqlens is not None:
        raise Skip("has no packed sequences")
    t = _leaves(inputs)

    def call() -> Tensor:
        x = torch.cat([t["x"], t["x"].flip(1)])
        dt, B, C = (torch.cat([t[k], t[k + BACK].flip(1)]) for k in ("dt", "B", "C"))
        options = {"chunk_size": _CHUNK, "dt_bias": t["dt_bias"], "dt_softplus": True}
        y = scan(x, dt, t["A"], B, C, **options)
        forward, back = F.pad(y[:, :-1], (0, 0, 0, 0, 1, 0)).chunk(2)
        return (forward + back.flip(1) + t["D"][:, None] * t["x"]).to(t["x"].dtype)

    return Prepared(call, t)


def fla(op: Op, inputs: Inputs) -> Prepared:
    """Gated linear attention with one decay a head."""
    need_cuda(inputs)
    return attention_prepared(inputs, attribute("fla.ops.simple_gla", "chunk_simple_gla"))


def attention_prepared(inputs: Inputs, attention: Callable[..., tuple[Tensor, Any]]) -> Prepared:
    """Linear attention `attention(q, k, v, g, scale=, cu_seqlens=)`, (B, L, H, ...) each."""
    t, heads = _leaves(inputs), inputs.shape.dim // inputs.shape.head
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.long()

    def call() -> Tensor:
        delta = F.softplus(t["dt"].float() + t["dt_bias"])
        q, k = (t[name].expand(-1, -1, heads, -1).contiguous() for name in ("C", "B"))
        v = (t["x"] * delta.unsqueeze(-1)).to(t["x"].dtype)
        y, _ = attention(q, k, v, delta * t["A"], scale=1.0, cu_seqlens=cu_seqlens)
        return (y + t["D"][:, None] * t["x"]).to(t["x"].dtype)

    return Prepared(call, t)


def fla_attention(op: Op, inputs: Inputs) -> Prepared:
    """GLA's chunks."""
    need_cuda(inputs)
    return decays_prepared(inputs, attribute("fla.ops.gla", "chunk_gla"))


def fla_rwkv(op: Op, inputs: Inputs) -> Prepared:
    """RWKV-6's chunks."""
    need_cuda(inputs)
    return decays_prepared(inputs, attribute("fla.ops.rwkv6", "chunk_rwkv6"))


def decays_prepared(inputs: Inputs, attention: Callable[..., tuple[Tensor, Any]]) -> Prepared:
    """Linear attention `attention(q, k, v, g, [bonus,] scale=, cu_seqlens=)`, a decay a channel."""
    t = _leaves(inputs)
    given = [t[name] for name in ("q", "k", "v", "g", "bonus") if name in t]
    cu_seqlens = None if inputs.cu_seqlens is None else inputs.cu_seqlens.long()
    return Prepared(lambda: attention(*given, scale=1.0, cu_seqlens=cu_seqlens)[0], t)


GATED_OPS: tuple[Op, ...] = (
    Op("ssd", _make_one, _run_one, _exact_one, _work_one),
    Op("bidirectional_ssd", _make_both, _run_both, _exact_both, _work_both, directions=2),
    Op(
        "gated_linear_attention",
        *(_make_attention, _run_attention, _exact_attention, _attention_work),
    ),
    Op("rwkv6", _make_rwkv, _run_attention, _exact_attention, _attention_work),
)
GATED_PEERS: dict[str, tuple[Peer, ...]] = {
    "ssd": (
        Peer("mamba_ssm", "mamba_ssm", mamba_ssm_one),
        Peer("fla", "fla_core", fla),
        Peer("transformers", "transformers", transformers_one),
    ),
    "bidirectional_ssd": (Peer("mamba_ssm", "mamba_ssm", mamba_ssm_both),),
    "gated_linear_attention": (Peer("fla", "fla_core", fla_attention),),
    "rwkv6": (Peer("fla", "fla_core", fla_rwkv),),
}
