"""Heat maps point at what decides, in the tokens' own order, for every mixer with a matrix."""

import json
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

from scanweave.core import list_mixers
from scanweave.vision import explain
from scanweave.vision.explain import (
    Config,
    effective_receptive_field,
    heat_map,
    token_matrices,
)
from scanweave.vision.train import save_model


def tiny(name: str = "vim_tiny_patch16_224", **kwargs) -> nn.Module:
    plain = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_classes": 2}
    return timm.create_model(name, **{**plain, **kwargs}).eval()


def marked(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise with one bright 4 x 4 patch of rows (0) or columns (1); its place."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 3, 16, 16, generator=draw)
    labels = torch.randint(2, (count,), generator=draw)
    places = torch.randint(16, (count,), generator=draw)
    for image, label, place in zip(images, labels, places, strict=True):
        stripes = torch.tensor([2.0, -2.0, 2.0, -2.0]).expand(4, 4)
        top, left = 4 * (int(place) // 4), 4 * (int(place) % 4)
        image[:, top : top + 4, left : left + 4] += stripes if label else stripes.t()
    return images, labels, places


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = tiny(d_state=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    for step in range(80):
        images, labels, _ = marked(32, step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_heat_maps_find_the_patch_that_decides(trained):
    images, labels, places = marked(96, 1000)
    maps, scores = heat_map(trained, images)
    assert (scores.argmax(1) == labels).float().mean() > 0.9
    assert maps.shape == (96, 16, 16)
    assert maps.amin() == 0
    assert maps.amax() == 1
    patches = F.avg_pool2d(maps.unsqueeze(1), 4).flatten(1)
    # chance is one in sixteen
    assert (patches.argmax(1) == places).float().mean() > 0.6


def test_gradient_depends_on_the_class(trained):
    images, _, _ = marked(2, 0)
    maps = [heat_map(trained, images, "gradient", torch.full((2,), c))[0] for c in (0, 1)]
    assert not torch.allclose(maps[0], maps[1])
    same = [heat_map(trained, images, "attention", torch.full((2,), c))[0] for c in (0, 1)]
    assert same[0].equal(same[1])


def test_rows_are_shares(trained):
    images, _, _ = marked(2, 0)
    layers, scores = token_matrices(trained, images)
    assert len(layers) == 2
    assert all(layer.grid == (4, 4) and layer.class_places == (8,) for layer in layers)
    for layer in layers:
        assert layer.weights.shape == (2, 17, 17)
        assert torch.allclose(layer.weights.sum(-1), torch.ones(2, 17))
    assert scores.equal(trained(images).detach())
    weighted = token_matrices(trained, images, "gradient")[0]
    for layer, plain in zip(weighted, layers, strict=True):
        assert torch.allclose(layer.weights.sum(-1), torch.ones(2, 17))
        # columns alone are weighted: what is not read stays so, and ratios within them
        ratio = layer.weights / plain.weights
        rows = ratio / ratio[:, :, :1]
        assert torch.allclose(rows, rows[:, :1].expand_as(rows), rtol=1e-3)


@pytest.mark.parametrize("path", ["raster", "serpentine", "cross"])
def test_matrices_are_in_the_order_of_the_image(path):
    """A causal layer's matrix is filled exactly where its output depends on its input."""
    model = tiny("ssm_vit_tiny_patch16_224", mixer="mamba", path=path, depth=2)
    image = torch.randn(1, 3, 16, 16)
    for number, layer in enumerate(token_matrices(model, image)[0]):
        block = model.layers[number]
        calls: list = []
        hook = block.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
        model(image)
        hook.remove()
        x, *rest = calls[0]

        def mixed(tokens: Tensor, block=block, rest=rest) -> Tensor:
            return block(tokens, *rest) - tokens

        slopes = torch.autograd.functional.jacobian(mixed, x.detach())[0, :, :, 0]
        depends = slopes.abs().sum((1, 3)) > 0
        assert depends.equal(layer.weights[0] > 0)
        assert not depends.all()


@pytest.mark.parametrize("mixer", list_mixers())
def test_every_mixer_can_be_seen(mixer):
    model = tiny("ssm_vit_tiny_patch16_224", mixer=mixer, embed_dim=64, depth=1)
    maps, _ = heat_map(model, torch.randn(1, 3, 16, 16))
    assert maps.shape == (1, 16, 16)
    assert maps.isfinite().all()


def test_models_of_several_stages():
    class Share(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2), keepdim=True) + x

        def matrix(self, x: Tensor) -> Tensor:
            length = x.shape[1] * x.shape[2]
            return torch.eye(length).expand(x.shape[0], 3, length, length)

    class Stages(nn.Module):
        """Two grids, (8, 8) and (4, 4); every token reads itself."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Share(), Share()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            x = F.avg_pool2d(x, 2).permute(0, 2, 3, 1)
            return self.second(x).amax((1, 2))

    images = torch.zeros(1, 3, 8, 8)
    images[:, 0, 6, 2] = 5
    layers, _ = token_matrices(Stages(), images)
    assert [layer.grid for layer in layers] == [(8, 8), (4, 4)]
    # the maximum of channel 0 comes from row 3, column 1 of the small grid alone
    maps, _ = heat_map(Stages(), images)
    assert divmod(int(maps[0].argmax()), 8) in {(6, 2), (6, 3), (7, 2), (7, 3)}


def test_receptive_field_of_a_narrow_and_a_wide_layer():
    """Bands of 3 patches and of all; the middle of a 4 x 4 grid is row 2, column 2."""
    images = torch.randn(2, 3, 16, 16)
    wide = effective_receptive_field(tiny(depth=1), images)
    assert wide.max() == 1
    assert (wide > 0).all()
    narrow = tiny(
        "ssm_vit_tiny_patch16_224",
        mixer="gated_cnn_bidirectional",
        depth=1,
        mixer_args={"kernel_size": 3},
    )
    patches = F.max_pool2d(effective_receptive_field(narrow, images)[None, None], 4)[0, 0]
    assert (patches > 0).nonzero().tolist() == [[2, 1], [2, 2], [2, 3]]


def test_models_without_matrices_have_a_receptive_field():
    field = effective_receptive_field(
        timm.create_model("test_resnet").eval(), torch.randn(1, 3, 96, 96)
    )
    assert field.shape == (96, 96)
    assert field.max() == 1
    row, column = divmod(int(field.argmax()), 96)
    assert 24 < row < 84
    assert 24 < column < 84


def test_pictures_are_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (20, 30), (90, 10, 200)).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    arguments = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_classes": 2}
    model = timm.create_model("vim_tiny_patch16_224", **arguments)
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    save_model(model, tmp_path / "model", arguments)
    names = [f"local-dir:{tmp_path / 'model'}", f"local-dir:{tmp_path / 'other'}"]
    save_model(model, tmp_path / "other", arguments)
    options = f"--model {' '.join(names)} --images {folder} --target 1"
    options += f" --output-dir {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["explain", *options.split()])
    explain.main()
    shown = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == shown["images"]
    assert len(shown["images"]) == 2
    for found in shown["images"].values():
        assert [said["target"] for said in found["models"].values()] == [1, 1]
        assert 0.5 <= found["models"][names[0]]["probability"] <= 1
        with Image.open(found["picture"]) as picture:
            # the image and two maps
            assert picture.size == (1248, 481)
            assert len(picture.convert("RGB").getcolors(10**6) or []) > 20
    with Image.open(shown["receptive_field"]) as picture:
        assert len(picture.convert("RGB").getcolors(10**6) or []) > 20


def test_what_cannot_be_explained(tmp_path):
    image = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="form must be attention or gradient, got 'rollout'"):
        token_matrices(tiny(), image, "rollout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must have mixers with matrix\(x\), ResNet has"):
        heat_map(timm.create_model("test_resnet").eval(), image)
    with pytest.raises(ValueError, match="model must have forward_intermediates, got Linear"):
        effective_receptive_field(nn.Linear(1, 1), image)
    broken = tiny()
    broken.patch_embed.stride = (8, 8)
    with pytest.raises(ValueError, match="model must have one token per patch and num_prefix"):
        explain._places(broken, image, torch.zeros(1, 17, 32))
    with pytest.raises(ValueError, match="images must name at least one image"):
        explain.explain(Config(("test_vim",), (tmp_path,), pretrained=False))
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="model must name at least one model, got none"):
        explain.explain(Config((), (tmp_path,)))


def test_labels():
    """Names as they are, runs by their folder."""
    assert explain._label("vim_tiny_patch16_224") == "vim_tiny_patch16_224"
    assert explain._label("local-dir:runs/fine/model") == "fine"
    assert explain._label("hf-hub:somebody/vim") == "vim"
