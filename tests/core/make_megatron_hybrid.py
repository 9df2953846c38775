"""Mamba-2's hybrid as Megatron-LM builds it, on a CPU: a case of `make_hybrids.py`.

Transformer Engine's maps and norms, mamba_ssm's scan and gated norm are the equations here.
"""

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tests.core.published_code import D_MODEL, LENGTH, Case, stand_in
from torch import Tensor, nn

EPS = 1e-5


class Linear(nn.Module):
    """Transformer Engine's map without bias; its second result is the bias."""

    normed = False

    def __init__(self, width: int, out: int, **options: Any) -> None:
        super().__init__()
        assert not options["bias"]
        self.weight = nn.Parameter(torch.zeros(out, width))
        if self.normed:
            self.layer_norm_weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if self.normed:
            x = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, EPS)
        return x @ self.weight.T, None


class NormedLinear(Linear):
    """Transformer Engine's map behind an RMS norm."""

    normed = True


def norm(config: Any, hidden_size: int, eps: float) -> nn.Module:
    """Transformer Engine's RMS norm."""
    assert config.normalization == "RMSNorm"
    return nn.RMSNorm(hidden_size, eps=eps)


class GatedNorm(nn.Module):
    """mamba_ssm's RMS norm of x silu(z), in groups."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        assert not options["norm_before_gate"]
        self.groups, self.eps = width // options["group_size"], options["eps"]
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        parts = (x * F.silu(z)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any
) -> Tensor:
    """mamba_ssm's chunked scan, one token after the other."""
    assert options["dt_softplus"]
    assert options["z"] is None
    dt = F.softplus(dt + options["dt_bias"])
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (B, C))
    h, outputs = torch.zeros(()), []
    for t in range(x.shape[1]):
        written = dt[:, t, :, None, None] * x[:, t, :, :, None] * B[:, t, :, None]
        h = (dt[:, t] * A).exp()[..., None, None] * h + written
        outputs.append((h * C[:, t, :, None]).sum(-1) + options["D"][:, None] * x[:, t])
    return torch.stack(outputs, 1)


class ByBatch(nn.Module):
    """A `HybridStack`, which has tokens before sequences, with its causal mask."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return self.stack(x.transpose(0, 1), hidden).transpose(0, 1)


def mamba2_hybrid(folder: Path) -> Case:
    """NVIDIA/Megatron-LM (commit d98e8a64), megatron/core/models/hybrid.

    `HybridStack` of `hybrid_stack_spec` with the first twelve layers of the 8B model of
    examples/mamba/train.sh and its options: attention is its own `DotProductAttention`, Mamba-2
    its path without the fused kernel, all in one process without groups.
    """
    sys.path.insert(0, str(folder / "Megatron-LM"))
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        stand_in(name)
    stand_in("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=GatedNorm)
    both = dict.fromkeys(("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"), scan)
    stand_in("mamba_ssm.ops.triton.ssd_combined", **both)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]

    def replace(module: str, **content: Any) -> None:
        vars(importlib.import_module(f"megatron.core.{module}")).update(content)

    tracker = SimpleNamespace(fork=contextlib.nullcontext)
    replace("tensor_parallel", get_cuda_rng_tracker=lambda: tracker)
    buffer = SimpleNamespace(get_tensor=lambda size, dtype, name: torch.zeros(size, dtype=dtype))
    replace("parallel_state", get_global_memory_buffer=lambda: buffer)
    dot = importlib.import_module("megatron.core.transformer.dot_product_attention")
    replace(
        "extensions.transformer_engine",
        TELayerNormColumnParallelLinear=NormedLinear,
        TERowParallelLinear=Linear,
        TENorm=norm,
        TEDotProductAttention=dot.DotProductAttention,
    )
    spec = importlib.import_module("megatron.core.models.hybrid.hybrid_layer_specs")
    code = importlib.import_module("megatron.core.process_groups_config")
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = importlib.import_module("megatron.core.transformer").TransformerConfig(
        num_layers=12,
        hidden_size=D_MODEL,
        num_attention_heads=4,
        num_query_groups=2,
        mamba_state_dim=3,
        mamba_head_dim=4,
        mamba_num_groups=2,
        use_mamba_mem_eff_path=False,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=EPS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float64,
    )
    stack = spec.hybrid_stack_spec.module(
        config,
        spec.hybrid_stack_spec.submodules,
        layer_type_list=list("M-M-M--M-M*-"),
        pg_collection=code.ProcessGroupCollection(tp=one, pp=one, cp=one),
    )
    return Case(ByBatch(stack))
