"""Options of mixers that the laws run besides their defaults, by the mixer's name."""

from typing import Any

HYMBA = {"window": 3, "prefix": 2, "expand": 2}
ZAMBA = {"window": 3, "num_heads": 2}
TWO = {"num_experts": 2, "top_k": 2, "balance": 0}
# besides every mixer's defaults: the smallest sizes, and options that change the code's path
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention": [
        {"num_heads": 4, "bias": False},
        {"num_heads": 4, "num_kv_heads": 2, "window": 3},
        {
            "num_heads": 1,
            "expand": 0.75,
            "rope_fraction": 0.7,
            "prefix": 2,
            "window": 2,
            "scale": 1,
        },
    ],
    "attention_bidirectional": [{"num_heads": 2}, {"num_heads": 2, "num_kv_heads": 1}],
    "base_conv": [
        {"kernel_size": 1, "skip": False},
        {"kernel_size": 18},
        {"expand": 2, "skip": False},
        {"expand": 0.5},
    ],
    "base_conv_bidirectional": [{"kernel_size": 5, "skip": False}, {"expand": 2}],
    "based": [{"num_heads": 2, "feature_dim": 2}, {"num_heads": 4, "feature_dim": 1}],
    "based_bidirectional": [{"num_heads": 2, "feature_dim": 3}],
    "bimamba": [{"d_state": 1, "d_conv": 1, "expand": 1, "average": False, "bias": True}],
    "gated_cnn": [{"kernel_size": 1, "conv_ratio": 0.5}, {"kernel_size": 4, "expansion": 2}],
    "gated_cnn_bidirectional": [{"kernel_size": 3, "conv_ratio": 0.25}],
    "h3": [
        {"d_state": 6, "head_dim": 2},
        {"d_state": 2, "d_conv": 1, "head_dim": 4},
        {"d_state": 4, "d_conv": 3, "mode": "scan"},
    ],
    "gla": [
        {"num_heads": 2, "expand_k": 1, "expand_v": 0.5, "gate_low_rank_dim": 2},
        {"num_heads": 1, "gate_logit_normalizer": 1.0},
    ],
    "gla_bidirectional": [{"num_heads": 2, "gate_logit_normalizer": 2.0}],
    "hgrn2": [
        {"num_heads": 2, "lower_bound": 0.5},
        {"num_heads": 1, "expand_ratio": 2, "eps": 1e-3},
    ],
    "hgrn2_bidirectional": [{"num_heads": 2, "expand_ratio": 3, "lower_bound": 0.2}],
    "hydra": [
        {"d_state": 3, "d_conv": 1, "headdim": 4, "ngroups": 2, "bias": True},
        {"d_state": 2, "d_conv": 3, "expand": 1, "headdim": 2, "conv_bias": False},
    ],
    "hyena": [
        {"order": 3, "l_max": 5, "d_conv": 1, "filter_width": 4, "filter_depth": 0},
        {"l_max": 40, "emb_dim": 5, "filter_width": 3, "frequency": 10.0},
    ],
    "hyena_bidirectional": [
        {"order": 3, "l_max": 4, "d_conv": 5, "filter_width": 4, "filter_depth": 1},
    ],
    "linear_attention": [
        {"num_heads": 2, "feature_map": "relu", "bias": False},
        {"num_heads": 4, "feature_map": "identity", "norm": "rms", "eps": 1e-3},
    ],
    "linear_attention_bidirectional": [
        {"num_heads": 2, "feature_map": "relu"},
        {"num_heads": 1, "feature_map": "identity", "norm": "rms", "bias": False},
    ],
    "local_attention": [
        {"num_heads": 2, "num_kv_heads": 1, "window": 3, "prefix": 2},
        {"num_heads": 2, "expand": 0.5, "window": 1, "rope_fraction": 0, "out_bias": False},
        {"window": 2, "rope_fraction": 0.5, "prefix": 1, "scale": 0.3},
    ],
    "lru": [{"d_state": 3, "glu": False}, {"d_state": 1, "r_min": 0.9, "r_max": 0.99}],
    "mamba": [{"d_state": 3, "d_conv": 2, "dt_rank": 4, "conv_bias": False}, {"d_conv": 1}],
    "mamba2": [
        {"d_state": 3, "d_conv": 2, "headdim": 4, "ngroups": 2, "conv_bias": False},
        {"d_state": 2, "d_conv": 1, "headdim": 1, "norm_before_gate": True, "bias": True},
        {"d_state": 4, "expand": 1, "headdim": 4, "dt_limit": (0.01, 0.05)},
    ],
    "mamba3": [
        {"d_state": 4, "headdim": 4, "ngroups": 2, "is_outproj_norm": True},
        {"d_state": 2, "headdim": 2, "rope_fraction": 1.0, "dt_min": 0.5, "dt_max": 2.0},
    ],
    "mamba_heads": [
        {"n_heads": 2, "bcdt_norm": False, "d_state": 3},
        {"n_heads": 4, "d_conv": 1, "dt_rank": 2, "expand": 1, "conv_bias": False},
    ],
    "bidirectional": [
        {"mixer": "lru", "mixer_args": {"d_state": 3}, "merge": "concat"},
        {"mixer": "rg_lru", "tied": True},
    ],
    "parallel": [
        {"mixers": ["mamba_heads", ["local_attention", {"expand": 2}]], "merge": "norm"},
        {"mixers": ["gated_cnn", "local_attention", "lru"], "merge": "concat"},
    ],
    "stack": [
        {"pattern": "(w|m f)", "meta_tokens": 2, "letters": {"w": ["local_attention", HYMBA]}},
        {"pattern": "(S>l) (S>c e)", "letters": {"S": ["shared", ZAMBA], "e": ["moe", TWO]}},
    ],
    "stack_bidirectional": [
        {"pattern": "(w|g p)", "meta_tokens": 2, "merge": "concat"},
        {"pattern": "(S>l) (hydra>l)", "letters": {"S": ["shared", ZAMBA]}},
    ],
    "rg_lru": [
        {"d_conv": 1, "headdim": 2, "decay_range": (0.3, 0.6)},
        {"d_conv": 3, "expand": 2, "headdim": 1},
    ],
    "phi_mamba": [
        {"d_state": 2, "d_conv": 1, "headdim": 2, "ngroups": 2, "conv_bias": False},
        {"d_state": 3, "d_conv": 2, "expand": 2, "headdim": 1},
    ],
    "retnet": [{"num_heads": 2}, {"num_heads": 1, "expand": 0.5, "eps": 1e-3}],
    "s5": [
        {"d_state": 4, "blocks": 2, "discretisation": "bilinear", "activation": "none"},
        {"d_state": 4, "activation": "full_glu", "c_init": "normal", "rate": 2.0},
        {"activation": "half_glu2"},
    ],
    "s5_bidirectional": [{"d_state": 6, "blocks": 3, "activation": "gelu"}],
    "rwkv4": [{"expand": 0.5, "layer": 1, "num_layers": 3}],
    "rwkv4_bidirectional": [{"expand": 2, "layer": 2, "num_layers": 3}],
    "rwkv5": [{"headdim": 2, "layer": 1, "num_layers": 2}, {"expand": 0.5, "eps": 1e-3}],
    "rwkv5_bidirectional": [{"headdim": 4, "layer": 1, "num_layers": 2}],
    "rwkv6": [
        {"headdim": 4, "mix_rank": 3, "decay_rank": 2, "layer": 1, "num_layers": 2},
        {"headdim": 2, "expand": 1.5, "mix_rank": 1},
    ],
    "rwkv6_bidirectional": [{"headdim": 4, "mix_rank": 3, "decay_rank": 2}],
    "lssl": [
        {"d_state": 3, "channels": 2, "init": "lagt"},
        {"d_state": 4, "init": "fout", "dt_max": 1.0},
    ],
    "s4": [
        {"d_state": 4, "channels": 2, "init": "legt", "rate": 0.5},
        {"d_state": 6, "init": "hippo", "copies": 2, "dt_max": 1.0},
        {"d_state": 4, "gated": False},
    ],
    "s4_bidirectional": [
        {"d_state": 4, "channels": 2, "init": "fout", "copies": 4},
        {"d_state": 2, "gated": False},
    ],
    "retnet_bidirectional": [{"num_heads": 2, "expand": 1}],
    "s4d": [
        {"d_state": 4, "init": "legs", "disc": "bilinear", "mode": "scan"},
        {"d_state": 3, "init": "real", "dt_min": 0.1, "dt_max": 1.0},
    ],
    "s4d_bidirectional": [{"d_state": 4, "init": "inv", "mode": "conv"}],
    "dss": [{"d_state": 3, "dt_min": 0.1, "dt_max": 1.0, "mode": "scan"}],
    "dss_bidirectional": [{"d_state": 2, "mode": "conv"}],
    "dss_softmax": [{"d_state": 2, "dt_min": 0.1, "dt_max": 1.0}],
    "gss": [{"d_state": 3, "d_ssm": 4, "expand": 2, "norm": True}],
    "mega": [
        {"chunk_size": 5, "d_attn": 3, "expand": 1.5, "d_state": 2, "norm": True},
        {"chunk_size": 1, "attention": "laplace"},
        {"chunk_size": 3, "attention": "laplace", "d_state": 1},
    ],
    "mega_bidirectional": [
        {"chunk_size": 5, "d_attn": 3, "expand": 1.5, "d_state": 2, "norm": True},
        {"chunk_size": 6, "attention": "laplace"},
    ],
}
