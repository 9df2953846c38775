"""Settings, their checks, the schedule, and which packages the folder needs."""

import ast
import inspect
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from scanweave.core.training import TrainConfig, schedule_factor


def test_tyro_reads_every_field(tmp_path: Path) -> None:
    tyro = pytest.importorskip("tyro")
    arguments = ["--output-dir", str(tmp_path), "--betas", "0.8", "0.95", "--schedule", "linear"]
    config = tyro.cli(TrainConfig, args=[*arguments, "--resume", "--max-steps", "7"])
    assert config == TrainConfig(
        output_dir=tmp_path, betas=(0.8, 0.95), schedule="linear", resume=True, max_steps=7
    )


def test_every_field_is_documented() -> None:
    # tyro shows the string below a field as the option's help
    body = ast.parse(inspect.getsource(TrainConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    documented = {
        field.target.id
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and len(str(text.value.value)) > 15
    }
    assert documented == {field.name for field in fields(TrainConfig)}


def test_values_become_their_types() -> None:
    config = TrainConfig(output_dir="a/b", betas=[0.9, 0.95])  # type: ignore[arg-type]
    assert config.output_dir == Path("a/b")
    assert config.betas == (0.9, 0.95)
    assert hash(config) == hash(replace(config))
    with pytest.raises(FrozenInstanceError):
        config.lr = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0"),
        ({"max_steps": -1}, "max_steps must be at least 0, got -1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be finite and at least 0, got nan"),
        ({"clip_grad": -1.0}, r"clip_grad must be finite and at least 0, got -1\.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got"),
        ({"final_lr": 1.5}, r"final_lr must be a fraction of lr in \[0, 1\], got 1\.5"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant, got 'step'"),
        ({"compile": True}, "compile must be one of no, default, reduce-overhead, max-autotune"),
        ({"precision": "fp8"}, "precision must be one of no, bf16, fp16, got 'fp8'"),
        ({"best_mode": "most"}, "best_mode must be one of auto, max, min, got 'most'"),
        ({"resume": True, "overwrite": True}, "overwrite must be False together with resume"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_warmup_rises_to_one() -> None:
    factors = [schedule_factor(s, 20, warmup_steps=4) for s in range(4)]
    assert factors == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedule_falls_from_one_to_final(schedule: Any) -> None:
    factors = [schedule_factor(s, 50, schedule=schedule, final=0.1) for s in range(51)]
    assert factors[0] == 1.0
    assert factors[25] == pytest.approx(0.55)
    assert factors[50] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    assert schedule_factor(99, 50, schedule=schedule, final=0.1) == pytest.approx(0.1)


def test_constant_stays_and_unknown_is_refused() -> None:
    assert schedule_factor(49, 50, schedule="constant", final=0.1) == 1.0
    with pytest.raises(ValueError, match="schedule must be cosine, linear or constant, got 'up'"):
        schedule_factor(3, 50, schedule="up")  # type: ignore[arg-type]


def test_missing_packages_are_named_and_core_needs_none() -> None:
    # a fresh interpreter whose finder denies the optional packages
    script = """
import importlib.util, sys
denied = {"accelerate", "rich", "tyro", "tensorboard", "matplotlib", "timm", "torch_geometric",
          "gymnasium", "wandb"}
class Deny:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in denied:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Deny())
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in denied else original(name, *a)
import scanweave.core
for missing in ("accelerate", "rich"):
    try:
        import scanweave.core.training
    except ImportError as error:
        expected = f"scanweave.core.training needs {missing}: pip install 'scanweave[train]'"
        assert str(error) == expected, str(error)
    else:
        raise AssertionError(missing)
    denied.discard(missing)
import scanweave.core.training
assert not denied & set(sys.modules)
try:
    scanweave.core.training.plot_history([{"step": 1, "loss": 1.0}], "x.png")
except ImportError as error:
    assert "plot_history needs matplotlib: pip install 'scanweave[train]'" in str(error), error
else:
    raise AssertionError("matplotlib")
"""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2] / "core"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
