"""timm's own model tests, from its source distribution, run on our models.

The file is not ours and not in the repository: `python tests/vision/fetch_timm_tests.py` fetches
the one that belongs to the installed timm, or `TIMM_TESTS` names it. Everything that timm runs on
every registered model runs here on every `test_*` model of ours; its configuration tests, which
run on the meta device, on all of our models. Tests that timm ties to one of its own models are
called with ours where they say something about ours.
"""

import copy
import fnmatch
from collections.abc import Callable
from typing import Any

import pytest
import timm
from tests.vision.fetch_timm_tests import suite_path
from tests.vision.registered import TEST_MODELS, takes

from scanweave.vision.tokens import TokenModel

SUITE = suite_path()
if not SUITE.is_file():
    pytest.skip(
        f"no {SUITE}: run tests/vision/fetch_timm_tests.py or set TIMM_TESTS",
        allow_module_level=True,
    )

# modules with `forward_intermediates`, and models whose features are tokens, in timm's lists
TOKEN_MODULES = ["vim", "ssm_vit", "hydra_vit"]
TOKEN_MODELS = [f"{m}_*" for m in TOKEN_MODULES] + [f"test_{m}*" for m in TOKEN_MODULES]
TOKEN_MODELS += ["local_vim_*", "mambar_*", "test_mambar*"]
MODULES = [*TOKEN_MODULES, "vmamba"]
MODELS = [*TOKEN_MODELS, "vmamba_*", "vanilla_vmamba_*", "local_vmamba_*", "test_vmamba*"]

# torch deprecates TorchScript, which timm tests still
pytestmark = pytest.mark.filterwarnings("default")


def _is_ours(name: str) -> bool:
    return any(fnmatch.fnmatch(name, glob) for glob in MODELS)


def _load(source: str) -> dict[str, Any]:
    """Execute timm's test module with our models in the place of its own."""
    for name, extra in (("FEAT_INTER_FILTERS", MODULES), ("NON_STD_FILTERS", TOKEN_MODELS)):
        head = f"{name} = [\n"
        assert source.count(head) == 1, f"timm's test_models.py has another {name}"
        source = source.replace(head, head + f"    {', '.join(map(repr, extra))},\n")

    listed = timm.list_models

    def ours(*args: Any, **kwargs: Any) -> list[str]:
        # models with tags are asked for only by the tests on the meta device
        small = not kwargs.get("include_tags")
        return [
            m
            for m in listed(*args, **kwargs)
            if _is_ours(m) and (m.startswith("test_") or not small)
        ]

    namespace: dict[str, Any] = {"__name__": __name__, "__file__": str(SUITE)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "list_models", ours)
        patch.setattr(timm, "list_pretrained", lambda *args, **kwargs: [])
        exec(compile(source, str(SUITE), "exec"), namespace)
    return namespace


def _for_ours(test: Callable[..., None]) -> bool:
    """Whether timm parametrises a test with our models."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize" and mark.args[0] == "model_name" and mark.args[1]:
            return all(_is_ours(name) for name in mark.args[1])
    return False


_SUITE = _load(SUITE.read_text(encoding="utf-8"))
cfg_device = _SUITE["cfg_device"]
globals().update(
    {n: f for n, f in _SUITE.items() if n.startswith("test_") and callable(f) and _for_ours(f)}
)


def test_suite_has_not_shrunk() -> None:
    """The tests that apply to our models, of tokens and of stages, are all collected."""
    assert {n.removeprefix("test_model_") for n in globals() if n in _SUITE} >= {
        "forward",
        "backward",
        "default_cfgs",
        "default_cfgs_non_std",
        "forward_torchscript",
        "forward_features",
        "forward_intermediates",
        "forward_intermediates_features",
        "forward_fx",
        "backward_fx",
        "test_prune_intermediate_layers_contract",
    }


SMALL = {"embed_dim": 32, "depth": 3, "img_size": 64}
SMALL_STAGES = {"dims": 8, "depths": (1, 1, 1)}


@pytest.mark.parametrize("model", ["test_vim", "test_mambar", "test_ssm_vit", "test_hydra_vit"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_model_init_weights_after_to_empty", (SMALL,)),
        ("test_headless_checkpoint_reload", ({"depth": 2},)),
        ("test_relpos_non_square_checkpoint_reload", ({"depth": 2},)),
        ("test_relpos_non_square_set_input_size", ({"depth": 2},)),
        ("test_prune_intermediate_layers_params_used", ()),
        ("test_pruned_features_torchscript", ()),
    ],
)
def test_timm_says_of_other_models(name: str, arguments: tuple[Any, ...], model: str) -> None:
    """What timm asks of single models of its own, asked of ours."""
    _SUITE[name](model, *copy.deepcopy(arguments))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_model_init_weights_after_to_empty", (SMALL_STAGES,)),
        ("test_headless_checkpoint_reload", (SMALL_STAGES,)),
        ("test_relpos_non_square_checkpoint_reload", (SMALL_STAGES,)),
        ("test_relpos_non_square_set_input_size", (SMALL_STAGES,)),
        ("test_prune_intermediate_layers_params_used", ()),
        ("test_pruned_features_torchscript", ()),
    ],
)
def test_timm_says_of_other_models_of_stages(name: str, arguments: tuple[Any, ...]) -> None:
    """The same, asked of a model whose features are maps."""
    _SUITE[name]("test_vmamba", *copy.deepcopy(arguments))


@pytest.mark.parametrize("model", TEST_MODELS)
@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("test_reset_classifier_keeps_pool", ("",), 64),
        ("test_head_hidden_size", ("", {}), 64),
        ("test_gcvit_batch_consistency", (), 224),
        ("test_convit_dtype_change_after_forward", (), 224),
    ],
)
def test_timm_says_of_named_models(
    name: str, arguments: tuple[Any, ...], size: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What timm asks of models that it names in the test, ours in their place."""

    def create(_: str, pretrained: bool = False, **kwargs: Any) -> Any:
        image = {"img_size": size} if takes(model, "img_size") else {}
        return timm.create_model(model, **{**image, **kwargs})

    if name == "test_head_hidden_size" and takes(model, "depth"):
        # timm's own tokens cannot be pooled so either; they answer with an AssertionError
        monkeypatch.setattr(TokenModel, "_checked_pool", _asserting(TokenModel._checked_pool))
    monkeypatch.setitem(_SUITE, "create_model", create)
    _SUITE[name](*arguments)


def _asserting(check: Callable[..., str]) -> Callable[..., str]:
    def checked(*args: Any) -> str:
        try:
            return check(*args)
        except ValueError as error:
            raise AssertionError from error

    return checked
