"""Settings of a training run; `scanweave.vision.recipes` has filled-in ones.

Config   everything that `python -m scanweave.vision.train` takes
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from scanweave.core.training import TrainConfig, parse_pairs

from .data import DataConfig


def _train_defaults() -> TrainConfig:
    return TrainConfig(output_dir=Path("runs/vision"), epochs=100, batch_size=64, lr=1e-3)


@dataclass(frozen=True)
class Config(DataConfig):
    """Settings of one run."""

    recipe: str = "none"
    """What the other settings start from: `none`, or a name in `scanweave.vision.recipes`; on the
    command line `digits` where it is left out."""
    model: str = "vim_tiny_patch16_224"
    """Any model of timm or scanweave, `local-dir:` and `hf-hub:` included."""
    model_args: tuple[str, ...] = ()
    """Arguments of the model as name=value, such as `depth=4 mixer=hydra patch_size=4`."""
    pretrained: bool = False
    """Start from the model's published weights."""
    init_checkpoint: Path | None = None
    """Start from a file of weights, as published for this model; the classifier is left out where
    the number of classes differs from the model's default."""
    drop_path: float = 0.0
    """Rate at which the last layer is dropped (`drop_path_rate`)."""
    grad_checkpointing: bool = False
    """Recompute layers in the backward pass: less memory, more time."""

    opt: str = "adamw"
    """Any optimiser of timm; learning rate and decay are in `train`."""
    momentum: float = 0.9
    """For optimisers that have one."""
    layer_decay: float = 0.0
    """Factor on the learning rate from layer to layer, from the head down; 0 for none."""
    lr_batch: int = 0
    """`train.lr` is meant for this many images per step and scaled linearly to the real number;
    0 takes it as it is."""
    warmup_epochs: float = 0.0
    """Epochs of rising learning rate; used where `train.warmup_steps` is 0."""
    ema_decay: float = 0.0
    """Decay of the weights' moving average, which is then evaluated too, picks the best epoch and
    is what is saved; 0 for none."""
    ema_warmup: bool = False
    """Let the decay rise with the steps, for runs shorter than 1 / (1 - ema_decay)."""

    smoothing: float = 0.1
    """Label smoothing."""
    mixup: float = 0.0
    """Alpha of mixup; 0 for none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 for none."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed, where `mixup` or `cutmix` is set."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix where both are set."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """What shares one mixing weight."""

    train: TrainConfig = field(default_factory=_train_defaults)
    """The training loop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("drop_path", "layer_decay", "ema_decay", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("mixup", "cutmix", "lr_batch", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        parse_pairs(self.model_args, "model_args", last_wins=True)
        if self.mixed and self.train.batch_size % 2:
            raise ValueError(
                f"batch_size must be even with mixup or cutmix, got {self.train.batch_size}"
            )

    @property
    def mixed(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0
