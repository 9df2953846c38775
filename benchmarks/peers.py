"""Other public implementations of the same ops, imported if installed, on the same inputs.

Most of them are channel-first, (B, D, L), and know no packed sequences: their inputs are
transposed, and packed ones padded to the longest, before the clock starts, and their results
turned back after it has stopped. A second direction is a second call between flips of x, z and
the output, which are timed: models that use these scans do so.

    mamba_ssm          state-spaces/mamba: CUDA and Triton kernels, and the loops in PyTorch
    causal_conv1d      Dao-AILab/causal-conv1d: CUDA kernel
    fla                fla-org/flash-linear-attention: Triton kernels
    VMamba             MzeroMiko/VMamba: CUDA and Triton kernels, see `path_peers.py`
    transformers       huggingface/transformers: the path in PyTorch
    mamba.py           alxndrTL/mamba.py: parallel scan in PyTorch
    torch              depthwise convolution of PyTorch

On a CPU our own path in PyTorch, which runs where there is no C compiler, is timed as a peer.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .gated_ops import GATED_PEERS
from .inputs import BACK, Inputs, Op
from .linear_ops import LINEAR_OPS
from .path_peers import gated_norm, hgrn, vmamba
from .prepared import Layout, Peer, Prepared, Skip, attribute, need_cuda
from .shapes import Shape
from .step_ops import STEP_OPS

# B L D N elements up to which states of all steps are kept: 2 GB in float32
_MOST_STATES = 1 << 29
# autograd of a loop that slices a (B, D, L, N) tensor fills one such tensor with zeros a step
_MOST_SLICED = {"cpu": 2e9, "cuda": 1e11}


def ours(op: Op, inputs: Inputs) -> Prepared:
    """The op itself in the same form; what a step updates is its own copy."""
    leaves = inputs.tensors if op.backward else {}
    state = None if inputs.state is None else inputs.state.clone()
    own = replace(inputs, state=state)
    return Prepared(lambda: op.run(own), leaves, state=state)


def _portable(op: Op, inputs: Inputs) -> Prepared:
    """Our op without its compiled library."""
    takes = attribute("scanweave.core.ops.selective.compiled", "takes")
    x = inputs.tensors["x"]
    if x.is_cuda or not takes([x]):
        raise Skip
    module = importlib.import_module("scanweave.core.ops.selective.compiled")

    @contextmanager
    def without_library() -> Iterator[None]:
        module.takes = lambda tensors: False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.takes = takes  # type: ignore[attr-defined]

    return Prepared(lambda: op.run(inputs), inputs.tensors, context=without_library)


def _check_size(shape: Shape, device: str, sliced: bool) -> None:
    states = shape.batch * shape.length * shape.dim * shape.state
    if shape.is_packed:
        # at most this much padding
        states = (len(shape.ends()) - 1) * shape.packed[1] * shape.dim * shape.state
    if states > _MOST_STATES:
        raise Skip("too much memory: keeps (B, L, D, N)")
    longest = shape.packed[1] or shape.length
    if sliced and states * longest > _MOST_SLICED[device]:
        raise Skip("too slow: backward quadratic in L")


# x, dt, A, B, C, D, z, dt_bias -> out, in one layout
Scan = Callable[..., Tensor]


def _scan(
    load: Callable[[], Scan],
    *,
    cuda: bool = False,
    channel_first: bool = True,
    keeps_states: bool = True,
    sliced: bool = True,
) -> Callable[[Op, Inputs], Prepared]:
    """One or two directions of a peer's scan."""

    def prepare(op: Op, inputs: Inputs) -> Prepared:
        if cuda:
            need_cuda(inputs)
        scan = load()
        device = inputs.tensors["x"].device.type
        if keeps_states:
            _check_size(inputs.shape, device, sliced)
        layout = Layout(inputs, channel_first)
        time = 2 if channel_first else 1
        leaves = {}
        for name, v in inputs.tensors.items():
            v = layout.to(v.detach()) if v.ndim == 3 else v.detach()
            if name in ("dt_r", "B_r", "C_r"):
                v = v.flip(time)
            leaves[name] = v.requires_grad_()
        t = leaves
        z = t.get("z")

        def call() -> Tensor:
            out = scan(t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], z, t["dt_bias"])
            if op.directions == 1:
                return out
            again = (t[name + BACK] for name in ("dt", "A", "B", "C", "D"))
            gate = None if z is None else z.flip(time)
            flipped = scan(t["x_r"].flip(time), *again, gate, t["dt_bias_r"])
            return out + flipped.flip(time)

        def back(v: Tensor, name: str) -> Tensor:
            v = v.flip(time) if name in ("dt_r", "B_r", "C_r") else v
            return layout.back(v) if v.ndim == 3 else v

        return Prepared(call, leaves, layout.to, back)

    return prepare


def _mamba_ssm(name: str) -> Callable[[], Scan]:
    def load() -> Scan:
        function = attribute("mamba_ssm.ops.selective_scan_interface", name)
        return lambda *arguments: function(*arguments, delta_softplus=True)

    return load


def _transformers() -> Scan:
    function = attribute("transformers.models.mamba.modeling_mamba", "mamba_selective_scan")
    # what it wraps is the path in PyTorch, whichever kernels are installed
    function = inspect.unwrap(function)
    return lambda *arguments: function(*arguments, delta_softplus=True)


def _mamba_py() -> Scan:
    block = attribute("mambapy.mamba", "MambaBlock")

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Any, dt_bias: Tensor
    ) -> Tensor:
        # the method uses nothing of its block
        y = block.selective_scan(None, x, F.softplus(dt + dt_bias), A, B, C, D)
        return y if z is None else y * F.silu(z)

    return run


