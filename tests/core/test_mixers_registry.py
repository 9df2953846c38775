"""The registry of mixers, and the README's table and example made from it."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from scanweave.core import (
    Mixer,
    MixerInfo,
    create_mixer,
    list_mixers,
    mixer_info,
    register_mixer,
)
from scanweave.core.mixers import base

README = Path(__file__).resolve().parents[2] / "core" / "README.md"
FOUNDATION = [
    "attention",
    "attention_bidirectional",
    "bimamba",
    "gated_cnn",
    "gated_cnn_bidirectional",
    "mamba",
]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Mixer]]:
    """A copy that is thrown away."""
    copy = dict(base._REGISTRY)
    monkeypatch.setattr(base, "_REGISTRY", copy)
    return copy


def test_lists():
    assert set(FOUNDATION) <= set(list_mixers())
    assert list_mixers() == sorted(list_mixers())
    assert {"mamba", "gated_cnn", "attention"} <= set(list_mixers(causal=True))
    assert {"bimamba", "gated_cnn_bidirectional"} <= set(list_mixers(causal=False))
    assert sorted(list_mixers(causal=True) + list_mixers(causal=False)) == list_mixers()
    assert {"mamba", "gated_cnn"} <= set(list_mixers(recurrent=True))
    assert "attention" in list_mixers(causal=True, recurrent=False)
    assert not list_mixers(causal=False, recurrent=True)


@pytest.mark.parametrize("name", list_mixers())
def test_rows_agree_with_their_classes(name: str):
    info, mixer = mixer_info(name), create_mixer(name, 8)
    assert isinstance(info, MixerInfo)
    assert info.name == name
    assert mixer.info is info
    assert (info.causal, info.recurrent) == (mixer.causal, mixer.recurrent)
    assert re.search(r"arXiv \d{4}\.\d{5}", info.paper)
    assert info.primitive
    assert mixer.d_model == 8
    parameters = inspect.signature(type(mixer)).parameters
    first, *rest = parameters.values()
    assert first.name == "d_model"
    # no sinks, and every option has a default and is given by name
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)
    assert {"device", "dtype"} <= parameters.keys()
    doc = inspect.getdoc(type(mixer))
    assert doc
    if "arguments as" not in doc:
        assert all(f"{p}:" in doc for p in parameters)


def test_unknown_mixer():
    for call in (lambda: create_mixer("mambo", 8), lambda: mixer_info("mambo")):
        with pytest.raises(ValueError, match=r"mixer must be one of attention, .*, got 'mambo'"):
            call()


@pytest.mark.parametrize("name", list_mixers())
def test_unknown_argument(name: str):
    rule = rf"mixer '{name}' does not take breadth, height; it takes .*device, dtype"
    with pytest.raises(TypeError, match=rule):
        create_mixer(name, 8, height=3, breadth=2)


def test_arguments_reach_the_mixer():
    assert create_mixer("mamba", 8, d_state=5).get_parameter("A_log").shape == (16, 5)
    assert create_mixer("gated_cnn", 8, kernel_size=3).get_parameter("conv.weight").shape[-1] == 3


def test_own_mixers(registry: dict[str, type[Mixer]]):
    @register_mixer("mean", primitive="none", paper="none")
    class Mean(Mixer):
        causal = False

        def __init__(self, d_model: int) -> None:
            super().__init__()
            self.d_model = d_model

        def _mix(self, x, state, cu_seqlens, return_state):
            return x.mean(1, keepdim=True).expand_as(x), None

    assert "mean" in list_mixers(causal=False)
    assert mixer_info("mean") == MixerInfo("mean", "none", False, False, "none")
    mixer, x = create_mixer("mean", 4), torch.randn(2, 3, 4)
    assert torch.equal(mixer(x)[:, 0], x.mean(1))
    for call in (lambda: mixer.core(x), lambda: mixer.matrix(x), mixer.reset_parameters):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(ValueError, match=r"mixer name must be free, 'mean' is .*Mean"):
        register_mixer("mean", primitive="none", paper="none")(Mean)
    with pytest.raises(ValueError, match="mixer name must be free, 'mamba' is Mamba"):
        register_mixer("mamba", primitive="none", paper="none")(Mean)


def test_base_class_mixes_nothing():
    class Nothing(Mixer):
        d_model = 4

    with pytest.raises(NotImplementedError):
        Nothing()(torch.randn(1, 2, 4))


def table() -> str:
    """The README's rows, from the registry."""
    rows = ["| mixer | op | causal | recurrent | paper | loads the weights of |", "|---" * 6 + "|"]
    for name in list_mixers():
        info = mixer_info(name)
        paper = re.sub(r"arXiv (\S+)", r"[arXiv \1](https://arxiv.org/abs/\1)", info.paper)
        answers = ["yes" if v else "no" for v in (info.causal, info.recurrent)]
        cells = [f"`{name}`", f"`{info.primitive}`", *answers, paper, info.reference]
        rows.append(f"| {' | '.join(cells)} |".replace("  |", " |"))
    return "\n".join(rows)


def test_readme_lists_every_mixer():
    assert table() in README.read_text(), f"the table of core/README.md should be\n{table()}"


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        namespace: dict[str, object] = {}
        exec(compile(block, str(README), "exec"), namespace)
        y, mixer = namespace["y"], namespace["mixer"]
        assert isinstance(y, torch.Tensor)
        assert isinstance(mixer, Mixer)
        assert y.shape == (2, 100, 64)


def test_readme_links_to_files():
    text = README.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
    for path in re.findall(r"`((?:ops|mixers|training)/[\w/]+\.py)`", text):
        assert (README.parent / "scanweave" / "core" / path).is_file(), path
