"""Hybrids of research code: their weights' names as ours, and our stacks of the stored sizes."""

from typing import Any

from tests.core.stack_cases import Loader, Weights, under


def from_parts(theirs: Weights, **names: str) -> Weights:
    """Weights of submodules under other names: ours = "theirs"."""
    return {
        f"{ours}.{kind}": theirs[f"{part}.{kind}"]
        for ours, part in names.items()
        for kind in ("weight", "bias")
        if f"{part}.{kind}" in theirs
    }


def h3_weights(theirs: Weights) -> Weights:
    """SSMModel's, of HazyResearch/H3."""
    loader = Loader(theirs)
    for i in range(9):
        layer = f"layers.{i}"
        mixer = loader.get(f"{layer}.mixer")
        if "Wqkv.weight" in mixer:
            mixer = from_parts(mixer, in_proj="Wqkv", out_proj="out_proj")
        loader.put(f"{layer}.0.body", mixer)
        loader.put(f"{layer}.1.body", from_parts(loader.get(f"{layer}.mlp"), up="fc1", down="fc2"))
        for j in range(2):
            loader.put(f"{layer}.{j}.norm", under(theirs, f"{layer}.norm{j + 1}"))
    loader.put("norm", loader.get("ln_f"))
    return loader.ours


RENAMED = {"h3_hybrid": h3_weights}
STACKS: dict[str, dict[str, Any]] = {
    "h3_hybrid": {
        "letters": {"h": ["h3", {"d_state": 4}], "a": ["attention", {"num_heads": 2}]},
    },
}
