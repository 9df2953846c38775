"""Every `test_*` model through timm's ways of loading: files, folders, the hub, other heads."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError
from safetensors.torch import load_file, save_file
from tests.vision.registered import TEST_MODELS, small, takes
from timm.models import _hub, save_for_hf
from torch import Tensor, nn

each = pytest.mark.parametrize("name", TEST_MODELS)
# timm imports the hub's client, which may warn
pytestmark = pytest.mark.filterwarnings("default:::huggingface_hub")


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 64, 64)


def assert_same(model: nn.Module, other: nn.Module, but: tuple[str, ...] = ()) -> None:
    theirs = other.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        if not key.startswith(but or ("no such",)):
            assert torch.equal(theirs[key], value), key


def head(model: nn.Module) -> str:
    return f"{model.pretrained_cfg['classifier']}."  # type: ignore[index]


def stem(model: nn.Module) -> str:
    return f"{model.pretrained_cfg['first_conv']}.weight"  # type: ignore[index]


@pytest.fixture(params=["local-dir", "hf-hub"])
def scheme(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a repository in `tmp_path`, as a folder or through the client of the hub."""
    if request.param == "local-dir":
        return f"local-dir:{tmp_path}"

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "somebody/model"
        if not (tmp_path / filename).is_file():
            # made without its constructor, which wants a response of a server
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / filename)

    monkeypatch.setattr(_hub, "hf_hub_download", download)
    return "hf-hub:somebody/model"


def created_with(name: str, **more: Any) -> dict[str, Any]:
    return {**({"img_size": 64} if takes(name, "img_size") else {}), **more}


@each
@pytest.mark.parametrize("safe", ["both", True, False])
def test_round_trip_through_a_repository(
    name: str, safe: bool | str, scheme: str, tmp_path: Path
) -> None:
    """Architecture, weights and data configuration return, from either kind of file."""
    model = small(name, in_chans=4)
    data = {"mean": [0.1, 0.2, 0.3, 0.4], "std": [0.5] * 4, "crop_pct": 1.0}
    args = created_with(name)
    save_for_hf(
        model,
        tmp_path,
        model_args=args,
        model_config={"pretrained_cfg": data},
        safe_serialization=safe,
    )  # type: ignore[arg-type]
    assert (tmp_path / "model.safetensors").is_file() is (safe is not False)
    assert (tmp_path / "pytorch_model.bin").is_file() is (safe is not True)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["architecture"], config["num_classes"]) == (name, 5)

    again = timm.create_model(scheme, pretrained=True).eval()
    assert_same(model, again)
    assert torch.equal(again(x := image(4)), model(x))
    for key, value in data.items():
        assert again.pretrained_cfg[key] == value  # type: ignore[index]
    source = "local-dir" if scheme.startswith("local") else "hf-hub"
    assert again.pretrained_cfg["source"] == source


@each
def test_repository_with_another_head_and_stem(name: str, scheme: str, tmp_path: Path) -> None:
    model = small(name)
    save_for_hf(model, tmp_path, model_args=created_with(name))
    for classes in (7, 0):
        other = timm.create_model(scheme, pretrained=True, num_classes=classes)
        without = {k: v for k, v in model.state_dict().items() if not k.startswith(head(model))}
        kept = {k: v for k, v in other.state_dict().items() if not k.startswith(head(model))}
        # without a classifier a model may also leave out what only the classifier reads
        assert kept.keys() == without.keys() if classes else kept.keys() <= without.keys()
        assert all(torch.equal(v, without[k]) for k, v in kept.items())
        assert other(image()).shape == (2, classes or other.head_hidden_size)
    grey = timm.create_model(scheme, pretrained=True, in_chans=1)
    # one channel sees the sum of three: equal channels give the same outputs
    assert_same(model, grey, (stem(model),))
    x = image(1)
    torch.testing.assert_close(grey.eval()(x), model(x.expand(-1, 3, -1, -1)))
    features = timm.create_model(scheme, pretrained=True, features_only=True)
    assert all(f.isfinite().all() for f in features(image()))


def wrapped(kind: str, state: dict[str, Tensor]) -> dict[str, Any]:
    if kind == "ddp":
        return {f"module.{k}": v for k, v in state.items()}
    return state if kind == "plain" else {kind: state, "epoch": 3}


@each
@pytest.mark.parametrize(
    "kind", ["plain", "state_dict", "model", "model_ema", "state_dict_ema", "ddp"]
)
def test_checkpoint_path(name: str, kind: str, tmp_path: Path) -> None:
    """The argument and the overlay `file`, for the wrappers of training scripts."""
    model = small(name)
    path = tmp_path / "checkpoint.pth"
    torch.save(wrapped(kind, model.state_dict()), path)
    assert_same(model, small(name, checkpoint_path=str(path)))
    overlay = {"file": str(path), "num_classes": 5}
    assert_same(model, small(name, pretrained=True, pretrained_cfg_overlay=overlay))
    # what a training script asks for: the same weights under a new head
    overlay = {"file": str(path), "num_classes": -1}
    other = small(name, pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
    assert other(image()).shape == (2, 3)
    old = model.state_dict()
    assert all(
        torch.equal(v, old[k])
        for k, v in other.state_dict().items()
        if not k.startswith(head(model))
    )


@each
def test_safetensors_file(name: str, tmp_path: Path) -> None:
    model = small(name)
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    assert load_file(path).keys() == model.state_dict().keys()
    assert_same(model, small(name, checkpoint_path=str(path)))


@each
def test_another_models_weights_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), path)
    with pytest.raises((ValueError, RuntimeError), match=r"must be|size mismatch|Missing key"):
        small(name, checkpoint_path=str(path))


@each
def test_no_weights_are_promised(name: str) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        small(name, pretrained=True)


@each
def test_configuration_is_complete(name: str) -> None:
    """What timm's data pipeline and its adaptation of weights read."""
    model = small(name)
    cfg = model.pretrained_cfg  # type: ignore[attr-defined]
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0] == 3
    assert cfg["interpolation"] in ("bicubic", "bilinear")
    assert 0 < cfg["crop_pct"] <= 1
    assert cfg["architecture"] == name
    assert cfg["license"]
    assert isinstance(model.get_submodule(cfg["classifier"]), nn.Linear)
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    resolved = timm.data.resolve_data_config({}, model=model)
    size = (3, 64, 64) if takes(name, "img_size") else cfg["input_size"]
    assert resolved["input_size"] in (size, cfg["input_size"])
    assert timm.data.create_transform(**resolved, is_training=True)
