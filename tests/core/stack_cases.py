"""Names and layouts of published hybrids' weights, as those of our stacks."""

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def from_jamba(theirs: Weights) -> Weights:
    """Weights of transformers' JambaMambaMixer as those of `mamba_heads` with one head."""
    names = {"dt_layernorm": "dt_norm", "b_layernorm": "b_norm", "c_layernorm": "c_norm"}
    ours = {}
    for name, v in theirs.items():
        first, _, rest = name.partition(".")
        if name in ("x_proj.weight", "dt_proj.weight"):
            v = v.unsqueeze(0)
        ours[f"{names.get(first, first)}.{rest}" if rest else name] = v
    return ours


def from_zamba(theirs: Weights) -> Weights:
    """Weights of transformers' ZambaMambaMixer as those of `mamba_heads`."""
    ours = {}
    for name, v in theirs.items():
        if name == "in_proj.weight":
            # rows alternate between u and z
            v = torch.cat([v[::2], v[1::2]])
        elif name in ("A_log", "D"):
            v = v.flatten(0, 1)
        elif name in ("x_proj_weight", "dt_proj_weight"):
            name = name.replace("_weight", ".weight")
        elif name == "dt_proj_bias":
            name, v = "dt_proj.bias", v.flatten()
        ours[name] = v
    return ours


def from_gated(theirs: Weights) -> Weights:
    """Weights of a feed-forward with gate, up and down maps as those of `gated_mlp`."""
    ours = {}
    for kind in ("weight", "bias"):
        if f"gate_proj.{kind}" in theirs:
            both = [theirs[f"{name}_proj.{kind}"] for name in ("gate", "up")]
            ours[f"gate_up.{kind}"] = torch.cat(both)
            ours[f"down.{kind}"] = theirs[f"down_proj.{kind}"]
    return ours


def from_attention(theirs: Weights) -> Weights:
    """Weights of attention with four maps as those of our two."""
    ours = {}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" in theirs:
            ours[f"in_proj.{kind}"] = torch.cat([theirs[f"{n}_proj.{kind}"] for n in "qkv"])
        if f"o_proj.{kind}" in theirs:
            ours[f"out_proj.{kind}"] = theirs[f"o_proj.{kind}"]
    return ours


def under(weights: Weights, prefix: str) -> Weights:
    """Weights of one submodule."""
    return {
        k.removeprefix(f"{prefix}."): v for k, v in weights.items() if k.startswith(f"{prefix}.")
    }


class Loader:
    """Gathers a stack's weights from those of a published model."""

    def __init__(self, theirs: Weights) -> None:
        self.theirs, self.ours = theirs, Weights()

    def put(self, place: str, weights: Weights | Tensor) -> None:
        if isinstance(weights, Tensor):
            self.ours[place] = weights
        else:
            self.ours.update({f"{place}.{name}": v for name, v in weights.items()})

    def get(self, prefix: str) -> Weights:
        return under(self.theirs, prefix)


def griffin_weights(theirs: Weights, kinds: list[str]) -> Weights:
    """RecurrentGemmaModel's; its norms multiply by 1 + weight."""
    loader = Loader(theirs)
    for i in range(len(kinds)):
        block = loader.get(f"layers.{i}.temporal_block")
        loader.put(f"layers.{i}.0.body", from_attention(block) or block)
        loader.put(f"layers.{i}.1.body", from_gated(loader.get(f"layers.{i}.mlp_block")))
        for j, name in enumerate(("temporal", "channel")):
            norm = theirs[f"layers.{i}.{name}_pre_norm.weight"]
            loader.put(f"layers.{i}.{j}.norm.weight", 1 + norm)
    loader.put("norm.weight", 1 + theirs["final_norm.weight"])
    return loader.ours


def jamba_weights(theirs: Weights, kinds: list[str]) -> Weights:
    """JambaModel's."""
    loader = Loader(theirs)
    for i, kind in enumerate(kinds):
        layer = f"layers.{i}"
        if kind in ("attention", "full_attention"):
            mixer = from_attention(loader.get(f"{layer}.self_attn"))
        else:
            mixer = from_jamba(loader.get(f"{layer}.mamba"))
        feed = loader.get(f"{layer}.feed_forward")
        if "router.weight" in feed:
            names = {"experts.gate_up_proj": "up", "experts.down_proj": "down"}
            feed = {names.get(k, k): v for k, v in feed.items()}
        else:
            feed = from_gated(feed)
        loader.put(f"{layer}.0.body", mixer)
        loader.put(f"{layer}.1.body", feed)
        loader.put(f"{layer}.0.norm", loader.get(f"{layer}.input_layernorm"))
        loader.put(f"{layer}.1.norm", loader.get(f"{layer}.pre_ff_layernorm"))
    loader.put("norm", loader.get("final_layernorm"))
    return loader.ours


