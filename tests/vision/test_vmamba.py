"""VMamba: the official code's outputs, names and counts; checkpoints."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models import save_for_hf
from torch import Tensor, nn

from scanweave.vision.vmamba import VMamba, checkpoint_filter_fn

SMALL = {"dims": 8, "depths": (1, 2), "img_size": 32, "num_classes": 5}
COUNTS = {
    "vmamba_tiny_s1l8": 30_249_064,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_small_s2l15": 50_147_752,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_base_s2l15": 88_557_800,
    "vanilla_vmamba_tiny": 22_893_448,
    "vanilla_vmamba_small": 44_417_416,
    "vanilla_vmamba_base": 76_254_056,
}


def _small(**kwargs: Any) -> VMamba:
    return timm.create_model("test_vmamba", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 32, 32))


def _golden(folder: Path, name: str) -> tuple[VMamba, dict[str, Tensor]]:
    """An official model's tensors, and ours with its weights, strictly loaded."""
    with safe_open(folder / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    model = timm.create_model(
        "test_vmamba",
        depths=config["depths"],
        dims=config["dims"],
        d_state=config["ssm_d_state"],
        ssm_ratio=config["ssm_ratio"],
        d_conv=config["ssm_conv"],
        conv_bias=config["ssm_conv_bias"],
        gate="none" if "noz" in config["forward_type"] else "silu",
        mlp_ratio=config["mlp_ratio"],
        stem=config["patchembed_version"],
        downsample=config["downsample_version"],
        num_classes=config["num_classes"],
    ).eval()
    weights = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    return model, tensors


@pytest.mark.parametrize("name", ["vmamba_mini_s1_ln", "vmamba_mini_s2", "vmamba_mini_v0"])
def test_official_outputs_and_gradients(name: str, goldens: Path, assert_near: Any) -> None:
    """Official weights give the official logits, and the official gradient of the image."""
    model, tensors = _golden(goldens, name)
    image = tensors["input"].requires_grad_()
    logits = model(image)
    assert_near(logits, tensors["output"], name="logits")
    logits.backward(tensors["cotangent"])
    assert_near(image.grad, tensors["grad_input"], gradient=True, name="image")
    stored = {k: v for k, v in tensors.items() if k.startswith("grad/")}
    for key, parameter in model.named_parameters():
        if f"grad/{key}" in stored:
            assert_near(parameter.grad, stored[f"grad/{key}"], gradient=True, name=key)


@pytest.mark.parametrize("name", list(COUNTS))
def test_official_names_shapes_and_counts(name: str, goldens: Path) -> None:
    """Every tensor of the official entry has its place; the file lists one block of a stage."""
    entry = json.loads((goldens / "vmamba_registered.json").read_text(encoding="utf-8"))[name]
    model = timm.create_model(name, device="meta")
    own = model.state_dict()
    # the file lists block 0; the others repeat it
    for stage, layer in enumerate(model.layers):
        for key in [k for k in entry["state"] if k.startswith(f"layers.{stage}.blocks.0.")]:
            for j in range(1, len(layer.blocks)):
                entry["state"][key.replace("blocks.0.", f"blocks.{j}.")] = entry["state"][key]
    official = {k: torch.empty(v, device="meta") for k, v in entry["state"].items()}
    fitted = checkpoint_filter_fn(official, model)
    assert {k: v.shape for k, v in fitted.items()} == {k: v.shape for k, v in own.items()}
    assert sum(p.numel() for p in model.parameters()) == entry["params"]


@pytest.mark.parametrize("name", list(COUNTS))
def test_parameter_counts(name: str) -> None:
    """The counts that README quotes, also where the goldens are absent."""
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert name in timm.list_models("*vmamba*")


def test_own_names_are_the_released_ones() -> None:
    """The names of released checkpoints, for both versions of the blocks."""
    keys = set(_small(downsample="v1", gate="silu", conv_bias=True, stem="v1").state_dict())
    assert {
        "patch_embed.0.weight",
        "patch_embed.2.bias",
        "layers.0.blocks.0.norm.weight",
        "layers.0.blocks.0.op.in_proj.weight",
        "layers.0.blocks.0.op.conv2d.bias",
        "layers.0.blocks.0.op.x_proj_weight",
        "layers.0.blocks.0.op.dt_projs_weight",
        "layers.0.blocks.0.op.dt_projs_bias",
        "layers.0.blocks.0.op.A_logs",
        "layers.0.blocks.0.op.Ds",
        "layers.0.blocks.0.op.out_norm.bias",
        "layers.0.blocks.0.op.out_proj.weight",
        "layers.1.blocks.1.mlp.fc2.bias",
        "layers.0.downsample.norm.weight",
        "layers.0.downsample.reduction.weight",
        "classifier.norm.weight",
        "classifier.head.bias",
    } <= keys
    assert not any("paths" in key for key in keys)
    assert {"patch_embed.7.weight", "layers.0.downsample.3.weight"} <= set(_small().state_dict())


def _old_name(key: str) -> str:
    """A released name as the oldest official checkpoints have it."""
    for new, old in (
        ("patch_embed.0.", "patch_embed.proj."),
        ("patch_embed.2.", "patch_embed.norm."),
        (".op.", ".self_attention."),
        (".blocks.0.norm.", ".blocks.0.ln_1."),
        (".blocks.1.norm.", ".blocks.1.ln_1."),
        ("classifier.", ""),
    ):
        key = key.replace(new, old)
    return key


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema"])
def test_checkpoints_of_every_version_load(wrapper: str) -> None:
    """Wrapped, with DDP's prefix, oldest names, 1 x 1 convolutions, a detector's norms."""
    arguments = {"gate": "silu", "mlp_ratio": 0.0, "stem": "v1", "downsample": "v1"}
    source, target = _small(**arguments), _small(**arguments)
    state = {"outnorm0.weight": torch.ones(8)}
    for key, value in source.state_dict().items():
        wide = value[..., None, None] if key.endswith("_proj.weight") else value
        state["module." + _old_name(key)] = wide
    checkpoint = {wrapper: state, "epoch": 299, "args": Namespace(lr=1e-3)}
    target.load_state_dict(checkpoint_filter_fn(checkpoint, target), strict=True)
    x = _image()
    assert torch.equal(target(x), source(x))


def test_filter_leaves_own_state_dict_alone() -> None:
    """Same keys, same tensors, not copies; also without a head."""
    for model in (_small(downsample="v1"), _small(num_classes=0)):
        state = model.state_dict()
        out = checkpoint_filter_fn(dict(state), model)
        assert out.keys() == state.keys()
        assert all(out[k] is state[k] for k in state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 12}, "of a VMamba of this size: layers.0.blocks.0.* must be .*, got "),
        ({"gate": "silu"}, r"of this size: layers.0.blocks.0.op.in_proj.weight must be \(8, 8\)"),
        ({"depths": (1, 3)}, "with these arguments, got patch_embed.* layers.1.blocks.2.mlp"),
        ({"downsample": "v1"}, "not in both: layers.0.downsample.1.bias"),
    ],
)
def test_other_checkpoints_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Another width, gate, depth or downsampling."""
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(_small(**arguments).state_dict(), _small())
    with pytest.raises(ValueError, match="must be of a VMamba with these arguments, got cls_token"):
        checkpoint_filter_fn({"cls_token": torch.zeros(1)}, _small())


def test_no_pretrained_weights_is_an_error() -> None:
    """Asking for weights that do not exist does not pass silently."""
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_vmamba"):
        timm.create_model("test_vmamba", pretrained=True)


def test_pretrained_file_adapts_channels_and_classes(tmp_path: Path) -> None:
    """What timm does with weights: other in_chans and num_classes keep the rest."""
    source, x = _small(), _image()
    torch.save({"model": source.state_dict()}, tmp_path / "vmamba.pth")
    overlay = {"file": str(tmp_path / "vmamba.pth"), "num_classes": 5}
    assert torch.equal(_small(pretrained=True, pretrained_cfg_overlay=overlay)(x), source(x))
    grey = _small(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=9)
    assert grey(x[:, :1]).shape == (2, 9)
    expected = source.forward_features(x[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.forward_features(x[:, :1]), expected, rtol=1e-4, atol=1e-5)


def test_saved_model_comes_back_through_timm(tmp_path: Path) -> None:
    """`save_for_hf` and `local-dir:` keep the architecture arguments and every value."""
    args = {"dims": (8, 12), "depths": (1, 1), "path": "hilbert"}
    model = timm.create_model("test_vmamba", num_classes=5, **args).eval()
    config = {**model.pretrained_cfg, "num_classes": 5}
    save_for_hf(model, tmp_path, model_config=config, model_args=args)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = _image()
    assert torch.equal(again(x), model(x))


def test_readme_example_runs() -> None:
    """VMamba's Python block in the folder's README, as written."""
    readme = Path(__file__).parents[2] / "vision" / "README.md"
    section = readme.read_text(encoding="utf-8").split("\n## VMamba\n")[1]
    made: list[nn.Module] = []
    source = section.split("```python\n")[1].split("```")[0].replace("timm.create_model", "make")
    exec(
        compile(source, str(readme), "exec"),
        {"make": lambda name, **kwargs: made.append(timm.create_model(name, **kwargs))},
    )
    model, backbone = made
    assert model.num_features == 512
    assert backbone.feature_info.channels() == [192, 384, 768]
    assert backbone.feature_info.reduction() == [8, 16, 32]
