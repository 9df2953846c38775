"""The state of a run: prepared for its processes, saved whole, brought back whole."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from .checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_named_optimizer_state,
    named_optimizer_state,
    read_optimizer_state,
    save_checkpoint,
    unwrap,
)
from .means import RunningMeans
from .runtime import derive_seed, random_state, seed_everything, set_random_state

# settings that a resumed run must keep: changing one would neither continue the run nor start anew
_TRAJECTORY = (
    "seed",
    "batch_size",
    "accumulate",
    "lr",
    "weight_decay",
    "betas",
    "schedule",
    "warmup_steps",
    "final_lr",
    "clip_grad",
    "precision",
)
# derived seeds: a stream of its own, apart from those that the data uses
_DROPOUT = 4


@dataclass
class Progress:
    """Where a run is. `position` counts this epoch's batches per process."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    samples: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best_metrics: dict[str, float] = field(default_factory=dict)
    best_step: int = 0


class RunState:
    """A model and its optimiser as this process trains them, and all else that a step changes.

    Attributes:
        model: The prepared model, to be called in the loss.
        optimizer: The prepared optimiser.
        progress: Steps, position in the data, metrics.
        means: What the next row of the log is made of.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        settings: Mapping[str, Any],
        batches: int | None,
        resume: Path | None,
    ) -> None:
        """Prepare model and optimiser, from a checkpoint if there is one; set the random states.

        Args:
            accelerator: Knows the devices and processes.
            model: The model, not wrapped.
            optimizer: An optimiser of its parameters.
            settings: JSON-able settings, saved with every checkpoint; "train" holds those of
                `TrainConfig`.
            batches: Batches per epoch and process, if known.
            resume: Checkpoint to go on from.

        Raises:
            ValueError: the checkpoint is damaged, does not fit the model or optimiser, or belongs
                to a run with other settings, data or processes.
        """
        self.accelerator, self.settings = accelerator, settings
        self.progress, self.means = Progress(), RunningMeans()
        self._plain = model
        # a position in the data means nothing without these
        self._shape = {"processes": accelerator.num_processes, "batches per epoch": batches}
        saved = None if resume is None else load_checkpoint(resume)
        if saved is not None:
            self._check_same_run(saved)
            # weights go in before the model is split over processes or copied to them
            load_checkpoint(saved.path, model)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if saved is None:
            seed = settings["train"]["seed"]
            seed_everything(derive_seed(seed, _DROPOUT, accelerator.process_index))
        else:
            self._restore(saved)

    def save(self, path: Path) -> None:
        """Write a checkpoint; every process must call it, the main one writes."""
        accelerator = self.accelerator
        weights, optimizer = self._whole_states()
        process = {}
        for name, value in {**random_state(), **self.means.state()}.items():
            rows = accelerator.gather(value.unsqueeze(0).to(accelerator.device))
            assert isinstance(rows, Tensor)
            process[name] = rows.cpu()
        if accelerator.is_main_process:
            scaler = accelerator.scaler
            save_checkpoint(
                path,
                weights,
                optimizer=optimizer,
                step=self.progress.step,
                state={
                    "progress": asdict(self.progress),
                    "shape": self._shape,
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
                config=self.settings,
                process=process,
            )
        accelerator.wait_for_everyone()

    def release(self) -> None:
        """Give the caller's model its own forward back, without autocast."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        vars(self._plain).pop("_is_accelerate_prepared", None)

    def _restore(self, saved: Checkpoint) -> None:
        accelerator = self.accelerator
        self.progress = Progress(**saved.state["progress"])
        named = read_optimizer_state(saved.path)
        if accelerator.distributed_type == DistributedType.FSDP:
            scatter_sharded(self.model, self.optimizer.optimizer, named)
        else:
            load_named_optimizer_state(self._plain, self.optimizer.optimizer, named)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(saved.state["scaler"])
        own = {name: rows[accelerator.process_index] for name, rows in saved.process.items()}
        self.means.load(own, accelerator.device)
        set_random_state(own)

    def _whole_states(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        optimizer: AcceleratedOptimizer = self.optimizer
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return gather_sharded(self.model, optimizer.optimizer)
        weights = unwrap(self._plain).state_dict()
        return weights, named_optimizer_state(self._plain, optimizer.optimizer)

    def _check_same_run(self, saved: Checkpoint) -> None:
        now = json.loads(json.dumps(self.settings["train"], default=str))
        pairs = {name: (saved.config["train"][name], now[name]) for name in _TRAJECTORY}
        pairs |= {name: (saved.state["shape"][name], v) for name, v in self._shape.items()}
        for name, (then, value) in pairs.items():
            if value != then:
                raise ValueError(
                    f"{name} must be {then} as in {saved.path} to resume, got {value}; to change "
                    "it, load the weights into a model and train that in another output_dir"
                )


def script_settings(config: Any, free: Collection[str] = ()) -> dict[str, Any]:
    """A script's own settings as JSON values, for `Trainer(extra=...)`.

    Args:
        config: A dataclass that holds the loop's settings in its field `train`.
        free: Settings that a resumed run may change.

    Raises:
        ValueError: the run that `train` would resume has another setting.
    """
    now = json.loads(json.dumps(asdict(config), default=str))
    del now["train"]
    folder = config.train.output_dir
    if not config.train.resume or find_checkpoint(folder) is None:
        return now
    then = json.loads((folder / "config.json").read_text(encoding="utf-8"))["extra"]
    for name, value in now.items():
        if name not in free and then.get(name, value) != value:
            raise ValueError(
                f"{name} must be {then[name]} as in {folder} to resume, got {value}; to change it, "
                "train in another output_dir"
            )
    return now


def gather_sharded(model: nn.Module, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimiser state of a model that FSDP has split, on the CPU of rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(model, optimizer, options=options)


def scatter_sharded(model: nn.Module, optimizer: Any, named: Mapping[str, Any]) -> None:
    """Split a whole optimiser state over the processes; each must have read it."""
    # with cpu_offload, FSDP 1 would take rank 0 to be the only one that has it
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, dict(named), options=options)
