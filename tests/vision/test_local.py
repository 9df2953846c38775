"""LocalVim: the official code's outputs, its directions, and what they exclude."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor

from scanweave.vision import Vim
from scanweave.vision.local import LocalMamba, local_order
from scanweave.vision.vim import checkpoint_filter_fn

DIRECTIONS = [["h", "v_flip", "w2", "w2_flip"], ["h_flip", "v", "w3", "w3_flip"]]
SMALL = {"embed_dim": 32, "depth": 2, "img_size": 64, "num_classes": 5, "directions": DIRECTIONS}


def _small(**kwargs: Any) -> Vim:
    return timm.create_model("test_vim", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 64, 64))


def test_official_outputs_and_gradients(goldens: Path, assert_near: Callable[..., None]) -> None:
    """Windows that divide the grid and windows that are padded, class token in the middle."""
    with safe_open(goldens / "localvim_mini_midcls.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}
    names = ("img_size", "embed_dim", "depth", "num_classes", "directions")
    model = timm.create_model("test_vim", **{name: config[name] for name in names})
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    image = tensors["input"].requires_grad_()
    logits = model(image)
    assert_near(logits, tensors["output"], name="logits")
    logits.backward(tensors["cotangent"])
    assert_near(image.grad, tensors["grad_input"], gradient=True, name="image")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("direction", "rows", "expected"),
    [
        ("h", (), [0, 1, 2, 3, 4, 5]),
        ("h_flip", (), [5, 4, 3, 2, 1, 0]),
        ("v", (), [0, 3, 1, 4, 2, 5]),
        ("v_flip", (), [5, 2, 4, 1, 3, 0]),
        ("w2", (), [0, 1, 3, 4, 2, 6, 5, 6]),
        ("w2_flip", (), [6, 5, 6, 2, 4, 3, 1, 0]),
        ("h_flip", (3,), [6, 5, 4, 3, 2, 1, 0]),
        ("w2", (3,), [0, 1, 4, 3, 5, 2, 7, 6, 7]),
    ],
)
def test_orders(direction: str, rows: tuple[int, ...], expected: list[int]) -> None:
    """Two rows of three patches; padding is one past the last token, the class token stays."""
    order, inverse = local_order((2, 3), direction, rows)
    assert order.tolist() == expected
    assert order[inverse].tolist() == list(range(6 + len(rows)))


@pytest.mark.parametrize("direction", ["d", "w0", "w", "h_flip_flip", "flip"])
def test_unknown_directions_are_refused(direction: str) -> None:
    """With those that exist."""
    with pytest.raises(ValueError, match="direction must be h, v or w<K>, with _flip or not, got"):
        local_order((2, 3), direction)
    with pytest.raises(ValueError, match="direction must be h, v or w<K>"):
        _small(directions=[["h"], [direction]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 3}, ValueError, "directions must have one entry a layer, 3, got 2"),
        ({"mixer": "hydra"}, ValueError, "mixer and path must be left out with directions"),
        ({"path": "cross"}, ValueError, "mixer and path must be left out .* and 'cross'"),
        ({"dynamic_img_size": True}, ValueError, "dynamic_img_size must be False with directions"),
        ({"official_init": True}, ValueError, "official_init must be False for mixer 'LocalMamba'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """At creation."""
    with pytest.raises(error, match=message):
        _small(**arguments)


@pytest.mark.parametrize(
    ("name", "count"),
    [("local_vim_tiny_patch16_224", 8), ("local_vim_small_patch16_224", 28)],
)
def test_published_sizes(name: str, count: int) -> None:
    """The paper's millions of parameters, 20 layers of four scans."""
    model = timm.create_model(name, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == count
    assert [len(layer.mixer.directions) for layer in model.layers] == [4] * 20


def test_size_follows_set_input_size() -> None:
    """New paths for a new, non-square grid: as a model made with it."""
    model, target = _small(), _small(img_size=(48, 80))
    model.set_input_size((48, 80))
    target.load_state_dict(model.state_dict())
    x = _image(2, 3, 48, 80)
    assert torch.equal(model(x), target(x))
    assert "layers.0.mixer.order_0" not in model.state_dict()


def test_usable_after_to_empty() -> None:
    """Orders are made again, parameters drawn, decays exempt from weight decay."""
    model = timm.create_model("test_vim", device="meta", **SMALL).to_empty(device="cpu")
    model.init_weights()
    assert torch.isfinite(model(_image())).all()
    mixer = model.layers[1].mixer
    assert torch.equal(mixer.order_2, local_order((4, 4), "w3", (8,))[0])
    expected = {"A_log_0", "D_0", "dt_proj_0.bias"}
    assert expected <= {n.removeprefix("layers.0.mixer.") for n in model.no_weight_decay()}


def test_compiles_trains_and_taps() -> None:
    """One graph, gradients everywhere, maps without the class token, bfloat16."""
    model, x = _small().train(), _image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    model(x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 2
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_mixer_without_padding_or_token() -> None:
    """Usable alone on a grid."""
    mixer = LocalMamba(16, ["h", "v_flip"], d_state=4)
    mixer.set_grid((3, 5))
    assert mixer(torch.randn(2, 15, 16)).shape == (2, 15, 16)
