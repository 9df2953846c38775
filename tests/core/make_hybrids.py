"""Make stored results of published hybrids: `python -m tests.core.make_hybrids FOLDER NAME`.

FOLDER holds checkouts of the repositories that NAME's function lists, at their commits. The
published code runs on a CPU in float64; what it takes of packages with CUDA code only is answered
here by its equations, at places that each function tells.

A file `data/hybrid_<name>.npz` holds names and shapes of the published parameters, and on `weights`
of these the output y and the input's gradient dx (dx_training, where experts are balanced in
training); nothing of the code.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.core.make_megatron_hybrid import mamba2_hybrid
from tests.core.published_code import D_MODEL, DATA, LENGTH, Case, Same, inputs, stand_in, weights
from torch import Tensor, nn


def h3_hybrid(folder: Path) -> Case:
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
    return Case(model)


class Rotary(nn.Module):
    """flash-attention's rotations of queries and keys, of halves of all channels."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        assert options["base"] == 1e4
        assert not options["interleaved"]
        self.dim = dim

    def forward(self, qkv: Tensor, **places: Any) -> Tensor:
        angles = torch.arange(LENGTH)[:, None] * 1e4 ** (-torch.arange(0, self.dim, 2) / self.dim)
        cos, sin = (v.repeat(1, 2)[:, None] for v in (angles.cos(), angles.sin()))
        q, k, v = qkv.unbind(2)
        turned = [torch.cat([-u.chunk(2, -1)[1], u.chunk(2, -1)[0]], -1) for u in (q, k)]
        return torch.stack([q * cos + turned[0] * sin, k * cos + turned[1] * sin, v], 2)


class Window(nn.Module):
    """flash-attention's causal softmax over the tokens from i - window_size[0] to i."""

    def __init__(self, window_size: tuple[int, int], **options: Any) -> None:
        super().__init__()
        assert options["causal"]
        self.left, self.scale = window_size[0], options["softmax_scale"]

    def forward(self, qkv: Tensor, **options: Any) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        hidden = (lag < 0) | (lag > self.left)
        scores = (q @ k.mT * self.scale).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)


def instantiate(config: Any, **more: Any) -> Any:
    """What hydra makes of nested settings with a `_target_`, or its constructor."""
    if not isinstance(config, dict):
        return config
    values = {key: instantiate(v) for key, v in config.items()}
    module, _, name = values.pop("_target_").rpartition(".")
    made = getattr(importlib.import_module(module), name)
    return partial(made, **{**values, **more}) if more.pop("_partial_", False) else made(**values)


def based(folder: Path) -> Case:
    """HazyResearch/based (commit 32c1bd4e).

    `GPTModel` as train/configs/experiment/reference/based-360m.yaml has it, three layers of it:
    its BaseConv, Taylor linear attention in its quadratic form, and sliding attention. Settings of
    precision and fusion are off. Windowed attention, rotations, and hydra's instantiation are the
    equations here, the RMS norm is PyTorch's; embeddings and generation are stood in for. Hidden
    channels of the feed-forward are rounded up to 256, as that code does.
    """
    sys.path.insert(0, str(folder / "based"))
    for name in ("", ".modules", ".ops", ".utils", ".layers"):
        stand_in(f"flash_attn{name}")
    functions = ("kvpacked", "qkvpacked", "varlen_kvpacked", "varlen_qkvpacked", "with_kvcache")
    for name in functions:
        end = "" if name.startswith("with") else "_func"
        setattr(sys.modules["flash_attn"], f"flash_attn_{name}{end}", None)
    vars(sys.modules["flash_attn"])["flash_attn_func"] = lambda window_size: None
    stand_in("flash_attn.utils.generation", InferenceParams=None)
    parallel = {"all_gather_raw": None, "get_dim_for_local_rank": None, "sync_shared_params": None}
    stand_in("flash_attn.utils.distributed", **parallel)
    stand_in("flash_attn.utils.pretrained", state_dict_from_pretrained=None)
    stand_in("flash_attn.ops.activations", sqrelu_fwd=None)
    stand_in("flash_attn.layers.rotary", RotaryEmbedding=Rotary)
    stand_in("flash_attn.modules.mha", MHA=None, ParallelMHA=None)
    parts = dict.fromkeys(("FusedMLP", "Mlp", "ParallelFusedMLP", "ParallelMLP"))
    stand_in("flash_attn.modules.mlp", **parts)
    embeddings = {"GPT2Embeddings": lambda *_, **__: Same(), "ParallelGPT2Embeddings": None}
    stand_in("flash_attn.modules.embedding", **embeddings)
    stand_in("hydra", utils=SimpleNamespace(instantiate=instantiate))
    stand_in("based.ops.triton.layer_norm", RMSNorm=nn.RMSNorm)
    stand_in("based.utils.hf", load_config_hf=None, load_state_dict_hf=None)
    mixins = {name: type(name, (), {}) for name in ("GenerationMixin", "NaiveGenerationMixin")}
    stand_in("based.generation", InferenceParams=None, **mixins)
    slide = importlib.import_module("based.models.mixers.slide_attention")
    slide.FlashSelfAttention = Window  # pyright: ignore[reportAttributeAccessIssue]
    slide.FlashCrossAttention = Window  # pyright: ignore[reportAttributeAccessIssue]
    code = importlib.import_module("based.models.gpt")
    mixers = "based.models.mixers"
    linear = f"{mixers}.linear_attention"
    config = code.GPT2MixerConfig(n_embd=D_MODEL, n_head=2, n_layer=3, n_inner=2 * D_MODEL)
    settings = {
        "mixer": {"_target_": f"{mixers}.convolution.BaseConv", "l_max": 64, "expand_proj": 4},
        "alt_mixer": {
            "_target_": f"{linear}.LinearAttention",
            "feature_map": {"_target_": f"{linear}.TaylorExp", "input_dim": 2},
            "feature_dim": 2,
            "num_heads": 2,
        },
        "alt_mixer_2": {"_target_": f"{mixers}.slide_attention.SlidingAttention", "window_size": 4},
        "alt_mixer_layers": [1],
        "alt_mixer_2_layers": [2],
        "activation_function": "swiglu",
        "rotary_emb_fraction": 1,
        "rms_norm": True,
        "max_position_embeddings": 0,
    }
    settings |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0)
    biases = ("mlp_fc1_bias", "mlp_fc2_bias", "out_proj_bias", "qkv_proj_bias")
    for name, value in {**settings, **dict.fromkeys(biases, False)}.items():
        setattr(config, name, value)
    return Case(code.GPTModel(config))


