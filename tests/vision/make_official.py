"""Write `official.json`: names, shapes and outputs of the official models, for `test_official.py`.

Run by hand, with einops installed and checkouts of the official repositories in one folder:

    git clone https://github.com/hustvl/Vim                    # dd0358a
    git clone https://github.com/MzeroMiko/VMamba              # 2ed52ea
    git clone https://github.com/hunto/LocalMamba              # 75e5d1f
    git clone https://github.com/wangf3014/Mamba-Reg           # 0f7c2da
    python tests/vision/make_official.py FOLDER

The official classes are made by the official code, on the meta device at their real sizes; what
they import from CUDA extensions is replaced by `_stubs`. Only hashes and counts are kept of names
and shapes. Small models are also run, in float64, with weights and images that `wave` makes from
their names, so that outputs and gradients are all there is to store. Their scans and norms are
then the few lines of `_inner`, `_scan` and `_Norm`, everything else is the official code.
"""

import hashlib
import importlib
import json
import sys
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESULT = Path(__file__).with_name("official.json")
_LONG = "bimambav2_final_pool_mean_abs_pos_embed_with"
VIM = {
    "vim_tiny_patch16_224": f"vim_tiny_patch16_224_{_LONG}_midclstok_div2",
    "vim_tiny_patch16_stride8_224": f"vim_tiny_patch16_stride8_224_{_LONG}_midclstok_div2",
    "vim_small_patch16_224": f"vim_small_patch16_224_{_LONG}_midclstok_div2",
    "vim_small_patch16_stride8_224": f"vim_small_patch16_stride8_224_{_LONG}_midclstok_div2",
    "vim_base_patch16_224": f"vim_base_patch16_224_{_LONG}_middle_cls_token_div2",
}
VMAMBA = [
    *(f"vanilla_vmamba_{size}" for size in ("tiny", "small", "base")),
    *("vmamba_tiny_s1l8", "vmamba_small_s1l20", "vmamba_base_s1l20"),
    *("vmamba_tiny_s2l5", "vmamba_small_s2l15", "vmamba_base_s2l15"),
]
# what the small models that are run are made with, by our names
REGISTERS = {"img_size": 64, "embed_dim": 32, "depth": 2, "registers": 4, "register_reduce": 2}
STAGES = {"dims": 16, "depths": (2, 1), "d_state": 4, "img_size": 40}
ROPE = {
    "img_size": 80,
    "embed_dim": 32,
    "depth": 3,
    "directions": (("h", "w2_flip"), ("v_flip", "w7"), ("h_flip", "v")),
}
DIRECTIONS = (("h", "v_flip", "w2", "w7_flip"), ("v", "w2_flip"), ("h_flip", "w7"))


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on a tensor's name and shape only, float64; norms and skips around 1."""
    count = 1
    for side in shape:
        count *= side
    phase = zlib.crc32(name.encode()) % 1000
    values = 0.3 * torch.sin(torch.arange(count, dtype=torch.float64) * 1.618 + phase)
    last = name.rpartition(".")[2]
    if last in ("D", "D_b", "Ds") or ("norm" in name and last == "weight"):
        values = values + 1
    return values.reshape(shape)


def fill(model: nn.Module, names: Callable[[str], str] = str) -> None:
    """Make a model's parameters `wave`s of their names."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(wave(names(name), tuple(p.shape)))


def layout(state: dict[str, Tensor]) -> dict[str, Any]:
    """Number of tensors and of values, and a hash of all names and shapes."""
    lines = sorted(f"{k} {tuple(v.shape)}" for k, v in state.items())
    values = sum(v.numel() for v in state.values())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"tensors": len(lines), "values": values, "sha256": digest}


def results(model: nn.Module, size: int) -> dict[str, Any]:
    """Logits of two images, and every gradient's product with a wave of its own."""
    image = wave("image", (2, 3, size, size)).requires_grad_()
    logits = model(image)
    inputs = {"image": image, **dict(model.named_parameters())}
    grads = torch.autograd.grad(
        (logits * wave("logits", tuple(logits.shape))).sum(), inputs.values()
    )
    products = {
        name: float((g * wave(f"gradient.{name}", tuple(g.shape))).sum())
        for name, g in zip(inputs, grads, strict=True)
    }
    return {"logits": logits.tolist(), "gradients": products}


