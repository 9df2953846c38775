"""Which parameters `param_groups` decays, and how it splits them."""

import copy
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn

from scanweave.core import Mixer, create_mixer, list_mixers
from scanweave.core.training import param_groups


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(4, 6)
        self.norm = nn.LayerNorm([2, 6])
        self.A_log = nn.Parameter(torch.zeros(6, 3))
        self.A_b_log = nn.Parameter(torch.zeros(6, 3))
        self.D = nn.Parameter(torch.zeros(2, 6))
        self.D_b = nn.Parameter(torch.zeros(2, 6))
        self.dt_bias = nn.Parameter(torch.zeros(2, 3))
        self.gate = nn.Parameter(torch.zeros(2, 2))
        self.table = nn.Parameter(torch.zeros(2, 2))

    def no_weight_decay(self) -> set[str]:
        return {"tab*"}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)
        self.tied = nn.Linear(4, 2)
        self.tied.weight = self.head.weight

    def no_weight_decay(self) -> list[str]:
        return ["blocks.0.gate"]


def names_by_decay(model: nn.Module, groups: list[dict[str, Any]]) -> dict[float, set[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    result: dict[float, set[str]] = {}
    for group in groups:
        found = {names[id(p)] for p in group["params"]}
        result.setdefault(group["weight_decay"], set()).update(found)
    return result


def test_only_matrices_are_decayed() -> None:
    model = Model()
    split = names_by_decay(model, param_groups(model, 0.1))
    assert split[0.1] == {
        "blocks.0.in_proj.weight",
        "blocks.1.in_proj.weight",
        "blocks.1.gate",
        "head.weight",
    }
    assert split[0.0] == {n for n, _ in model.named_parameters()} - split[0.1]


def test_every_parameter_appears_once() -> None:
    model = Model()
    params = [p for group in param_groups(model, 0.1) for p in group["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(model.parameters()))


def test_marked_parameter_is_spared() -> None:
    model = nn.Linear(3, 3, bias=False)
    assert names_by_decay(model, param_groups(model, 0.1)) == {0.1: {"weight"}}
    model.weight._no_weight_decay = True  # type: ignore[attr-defined]
    assert names_by_decay(model, param_groups(model, 0.1)) == {0.0: {"weight"}}


def test_own_options_make_a_group() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight._optim = {"lr": 1e-4, "betas": [0.8, 0.9]}  # type: ignore[union-attr]
    groups = param_groups(model, 0.1, lr=1e-3)
    assert [g["lr"] for g in groups] == [1e-3, 1e-4]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1]
    assert groups[1]["betas"] == [0.8, 0.9]
    assert groups[1]["params"] == [model[1].weight]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    assert [g["params"] for g in param_groups(model, 0.1)] == [[model.bias]]


def test_errors() -> None:
    with pytest.raises(ValueError, match="model must have parameters that require gradients"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    with pytest.raises(ValueError, match=r"weight_decay must be at least 0, got -0\.1"):
        param_groups(nn.Linear(2, 2), -0.1)


# matrices of mixers that are decayed, besides the weights of linear layers and convolutions
DECAYED: dict[str, tuple[str, ...]] = {
    "gss": ("dss.C_*",),
    "s4d": ("kernel.C",),
    "s4d_bidirectional": ("kernel.C",),
    "h3": ("*kernel.C",),
    "lru": ("B_*", "C_*"),
    "mamba_heads": ("x_proj.weight", "dt_proj.weight"),
    "s5": ("C",),
    "s5_bidirectional": ("C1", "C2"),
    "lssl": ("C",),
    **dict.fromkeys(("s4", "s4_bidirectional"), ("kernel.C",)),
    "rg_lru": ("rg_lru.*_gate_weight",),
}
# weights of linear layers and convolutions that are not
SPARED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("hyena", "hyena_bidirectional"), ("filter_fn.*",)),
}
# rates of their own, for lr = 0.01
RATES: dict[str, dict[str, float]] = {
    **dict.fromkeys(
        ("s4", "s4_bidirectional"),
        dict.fromkeys(("kernel.log_dt", "kernel.A_*", "kernel.P", "kernel.B"), 1e-3),
    ),
    "lssl": {"kernel.log_dt": 1e-3, "kernel.[AB]": 1e-4},
    "gss": {"dss.Lambda_*": 1e-3},
    **{name: {"kernel.*": 1e-3} for name in ("dss", "dss_bidirectional", "dss_softmax")},
    **dict.fromkeys(
        ("s4d", "s4d_bidirectional"),
        dict.fromkeys(("kernel.log_*", "kernel.A_imag"), 1e-3),
    ),
    **dict.fromkeys(
        ("s5", "s5_bidirectional"),
        dict.fromkeys(("Lambda_re", "Lambda_im", "log_step", "B"), 1e-3),
    ),
    "hyena": {"filter_fn.pos_emb.z": 1e-5},
    "hyena_bidirectional": {"filter_fn.pos_emb.z": 1e-5},
    "h3": {
        "ssm_k_kernel.kernel.B": 1e-3,
        **dict.fromkeys(
            [f"kernel.kernel.{k}" for k in ("log_dt", "B", "inv_A_real", "A_imag")], 1e-3
        ),
    },
    "rwkv4": {"time_decay": 0.02, "time_first": 0.03},
    "rwkv4_bidirectional": {"time_decay": 0.02, "time_first": 0.03},
    "rwkv5": {"time_decay": 0.02},
    "rwkv5_bidirectional": {"time_decay": 0.02},
    "rwkv6": {"time_decay": 0.02},
    "rwkv6_bidirectional": {"time_decay": 0.02},
}


@pytest.mark.parametrize("name", list_mixers())
def test_every_mixer_decays_its_projections_alone(name: str) -> None:
    """Time steps, decays, skips, norms and biases never are, also in a copy of the mixer."""
    mixer = create_mixer(name, 16)
    projections = {
        f"{path}.weight" if path else "weight"
        for path, module in mixer.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d)
    }
    listed = [n for n, _ in mixer.named_parameters() if _match(n, DECAYED.get(name, ()))]
    assert len(listed) >= len(DECAYED.get(name, ())), "a pattern matches nothing"
    expected = projections.union(listed)
    expected -= {n for n in projections if _match(n, SPARED.get(name, ()))}
    for model in (mixer, copy.deepcopy(mixer), nn.Sequential(copy.deepcopy(mixer))):
        prefix = "" if isinstance(model, Mixer) else "0."
        groups = param_groups(model, 0.1, lr=0.01)
        split = names_by_decay(model, groups)
        assert split[0.1] == {prefix + n for n in expected}
        names = {id(p): n.removeprefix(prefix) for n, p in model.named_parameters()}
        for group in groups:
            for p in group["params"]:
                own = [r for n, r in RATES.get(name, {}).items() if _match(names[id(p)], (n,))]
                assert group["lr"] == pytest.approx(own[0] if own else 0.01), names[id(p)]


def _match(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def test_rules_of_rates() -> None:
    """`lr_scale` multiplies, `lr_max` limits, factors from outside multiply what comes of that."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    rules = [{"lr_scale": 2.0}, {"lr_max": 1e-3, "weight_decay": 0.0}, {"lr": 5e-4}, {}]
    for layer, rule in zip(model, rules, strict=True):
        layer.weight._optim = rule  # type: ignore[union-attr]

    def rates(lr: float, scales: dict[str, float] | None = None) -> list[float]:
        groups = param_groups(model, 0.1, lr=lr, scales=scales)
        found = {id(p): g for g in groups for p in g["params"]}
        assert all(set(g) == {"params", "weight_decay", "lr"} for g in groups)
        assert found[id(model[1].weight)]["weight_decay"] == 0
        return [found[id(layer.weight)]["lr"] for layer in model]

    assert rates(1e-2) == pytest.approx([2e-2, 1e-3, 5e-4, 1e-2])
    assert rates(1e-4) == pytest.approx([2e-4, 1e-4, 5e-4, 1e-4])
    scales = {f"{i}.weight": 0.5 for i in range(3)}
    assert rates(1e-2, scales) == pytest.approx([1e-2, 5e-4, 2.5e-4, 1e-2])
    with pytest.raises(ValueError, match=r"lr must be given where rates have rules.*0\.weight"):
        param_groups(model, 0.1)
