"""Official vision models, imported from checkouts of their repositories and made with our weights.

`folder` holds the repositories as `git clone` leaves them:

    Vim      hustvl/Vim: `vim/models_mamba.py` and its fork of mamba_ssm, with CUDA kernels of
             released `mamba_ssm` and `causal_conv1d`, whose newer signatures are adapted here
    VMamba   MzeroMiko/VMamba: `classification/models/vmamba.py`, with its CUDA extension
             `selective_scan_cuda_oflex`
"""

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .prepared import Skip

# what the checkouts' files are called once imported; the fork shares its name with mamba_ssm
_OWN = ("mamba_ssm", "models_mamba", "rope", "vmamba", "csms6s", "csm_triton", "mamba2")


def _empty(name: str, *names: str) -> types.ModuleType:
    """A module whose names cannot be used: what an import asks for and no model needs."""
    module = types.ModuleType(name)
    for attribute in names:
        setattr(module, attribute, None)
    return module


@contextlib.contextmanager
def _imports(paths: Sequence[Path], modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Import from `paths` first, with `modules` given, and leave no trace."""

    def own() -> dict[str, types.ModuleType]:
        return {k: v for k, v in sys.modules.items() if k.partition(".")[0] in _OWN}

    kept = {k: v for k, v in sys.modules.items() if k in modules} | own()
    for name in own():
        del sys.modules[name]
    before = list(sys.path)
    sys.path[:0] = [str(path) for path in paths]
    sys.modules.update(modules)
    try:
        with warnings.catch_warnings():
            # deprecated spellings of autocast and of timm's modules
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = before
        for name in {*own(), *modules}:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def _loaded(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as reason:
        raise Skip(f"{module} does not import: {str(reason).splitlines()[0]}") from None


class _Conv:
    """The extension of causal_conv1d 1.5 and later under the signatures of 1.1."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension

    def causal_conv1d_fwd(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        initial: Tensor | None,
        final: Tensor | None,
        silu: bool,
    ) -> Tensor:
        out = torch.empty_like(x)
        self.extension.causal_conv1d_fwd(x, weight, bias, index, initial, out, final, silu)
        return out

    def causal_conv1d_bwd(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dout: Tensor,
        index: Tensor | None,
        initial: Tensor | None,
        dfinal: Tensor | None,
        dx: Tensor,
        dinitial: bool,
        silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
        assert not dinitial, "dinitial must be False, no model asks for it"
        dout = dout if dout.stride(2) == 1 or dout.stride(1) == 1 else dout.contiguous()
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        dbias = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device)
        rest = (index, initial, dfinal, dx, dweight, None if bias is None else dbias, None, silu)
        self.extension.causal_conv1d_bwd(x, weight, bias, dout, *rest)
        return dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype), None


def official_vim(folder: Path, entry: str, size: int, classes: int) -> nn.Module:
    """Vim of hustvl/Vim, with random weights, without dropped paths.

    Args:
        folder: Where the checkout `Vim` is.
        entry: Our name of the model.
        size: Image side.
        classes: Of the classifier.

    Raises:
        Skip: there is no checkout, or a part of it does not import.
    """
    root = folder / "Vim"
    fork = root / "mamba-1p1p1" / "mamba_ssm"
    if not (root / "vim" / "models_mamba.py").is_file():
        raise Skip(f"no checkout of hustvl/Vim in {folder}")
    # the fork's own __init__ imports language models, which newer transformers break
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(fork)]
    given = {
        "mamba_ssm": package,
        "mamba_ssm.utils.generation": _empty("generation", "GenerationMixin"),
        "mamba_ssm.utils.hf": _empty("hf", "load_config_hf", "load_state_dict_hf"),
    }
    for module in ("causal_conv1d", "selective_scan_cuda"):
        _loaded(module)
    with _imports([root / "vim"], given):
        models = _loaded("models_mamba")
        scans = _loaded("mamba_ssm.ops.selective_scan_interface")
        scans.causal_conv1d_cuda = _Conv(_loaded("causal_conv1d_cuda"))
    widths = {"vim_tiny": 192, "vim_small": 384, "vim_base": 768}
    found = [width for name, width in widths.items() if entry.startswith(name)]
    return models.VisionMamba(
        img_size=size,
        embed_dim=found[0] if found else 64,
        depth=24 if found else 4,
        num_classes=classes,
        drop_path_rate=0.0,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        final_pool_type="mean",
        bimamba_type="v2",
        if_divide_out=True,
    )


def official_vmamba(folder: Path, entry: str, size: int, classes: int) -> nn.Module:
    """VMamba of MzeroMiko/VMamba, with random weights, without dropped paths.

    Args:
        folder: Where the checkout `VMamba` is.
        entry: The model's name, which is the official one.
        size: Image side.
        classes: Of the classifier.

    Raises:
        Skip: there is no checkout, or a part of it does not import.
    """
    root = folder / "VMamba" / "classification" / "models"
    if not (root / "vmamba.py").is_file():
        raise Skip(f"no checkout of MzeroMiko/VMamba in {folder}")
    names = ("FlopCountAnalysis", "flop_count_str", "flop_count", "parameter_count")
    given = {"fvcore": _empty("fvcore"), "fvcore.nn": _empty("fvcore.nn", *names)}
    with _imports([root], given):
        models = _loaded("vmamba")
        sizes: dict[str, Any] = {"depths": [2, 2, 8, 2], "dims": 96, "ssm_ratio": 1.0}
        if entry == "vmamba_tiny_s2l5":
            sizes = {"depths": [2, 2, 5, 2], "dims": 96, "ssm_ratio": 2.0}
        elif entry == "test_vmamba":
            sizes = {"depths": [1, 1, 2, 1], "dims": 16, "ssm_ratio": 1.0}
        return models.VSSM(
            **sizes,
            num_classes=classes,
            ssm_d_state=1,
            ssm_conv_bias=False,
            forward_type="v05_noz",
            drop_path_rate=0.0,
            norm_layer="ln2d",
            downsample_version="v3",
            patchembed_version="v2",
            imgsize=size,
        )


OFFICIAL = {"Vim": official_vim, "VMamba": official_vmamba}