def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """Channels of K groups, (B, K E, L), with B and C (B, K, N, L)."""
    delta = F.softplus(delta + bias.unsqueeze(-1))
    each = u.shape[1] // B.shape[1]
    B, C = (v.repeat_interleave(each, 1) for v in (B, C))
    h = torch.zeros_like(B[..., 0])
    out = []
    for t in range(u.shape[2]):
        d = delta[:, :, t, None]
        h = torch.exp(d * A) * h + d * B[..., t] * u[:, :, t, None]
        out.append((h * C[..., t]).sum(-1))
    return torch.stack(out, -1) + D.unsqueeze(-1) * u


def _inner(
    xz: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    A: Tensor,
    B: None,
    C: None,
    D: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
) -> Tensor:
    """Mamba between its projections, on (B, 2 E, L)."""
    assert delta_softplus
    x, z = xz.chunk(2, 1)
    taps = conv.shape[-1]
    x = F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), conv, conv_bias, groups=x.shape[1]))
    rank, state = dt_proj.shape[1], A.shape[1]
    dt, b, c = (x_proj @ x).split([rank, state, state], 1)
    y = _scan(x, dt_proj @ dt, A.double(), b[:, None], c[:, None], D, delta_bias.double())
    return y * F.silu(z)


class _Norm(nn.Module):
    """The RMS norm of the official code's Triton module."""

    def __init__(self, dim: int, eps: float = 1e-5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps, self.bias = eps, None
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _norm_of_sum(
    x: Tensor,
    weight: Tensor,
    bias: None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Any:
    total = x if residual is None else x + residual
    y = F.rms_norm(total, weight.shape, weight, eps)
    return (y, total) if prenorm else y


def _stubs() -> dict[str, types.ModuleType]:
    """What the official code imports and a machine without a GPU does not have."""
    nothing = dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_update"))
    norms = {"RMSNorm": _Norm, "layer_norm_fn": None, "rms_norm_fn": _norm_of_sum}
    scans = {
        "selective_scan_fn": None,
        "mamba_inner_fn": None,
        "bimamba_inner_fn": None,
        "mamba_inner_fn_no_out_proj": _inner,
    }
    counts = dict.fromkeys(("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count"))
    contents: dict[str, dict[str, Any]] = {
        "causal_conv1d": nothing,
        "causal_conv1d_cuda": {},
        "selective_scan_cuda": {},
        "selective_scan_cuda_core": {},
        "selective_scan_cuda_oflex": {},
        "mamba_ssm.ops.selective_scan_interface": scans,
        "mamba_ssm.ops.triton.layernorm": norms,
        "mamba_ssm.ops.triton.layer_norm": norms,
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": None},
        "mamba_ssm.utils.generation": {"GenerationMixin": object},
        "mamba_ssm.utils.hf": dict.fromkeys(("load_config_hf", "load_state_dict_hf")),
        "fvcore.nn": counts,
    }
    made = {}
    for name, inside in contents.items():
        module = made[name] = types.ModuleType(name)
        vars(module).update(inside)
        while "." in name:
            name = name.rpartition(".")[0]
            made.setdefault(name, types.ModuleType(name)).__path__ = []
    return made


@contextmanager
def _official(*paths: Path, **modules: types.ModuleType) -> Iterator[None]:
    """Import official code from `paths`, and forget it afterwards."""
    before, search = set(sys.modules), list(sys.path)
    stubs = {**_stubs(), **modules}
    sys.modules.update(stubs)
    sys.path[:0] = map(str, paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.path[:] = search
    for name in set(sys.modules) - before:
        source = str(getattr(sys.modules[name], "__file__", ""))
        if name in stubs or source.startswith(tuple(map(str, paths))):
            del sys.modules[name]


def make(folder: Path) -> dict[str, Any]:
    """Names, shapes and outputs of all of them.

    Args:
        folder: Where the checkouts are, under the names of their repositories.
    """
    layouts: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def keep(name: str, entry: str, model: nn.Module) -> None:
        layouts[name] = {"entry": entry, **layout(model.state_dict())}

    vim = folder / "Vim"
    # its own fork of the mixer, beside our stubs of what that imports
    mixers = types.ModuleType("mamba_ssm.modules")
    mixers.__path__ = [str(vim / "mamba-1p1p1" / "mamba_ssm" / "modules")]
    with _official(vim / "vim", **{"mamba_ssm.modules": mixers}):
        module = importlib.import_module("models_mamba")
        with torch.device("cpu"):
            for name, entry in VIM.items():
                keep(name, entry, getattr(module, entry)())
    with _official(folder / "VMamba" / "classification" / "models"):
        sys.modules["csm_triton"] = types.ModuleType("csm_triton")
        vars(sys.modules["csm_triton"]).update(cross_scan_fn=None, cross_merge_fn=None)
        module = importlib.import_module("vmamba")
        for name in VMAMBA:
            keep(name, name, getattr(module, name)())
    with _official(folder / "Mamba-Reg"):
        module = importlib.import_module("models_mamba")
        for size in ("tiny", "small", "base", "large"):
            entry = f"mambar_{size}_patch16_224"
            keep(entry, entry, getattr(module, entry)())
        sys.modules["mamba_custom"].mamba_inner_fn_no_out_proj = _inner
        small = {k: REGISTERS[k] for k in ("img_size", "embed_dim", "depth")}
        model = module.VisionMamba(
            num_classes=5,
            num_cls_tokens=REGISTERS["registers"],
            cls_reduce=REGISTERS["register_reduce"],
            rms_norm=True,
            residual_in_fp32=False,
            fused_add_norm=True,
            drop_path_rate=0.0,
            **small,
        ).double()
        fill(model)
        outputs["registers"] = results(model.eval(), 64)
    with _official(folder / "LocalMamba" / "classification" / "lib"):
        module = importlib.import_module("models.local_vim")
        for name, entry in (
            ("local_vim_tiny_patch16_224", "local_vim_tiny_middle_cls_token"),
            ("local_vim_small_patch16_224", "local_vim_tiny_middle_cls_token"),
            ("local_vim_tiny_rope_patch16_224", "local_vim_tiny"),
            ("local_vim_small_rope_patch16_224", "local_vim_tiny"),
        ):
            width = {"embed_dim": 384} if "small" in name else {}
            keep(name, entry, _local_vim(module, entry, width))
        model = module.VisionMamba(
            num_classes=5,
            final_pool_type="mean",
            if_abs_pos_embed=True,
            if_rope=True,
            if_rope_residual=True,
            rms_norm=True,
            residual_in_fp32=False,
            fused_add_norm=True,
            drop_path_rate=0.0,
            **{**ROPE, "directions": [list(names) for names in ROPE["directions"]]},
        ).double()
        for name in ("freqs_cos", "freqs_sin"):
            setattr(model.rope, name, getattr(model.rope, name).double())
        fill(model)
        outputs["rope"] = results(model.eval(), ROPE["img_size"])
        module = importlib.import_module("models.local_vmamba")
        for size in ("tiny", "small"):
            entry = f"local_vssm_{size}"
            keep(f"local_vmamba_{size}", entry, getattr(module, entry)())
        module.SelectiveScan = types.SimpleNamespace(
            apply=lambda u, delta, A, B, C, D, bias, softplus, rows: _scan(
                u.double(), delta.double(), A.double(), B.double(), C.double(), D, bias.double()
            )
        )
        model = module.VSSM(
            dims=STAGES["dims"],
            depths=STAGES["depths"],
            ssm_d_state=STAGES["d_state"],
            num_classes=5,
            drop_path_rate=0.0,
            directions=DIRECTIONS,
        ).double()
        fill(model)
        outputs["stages"] = results(model.eval(), STAGES["img_size"])
    return {"layouts": layouts, "outputs": outputs}


def _local_vim(module: Any, entry: str, width: dict[str, int]) -> nn.Module:
    """The entry, or the same with another width: only the tiny one has a class token."""
    made = module.VisionMamba
    if width:
        module.VisionMamba = lambda **given: made(**{**given, **width})
    try:
        return getattr(module, entry)()
    finally:
        module.VisionMamba = made


if __name__ == "__main__":
    RESULT.write_text(json.dumps(make(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
