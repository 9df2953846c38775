"""Vim: the official code's outputs, names and counts; checkpoints in and out of timm."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models import save_for_hf
from torch import Tensor

import scanweave.vision
from scanweave.vision import Vim
from scanweave.vision.vim import checkpoint_filter_fn

SMALL = {"embed_dim": 32, "depth": 2, "img_size": 64, "num_classes": 5}
# ours, and the official entry that has the same parameters
OFFICIAL = {
    "vim_tiny_patch16_224": "vim_tiny_patch16_224_",
    "vim_tiny_patch16_stride8_224": "vim_tiny_patch16_stride8_224_",
    "vim_small_patch16_224": "vim_small_patch16_224_",
    "vim_small_patch16_stride8_224": "vim_small_patch16_stride8_224_",
    "vim_base_patch16_224": "vim_base_patch16_224_",
}


def _small(**kwargs: Any) -> Vim:
    return timm.create_model("test_vim", **{**SMALL, **kwargs}).eval()


def _from_official(config: dict[str, Any]) -> Vim:
    """The model that an official configuration describes."""
    size = config["img_size"]
    has_class = config["if_cls_token"]
    return timm.create_model(
        "test_vim",
        img_size=tuple(size) if isinstance(size, list) else size,
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_classes=config["num_classes"],
        class_token=has_class,
        class_token_pos="middle" if config["use_middle_cls_token"] else "first",
        global_pool="token" if has_class else "avg",
        mixer_args={"average": config["if_divide_out"]},
    )


@pytest.mark.parametrize("name", ["vim_mini_nocls_mean", "vim_mini_nonsquare"])
def test_official_outputs_and_gradients(
    name: str, goldens: Path, assert_near: Callable[..., None]
) -> None:
    """Strictly loaded official weights give the official logits and gradients."""
    with safe_open(goldens / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
    model = _from_official(config)
    model.load_state_dict(weights, strict=True)
    image = tensors["input"].requires_grad_()
    logits = model(image)
    assert_near(logits, tensors["output"], name="logits")
    logits.backward(tensors["cotangent"])
    assert_near(image.grad, tensors["grad_input"], gradient=True, name="image")
    for key, parameter in model.named_parameters():
        if f"grad/{key}" in tensors:
            assert_near(parameter.grad, tensors[f"grad/{key}"], gradient=True, name=key)


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_official_names_shapes_and_counts(name: str, goldens: Path) -> None:
    """State dicts are the official ones, tensor by tensor; the file lists layer 0 of 24."""
    registered = json.loads((goldens / "vim_registered.json").read_text(encoding="utf-8"))
    (entry,) = [v for k, v in registered.items() if k.startswith(OFFICIAL[name])]
    model = timm.create_model(name, drop_path_rate=0.1, device="meta")
    first = {k: v for k, v in entry["state"].items() if k.startswith("layers.0.")}
    expected = {k: v for k, v in entry["state"].items() if k not in first}
    for i in range(entry["depth"]):
        expected |= {k.replace("layers.0.", f"layers.{i}."): v for k, v in first.items()}
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == expected
    # an official layer drops what the layer before it added
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates[:3] == pytest.approx(entry["drop_path_in_layer"][1:])
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
    assert list(model.pos_embed.shape) == entry["pos"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vim_tiny_patch16_224", 7_148_008),
        ("vim_tiny_patch16_stride8_224", 7_250_344),
        ("vim_small_patch16_224", 25_796_584),
        ("vim_small_patch16_stride8_224", 26_001_256),
        ("vim_base_patch16_224", 97_598_440),
        ("vim_tiny_patch16_384", 7_220_968),
        ("vim_small_patch16_384", 25_942_504),
        ("vim_base_patch16_384", 97_890_280),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    """The counts that README quotes, also where the goldens are absent."""
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == count


def test_registered_names() -> None:
    """Timm lists the models once the package is imported."""
    assert {*OFFICIAL, "test_vim"} <= set(timm.list_models("*vim_*") + timm.list_models("test_vim"))
    assert "Vim" in scanweave.vision.__all__


def test_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm the import says what to install."""
    monkeypatch.setitem(sys.modules, "timm", None)
    source = Path(scanweave.vision.__file__).read_text(encoding="utf-8")
    code = compile(source, "scanweave/vision/__init__.py", "exec")
    with pytest.raises(ImportError, match=r"needs timm: pip install 'scanweave\[vision\]'"):
        exec(code, {"__name__": "scanweave.vision", "__package__": "scanweave.vision"})


