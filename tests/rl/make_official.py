"""Write `official.json`: names, shapes and outputs of the official models, for the tests beside it.

Run by hand, with einops and transformers installed and checkouts of the official repositories in
one folder:

    git clone https://github.com/Toshihiro-Ota/decision-mamba     # 35f9944
    git clone https://github.com/kzl/decision-transformer         # e2d82e6
    python tests/rl/make_official.py FOLDER

The official classes run as they are, in float32 on the CPU, on weights and inputs that `wave` makes
from their names, so that names, shapes and results are all there is to store. `mamba_ssm`, which
needs a GPU, is replaced by the mixer that Decision Mamba's repository has for machines without one;
of transformers, what newer versions have elsewhere or no more.
"""

import importlib
import json
import sys
import types
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESULT = Path(__file__).with_name("official.json")
BATCH, STATE, ACTION, WIDTH, LAYERS, STEPS = 2, 5, 3, 16, 2, 4
ROWS = 12  # of a gym model's table of steps, and of an Atari model's
HISTORIES = (1, 3, 4, 7)


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that depend on a tensor's name and shape only, as large as weights usually are."""
    count = 1
    for side in shape:
        count *= side
    phase = zlib.crc32(name.encode()) % 1000
    inputs = count // shape[0] if len(shape) > 1 else 4
    values = torch.sin(torch.arange(count, dtype=torch.float64) * 1.618 + phase)
    values = values * (2 / inputs) ** 0.5
    # norms and skips around 1
    if len(shape) == 1 and name.endswith((".D", "weight")):
        values = 1 + 0.3 * values
    return values.float().reshape(shape)


def inputs(kind: str, steps: int) -> dict[str, Tensor]:
    """States, actions, returns to go and timesteps of `BATCH` windows."""
    atari = kind.startswith("atari")
    counts = torch.arange(BATCH * steps).reshape(BATCH, steps)
    shape = (4, 84, 84) if atari else (STATE,)
    number = 1
    for side in shape:
        number *= side
    # one phase a step, so that a longer history begins as a shorter one
    angle = 1.618 * torch.arange(number, dtype=torch.float64) + counts[..., None]
    found = {"states": torch.sin(angle).float().reshape(BATCH, steps, *shape)}
    if atari:
        found["actions"] = (3 * counts) % ACTION
    else:
        choice = torch.arange(ACTION, dtype=torch.float64) + 0.7 * counts[..., None]
        found["actions"] = torch.sin(choice).float()
    found["returns_to_go"] = torch.cos(0.37 * counts.double()).float()[..., None]
    found["timesteps"] = torch.arange(steps).expand(BATCH, steps) + torch.tensor([[0], [2]])
    return found


def loss_of(kind: str, outputs: Tensor, actions: Tensor) -> Tensor:
    """The training loss of every kind."""
    if kind.startswith("atari"):
        return F.cross_entropy(outputs.flatten(0, 1), actions.flatten())
    return F.mse_loss(outputs, actions)


