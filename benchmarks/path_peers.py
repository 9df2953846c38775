"""Peers of the scan along paths, the linear scan and the gated norm; see `peers.py`.

VMamba       MzeroMiko/VMamba: its extension `selective_scan_cuda_oflex`, with its modules
             `csms6s` and `csm_triton` (`classification/models` in PYTHONPATH)
fla          fla-org/flash-linear-attention: HGRN's recurrence
mamba_ssm    state-spaces/mamba: its gated norm
"""

import warnings

from torch import Tensor

from .inputs import Inputs, Op
from .paths import DIRECTIONS, along, natural
from .prepared import Layout, Prepared, attribute, need_cuda


def vmamba(op: Op, inputs: Inputs) -> Prepared:
    """Cross-scan, scan and cross-merge, all timed; dt, B and C are given in the paths' order.

    VMamba projects them from its permuted copies of x, so that is how its model has them.
    """
    need_cuda(inputs)
    with warnings.catch_warnings():
        # deprecated spellings of autocast
        warnings.simplefilter("ignore", FutureWarning)
        scan = attribute("csms6s", "selective_scan_fn")
        attribute("selective_scan_cuda_oflex", "fwd")
    split, merge = (attribute("csm_triton", f"cross_{name}_fn") for name in ("scan", "merge"))
    assert inputs.paths is not None
    return path_prepared(inputs, inputs.paths, scan, split, merge)


def path_prepared(inputs: Inputs, paths: Tensor, scan, split, merge) -> Prepared:
    """VMamba's three functions bound to our inputs."""
    shape, given = inputs.shape, {k: v.detach() for k, v in inputs.tensors.items()}

    def to(v: Tensor) -> Tensor:
        return v.transpose(1, 2).contiguous()

    leaves = {"x": to(given["x"]).unflatten(2, shape.grid)}
    # (B, K D, L), (B, K, N, L)
    leaves["dt"] = to(along(given["dt"], paths).flatten(2))
    for name in ("B", "C"):
        leaves[name] = along(given[name], paths).permute(0, 2, 3, 1).contiguous()
    leaves |= {name: given[name].flatten(0, 1) for name in ("A", "D", "dt_bias")}
    leaves = {name: leaves[name].requires_grad_() for name in given}
    t = leaves

    def call() -> Tensor:
        xs = split(t["x"], in_channel_first=True, out_channel_first=True)
        ys = scan(xs.flatten(1, 2), t["dt"], t["A"], t["B"], t["C"], t["D"], t["dt_bias"], True)
        ys = ys.unflatten(1, (DIRECTIONS, -1)).unflatten(3, shape.grid)
        return merge(ys, in_channel_first=True, out_channel_first=True).to(t["x"].dtype)

    def back(v: Tensor, name: str) -> Tensor:
        if name in ("out", "x"):
            return v.flatten(2).transpose(1, 2)
        if name == "dt":
            return natural(v.transpose(1, 2).unflatten(2, (DIRECTIONS, -1)), paths)
        if name in ("B", "C"):
            return natural(v.permute(0, 3, 1, 2), paths)
        return v.unflatten(0, (DIRECTIONS, -1))

    return Prepared(call, leaves, to, back)


def hgrn(op: Op, inputs: Inputs) -> Prepared:
    """The same recurrence, h = exp(g) h + x."""
    need_cuda(inputs)
    function = attribute("fla.ops.hgrn", "fused_recurrent_hgrn")
    layout = Layout(inputs, channel_first=False)
    leaves = {k: layout.to(v.detach()).requires_grad_() for k, v in inputs.tensors.items()}
    return Prepared(
        lambda: function(leaves["x"], leaves["log_a"])[0],
        leaves,
        layout.to,
        lambda v, name: layout.back(v),
    )


def gated_norm(op: Op, inputs: Inputs) -> Prepared:
    """Mamba-2's norm after the gate."""
    need_cuda(inputs)
    function = attribute("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
    t = {k: v.detach().requires_grad_() for k, v in inputs.tensors.items()}
    return Prepared(
        lambda: function(t["x"], t["weight"], None, t["z"], eps=1e-5, norm_before_gate=False), t
    )
