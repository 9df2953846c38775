"""Published hybrids as patterns: which layers, in which order, with which options.

A preset says what a paper or its code fixes for every size: the order of layers, kinds of norms and
feed-forwards, windows, ratios. Widths follow the stack's d_model; `letters` of `create_stack`
override single entries. `depth` of `create_stack` cuts or repeats the pattern.

Letters: D model channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from .step import NormKind
from .wrappers import Merge, Named

# what letters stand for unless a preset or an argument says otherwise
LETTERS: dict[str, Named] = {
    "a": "attention",
    "c": "gated_cnn",
    "e": "moe",
    "f": "gated_mlp",
    "g": "rg_lru",
    "h": "mamba_heads",
    "k": "channel_mix",
    "l": "lru",
    "m": "mamba",
    "n": "mamba2",
    "p": "mlp",
    "r": "retnet",
    "s": "s4",
    "w": "local_attention",
    "S": "shared",
}


@dataclass(frozen=True)
class Preset:
    """A published hybrid.

    Attributes:
        pattern: Its layers, see `parse_pattern`; whole where the published order is not periodic.
        paper: Where it is defined.
        letters: What the pattern's letters stand for where `LETTERS` says otherwise.
        depth: Layers if none are asked for: the fewest that hold every kind of layer.
        merge: How mixers side by side are merged.
        meta_tokens: Learned tokens before every sequence.
        norm_eps: Added to the mean square in the norms.
        norm_kind: Norms before every part and at the end.
    """

    pattern: str
    paper: str
    letters: Mapping[str, Named] = field(default_factory=dict)
    depth: int | None = None
    merge: Merge = "add"
    meta_tokens: int = 0
    norm_eps: float = 1e-5
    norm_kind: NormKind = "rms"


_GEGLU = ("gated_mlp", {"expand": 3, "activation": "gelu_tanh", "bias": True})
_LOCAL = {"num_kv_heads": 1, "window": 2048, "rope_fraction": 0.5, "bias": False, "out_bias": True}
_SWA = {"window": 2048, "bias": False}

PRESETS: dict[str, Preset] = {
    "samba": Preset(
        "(m f)(w f)",
        "Ren et al. 2024, arXiv 2406.07522",
        {"w": ("local_attention", _SWA)},
    ),
    "jamba": Preset(
        "(h f)(h e)(h f)(h e)(a f)(h e)(h f)(h e)",
        "Lieber et al. 2024, arXiv 2403.19887",
        {
            "a": ("attention", {"bias": False}),
            "f": ("gated_mlp", {"expand": 3.5}),
            "e": ("moe", {"num_experts": 16, "top_k": 2, "expand": 3.5, "balance": 1e-3}),
        },
        norm_eps=1e-6,
    ),
    "zamba": Preset(
        "2*m (S>m) 4*m (S>m) 11*(5*m (S>m)) 2*m",
        "Glorioso et al. 2024, arXiv 2405.16712",
        {"m": ("mamba_heads", {"n_heads": 2, "bcdt_norm": False})},
        depth=8,
    ),
    "zamba2": Preset(
        "m 7*(5*m (S>m)) 4*m (S>m) 3*m (S>m) 2*m",
        "Glorioso et al. 2024, arXiv 2411.15242",
        {"m": "mamba2", "S": ("shared", {"lora_rank": 128, "num_blocks": 2})},
        depth=13,
    ),
    "hymba": Preset(
        "(m|a f) 14*(m|w f) (m|a f) 15*(m|w f) (m|a f)",
        "Dong et al. 2024, arXiv 2411.13676",
        {
            "m": ("mamba_heads", {"d_conv": 3}),
            "a": ("attention", {"rope_fraction": 1.0, "bias": False, "expand": 2}),
            # 1024 tokens before one's own
            "w": ("local_attention", {"window": 1025, "prefix": 128, "bias": False, "expand": 2}),
            "f": ("gated_mlp", {"expand": 3}),
        },
        depth=2,
        merge="norm",
        meta_tokens=128,
        norm_eps=1e-6,
    ),
    "griffin": Preset(
        "(g f)(g f)(w f)",
        "De et al. 2024, arXiv 2402.19427",
        {"w": ("local_attention", _LOCAL), "f": _GEGLU},
        norm_eps=1e-6,
    ),
    "hawk": Preset(
        "(g f)",
        "De et al. 2024, arXiv 2402.19427",
        {"f": _GEGLU},
        norm_eps=1e-6,
    ),
    "moe_mamba": Preset(
        "(m e)",
        "Pioro et al. 2024, arXiv 2401.04081",
        {
            "e": (
                "moe",
                {
                    "num_experts": 32,
                    "router": "switch",
                    "capacity": 1.0,
                    "expand": 3,
                    "activation": "relu",
                    "gated": False,
                },
            )
        },
        norm_kind="layer",
    ),
    "blackmamba": Preset(
        "(m e)",
        "Anthony et al. 2024, arXiv 2402.01771",
        {"e": ("moe", {"num_experts": 8, "router": "sinkhorn", "router_bias": True})},
    ),
    "spade": Preset(
        "(s|w p) 15*(w p)",
        "Zuo et al. 2022, arXiv 2212.08136",
        {
            "s": ("s4", {"gated": False}),
            "w": ("local_attention", {"window": 512, "bias": False}),
            "p": ("mlp", {"activation": "relu"}),
        },
        depth=2,
        merge="concat",
        norm_kind="layer",
    ),
    "based": Preset(
        "5*((c f)(l f)(w f)(c f)(c f)) (c f)(c f)",
        "Arora et al. 2024, arXiv 2402.18668",
        {
            "c": ("base_conv", {"expand": 2, "skip": False}),
            "l": "based",
            # 128 tokens before one's own
            "w": ("local_attention", {"window": 129, "bias": False}),
            "f": ("gated_mlp", {"expand": 2}),
        },
        depth=3,
    ),
    "h3_hybrid": Preset(
        "8*(h p) (a p) 7*(h p) (a p) 7*(h p)",
        "Fu et al. 2023, arXiv 2212.14052",
        {"h": "h3", "p": ("mlp", {"activation": "gelu_tanh"})},
        depth=9,
        norm_kind="layer",
    ),
    "mamba2_hybrid": Preset(
        "npnpnppnpnapnpnpnpnppnapnpnpnpnpnappnpnpnpnpnapnppnpnpnp",
        "Waleffe et al. 2024, arXiv 2406.07887",
        {
            "a": ("attention", {"bias": False}),
            "p": ("mlp", {"bias": False}),
        },
        depth=12,
    ),
}
