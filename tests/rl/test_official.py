"""Opening published checkpoints."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from scanweave.rl import DecisionMamba, load_official


@pytest.fixture
def model():
    kwargs = {"d_state": 4, "d_conv": 3, "expand": 3, "dt_rank": 5}
    return DecisionMamba(
        7, 3, 12, 2, max_ep_len=50, n_inner=20, mixer_kwargs=kwargs, init="official"
    ).eval()


@pytest.mark.parametrize("form", ["dict", "wrapped", "module", "cpt", "safetensors"])
def test_every_form_loads(model, form, tmp_path):
    weights = model.state_dict()
    if form == "cpt":
        torch.save({"epoch": 11, "state_dict": weights, "optimizer": {}}, tmp_path / "a.cpt")
    save_file(weights, tmp_path / "a.safetensors")
    source = {
        "dict": weights,
        "wrapped": {"state_dict": weights},
        "module": {f"module.{name}": value for name, value in weights.items()},
        "cpt": tmp_path / "a.cpt",
        "safetensors": str(tmp_path / "a.safetensors"),
    }[form]
    loaded = load_official(source, max_length=9)
    assert loaded.max_length == 9
    assert loaded.config == {**model.config, "max_length": 9}
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, weights[name])


def test_files_run_no_code(tmp_path):
    path = tmp_path / "evil.cpt"
    torch.save({"state_dict": Trap(tmp_path / "ran")}, path)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        load_official(path)
    assert not (tmp_path / "ran").exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("blocks.0.mamba.A_log", "an Atari Decision Mamba"),
        ("transformer.h.0.attn.c_attn.weight", "a gym Decision Transformer"),
        ("blocks.0.attn.key.weight", "an Atari Decision Transformer"),
        ("layer.weight", "unknown weights"),
    ],
)
def test_other_models_are_named(key, kind):
    with pytest.raises(ValueError, match=f"source must be a gym Decision Mamba .*, got {kind}"):
        load_official({key: torch.zeros(1)})


def test_what_is_no_state_dict(model):
    with pytest.raises(ValueError, match="source must hold a state dict of tensors, got dict"):
        load_official({"epoch": 3})
    small = {k: v for k, v in model.state_dict().items() if not k.endswith("norm_mamba.bias")}
    with pytest.raises(ValueError, match="source must have LayerNorms, got the 'dmamba-min'"):
        load_official(small)