def products(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Of each gradient with a wave of its own."""
    return {
        name: float((g.double() * wave(f"gradient.{name}", tuple(g.shape)).double()).sum())
        for name, g in gradients.items()
    }


def _fill(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(wave(name, tuple(p.shape)))
    return model


def _results(kind: str, model: nn.Module, call: Any, act: Any) -> dict[str, Any]:
    """All that is stored of one model."""
    given = inputs(kind, STEPS)
    outputs = call(model.train(), given)
    loss = loss_of(kind, outputs, given["actions"])
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    used = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
    model.eval()
    with torch.no_grad():
        actions = {str(n): act(model, inputs(kind, n)).tolist() for n in HISTORIES}
    return {
        "shapes": {name: list(value.shape) for name, value in model.state_dict().items()},
        "buffers": [name for name, _ in model.named_buffers()],
        "outputs": outputs.tolist(),
        "loss": float(loss),
        "gradients": products(used),
        "actions": actions,
    }


def _gym(model: Any, given: dict[str, Tensor]) -> Tensor:
    return model(given["states"], given["actions"], given["returns_to_go"], given["timesteps"])


def _gym_act(model: Any, given: dict[str, Tensor]) -> Tensor:
    """`get_action` of every row on its own: the newest action is zeros, as in the roll-out."""
    rows = []
    for row in range(BATCH):
        one = {name: value[row].clone() for name, value in given.items()}
        one["actions"][-1] = 0
        rows.append(
            model.get_action(one["states"], one["actions"], one["returns_to_go"], one["timesteps"])
        )
    return torch.stack(rows)


def _transformer(model: Any, given: dict[str, Tensor]) -> Tensor:
    rewards = torch.zeros_like(given["returns_to_go"])
    return model(
        given["states"], given["actions"], rewards, given["returns_to_go"], given["timesteps"]
    )[1]


def _transformer_act(model: Any, given: dict[str, Tensor]) -> Tensor:
    rows = []
    for row in range(BATCH):
        one = {name: value[row].clone() for name, value in given.items()}
        one["actions"][-1] = 0
        rewards = torch.zeros(len(one["states"]))
        rows.append(
            model.get_action(
                *(one["states"], one["actions"], rewards),
                *(one["returns_to_go"], one["timesteps"]),
            )
        )
    return torch.stack(rows)


def _atari(model: Any, given: dict[str, Tensor]) -> Tensor:
    """In training: the window's first step chooses the row of positions."""
    actions = given["actions"][..., None]
    first = given["timesteps"][:, :1, None]
    return model(given["states"], actions, actions, given["returns_to_go"], first)[0]


def _atari_act(model: Any, given: dict[str, Tensor]) -> Tensor:
    """In evaluation: no newest action, and the current step chooses the row."""
    last = {name: value[:, -STEPS:] for name, value in given.items()}
    before = last["actions"][:, :-1, None] if last["actions"].shape[1] > 1 else None
    current = last["timesteps"][:, -1:, None]
    return model(last["states"], before, None, last["returns_to_go"], current)[0][:, -1]


def _stubs() -> dict[str, types.ModuleType]:
    """What the official code imports and is not there."""
    # before anything of it is replaced
    importlib.import_module("transformers.models.gpt2.configuration_gpt2")
    pytorch_utils = importlib.import_module("transformers.pytorch_utils")
    outputs = importlib.import_module("transformers.utils")
    shims: dict[str, dict[str, Any]] = {
        "mamba_ssm": {"Mamba": None},
        "transformers.file_utils": {
            "ModelOutput": outputs.ModelOutput,
            "add_code_sample_docstrings": lambda *a, **k: lambda f: f,
            "add_start_docstrings": lambda *a, **k: lambda f: f,
            "add_start_docstrings_to_model_forward": lambda *a, **k: lambda f: f,
            "replace_return_docstrings": lambda *a, **k: lambda f: f,
        },
        "transformers.utils.model_parallel_utils": {
            "assert_device_map": None,
            "get_device_map": None,
        },
        "transformers.modeling_utils": {
            "Conv1D": pytorch_utils.Conv1D,
            "PreTrainedModel": _PreTrained,
            "SequenceSummary": nn.Module,
            "find_pruneable_heads_and_indices": None,
            "prune_conv1d_layer": None,
        },
    }
    made = {}
    for name, inside in shims.items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(inside)
    return made


class _PreTrained(nn.Module):
    """What the official stacks use of transformers' base class."""

    def __init__(self, config: Any, *rest: Any, **more: Any) -> None:
        super().__init__()
        self.config, self.dtype = config, torch.float32

    def init_weights(self) -> None:
        pass

    def get_head_mask(self, head_mask: None, layers: int) -> list[None]:
        return [None] * layers


@contextmanager
def _official(path: Path) -> Iterator[None]:
    """Import official code from `path`, and forget it afterwards."""
    stubs, search = _stubs(), list(sys.path)
    replaced = {name: sys.modules[name] for name in stubs if name in sys.modules}
    sys.modules.update(stubs)
    sys.path.insert(0, str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.path[:] = search
    for name, module in list(sys.modules.items()):
        source = str(getattr(module, "__file__", ""))
        if name in stubs or source.startswith(str(path)):
            del sys.modules[name]
    sys.modules.update(replaced)


def _mamba_without_gpu(layers: Any) -> None:
    layers.Mamba = lambda width: layers.MambaBlock(layers.ModelArgs(d_model=width))


def make(folder: Path) -> dict[str, Any]:
    """Everything, from the folder of the checkouts."""
    found: dict[str, Any] = {}
    ota, kzl = folder / "decision-mamba", folder / "decision-transformer"
    sizes = {
        "max_length": STEPS,
        "max_ep_len": ROWS,
        "n_layer": LAYERS,
        "n_head": 1,
        "n_inner": 4 * WIDTH,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }
    with _official(ota / "gym"):
        module = importlib.import_module("models.decision_mamba")
        _mamba_without_gpu(sys.modules["models.layers"])
        for kind, model_type, without in (
            ("gym mamba", "dmamba", False),
            ("gym mamba without actions", "dmamba", True),
            ("gym mamba-min", "dmamba-min", False),
        ):
            model = module.DecisionMamba(
                STATE, ACTION, WIDTH, model_type=model_type, remove_act_embs=without, drop_p=0.0,
                **sizes,
            )  # fmt: skip
            found[kind] = _results(kind, _fill(model), _gym, _gym_act)
    with _official(kzl / "gym"):
        module = importlib.import_module("decision_transformer.models.decision_transformer")
        model = module.DecisionTransformer(
            STATE, ACTION, WIDTH, activation_function="relu", n_ctx=1024, **sizes
        )
        found["gym attention"] = _results(
            "gym attention", _fill(model), _transformer, _transformer_act
        )
    for kind, path, mixer in (
        ("atari mamba", ota, "mamba"),
        ("atari mamba-min", ota, "mamba-min"),
        ("atari attention", ota, "attn"),
        ("atari attention, first code", kzl, ""),
    ):
        with _official(path / "atari"):
            module = importlib.import_module("mingpt.model_atari")
            if mixer:
                _mamba_without_gpu(sys.modules["mingpt.layers"])
            config = module.GPTConfig(
                ACTION,
                3 * STEPS,
                n_layer=LAYERS,
                n_head=8,
                n_embd=WIDTH,
                model_type="reward_conditioned",
                max_timestep=ROWS,
                token_mixer=mixer,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
                attn_pdrop=0.0,
            )
            found[kind] = _results(kind, _fill(module.GPT(config)), _atari, _atari_act)
    return found


if __name__ == "__main__":
    RESULT.write_text(json.dumps(make(Path(sys.argv[1])), indent=1) + "\n", encoding="utf-8")