def test_no_pretrained_weights_is_an_error() -> None:
    """Asking for weights that do not exist does not pass silently."""
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_vim"):
        timm.create_model("test_vim", pretrained=True)


def _wrapped(state: dict[str, Tensor], key: str) -> dict[str, Any]:
    return {key: state, "epoch": 299, "args": Namespace(lr=1e-3)}


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema"])
def test_training_checkpoints_are_unwrapped(key: str) -> None:
    """The official training file's layout, and DDP's prefix, load strictly."""
    source, target = _small(), _small()
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    target.load_state_dict(checkpoint_filter_fn(_wrapped(state, key), target), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(target(x), source(x))


def test_filter_leaves_own_state_dict_alone() -> None:
    """Same keys, same tensors, not copies."""
    model = _small(img_size=(64, 96))
    state = model.state_dict()
    out = checkpoint_filter_fn(dict(state), model)
    assert out.keys() == state.keys()
    assert all(out[k] is state[k] for k in state)


def test_positions_are_resized_when_loading() -> None:
    """A table of a square grid fits a larger, non-square model; the class row keeps its values."""
    source, target = _small(img_size=64), _small(img_size=(96, 128))
    state = checkpoint_filter_fn(source.state_dict(), target)
    target.load_state_dict(state, strict=True)
    assert target.pos_embed.shape == (1, 6 * 8 + 1, 32)
    assert torch.equal(target.pos_embed[:, 24], source.pos_embed[:, 8])
    assert torch.isfinite(target(torch.randn(1, 3, 96, 128))).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_official_resize_is_an_option(dynamic: bool) -> None:
    """Row 0 stays and every other one is the grid's, in loading, setting and running alike."""
    source = _small()
    table = source.pos_embed
    rest = table[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    rest = torch.nn.functional.interpolate(rest, (6, 8), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :1], rest.flatten(2).transpose(1, 2)], 1)
    target = _small(img_size=(96, 128), official_pos_resize=True)
    state = checkpoint_filter_fn(source.state_dict(), target)
    torch.testing.assert_close(state["pos_embed"], expected)
    target.load_state_dict(state)
    x = torch.randn(1, 3, 96, 128)
    other = _small(official_pos_resize=True, dynamic_img_size=dynamic)
    other.load_state_dict(source.state_dict())
    if not dynamic:
        other.set_input_size((96, 128))
        torch.testing.assert_close(other.pos_embed, expected)
    torch.testing.assert_close(other(x), target(x))


def test_stride_16_weights_load_into_stride_8() -> None:
    """The start of Vim's stride-8 fine-tuning."""
    source, target = _small(), _small(stride=8)
    target.load_state_dict(checkpoint_filter_fn(source.state_dict(), target), strict=True)
    assert target.pos_embed.shape == (1, 7 * 7 + 1, 32)


def test_non_square_table_of_unknown_grid_is_refused() -> None:
    """15 patches could be 3 x 5 or 5 x 3."""
    state = _small(img_size=(48, 80)).state_dict()
    with pytest.raises(ValueError, match="pos_embed must hold a square grid to be resized, got 15"):
        checkpoint_filter_fn(state, _small())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"blocks.0.attn.qkv.weight": torch.zeros(1)}, "of a Vim with this mixer, got blocks.0"),
        (None, "of a Vim of this size: layers.0.norm.weight must be .32,., got .48,."),
        ({}, "of a Vim with this mixer, got "),
    ],
)
def test_other_models_checkpoints_are_refused(
    state: dict[str, Tensor] | None, message: str
) -> None:
    """A DeiT, another width, and nothing at all."""
    if state is None:
        wide = _small(embed_dim=48).state_dict()
        state = {k: wide[k] for k in sorted(wide, key=lambda k: not k.endswith("norm.weight"))}
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(state, _small())


