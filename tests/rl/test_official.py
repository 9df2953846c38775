"""Opening published checkpoints."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from scanweave.rl import AtariDecisionMamba, DecisionMamba, export_official, load_official


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


def test_unknown_and_damaged_weights(model):
    with pytest.raises(ValueError, match=r"source must be a published model .*, got unknown"):
        load_official({"layer.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="source must hold a state dict of tensors, got dict"):
        load_official({"epoch": 3})
    weights = model.state_dict()
    del weights["embed_ln.bias"]
    with pytest.raises(
        ValueError, match=r"(?s)source must be a whole gym mamba checkpoint: .*embed_ln"
    ):
        load_official(weights)


def perturb(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def gym_batch(model, batch=2, steps=5):
    torch.manual_seed(2)
    return (
        torch.randn(batch, steps, *model.state_shape),
        torch.randn(batch, steps, model.act_dim),
        torch.randn(batch, steps, 1),
        torch.arange(steps).expand(batch, -1) + torch.tensor([[0], [7]]),
    )


def test_rms_norms_are_told_by_the_weights():
    """The published variant `dmamba-min`: same names, no bias in the norm before the mixer."""
    model = perturb(DecisionMamba(4, 2, 16, 2, norm="rms"))
    assert "transformer.h.0.norm_mamba.bias" not in model.state_dict()
    loaded = load_official(model.state_dict())
    assert loaded.config["norm"] == "rms"
    inputs = gym_batch(model)
    assert torch.equal(loaded(*inputs), model(*inputs))
    x = torch.randn(3, 16)
    norm = loaded.transformer.blocks[0].norm_mamba
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("prefix", ["encoder", "transformer"])
def test_decision_transformer_equals_that_of_transformers(prefix):
    """The gym Decision Transformer, against an implementation that is not ours."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DecisionTransformerConfig(
        state_dim=5, act_dim=2, hidden_size=12, n_layer=2, n_head=1, max_ep_len=40
    )
    torch.manual_seed(0)
    theirs = perturb(transformers.DecisionTransformerModel(config))
    weights = theirs.state_dict()
    if prefix == "transformer":
        # the layout of the published code: other prefix, no positions, unused table and buffers
        with torch.no_grad():
            theirs.encoder.wpe.weight.zero_()
        weights = {
            name.replace("encoder.", "transformer.", 1): value
            for name, value in theirs.state_dict().items()
            if "wpe" not in name
        }
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    ours = load_official(weights)
    assert ours.config["mixer"] == "attention"
    assert ours.config["activation"] == "relu"
    states, actions, returns, timesteps = gym_batch(ours)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    with torch.no_grad():
        expected = theirs(
            states=states,
            actions=actions,
            rewards=torch.zeros(2, 5, 1),
            returns_to_go=returns,
            timesteps=timesteps,
            attention_mask=mask,
        ).action_preds
        got = ours(states, actions, returns, timesteps, mask=mask.bool())
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-6, rtol=1e-5)
    back = export_official(ours)
    for name, value in weights.items():
        if prefix == "transformer" and "wte" not in name and not name.endswith("attn.bias"):
            assert torch.equal(back[name], value), name


def official_atari(model, attention):
    """State dict under published names, made by hand: what `export_official` must give."""
    renamed = {}
    for name, value in model.state_dict().items():
        name = name.replace("transformer.h.", "blocks.").replace("transformer.ln_f", "ln_f")
        name = name.replace("ln_2", "ln2")
        if attention and "in_proj" in name:
            query, key, value = value.chunk(3)
            renamed[name.replace("mamba.in_proj", "attn.query")] = query
            renamed[name.replace("mamba.in_proj", "attn.key")] = key
            name = name.replace("mamba.in_proj", "attn.value")
        elif attention:
            name = name.replace("norm_mamba", "ln1").replace("mamba.out_proj", "attn.proj")
        renamed[name] = value
    renamed["tok_emb.weight"] = torch.zeros(model.act_dim, 16)
    if attention:
        tokens = 3 * model.max_length + 1
        lower = torch.ones(tokens, tokens).tril()[None, None]
        renamed.update({f"blocks.{i}.attn.mask": lower for i in range(2)})
    return renamed


@pytest.mark.parametrize("attention", [False, True])
def test_atari_weights_there_and_back(attention):
    mixer = {"mixer": "attention", "mixer_kwargs": {"num_heads": 8}} if attention else {}
    model = perturb(AtariDecisionMamba(4, (4, 84, 84), 16, 2, 5, 30, **mixer))
    weights = official_atari(model, attention)
    loaded = load_official(weights)
    assert isinstance(loaded, AtariDecisionMamba)
    assert loaded.config == {
        **model.config,
        "mixer_kwargs": loaded.config["mixer_kwargs"],
        "global_step": "current",
        "init": "official",
    }
    back = export_official(loaded)
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(back[name], value), name
    # kzl's Decision Transformer calls the MLP `mlp`
    other = {name.replace("mlp_channels", "mlp"): value for name, value in weights.items()}
    assert load_official(other).config == loaded.config


def test_other_mixers_have_no_published_form():
    with pytest.raises(ValueError, match="mixer must be 'mamba' or 'attention' as published"):
        export_official(DecisionMamba(3, 1, 8, 1, mixer="gated_cnn"))
