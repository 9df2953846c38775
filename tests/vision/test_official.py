"""Official models' names, shapes, outputs and gradients, as `make_official.py` found them."""

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.vision.make_official import (
    DIRECTIONS,
    REGISTERS,
    RESULT,
    ROPE,
    STAGES,
    VIM,
    fill,
    layout,
    results,
)
from torch import nn

import scanweave.vision  # noqa: F401  (registers the models)

FOUND = json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", list(FOUND["layouts"]))
def test_names_and_shapes(name: str) -> None:
    """All of a published state dict's, at full size, by their hash."""
    official = {k: v for k, v in FOUND["layouts"][name].items() if k != "entry"}
    assert layout(timm.create_model(name, device="meta").state_dict()) == official


@pytest.mark.parametrize("name", list(VIM))
@pytest.mark.filterwarnings("ignore:Mapping deprecated model")
def test_long_names(name: str) -> None:
    """Vim's official entries make our models; timm does not list them twice."""
    model = timm.create_model(VIM[name], device="meta", num_classes=7)
    expected = timm.create_model(name, device="meta", num_classes=7)
    assert layout(model.state_dict()) == layout(expected.state_dict())
    assert VIM[name] not in timm.list_models("vim_*")


def _model(kind: str) -> nn.Module:
    if kind == "registers":
        return timm.create_model("test_mambar", num_classes=5, **REGISTERS)
    if kind == "rope":
        return timm.create_model("local_vim_tiny_rope_patch16_224", num_classes=5, **ROPE)
    given = {**STAGES, "directions": DIRECTIONS}
    return timm.create_model("local_vmamba_tiny", num_classes=5, **given)


@pytest.mark.parametrize(("kind", "size"), [("registers", 64), ("stages", 40), ("rope", 80)])
def test_outputs_and_gradients(kind: str, size: int) -> None:
    """Mamba-Reg, LocalVMamba and LocalVim, whose windows of 7 do not divide the grids."""
    # without rounding of the stream to float32, which the stored results do not have either
    model = _model(kind).double()
    fill(model)
    official = FOUND["outputs"][kind]
    ours = results(model.eval(), size)
    # official decays and states are rounded to float32 on their way
    torch.testing.assert_close(
        torch.tensor(ours["logits"]), torch.tensor(official["logits"]), rtol=1e-5, atol=1e-6
    )
    assert ours["gradients"].keys() == official["gradients"].keys()
    largest = max(map(abs, official["gradients"].values()))
    for name, value in ours["gradients"].items():
        expected = official["gradients"][name]
        assert math.isclose(value, expected, rel_tol=1e-3, abs_tol=1e-6 * largest), name


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "local_vmamba_tiny"])
def test_file_as_it_is_published(name: str, tmp_path: Path) -> None:
    """A whole training checkpoint of 1000 classes, opened by its path under a head of ten."""
    small: dict[str, Any] = {"depth": 2} if "vim" in name.split("_") else {"depths": (1, 1)}
    if "depths" in small:
        small |= {"directions": (("h",), ("v",)), "dims": 16}
    source = timm.create_model(name, **small)
    average = {k: v + 1 for k, v in source.state_dict().items()}
    checkpoint = {
        "model": source.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 299,
        "scaler": {},
        "args": Namespace(lr=1e-3, model=name),
    }
    path = tmp_path / "published.pth"
    torch.save(checkpoint, path)
    same = timm.create_model(name, checkpoint_path=str(path), **small)
    for key, value in source.state_dict().items():
        assert torch.equal(same.state_dict()[key], value), key
    overlay = {"file": str(path)}
    other = timm.create_model(
        name, pretrained=True, num_classes=10, pretrained_cfg_overlay=overlay, **small
    )
    assert other.get_classifier().out_features == 10
    head = source.pretrained_cfg["classifier"]
    for key, value in other.state_dict().items():
        if not key.startswith(head):
            assert torch.equal(value, source.state_dict()[key]), key
    # timm takes the average of the weights where there is one
    torch.save({**checkpoint, "model_ema": average}, path)
    averaged = timm.create_model(name, checkpoint_path=str(path), **small).state_dict()
    assert all(torch.equal(averaged[k], v) for k, v in average.items())
