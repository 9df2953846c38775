"""Two processes under `accelerate launch` train vision models as one with the double batch would.

Run as a script, this file is what the launcher starts; each process writes what it saw to JSON.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")

from scanweave.core.ops.selective import path_values
from scanweave.core.training import TrainConfig
from scanweave.vision.averaging import Averaged
from scanweave.vision.data import ImageSets
from scanweave.vision.settings import Config
from scanweave.vision.stored import StoredImages
from scanweave.vision.train import build_model, fit

VMAMBA = ("dims=8", "depths=(1,1)", "img_size=16")
FSDP = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_cpu_ram_efficient_loading", "false"]
VIM = ("patch_size=4", "embed_dim=16", "depth=1", "d_state=2", "path=cross")


def images(count: int, seed: int) -> StoredImages:
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 200, (count, 16, 16, 3))
    labels = np.arange(count) % 2
    pixels[labels == 1, :, :8] += 50
    return StoredImages(pixels.astype(np.uint8), labels)


def settings(folder: Path, batch: int, vmamba: bool, **loop: Any) -> Config:
    return Config(
        model="vmamba_tiny_s1l8" if vmamba else "vim_tiny_patch16_224",
        model_args=VMAMBA if vmamba else VIM,
        img_size=16,
        crop="none",
        crop_pct=1.0,
        ema_decay=0.9,
        in_memory=vmamba,
        train=TrainConfig(
            output_dir=folder,
            batch_size=batch,
            lr=3e-3,
            cpu=not torch.cuda.is_available(),
            progress=False,
            tensorboard=False,
            **{"epochs": 2, **loop},
        ),
    )


def run(folder: Path, batch: int, vmamba: bool, **loop: Any) -> tuple[dict[str, Any], Any]:
    sets = ImageSets(images(48, 0), images(16, 1), num_classes=2, in_chans=3)
    model, result = fit(settings(folder, batch, vmamba, **loop), sets)
    return {"steps": result.steps, "metrics": result.metrics}, model


class Counted(type(path_values._READ_PATHS)):  # type: ignore[misc]
    """Counts how often paths are read."""

    reads = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        Counted.reads += 1
        super().__setitem__(key, value)


def call_processors_gpus() -> None:
    """Make accelerate split models among CPU processes, which it does among GPUs only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    start = PartialState.__init__
    started: list[PartialState] = []

    def patched(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        start(self, True, **kwargs)
        if not started:
            started.append(self)
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched  # type: ignore[method-assign]


def run_script(folder: Path) -> None:
    """What the launcher starts, once per process."""
    rank = int(os.environ["RANK"])
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp and not torch.cuda.is_available():
        call_processors_gpus()
    path_values._READ_PATHS = Counted()
    # as in versions of torch before DDP hid that it writes to buffers
    torch.autograd._unsafe_preserve_version_counter = lambda _: nullcontext()  # type: ignore
    seen, model = run(folder / "vmamba", 4, True)
    seen["reads"] = Counted.reads
    if not (fsdp or torch.cuda.is_available()):
        seen["sharded"] = sharded_average_is_the_same()
    run(folder / "vim", 4, False, max_steps=5)
    run(folder / "vim", 4, False, resume=True)
    torch.save(model.state_dict(), folder / f"rank{rank}.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    # torch's caches keep the group of a split model, whose threads may abort a process that ends
    # before they do
    os._exit(0)


def sharded_average_is_the_same() -> float:
    """Largest difference that it makes to an average whether FSDP 2 splits its model."""
    from torch.distributed.fsdp import fully_shard

    x, y = torch.linspace(-1, 1, 4 * 3 * 16 * 16).view(4, 3, 16, 16), torch.arange(4) % 2

    def averaged(split: bool) -> torch.Tensor:
        sets = ImageSets(images(4, 0), None, num_classes=2, in_chans=3)
        pair = Averaged(build_model(settings(Path(), 4, False), sets), 0.9, warmup=True)
        if split:
            fully_shard(pair)
        optimizer = torch.optim.AdamW(pair.model.parameters(), lr=1e-2)
        pair.follow(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(pair(x), y).backward()
            optimizer.step()
        return pair(x, averaged=True).detach()

    return float((averaged(True) - averaged(False)).abs().max())


def launch(folder: Path, *options: str) -> list[dict[str, Any]]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command += ["--main_process_port", str(port), *options, __file__, str(folder)]
    paths = os.pathsep.join([str(root / "core"), str(root / "vision"), *sys.path])
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def check(folder: Path, seen: list[dict[str, Any]], tolerance: float) -> None:
    """Compare what two processes saw and made with one process and with each other."""
    assert [rank["steps"] for rank in seen] == [12, 12]
    # one grid a stage for the model, its average, and what the evaluation unwraps; not every step
    assert all(rank["reads"] <= 8 for rank in seen), seen
    one, model = run(folder / "one", 8, True)
    for name, value in one["metrics"].items():
        assert seen[0]["metrics"][name] == pytest.approx(value, rel=tolerance, abs=1e-5), name
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in model.cpu().state_dict().items():
        assert found[0][name].cpu().equal(found[1][name].cpu()), name
        torch.testing.assert_close(
            found[0][name].cpu(), value, rtol=tolerance, atol=tolerance / 10, msg=name
        )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_equal_one_with_the_double_batch(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("the launcher would take the GPUs")
    seen = launch(tmp_path, "--multi_gpu")
    assert all(rank["sharded"] < 1e-6 for rank in seen), seen
    check(tmp_path, seen, 1e-4)


@pytest.mark.parametrize(("version", "efficient"), [("1", "false"), ("2", "true")])
def test_an_average_is_refused_where_fsdp_cannot_have_one(
    version: str, efficient: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", efficient)
    with pytest.raises(ValueError, match=r"ema_decay must be 0 under FSDP, got 0.9, unless it is"):
        run(tmp_path, 4, False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_split_models_equal_whole_ones(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("the launcher would take the GPUs")
    check(tmp_path, launch(tmp_path, *FSDP), 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [["--multi_gpu"], FSDP], ids=["ddp", "fsdp2"])
def test_two_gpus(options: list[str], tmp_path: Path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(tmp_path, launch(tmp_path, *options), 1e-3)


if __name__ == "__main__":
    run_script(Path(sys.argv[1]))
