"""Two processes under `accelerate launch` train as one with the double batch; killed runs go on.

Run as a script, this file is what the launcher starts; each process writes what it saw to JSON.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

pytest.importorskip("accelerate")
pytest.importorskip("torchmetrics")

from scanweave.core.training import TrainConfig, read_history
from scanweave.graph import GraphSplits
from scanweave.graph.tasks import Task
from scanweave.graph.train import Config, fit

ROOT = Path(__file__).parents[2]


def graphs(count: int, seed: int) -> list[Data]:
    """Paths of 3 to 7 nodes; the label says whether there are more than four."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        size = int(torch.randint(3, 8, (), generator=generator))
        step = torch.arange(size - 1)
        edge_index = to_undirected(torch.stack([step, step + 1]))
        made.append(
            Data(
                x=torch.randn(size, 2, generator=generator),
                edge_index=edge_index,
                edge_attr=torch.ones(edge_index.size(1), 1),
                y=torch.tensor([int(size > 4)]),
            )
        )
    return made


def run(folder: Path, batch: int, **kwargs: Any) -> tuple[dict[str, Any], torch.nn.Module]:
    task = Task("graph", "multiclass", 2, "accuracy")
    splits = GraphSplits(graphs(48, 0), graphs(16, 1), [], 2, 1, 2, task)
    loop = {
        "output_dir": folder,
        "batch_size": batch,
        "epochs": 2,
        "lr": 3e-3,
        "cpu": True,
        "progress": False,
        "tensorboard": False,
        "log_every": 1,
        **kwargs.pop("loop", {}),
    }
    # batch norm would see the half batch of its process
    settings = {"hidden_channels": 16, "num_layers": 1, "norm": "layer_norm", "conv": "gcn"}
    model, result = fit(Config(**settings | kwargs, train=TrainConfig(**loop)), splits)
    return {"steps": result.steps, "metrics": result.metrics}, model


def run_script(folder: Path) -> None:
    """What the launcher starts, once per process."""
    rank = int(os.environ["RANK"])
    seen, model = run(folder / "run", 4)
    state = {name: value.flatten()[:8].tolist() for name, value in model.state_dict().items()}
    (folder / f"rank{rank}.json").write_text(json.dumps({**seen, "state": state}))


def start(*arguments: str) -> "subprocess.Popen[str]":
    paths = os.pathsep.join([*(str(ROOT / part) for part in ("core", "graph")), *sys.path])
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(folder: Path, *options: str) -> list[dict[str, Any]]:
    command = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--main_process_port", str(free.getsockname()[1])]
    with start(*command, *options, __file__, str(folder)) as process:
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_as_one(seen: list[dict[str, Any]], folder: Path) -> None:
    one, model = run(folder / "one", 8)
    assert [rank["steps"] for rank in seen] == [one["steps"]] * 2 == [12, 12]
    for name, value in one["metrics"].items():
        assert seen[0]["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    for name, value in model.state_dict().items():
        found = torch.tensor(seen[0]["state"][name])
        torch.testing.assert_close(found, value.flatten()[:8], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path):
    """The convolution takes no edge features though there are some: known behind DDP as well."""
    if torch.cuda.is_available():
        pytest.skip("the launcher would take the GPUs")
    seen = launch(tmp_path, "--multi_gpu")
    assert seen[0]["state"] == seen[1]["state"]
    assert_as_one(seen, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sharded_processes_equal_one_with_the_double_batch(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("the launcher would take the GPUs")
    options = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "NO_WRAP"]
    assert_as_one(launch(tmp_path, *options), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_run_goes_on_to_the_same_weights(tmp_path: Path):
    loop = {"epochs": 40, "save_every": 3}
    with start(__file__, "--slowly", str(tmp_path / "killed")) as process:
        file = tmp_path / "killed" / "metrics.csv"
        while not file.is_file() or len(read_history(file)) < 10:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed, model = run(tmp_path / "killed", 8, loop={**loop, "resume": True})
    whole, expected = run(tmp_path / "whole", 8, loop=loop)
    assert resumed["steps"] == whole["steps"] == 240
    assert resumed["metrics"] == whole["metrics"]
    for name, value in expected.state_dict().items():
        assert value.equal(model.state_dict()[name]), name


if __name__ == "__main__":
    if sys.argv[1] == "--slowly":
        run(Path(sys.argv[2]), 8, loop={"epochs": 40, "save_every": 3})
    else:
        run_script(Path(sys.argv[1]))