def zamba_weights(theirs: Weights, kinds: list[str]) -> Weights:
    """ZambaModel's."""
    loader = Loader(theirs)
    for i, kind in enumerate(kinds):
        layer, mamba = f"layers.{i}", f"layers.{i}"
        if kind == "hybrid":
            mamba = f"{layer}.mamba_decoder"
            shared = loader.get(f"{layer}.shared_transf")
            place = f"{layer}.0.source"
            loader.put(f"{place}.norm", under(shared, "input_layernorm"))
            loader.put(f"{place}.norm2", under(shared, "pre_ff_layernorm"))
            loader.put(f"{place}.attention", from_attention(under(shared, "self_attn")))
            loader.put(f"{place}.feed_forward", from_gated(under(shared, "feed_forward")))
            loader.put(f"{place}.linear", loader.get(f"{layer}.linear"))
        loader.put(f"{layer}.0.norm", loader.get(f"{mamba}.input_layernorm"))
        loader.put(f"{layer}.0.body", from_zamba(loader.get(f"{mamba}.mamba")))
    loader.put("norm", loader.get("final_layernorm"))
    return loader.ours


def zamba2_weights(theirs: Weights, kinds: list[str]) -> Weights:
    """Zamba2Model's, with adapters of the feed-forward and of the attention."""
    loader = Loader(theirs)
    turn = 0
    for i, kind in enumerate(kinds):
        layer, mamba = f"layers.{i}", f"layers.{i}"
        if kind == "hybrid":
            mamba = f"{layer}.mamba_decoder"
            shared = loader.get(f"{layer}.shared_transformer")
            place = f"{layer}.0.source"
            loader.put(f"{place}.norm", under(shared, "input_layernorm"))
            loader.put(f"{place}.norm2", under(shared, "pre_ff_layernorm"))
            attention = from_attention(under(shared, "self_attn"))
            loader.put(f"{place}.attention.in_proj.base.weight", attention["in_proj.weight"])
            loader.put(f"{place}.attention.out_proj.weight", attention["out_proj.weight"])
            adapters = [
                under(shared, f"self_attn.linear_{n}_adapter_list.{turn}") for n in ("q", "k", "v")
            ]
            down = torch.cat([v["0.weight"] for v in adapters])
            loader.put(f"{place}.attention.in_proj.down.weight", down)
            up = torch.block_diag(*(v["1.weight"] for v in adapters))
            loader.put(f"{place}.attention.in_proj.up.weight", up)
            feed = f"{place}.feed_forward"
            loader.put(f"{feed}.gate_up.base", under(shared, "feed_forward.gate_up_proj"))
            adapter = under(shared, f"feed_forward.gate_up_proj_adapter_list.{turn}")
            loader.put(f"{feed}.gate_up.down.weight", adapter["0.weight"])
            loader.put(f"{feed}.gate_up.up.weight", adapter["1.weight"])
            loader.put(f"{feed}.down", under(shared, "feed_forward.down_proj"))
            loader.put(f"{place}.linear", loader.get(f"{layer}.linear"))
            turn += 1
        loader.put(f"{layer}.0.norm", loader.get(f"{mamba}.input_layernorm"))
        loader.put(f"{layer}.0.body", loader.get(f"{mamba}.mamba"))
    loader.put("norm", loader.get("final_layernorm"))
    return loader.ours


def nemotron_weights(theirs: Weights, kinds: list[str]) -> Weights:
    """NemotronHModel's."""
    loader = Loader(theirs)
    for i, kind in enumerate(kinds):
        weights = loader.get(f"layers.{i}.mixer")
        if kind == "full_attention":
            weights = from_attention(weights)
        elif kind == "mlp":
            weights = {k.replace("_proj", ""): v for k, v in weights.items()}
        loader.put(f"layers.{i}.0.body", weights)
        loader.put(f"layers.{i}.0.norm", loader.get(f"layers.{i}.norm"))
    loader.put("norm", loader.get("norm_f"))
    return loader.ours


def bamba_weights(theirs: Weights, kinds: list[str]) -> Weights:
    """BambaModel's, and GraniteMoeHybridModel's without experts."""
    loader = Loader(theirs)
    granite = "norm.weight" in theirs
    second = "post_attention_layernorm" if granite else "pre_ff_layernorm"
    for i, kind in enumerate(kinds):
        layer = f"layers.{i}"
        if kind in ("attention", "full_attention"):
            loader.put(f"{layer}.0.body", from_attention(loader.get(f"{layer}.self_attn")))
        else:
            loader.put(f"{layer}.0.body", loader.get(f"{layer}.mamba"))
        if granite:
            shared = loader.get(f"{layer}.shared_mlp")
            names = {"input_linear.weight": "gate_up.weight", "output_linear.weight": "down.weight"}
            loader.put(f"{layer}.1.body", {names[k]: v for k, v in shared.items()})
        else:
            loader.put(f"{layer}.1.body", from_gated(loader.get(f"{layer}.feed_forward")))
        loader.put(f"{layer}.0.norm", loader.get(f"{layer}.input_layernorm"))
        loader.put(f"{layer}.1.norm", loader.get(f"{layer}.{second}"))
    loader.put("norm", loader.get("norm" if granite else "final_layernorm"))
    return loader.ours