def _conv_leaves(
    op: Op, inputs: Inputs, channel_first: bool
) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor], Callable[[Tensor, str], Tensor]]:
    layout = Layout(inputs, channel_first)
    x = layout.to(inputs.tensors["x"].detach())
    # these want one dtype
    leaves = {"x": x} | {k: inputs.tensors[k].detach().to(x.dtype) for k in ("weight", "bias")}
    leaves = {name: v.requires_grad_() for name, v in leaves.items()}
    return leaves, layout.to, lambda v, name: layout.back(v) if v.ndim == 3 else v


def _causal_conv1d(op: Op, inputs: Inputs) -> Prepared:
    need_cuda(inputs)
    function = attribute("causal_conv1d", "causal_conv1d_fn")
    t, to, back = _conv_leaves(op, inputs, True)
    return Prepared(
        lambda: function(t["x"], t["weight"], t["bias"], activation="silu"), t, to, back
    )


def _fla_conv(op: Op, inputs: Inputs) -> Prepared:
    need_cuda(inputs)
    function = attribute("fla.modules.convolution", "causal_conv1d")
    t, to, back = _conv_leaves(op, inputs, False)
    run = lambda: function(t["x"], t["weight"], t["bias"], activation="silu")[0]  # noqa: E731
    return Prepared(run, t, to, back)


def _torch_conv(op: Op, inputs: Inputs) -> Prepared:
    t, to, back = _conv_leaves(op, inputs, True)
    x, taps, width = t["x"], t["weight"], inputs.shape.width

    def run() -> Tensor:
        c = F.conv1d(x, taps.unsqueeze(1), t["bias"], padding=width - 1, groups=x.shape[1])
        return F.silu(c[..., : x.shape[2]])

    return Prepared(run, t, to, back)


def _state_update(name: str, cuda: bool) -> Callable[[Op, Inputs], Prepared]:
    def prepare(op: Op, inputs: Inputs) -> Prepared:
        if cuda:
            need_cuda(inputs)
        function = attribute("mamba_ssm.ops.triton.selective_state_update", name)
        assert inputs.state is not None
        state, t = inputs.state.clone(), inputs.tensors
        return Prepared(lambda: function(state, **t, dt_softplus=True), {}, state=state)

    return prepare


def _same_weights(inputs: Inputs, module: torch.nn.Module) -> Prepared:
    """A block with our parameters and their dtypes."""
    own = dict(module.named_parameters())
    for name, v in inputs.tensors.items():
        if name != "x":
            own[name].data = v.detach().clone()
    if own.keys() != inputs.tensors.keys() - {"x"}:
        raise Skip("has other parameters")
    leaves = {"x": inputs.tensors["x"].detach().requires_grad_()} | own
    return Prepared(lambda: module(leaves["x"]), leaves)


def _mamba_ssm_block(op: Op, inputs: Inputs) -> Prepared:
    if inputs.shape.mixer != "mamba":
        raise Skip
    need_cuda(inputs)
    block = attribute("mamba_ssm.modules.mamba_simple", "Mamba")
    return _same_weights(inputs, block(inputs.shape.dim).to(inputs.tensors["x"].device))


def _transformers_block(op: Op, inputs: Inputs) -> Prepared:
    shape = inputs.shape
    if shape.mixer != "mamba":
        raise Skip
    block = attribute("transformers.models.mamba.modeling_mamba", "MambaMixer")
    config = attribute("transformers.models.mamba.configuration_mamba", "MambaConfig")
    inner = Shape(shape.name, shape.batch, shape.length, 2 * shape.dim, shape.state)
    _check_size(inner, inputs.tensors["x"].device.type, sliced=True)
    module = block(config(hidden_size=shape.dim, num_hidden_layers=1), layer_idx=0)
    return _same_weights(inputs, module.to(inputs.tensors["x"].device).eval())


_SCANS = (
    Peer("scanweave portable", "scanweave", _portable),
    Peer(
        "mamba_ssm",
        "mamba_ssm",
        _scan(_mamba_ssm("selective_scan_fn"), cuda=True, keeps_states=False),
    ),
    Peer("mamba_ssm loop", "mamba_ssm", _scan(_mamba_ssm("selective_scan_ref"))),
    Peer("transformers", "transformers", _scan(_transformers)),
    Peer("mamba.py", "mambapy", _scan(_mamba_py, channel_first=False, sliced=False)),
)
PEERS: dict[str, tuple[Peer, ...]] = {
    "selective_scan": _SCANS,
    "bidirectional_selective_scan": _SCANS,
    "path_selective_scan": (Peer("VMamba", "selective_scan", vmamba),),
    "causal_conv1d": (
        Peer("causal_conv1d", "causal_conv1d", _causal_conv1d),
        Peer("fla", "fla_core", _fla_conv),
        Peer("torch", "torch", _torch_conv),
    ),
    "bidirectional_conv": (),
    "selective_scan_step": (
        Peer("mamba_ssm", "mamba_ssm", _state_update("selective_state_update", True)),
        Peer("mamba_ssm loop", "mamba_ssm", _state_update("selective_state_update_ref", False)),
    ),
    **GATED_PEERS,
    **{op.name: () for op in (*STEP_OPS, *LINEAR_OPS)},
    "linear_scan": (Peer("fla", "fla_core", hgrn),),
    "rms_norm_gated": (Peer("mamba_ssm", "mamba_ssm", gated_norm),),
    "layer_norm": (),
    "rms_norm": (),
    "mixer": (
        Peer("mamba_ssm", "mamba_ssm", _mamba_ssm_block),
        Peer("transformers", "transformers", _transformers_block),
    ),
}
