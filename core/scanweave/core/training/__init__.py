"""The one training loop that all of scanweave's scripts share, on Hugging Face Accelerate.

    config = TrainConfig(output_dir="runs/digits", epochs=20, lr=2e-3, warmup_steps=50)
    seed_everything(config.seed)                      # before the model is built
    trainer = Trainer(config, model, loss, loader, evaluate)
    result = trainer.fit()
    plot_history(result.history, "runs/digits/curves.png")

where `loss(model, batch)` returns a scalar, or a scalar and a dict of numbers to log; `loader` is
any torch DataLoader; and `evaluate(model)` returns numbers, the first of which picks the best
checkpoint. `load_checkpoint(result.best_checkpoint, model)` brings the best weights back.

The script runs on one device as it is, and on several under

    accelerate launch --multi_gpu --num_processes 4 script.py      # DDP; on CPUs where no GPU is
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 script.py

(`--cpu --num_processes 4` alone starts one process: accelerate leaves that case to MPI). A run
that was killed goes on with `resume=True`. On CPUs it ends at the same bits as one that was not;
on GPUs as near as their kernels repeat themselves.

    TrainConfig            all settings; a script's own settings hold one in a field
    Trainer, TrainResult   the loop
    parse_pairs            name=value texts of a command line as arguments
    script_settings        a script's own settings, the same when it resumes
    param_groups           weight decay where it belongs
    schedule_factor        the learning rate's course
    save_checkpoint, load_checkpoint, find_checkpoint, Checkpoint
    seed_everything, derive_seed, isolated_random_state
    read_history, plot_history
"""

from importlib.util import find_spec

if find_spec("accelerate") is None:
    raise ImportError("scanweave.core.training needs accelerate: pip install 'scanweave[train]'")
if find_spec("rich") is None:
    raise ImportError("scanweave.core.training needs rich: pip install 'scanweave[train]'")

from .checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .log import read_history
from .pairs import parse_pairs
from .params import param_groups
from .plot import plot_history
from .runtime import derive_seed, isolated_random_state, seed_everything
from .schedule import schedule_factor
from .state import script_settings
from .trainer import Trainer, TrainResult

__all__ = [
    "Checkpoint",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "derive_seed",
    "find_checkpoint",
    "isolated_random_state",
    "load_checkpoint",
    "param_groups",
    "parse_pairs",
    "plot_history",
    "read_history",
    "save_checkpoint",
    "schedule_factor",
    "script_settings",
    "seed_everything",
]
