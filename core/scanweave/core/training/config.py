"""Settings of a training run, as one dataclass that tyro turns into command-line options.

A domain's script keeps them as a field of its own settings, `train: TrainConfig = TrainConfig()`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """How to train; what to train is given to `Trainer`.

    Raises:
        ValueError: a value is out of its range, or two values exclude each other.
    """

    output_dir: Path = Path("runs/train")
    """Folder of this run: checkpoints/, metrics.csv, config.json, tensorboard/. A folder that
    holds a run is refused unless `resume` or `overwrite` is set."""
    epochs: int = 10
    """Passes over the data; ignored where `max_steps` is set."""
    max_steps: int = 0
    """Optimiser steps; 0 leaves the length to `epochs`."""
    batch_size: int = 32
    """Samples per process and micro-batch, for the script that builds the loader. One step
    sees batch_size * accumulate * processes samples."""
    num_workers: int = 0
    """Loader processes, for the script that builds the loader. Does not change the batches."""
    accumulate: int = 1
    """Micro-batches whose gradients are averaged into one step; an epoch's last step takes what
    is left."""
    lr: float = 1e-3
    """Highest learning rate, after warm-up."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; see `param_groups` for what is spared."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up, by step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to `lr`."""
    final_lr: float = 0.0
    """Learning rate that cosine and linear end at, as a fraction of `lr`."""
    clip_grad: float = 1.0
    """Largest norm of all gradients together; 0 turns clipping off."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast dtype of the forward pass; weights stay as they are. fp16 scales the loss and
    needs a GPU."""
    compile: Literal["no", "default", "reduce-overhead", "max-autotune"] = "no"
    """Mode of `torch.compile` for the model. reduce-overhead and max-autotune also record CUDA
    graphs, for models whose kernels are done before the host has launched the next ones. Batches
    whose shapes keep changing compile again and again."""
    cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    seed: int = 0
    """Decides the order of the data, augmentation and dropout."""
    log_every: int = 10
    """Steps between rows of metrics.csv; each row holds means over these steps."""
    eval_every: int = 0
    """Steps between evaluations; 0 for every epoch's end. The last step is always evaluated."""
    save_every: int = 0
    """Steps between checkpoints; 0 for every epoch's end. The last step is always saved."""
    keep_last: int = 2
    """Checkpoints to keep besides the best one."""
    best_metric: str = ""
    """Evaluation metric that picks the best checkpoint; empty takes the first one returned."""
    best_mode: Literal["auto", "max", "min"] = "auto"
    """Whether large or small is good; auto takes min for names that end in loss, error, mae,
    mse, rmse or perplexity."""
    resume: bool = False
    """Go on from the newest checkpoint in `output_dir`; from the start if there is none."""
    overwrite: bool = False
    """Delete the run that `output_dir` holds and start anew."""
    progress: bool = True
    """Show a progress bar, or a line per log row where there is no terminal."""
    tensorboard: bool = True
    """Write TensorBoard events too, if it is installed."""
    wandb: str = ""
    """Weights & Biases project to log to; empty for none."""
    unused_parameters: bool = False
    """Several processes: allow parameters that a step's loss does not depend on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", Path(self.output_dir))
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("epochs", "batch_size", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "num_workers", "warmup_steps", "eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "clip_grad"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr must be a fraction of lr in [0, 1], got {self.final_lr}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")
        for name, options in (
            ("schedule", ("cosine", "linear", "constant")),
            ("precision", ("no", "bf16", "fp16")),
            ("compile", ("no", "default", "reduce-overhead", "max-autotune")),
            ("best_mode", ("auto", "max", "min")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(
                    f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}"
                )
        if self.resume and self.overwrite:
            raise ValueError("overwrite must be False together with resume, got True")
