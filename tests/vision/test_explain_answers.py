"""Heat maps where the right answer is known without looking: who reads what is built in."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("accelerate")

from scanweave.vision.explain import effective_receptive_field, heat_map, token_matrices


def tiny(name: str = "vim_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    plain = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_classes": 2}
    return timm.create_model(name, **{**plain, **kwargs}).eval()


def stages(**kwargs: Any) -> nn.Module:
    plain = {"img_size": 16, "dims": 16, "depths": (1,), "stem": "v1", "num_classes": 2}
    return timm.create_model("test_vmamba", **{**plain, **kwargs}).eval()


class Reads(nn.Module):
    """Token t is given token `source[t]`, of which there is nothing else."""

    def __init__(self, source: list[int]) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.source]

    def matrix(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        matrix = torch.zeros(length, length)
        matrix[torch.arange(length), self.source] = 1
        return matrix.expand(x.shape[0], 2, length, length)


def patches(maps: Tensor, side: int = 4) -> Tensor:
    """Values in the middle of every patch, (B, h w)."""
    return maps[:, side // 2 :: side, side // 2 :: side].flatten(1)


@pytest.mark.parametrize("form", ["attention", "gradient"])
def test_the_patch_that_the_class_token_reads(form: Any) -> None:
    """The class token, token 8 of 17, reads token 11, which is patch 10; all others themselves."""
    model = tiny(depth=1)
    source = list(range(17))
    source[8] = 11
    model.layers[0].mixer = Reads(source)
    maps, _ = heat_map(model, torch.randn(1, 3, 16, 16), form)
    values = patches(maps)
    assert values.argmax() == 10
    # bilinear in between; no neighbour beyond the next is touched
    assert set(values[0].nonzero().flatten().tolist()) <= {5, 6, 7, 9, 10, 11, 13, 14, 15}


def test_the_patch_that_a_chain_of_layers_reads() -> None:
    """Token 8 reads 11, and 11 had read 3 before that: patches 10 and 3 count, no other."""
    model = tiny(depth=2)
    first, second = list(range(17)), list(range(17))
    first[11], second[8] = 3, 11
    model.layers[0].mixer, model.layers[1].mixer = Reads(first), Reads(second)
    layers, _ = token_matrices(model, torch.randn(1, 3, 16, 16))
    assert layers[0].weights[0, 11].nonzero().tolist() == [[3]]
    maps, _ = heat_map(model, torch.randn(1, 3, 16, 16), "attention")
    assert set(patches(maps)[0].topk(2).indices.tolist()) == {10, 3}


def test_registers_all_count() -> None:
    """Three registers among 16 patches, at 4, 9 and 14; each reads one patch."""
    model = tiny("test_mambar", depth=1)
    source = list(range(19))
    source[4], source[9], source[14] = 0, 6, 18
    model.layers[0].mixer = Reads(source)
    image = torch.randn(1, 3, 16, 16)
    (layer,), _ = token_matrices(model, image)
    assert layer.class_places == (4, 9, 14)
    assert layer.grid == (4, 4)
    maps, scores = heat_map(model, image, "attention")
    assert scores.shape == (1, 2)
    # tokens 0, 6 and 18 are patches 0, 5 and 15
    assert set(patches(maps)[0].topk(3).indices.tolist()) == {0, 5, 15}


def test_pooled_patches_count_alike() -> None:
    """Everyone reads themselves and all are averaged: a flat map, which is shown as nothing."""
    model = tiny(depth=1, global_pool="avg")
    model.layers[0].mixer = Reads(list(range(17)))
    (layer,), _ = token_matrices(model, torch.randn(1, 3, 16, 16))
    assert layer.class_places == (8,)
    maps, _ = heat_map(model, torch.randn(1, 3, 16, 16), "attention")
    assert maps.abs().max() < 1e-3


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "mamba3", "attention", "gated_cnn"])
@pytest.mark.parametrize("form", ["attention", "gradient"])
def test_causal_mixers_use_nothing_later(mixer: str, form: Any) -> None:
    """A class token in the middle of the reading order: nothing behind it can have been used."""
    model = tiny(
        "ssm_vit_tiny_patch16_224",
        mixer=mixer,
        embed_dim=64,
        class_token=True,
        class_token_pos="middle",
    )
    maps, _ = heat_map(model, torch.randn(2, 3, 16, 16), form)
    values = patches(maps)
    # the third row of patches lies next to the second, the last one does not
    assert values[:, 12:].abs().max() == 0
    assert values[:, :8].amax() > 0.5
    field = effective_receptive_field(model, torch.randn(2, 3, 16, 16))
    # what reaches row 2, column 2: everything up to there
    used = F.max_pool2d(field[None, None], 4).flatten() > 0
    assert not used[11:].any()
    assert used[10]


@pytest.mark.parametrize("path", ["raster", "bidirectional"])
def test_stages_read_along_their_paths(path: str) -> None:
    """One path, forwards: the first token of the grid reads itself alone; two: it reads all."""
    model = stages(path=path, d_conv=1)
    (layer,), _ = token_matrices(model, torch.randn(1, 3, 16, 16))
    assert layer.grid == (4, 4)
    assert layer.class_places == ()
    assert layer.weights.sum(-1).allclose(torch.ones(1, 16))
    reads = layer.weights[0, 0].nonzero().flatten().tolist()
    assert reads == ([0] if path == "raster" else list(range(16)))


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


@pytest.mark.parametrize("name", ["vmamba", "registers"])
def test_heat_maps_find_the_patch_that_decides(name: str) -> None:
    """After training on noise with one patch that says the class.

    Chance is one in sixteen. Other seeds of the weights give 0.4 to 0.6 and 0.3 to 0.5.
    """
    torch.manual_seed(0)
    model = stages(depths=(2, 1)) if name == "vmamba" else tiny("test_mambar", d_state=4)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    for step in range(80):
        images, labels, _ = marked(32, step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels, places = marked(64, 1000)
    maps, scores = heat_map(model.eval(), images)
    assert (scores.argmax(1) == labels).float().mean() > 0.9
    found = F.avg_pool2d(maps.unsqueeze(1), 4).flatten(1).argmax(1)
    assert (found == places).float().mean() > 0.3