class Mamba(nn.Module):
    """mamba_ssm's layer: its parameters, and its equations one token after the other."""

    def __init__(self, d_model: int, expand: float) -> None:
        super().__init__()
        self.inner, self.state, self.rank = int(expand * d_model), 3, 1
        self.in_proj = nn.Linear(d_model, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, 4, groups=self.inner, padding=3)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.zeros(self.inner, self.state))
        self.D = nn.Parameter(torch.zeros(self.inner))
        self.out_proj = nn.Linear(self.inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv1d(u.mT)[..., : x.shape[1]].mT)
        low, b, c = self.x_proj(u).split([self.rank, self.state, self.state], -1)
        dt = F.softplus(self.dt_proj(low)).unsqueeze(-1)
        h, outputs = torch.zeros(()), []
        for t in range(x.shape[1]):
            written = dt[:, t] * b[:, t, None] * u[:, t, :, None]
            h = (-dt[:, t] * self.A_log.exp()).exp() * h + written
            outputs.append((h * c[:, t, None]).sum(-1) + self.D * u[:, t])
        return self.out_proj(torch.stack(outputs, 1) * F.silu(z))


def moe_mamba(folder: Path) -> Case:
    """llm-random/llm-random (commit 67be78cb).

    Two blocks of `TransformerTower` with `TokenChoiceFF`, as configs/experiments/mamba_dff_exp
    has it, with places for all tokens: which ones its code drops is for topk on equal values. The
    balancing losses are those that its trainer adds. Mamba's layer is the one here; einsum of
    fancy_einsum, of letters only, is PyTorch's, and its logging is not there.
    """
    sys.path.insert(0, str(folder / "llm-random"))
    stand_in("plotly", express=None)
    stand_in("opt_einsum")
    stand_in("fancy_einsum", einsum=torch.einsum)
    stand_in("lizrd.support.logging", make_histogram=None)
    llm = importlib.import_module("lizrd.core.llm")
    moe = importlib.import_module("research.conditional.moe_layers.token_choice")
    experts = importlib.import_module("research.conditional.moe_layers.expert_types")
    init = {"init_type": "truncated_normal", "init_scale": 0.1}

    def feed_forward() -> nn.Module:
        inner = experts.ExpertFF(D_MODEL, n_experts=3, expert_size=12, **init)
        return moe.TokenChoiceFF(D_MODEL, 3, 3.0, 0.01, expert_inner_function=inner, **init)

    parts = {"mamba": lambda: Mamba(D_MODEL, expand=2), "feedforward": feed_forward}
    model = llm.TransformerTower(2, D_MODEL, parts, device=torch.device("cpu"))
    gates = [part for part in model.modules() if hasattr(part, "load_balancing_loss_weight")]
    for part in model.modules():
        part.forward_pass_cache = {}  # pyright: ignore[reportAttributeAccessIssue]
    return Case(model, lambda: sum(g.forward_pass_cache["load_balancing_losses"][0] for g in gates))


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """SPADE's Cauchy sums as its kernels give them, over both conjugate halves."""
    v, w = (torch.cat([u, u.conj()], -1) for u in (v, w))
    return (v.unsqueeze(-1) / (z.unsqueeze(-2) - w.unsqueeze(-1))).sum(-2)