def test_checkpoint_without_class_token_is_refused() -> None:
    """And the other way round."""
    plain = _small(class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="must hold cls_token"):
        checkpoint_filter_fn(plain.state_dict(), _small())
    with pytest.raises(ValueError, match="must lack cls_token"):
        checkpoint_filter_fn(_small().state_dict(), plain)


def test_pretrained_file_adapts_channels_and_classes(tmp_path: Path) -> None:
    """What timm does with weights: other in_chans and num_classes keep the rest."""
    source = _small()
    path = tmp_path / "vim.pth"
    torch.save({"model": source.state_dict()}, path)
    overlay = {"file": str(path), "num_classes": 5, "input_size": (3, 64, 64)}
    same = _small(pretrained=True, pretrained_cfg_overlay=overlay)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(same(x), source(x))
    grey = _small(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=9)
    assert grey(x[:, :1]).shape == (2, 9)
    # one grey channel acts as three equal ones
    expected = source.forward_features(x[:, :1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(grey.forward_features(x[:, :1]), expected, rtol=1e-4, atol=1e-5)


def test_saved_model_comes_back_through_timm(tmp_path: Path) -> None:
    """`save_for_hf` and `local-dir:` keep the architecture arguments and every value."""
    args = {"embed_dim": 32, "depth": 2, "img_size": (64, 96), "d_state": 4}
    model = timm.create_model("test_vim", num_classes=5, **args).eval()
    config = {**model.pretrained_cfg, "num_classes": 5, "input_size": (3, 64, 96)}
    save_for_hf(model, tmp_path, model_config=config, model_args=args)
    x = torch.randn(1, 3, 64, 96)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    # the stored grid is not square; timm recorded the image size it belongs to
    resized = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(96, 96))
    assert resized.pos_embed.shape == (1, 37, 32)


def test_official_init_has_the_official_quirk() -> None:
    """Backward step sizes: softplus(0) in official code, log-uniform in [0.001, 0.1] in ours."""
    official, ours = _small(official_init=True), _small()
    for i in range(2):
        assert official.layers[i].mixer.dt_proj_b.bias.abs().max() == 0
        steps = torch.nn.functional.softplus(ours.layers[i].mixer.dt_proj_b.bias)
        assert 9e-4 < steps.min() < steps.max() < 0.11
    with pytest.raises(ValueError, match="official_init must be False for mixer 'gated_cnn_bidi"):
        _small(official_init=True, mixer="gated_cnn_bidirectional")


def test_init_statistics() -> None:
    """Widths of the official initialisation, on enough numbers to tell them apart."""
    model = _small(embed_dim=192, depth=4)
    mixer = model.layers[0].mixer
    bound = (2 * 192) ** -0.5
    assert mixer.out_proj.weight.abs().max() <= bound / 2
    assert mixer.out_proj.weight.abs().max() > 0.98 * bound / 2
    for table in (model.pos_embed, model.cls_token, model.head.weight):
        assert 0.017 < table.std() < 0.023
    fan_in = 3 * 16 * 16
    assert 0.9 < model.patch_embed.proj.weight.std() * fan_in**0.5 < 1.1
    assert model.patch_embed.proj.bias.abs().max() == 0
    assert torch.equal(mixer.A_b_log.exp().round()[0], torch.arange(1.0, 17))


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The first Python block of the folder's README, as written."""
    readme = Path(__file__).parents[2] / "vision" / "README.md"
    block = readme.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(block, str(readme), "exec"), {})
    assert capsys.readouterr().out == "[(1, 64, 4, 4), (1, 64, 4, 4), (1, 64, 4, 4)]\n"
