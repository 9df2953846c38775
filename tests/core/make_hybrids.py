"""Make stored results of published hybrids: `python -m tests.core.make_hybrids FOLDER NAME`.

FOLDER holds checkouts of the repositories that NAME's function lists, at their commits. The
published code runs on a CPU in float64; what it takes of packages with CUDA code only is answered
here by its equations, at places that each function tells.

A file `data/hybrid_<name>.npz` holds names and shapes of the published parameters, and on `weights`
of these the output y and the input's gradient dx; nothing of the code.
"""

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tests.core.wave_cases import waves
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
D_MODEL, LENGTH = 8, 9


def weights(shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """Waves for all parameters, one speed each by the order of their names; norms are near 1."""
    made = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        made[name] = 0.5 * waves(*shape, speed=i + 1.5)
        if name.endswith("weight") and ("norm" in name or "ln_" in name):
            made[name] += 1
    return made


def inputs() -> tuple[Tensor, Tensor]:
    """The input and the cotangent of the output, both (2, L, D)."""
    size = (2, LENGTH, D_MODEL)
    return waves(*size, speed=0.7).requires_grad_(), waves(*size, speed=0.3)


class Same(nn.Module):
    """Stands where embeddings were: the input as it is."""

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        return x


def stand_in(name: str, **content: Any) -> ModuleType:
    """A module of this name that holds `content`, for imports to find."""
    module = ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
    return module


def h3_hybrid(folder: Path) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """HazyResearch/H3 (commit 5c4d06b5) with flash-attention (33e0860c), as H3 pins it.

    `SSMModel` with one layer of attention behind eight of H3. Attention and blocks are
    flash-attention's plain ones; embeddings, generation and opt_einsum are stood in for.
    """
    sys.path[:0] = [str(folder / "H3"), str(folder / "flash-attention")]
    stand_in("flash_attn.utils.generation", GenerationMixin=object)
    stand_in("flash_attn.modules.embedding", GPT2Embeddings=lambda *_: Same())
    stand_in("opt_einsum", contract=torch.einsum)
    stand_in("src.utils.utils", get_logger=logging.getLogger)
    code = importlib.import_module("src.models.ssm_seq")
    model = code.SSMModel(
        D_MODEL,
        n_layer=9,
        d_inner=4 * D_MODEL,
        vocab_size=1,
        ssm_cfg={"mode": "diag", "measure": "diag-lin", "d_state": 4},
        attn_layer_idx=[8],
        attn_cfg={"num_heads": 2},
    )
    return model, model


CASES = {"h3_hybrid": h3_hybrid}


def make(name: str, folder: Path) -> None:
    """Run one case and write its file."""
    torch.set_default_dtype(torch.float64)
    # kernels are cast to float32 here and there
    torch.Tensor.float = torch.Tensor.double  # pyright: ignore[reportAttributeAccessIssue]
    model, run = CASES[name](folder)
    model.double().eval()
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    missing, strange = model.load_state_dict(weights(shapes), strict=False)
    assert not strange
    assert not set(missing) & shapes.keys()
    x, g = inputs()
    y = run(x)
    (dx,) = torch.autograd.grad(y, x, g)
    names = np.array([f"{key} {' '.join(map(str, s))}" for key, s in shapes.items()])
    np.savez_compressed(
        DATA / f"hybrid_{name}.npz", parameters=names, y=y.detach().numpy(), dx=dx.numpy()
    )


if __name__ == "__main__":
    make(sys.argv[2], Path(sys.argv[1]))
