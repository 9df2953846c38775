"""Test accuracy of the vision models on real images, at equal numbers of parameters.

    python -m benchmarks.vision_table --data-dir DATA --devices cuda:0,cuda:1,cuda:2 --slots 12

DATA holds Fashion-MNIST as its four IDX files (`train-images-idx3-ubyte.gz`, ...) and CIFAR-10 as
`cifar10_jpeg.npz`, directly or in folders. That CIFAR-10 is a JPEG-compressed copy, so accuracies
are not those of the original images. `sweep.py` says what is written where, and what is run again.

Every model has 1.07 to 1.11 million parameters and is trained by `scanweave.vision.train` with the
same settings, which were not tuned for any of them: patches of 4 pixels (49 or 64 tokens), AdamW,
cosine schedule, label smoothing, crops shifted by up to an eighth, mirror images. Reported is the
test accuracy of the averaged weights after the last step; no run or epoch is picked by it.

    vim           Vim: both directions in every block, class token in the middle
    vmamba        VMamba: SS2D, four directions, two of its stages (64 and 16 tokens)
    hydra_vit     Hydra: one quasi-separable matrix, no positions
    mamba2        ssm_vit: causal Mamba-2, layers in turns forward and backward
    gated_cnn     ssm_vit: the block without a scan, 7 taps in both directions; control
    attention     ssm_vit: softmax attention with four heads, and an MLP of ratio 2; control
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .sweep import Job, Result, add_options, parse_devices, run_table

METRIC = "test accuracy, %"
_PLAIN = ("patch_size=4", "embed_dim=128", "depth=8")
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "vim": ("vim_tiny_patch16_224", _PLAIN),
    # timm passes img_size on to models of one size only
    "vmamba": ("vmamba_tiny_s1l8", ("dims=64", "depths=(2,5)", "img_size={size}")),
    "hydra_vit": ("hydra_vit_tiny_patch16_224", _PLAIN),
    "mamba2": (
        "ssm_vit_tiny_patch16_224",
        (*_PLAIN, "mixer=mamba2", "d_state=128", "path=bidirectional"),
    ),
    "gated_cnn": ("ssm_vit_tiny_patch16_224", (*_PLAIN, "mixer=gated_cnn_bidirectional")),
    "attention": (
        "ssm_vit_tiny_patch16_224",
        (*_PLAIN, "mixer=attention_bidirectional", "mixer_args={'num_heads':4}", "mlp_ratio=2"),
    ),
}
# name for the training script, side, and mean and deviation of the training pixels
DATASETS: dict[str, tuple[str, int, tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ("cifar10_jpeg", 32, (0.4913, 0.4821, 0.4465), (0.2470, 0.2435, 0.2616)),
    "fashion_mnist": ("fashion_mnist", 28, (0.2860,), (0.3530,)),
}


def arguments(
    model: str, dataset: str, seed: int, data_dir: Path, *, epochs: int, batch: int, precision: str
) -> tuple[str, ...]:
    """What `python` gets for one run; "{folder}" stands for the run's folder."""
    name, size, mean, std = DATASETS[dataset]
    architecture, settings = MODELS[model]
    options: dict[str, Sequence[object]] = {
        "recipe": ["none"],
        "dataset": [name],
        "data-dir": [data_dir],
        "in-memory": [],
        "img-size": [size],
        "mean": mean,
        "std": std,
        "model": [architecture],
        "model-args": [text.replace("{size}", str(size)) for text in settings],
        "crop": ["shift"],
        "hflip": [0.5],
        "crop-pct": [1.0],
        "drop-path": [0.05],
        "smoothing": [0.1],
        "ema-decay": [0.999],
        "ema-warmup": [],
        "warmup-epochs": [min(2, epochs / 4)],
        "eval-batch-size": [1000],
        "train.output-dir": ["{folder}"],
        "train.resume": [],
        "train.seed": [seed],
        "train.epochs": [epochs],
        "train.batch-size": [batch],
        "train.lr": [0.002],
        "train.weight-decay": [0.05],
        "train.precision": [precision],
        "train.log-every": [100],
        # the last step is always evaluated and saved
        "train.eval-every": [10**9],
        "train.save-every": [10**9],
        "train.no-tensorboard": [],
    }
    flat = ["-m", "scanweave.vision.train"]
    for option, values in options.items():
        flat += [f"--{option}", *map(str, values)]
    return tuple(flat)


def jobs(options: argparse.Namespace) -> list[Job]:
    """All runs of the table; seeds are outermost, so that a short sweep has some of everything."""
    precision = "no" if parse_devices(options.devices) == ["cpu"] else "bf16"
    data_dir = options.data_dir.resolve()
    return [
        Job(
            "vision",
            dataset,
            model,
            seed,
            arguments(
                model,
                dataset,
                seed,
                data_dir,
                epochs=options.epochs,
                batch=options.batch_size,
                precision=precision,
            ),
            {METRIC: "last/ema_top1"},
        )
        for seed in range(options.seeds)
        for dataset in options.datasets
        for model in options.models
    ]


def main(given: Sequence[str] | None = None) -> list[Result]:
    """Read the options, run what is missing, write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-dir", type=Path, required=True, help="folder of the files named above")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    add("--seeds", type=int, default=3, help="runs of each, with seeds 0, 1, ...")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=256)
    options = add_options(parser, "runs/vision_table").parse_args(given)
    return run_table(
        jobs(options),
        options,
        packages=("torch", "triton", "timm"),
        paths=("core", "vision", "benchmarks/*.py"),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