class Layers(nn.Module):
    """Fairseq's loop over a decoder's layers, as SPADE's decoder has it: causal and local."""

    def __init__(self, layers: list[nn.Module], attention: ModuleType, radius: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        real = torch.ones(2, LENGTH, dtype=torch.bool)
        local = attention.get_local_attention_mask(real, radius + 1)
        self.seen = local & (attention.make_3block_relative_position_ids(radius + 1) <= 0)

    def forward(self, x: Tensor) -> Tensor:
        x, bias = x.transpose(0, 1), None
        for layer in self.layers:
            x, _, _, bias = layer(x, local_attn_mask=self.seen, position_bias=bias)
        return x.transpose(0, 1)


def spade(folder: Path) -> Case:
    """microsoft/EfficientLongSequenceModeling (commit 0819294c).

    Two of its decoder layers with run_lm.sh's options, but without the table of distances, of
    which ours has none. Its decoder's loop and what it takes of fairseq (norms, dropout that is
    off) are stood in for; its Cauchy sums are those of its CUDA and KeOps kernels.
    """
    package = stand_in("spade-modules")
    package.__path__ = [str(folder / "EfficientLongSequenceModeling" / "spade-modules")]
    stand_in("opt_einsum", contract=torch.einsum, contract_expression=None)
    helpers = SimpleNamespace(
        safe_getattr=lambda config, name, default: getattr(config, name, default),
        get_activation_fn=lambda activation: getattr(F, activation),
    )
    stand_in("fairseq", utils=helpers)
    stand_in("fairseq.modules", LayerNorm=lambda width, **_: nn.LayerNorm(width))
    stand_in("fairseq.modules.fairseq_dropout", FairseqDropout=lambda *_, **__: nn.Identity())
    stand_in("fairseq.modules.quant_noise", quant_noise=lambda module, *_: module)
    stand_in("fairseq.incremental_decoding_utils", with_incremental_state=lambda made: made)
    importlib.import_module("spade-modules.s4").cauchy_naive = cauchy  # type: ignore[attr-defined]
    code = importlib.import_module("spade-modules.spade_layer")
    radius = 2
    decoder = SimpleNamespace(
        embed_dim=D_MODEL, attention_heads=2, ffn_embed_dim=4 * D_MODEL, normalize_before=True
    )
    off = ("dropout", "attention_dropout", "activation_dropout", "relu_dropout", "export")
    config = SimpleNamespace(
        **dict.fromkeys((*off, "cross_self_attention"), 0),
        decoder=decoder,
        quant_noise=SimpleNamespace(pq=0, pq_block_size=8),
        activation_fn="relu",
        local_radius=radius,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        s4_every_n_layers=100,
        s4_local_combine="concat",
        s4_state_dim=4,
        s4_channels=1,
        s4_n_ssm=D_MODEL,
        s4_dt_min=0.001,
        s4_dt_max=0.1,
        s4_lr=None,
        max_target_positions=LENGTH,
    )
    layers = [code.SpadeDecoderLayerBase(config, i, no_encoder_attn=True) for i in range(2)]
    return Case(Layers(layers, importlib.import_module("spade-modules.local_attention"), radius))


CASES: dict[str, Callable[[Path], Case]] = {
    "based": based,
    "h3_hybrid": h3_hybrid,
    "mamba2_hybrid": mamba2_hybrid,
    "moe_mamba": moe_mamba,
    "spade": spade,
}


def make(name: str, folder: Path) -> None:
    """Run one case and write its file."""
    torch.set_default_dtype(torch.float64)
    # kernels are cast to float32 here and there
    torch.Tensor.float = torch.Tensor.double  # pyright: ignore[reportAttributeAccessIssue]
    model, balance = CASES[name](folder)
    model.double().eval()
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    missing, strange = model.load_state_dict(weights(shapes), strict=False)
    assert not strange
    assert not set(missing) & shapes.keys()
    x, g = inputs()
    y = model(x)
    (dx,) = torch.autograd.grad(y, x, g, retain_graph=True)
    found = {"y": y.detach(), "dx": dx}
    if balance is not None:
        (found["dx_training"],) = torch.autograd.grad((y * g).sum() + balance(), x)
    names = np.array([f"{key} {' '.join(map(str, s))}" for key, s in shapes.items()])
    arrays = {key: v.numpy() for key, v in found.items()}
    np.savez_compressed(DATA / f"hybrid_{name}.npz", parameters=names, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    make(sys.argv[2], Path(sys.argv[1]))
