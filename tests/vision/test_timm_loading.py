"""timm's own tests of inputs, repositories and checkpoints, with our models in their place.

As in `test_timm_suite.py` the files are timm's, fetched by `fetch_timm_tests.py`. They name single
models: what they say of a patch model of a fixed size is asked of ours of that kind, what they say
of any model of all of ours. Not here: what concerns conversions to other architectures
("naflex"), weights in JAX's format, and `test_hub.py`, which looks at files and at no model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from tests.vision.fetch_timm_tests import suite_path
from tests.vision.registered import TEST_MODELS, takes

FILES = ("test_model_input.py", "test_checkpoint_loading.py")
_missing = [name for name in FILES if not suite_path().with_name(name).is_file()]
if _missing:
    pytest.skip(
        f"no {', '.join(_missing)} beside {suite_path()}: run tests/vision/fetch_timm_tests.py",
        allow_module_level=True,
    )

pytestmark = pytest.mark.filterwarnings("default")
# models of patches, and those of them that have positions, so that images have one size
PATCHES = [n for n in TEST_MODELS if takes(n, "dynamic_img_size")]
FIXED = [n for n in PATCHES if timm.get_pretrained_cfg(n).fixed_input_size]  # type: ignore[union-attr]


def _load(name: str) -> dict[str, Any]:
    path = suite_path().with_name(name)
    namespace: dict[str, Any] = {"__name__": __name__, "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return namespace


_INPUT, _LOADING = (_load(name) for name in FILES)


@pytest.fixture(params=FIXED)
def vit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ours in the place of timm's small ViT, also where timm's tests make it by its name."""
    name: str = request.param
    own = {"img_size": (32, 48), "embed_dim": 32, "depth": 1}

    def make(**arguments: Any) -> Any:
        return timm.create_model(name, **{**own, **arguments})

    def resolve(model: str, *args: Any, **arguments: Any) -> dict[str, Any]:
        arguments.pop("num_heads", None)
        return timm.models.resolve_model_input_args(
            name if model == "vit_tiny_patch16_224" else model, *args, **arguments
        )

    monkeypatch.setitem(_INPUT, "_vit", make)
    monkeypatch.setitem(_INPUT, "resolve_model_input_args", resolve)
    return name


@pytest.mark.parametrize("legacy", [False, True])
def test_adapted_and_resized_models_return(vit: str, legacy: bool, tmp_path: Path) -> None:
    _INPUT["test_adapted_resized_model_hub_roundtrip"](tmp_path, legacy)


@pytest.mark.parametrize("nested", [False, True])
def test_conflicting_metadata_is_refused(vit: str, nested: bool, tmp_path: Path) -> None:
    _INPUT["test_export_rejects_conflicting_model_metadata"](tmp_path, nested)


def test_dynamic_sizes_are_kept_apart_from_the_grid(vit: str, tmp_path: Path) -> None:
    name = "test_flexible_model_export_keeps_nominal_grid_and_preprocessing_separate"
    _INPUT[name](tmp_path, False)


def test_traits(vit: str) -> None:
    _INPUT["test_model_traits_are_independent_and_follow_resize_and_head_reset"]()


def test_test_size_and_data_overrides(vit: str) -> None:
    _INPUT["test_flexible_model_uses_test_size_and_explicit_data_overrides"]()


@pytest.mark.parametrize("args", [{"in_chans": 4}, {"img_size": 64}, {"mean": (0.5, 0.5)}])
def test_incompatible_requests_are_refused(vit: str, args: dict[str, Any]) -> None:
    _INPUT["test_runtime_resolution_rejects_incompatible_explicit_requests"](args)


@pytest.mark.parametrize(
    ("args", "arguments"),
    [
        ({"in_chans": 4, "input_size": (3, 32, 32)}, {}),
        ({"in_chans": 4}, {"in_chans": 3}),
        ({"img_size": 32, "input_size": (3, 48, 48)}, {}),
        ({"img_size": 32}, {"img_size": 48}),
    ],
)
def test_conflicting_inputs_are_refused(
    vit: str, args: dict[str, Any], arguments: dict[str, Any]
) -> None:
    _INPUT["test_script_construction_rejects_conflicting_inputs"](args, arguments)


@pytest.mark.parametrize("name", PATCHES)
def test_resized_models_return(name: str, tmp_path: Path) -> None:
    check: Callable[..., None] = _INPUT["test_default_resize_hub_roundtrip"]
    check(tmp_path, name, {"embed_dim": 32, "depth": 1}, 64, 96)


@pytest.mark.parametrize("name", TEST_MODELS)
@pytest.mark.parametrize(("classes", "pool"), [(3, "max"), (3, "avg"), (0, "")])
def test_pools_and_heads_return(name: str, classes: int, pool: str, tmp_path: Path) -> None:
    """At the models' own size, where timm's test takes 64 pixels for any."""
    _INPUT["test_export_tracks_reset_classifier_structure"](tmp_path, name, {}, pool, None)
    if name not in PATCHES:
        _INPUT["test_export_tracks_reset_pool_in_head"](tmp_path, name, classes, pool)


@pytest.mark.parametrize("name", TEST_MODELS)
def test_checkpoint_goes_through_timms_loader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(pretrained: bool = False, **arguments: Any) -> Any:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)

    monkeypatch.setitem(_LOADING, "_create_tiny_naflexvit", make)
    _LOADING["test_naflexvit_native_checkpoint_uses_factory_loader"](tmp_path)
