"""Two CPU processes under `accelerate launch` train as one with the double batch would.

Run as a script, this file is what the launcher starts; each process writes what it saw to JSON.
FSDP itself needs GPUs under accelerate, so here only the gathering and splitting of the states of
a sharded model is run, on CPUs. The GPU test at the end runs the whole of it on two GPUs.
"""

import atexit
import copy
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from scanweave.core.training import (
    TrainConfig,
    Trainer,
    TrainResult,
    load_checkpoint,
    read_history,
    seed_everything,
)
from scanweave.core.training.checkpoint import load_named_optimizer_state, named_optimizer_state
from scanweave.core.training.state import gather_sharded, scatter_sharded

FEATURES = torch.randn(48, 3, generator=torch.Generator().manual_seed(5))
TARGETS = FEATURES.sin().sum(1, keepdim=True)


class Crash(Exception):
    """Both processes die in the same step."""


def make_model(dropout: float) -> nn.Module:
    seed_everything(1)
    # BatchNorm would see other batches than one process does
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def train(folder: Path, batch: int, *, dropout: float = 0.0, hook: Any = None) -> TrainResult:
    """Three epochs of three steps of two micro-batches."""
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(1)
        if hook is not None:
            hook(len(calls))
        out = model(batch[0])
        return nn.functional.mse_loss(out, batch[1]), {"mean": out.mean()}

    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        out = model(FEATURES.to(device))
        return {"loss": nn.functional.mse_loss(out, TARGETS.to(device)).item()}

    config = TrainConfig(
        output_dir=folder,
        epochs=3,
        accumulate=2,
        lr=0.02,
        clip_grad=0.5,
        log_every=1,
        save_every=2,
        resume=True,
        progress=False,
        tensorboard=False,
    )
    loader = DataLoader(TensorDataset(FEATURES, TARGETS), batch, shuffle=True)
    return Trainer(config, make_model(dropout), loss, loader, evaluate).fit()


def crash_at(count: int) -> Any:
    def hook(call: int) -> None:
        if call == count:
            raise Crash

    return hook


def run_script(folder: Path) -> None:
    """What the launcher starts, once per process."""
    rank = int(os.environ["RANK"])
    seen: dict[str, Any] = {}
    atexit.register(write_seen, folder / f"rank{rank}.json", seen)
    seen["steps"] = train(folder / "plain", 4).steps
    train(folder / "whole", 4, dropout=0.3)
    try:
        train(folder / "resumed", 4, dropout=0.3, hook=crash_at(14))
    except Crash:
        train(folder / "resumed", 4, dropout=0.3)
        seen["resumed"] = True

    def interrupt_one(call: int) -> None:
        if rank == 1 and call == 9:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        train(folder / "stopped", 4, dropout=0.3, hook=interrupt_one)
    except SystemExit as stopped:
        seen["exit code"] = stopped.code
    if torch.cuda.is_available():
        from accelerate import Accelerator

        seen["kind"] = str(Accelerator().distributed_type)
    else:
        seen["sharded"] = sharded_states_survive(rank)
    seen["done"] = True


def write_seen(path: Path, seen: dict[str, Any]) -> None:
    """The script's last act, after the trainer's own."""
    if seen.get("done"):
        path.write_text(json.dumps({**seen, "group": torch.distributed.is_initialized()}))
        # torch's caches keep the group of a sharded model, whose threads may abort a process that
        # ends before they do
        os._exit(0)


def sharded_states_survive(rank: int) -> str:
    """Whether a sharded model trains on alike after its whole states went through plain ones."""
    from torch.distributed.fsdp import fully_shard

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        value = nn.functional.mse_loss(model(FEATURES), TARGETS)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make_model(0.0)
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    plain = make_model(0.0)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for _ in range(2):
        step(model, optimizer)
        step(plain, plain_optimizer)
    weights, named = gather_sharded(model, optimizer)
    expected = named_optimizer_state(plain, plain_optimizer)
    if rank == 0:
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(weights[name], value)
        for name, entries in expected["state"].items():
            for key, value in entries.items():
                torch.testing.assert_close(named["state"][name][key], value)
        load_named_optimizer_state(plain, plain_optimizer, named)
    again = make_model(0.0)
    again.load_state_dict(plain.state_dict())
    fully_shard(again)
    again_optimizer = torch.optim.AdamW(again.parameters(), lr=0.5)
    scatter_sharded(again, again_optimizer, copy.deepcopy(expected))
    first, second = step(model, optimizer), step(again, again_optimizer)
    third = step(model, optimizer)
    assert abs(first - second) < 1e-6
    assert abs(third - step(again, again_optimizer)) < 1e-6
    return "yes"


def launch(folder: Path, *options: str) -> list[dict[str, Any]]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command += ["--main_process_port", str(port), *options, __file__, str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(root / "core"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def check(folder: Path, seen: list[dict[str, Any]], tolerance: float) -> None:
    """Compare the files that two processes wrote with one process and with each other."""
    assert [rank["steps"] for rank in seen] == [9, 9]
    assert [rank["group"] for rank in seen] == [False, False]
    assert [rank["resumed"] for rank in seen] == [True, True]
    # only one process got the signal, both stopped, at the same step
    assert [rank["exit code"] for rank in seen] == [130, 130]
    assert (folder / "stopped" / "checkpoints" / "step-00000005").is_dir()

    one = train(folder / "one", 8)
    two = read_history(folder / "plain" / "metrics.csv")
    assert len(one.history) == len(two) == 9
    for row, other in zip(one.history, two, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"seconds", "samples_per_second"}:
            assert other[name] == pytest.approx(row[name], rel=tolerance, abs=1e-6), name
    assert two[-1]["loss"] < 0.8 * two[0]["loss"]

    models = []
    for name in ("plain", "one", "whole", "resumed"):
        models.append(make_model(0.0))
        load_checkpoint(folder / name / "checkpoints" / "step-00000009", models[-1])
    for first, second in (models[:2], models[2:]):
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("the launcher would take the GPUs")
    seen = launch(tmp_path, "--multi_gpu")
    check(tmp_path, seen, 1e-5)
    assert [rank["sharded"] for rank in seen] == ["yes", "yes"]
    for name in ("model", "optimizer", "process"):
        files = [
            tmp_path / run / "checkpoints" / "step-00000009" / f"{name}.safetensors"
            for run in ("whole", "resumed")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    # dropout differs between the processes
    state = load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-00000009").process["torch"]
    assert state.shape[0] == 2
    assert not torch.equal(state[0], state[1])


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", 4)
    path = tmp_path / "run" / "checkpoints" / "step-00000018"
    document = json.loads((path / "state.json").read_text())
    document["state"]["shape"]["processes"] = 2
    (path / "state.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"processes must be 2 as in .* to resume, got 1"):
        train(tmp_path / "run", 4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        ["--multi_gpu"],
        ["--use_fsdp", "--fsdp_version", "1"],
        ["--use_fsdp", "--fsdp_version", "2"],
    ],
    ids=["ddp", "fsdp1", "fsdp2"],
)
def test_two_gpus(tmp_path: Path, options: list[str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    seen = launch(tmp_path, *options)
    assert [("FSDP" in rank["kind"]) for rank in seen] == ["--use_fsdp" in options] * 2
    check(tmp_path, seen, 1e-4)


if __name__ == "__main__":
    run_script(Path(sys.argv[1]))
