"""The table of vision models: equal sizes, settings that the training script takes, one command."""

import argparse
import gzip
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")
pytest.importorskip("tyro")

from benchmarks import vision_table
from benchmarks.sweep import read_csv
from benchmarks.vision_table import DATASETS, METRIC, MODELS, jobs

from scanweave.vision.data import ImageSets
from scanweave.vision.settings import Config
from scanweave.vision.train import build_model, parse


def options(data_dir: Path, **changed: object) -> argparse.Namespace:
    given = {
        "data_dir": data_dir,
        "devices": "cpu",
        "models": list(MODELS),
        "datasets": list(DATASETS),
        "seeds": 2,
        "epochs": 3,
        "batch_size": 8,
    }
    return argparse.Namespace(**{**given, **changed})


def parsed(arguments: tuple[str, ...]) -> Config:
    assert arguments[:2] == ("-m", "scanweave.vision.train")
    return parse(arguments[2:])


def test_models_have_equally_many_parameters(tmp_path: Path):
    sizes = {}
    for job in jobs(options(tmp_path, seeds=1)):
        channels = len(DATASETS[job.dataset][2])
        model = build_model(parsed(job.arguments), ImageSets(None, None, 10, channels))
        sizes[job.name] = sum(p.numel() for p in model.parameters())
        assert model.pretrained_cfg["input_size"][1] == DATASETS[job.dataset][1]  # type: ignore[index]
    assert len(sizes) == len(MODELS) * len(DATASETS)
    assert 1.05e6 < min(sizes.values()) <= max(sizes.values()) < 1.05 * min(sizes.values())
    # as the module says
    assert round(min(sizes.values()) / 1e6, 2) == 1.07
    assert round(max(sizes.values()) / 1e6, 2) == 1.11


def test_runs_differ_in_what_is_compared_only(tmp_path: Path):
    found = jobs(options(tmp_path, devices="cuda:0"))
    assert [job.seed for job in found] == sorted(job.seed for job in found)
    configs = [parsed(job.arguments) for job in found]
    assert len({(c.model, c.model_args, c.dataset, c.train.seed) for c in configs}) == len(found)
    for config in configs:
        assert config.train.precision == "bf16"
        assert config.in_memory
        assert config.train.resume
        same = {c.train.lr for c in configs} | {c.ema_decay for c in configs}
        assert same == {0.002, 0.999}
    assert parsed(jobs(options(tmp_path))[0].arguments).train.precision == "no"


def write_idx(folder: Path, part: str, count: int) -> None:
    """Images whose mean tells their class, as Fashion-MNIST's files."""
    labels = np.arange(count, dtype=np.uint8) % 10
    draw = np.random.default_rng(count).integers(0, 20, (count, 28, 28))
    pixels = (draw + 23 * labels[:, None, None]).astype(np.uint8)
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, values.ndim])
        head += b"".join(int(n).to_bytes(4, "big") for n in values.shape)
        (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))


@pytest.mark.slow
def test_the_command_makes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_idx(tmp_path, "train", 200)
    write_idx(tmp_path, "t10k", 40)
    given = f"--data-dir {tmp_path} --devices cpu --models gated_cnn --datasets fashion_mnist "
    given += f"--epochs 1 --batch-size 50 --out {tmp_path / 'runs'} --seeds 1"
    (row,) = vision_table.main(given.split())
    assert (row.metric, row.dataset, row.model, row.seed) == (
        METRIC,
        "fashion_mnist",
        "gated_cnn",
        0,
    )
    assert 0 <= row.value <= 100
    assert 1.05e6 < row.parameters < 1.12e6
    assert "timm " in row.versions
    assert read_csv(tmp_path / "runs" / "results.csv") == [row]
    assert f"| gated_cnn | {row.parameters:,} | {row.value:.2f} (1) |" in capsys.readouterr().out
    run = tmp_path / "runs" / "fashion_mnist" / "gated_cnn" / "seed0"
    before = (run / "metrics.csv").stat().st_mtime_ns
    assert vision_table.main(given.split()) == [row]
    assert (run / "metrics.csv").stat().st_mtime_ns == before
