"""Train an image classifier: `python -m scanweave.vision.train`.

Without options: scikit-learn's 1,797 handwritten digits, which need no download. A folder of
images, one folder per class under `train` and `validation`; and a recipe on several GPUs:

    python -m scanweave.vision.train --recipe none --data-dir images --model vim_tiny_patch16_224
    accelerate launch --multi_gpu -m scanweave.vision.train --recipe vim_small --data-dir imagenet

One run with seed 0 read 98.9 % of the test digits in its best epoch, after 37 s of one CPU core
(`OMP_NUM_THREADS=1`: on a busy machine more threads are slower). The run's folder then holds
`model/`, which `timm.create_model("local-dir:...", pretrained=True)` opens. A run refuses a folder
that holds another one: `--train.overwrite`, or another `--train.output-dir`.

    Config            settings, from `scanweave.vision.settings`
    build_model       settings and sets -> timm model
    build_optimizer   settings and model -> timm optimiser, decay where it belongs
    evaluate          top-1, top-5 and loss on a set
    fit               train, keep the best epoch's weights
    train             load, fit, save: what `main` runs
"""
# timm exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import copy
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import PartialState
from timm.data import Mixup, resolve_data_config
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from scanweave.core.training import (
    TrainConfig,
    Trainer,
    TrainResult,
    load_checkpoint,
    param_groups,
    parse_pairs,
    plot_history,
    script_settings,
    seed_everything,
)

from .averaging import Averaged
from .data import (
    ImageSets,
    eval_loader,
    eval_transform,
    load_sets,
    train_loader,
    train_transform,
)
from .in_memory import hold_eval, hold_train
from .settings import Config

# settings that may differ between a run and its continuation
_FREE = ("data_dir", "download", "eval_batch_size", "recipe", "init_checkpoint")


def _model_args(config: Config) -> dict[str, Any]:
    """`model_args`, and arguments that have settings of their own."""
    values = parse_pairs(config.model_args, "model_args", last_wins=True)
    if config.drop_path:
        values["drop_path_rate"] = config.drop_path
    if config.img_size:
        known = ":" in config.model or not timm.is_model(config.model)
        cfg = None if known else timm.get_pretrained_cfg(config.model)
        # others take images of any size and have no such argument
        if known or (cfg is not None and cfg.fixed_input_size):
            values["img_size"] = config.img_size
    return values


def build_model(config: Config, sets: ImageSets) -> nn.Module:
    """The timm model of these settings, with weights drawn from `config.train.seed`.

    Its `pretrained_cfg` gets size, crop, mean and deviation of the images that it is trained on.

    Raises:
        ValueError: no model has this name, or `mean` and `std` do not fit the channels.
    """
    if ":" not in config.model and not timm.is_model(config.model):
        raise ValueError(f"model must be one of timm.list_models(), got {config.model!r}")
    seed_everything(config.train.seed)
    start: dict[str, Any] = {"pretrained": config.pretrained}
    if config.init_checkpoint is not None:
        # as if published there, so that timm adapts it to the model
        file = {"file": str(config.init_checkpoint)}
        start = {"pretrained": True, "pretrained_cfg_overlay": file}
    model = timm.create_model(
        config.model,
        num_classes=sets.num_classes,
        in_chans=sets.in_chans,
        **start,
        **_model_args(config),
    )
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    data = resolve_data_config({}, model=model)
    size = (config.img_size,) * 2 if config.img_size else data["input_size"][1:]
    embed = getattr(model, "patch_embed", None)
    if not config.img_size and getattr(embed, "img_size", None):
        size = embed.img_size  # type: ignore[union-attr]
    shown: dict[str, Any] = {}
    for name in ("mean", "std"):
        values = getattr(config, name) or tuple(data[name])
        if sets.in_chans == 1 and len(values) == 3 and not getattr(config, name):
            values = (sum(values) / 3,)
        if len(values) != sets.in_chans:
            raise ValueError(f"{name} must have {sets.in_chans} values, got {values}")
        shown[name] = values
    if config.crop_pct:
        shown["crop_pct"] = config.crop_pct
    # a copy: timm may share the dictionary
    model.pretrained_cfg = {  # type: ignore[assignment]
        **(getattr(model, "pretrained_cfg", None) or {}),
        "input_size": (sets.in_chans, *size),
        **shown,
    }
    return model


def build_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """A timm optimiser whose groups have the decay of `param_groups` and rates by layer.

    Raises:
        ValueError: timm has no such optimiser.
    """
    settings, lr, decay = config.train, config.train.lr, config.train.weight_decay
    scales: dict[str, float] = {}
    if config.layer_decay:
        layers = param_groups_layer_decay(model, layer_decay=config.layer_decay)
        found = {id(p): layer["lr_scale"] for layer in layers for p in layer["params"]}
        scales = {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}
    groups = param_groups(model, decay, lr=lr, scales=scales)
    options: dict[str, Any] = {}
    if get_optimizer_info(config.opt).has_betas:
        options["betas"] = settings.betas
    return create_optimizer_v2(
        groups, config.opt, lr=lr, weight_decay=decay, momentum=config.momentum, **options
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Any, batch_size: int, *, averaged: bool = False, workers: int = 0
) -> dict[str, float]:
    """Percentages of images whose class is the first guess, or among five, and the mean loss.

    Args:
        model: The model, or `Averaged`; the caller sets its mode.
        images: A set of (image, class number), transformed.
        batch_size: Images at a time.
        averaged: Ask the averaged weights; the names then start with `ema_`.
        workers: Loading processes.

    Raises:
        ValueError: there are no images.
    """
    device = next(model.parameters()).device
    sums, count = torch.zeros(3, device=device), 0
    for batch, labels in eval_loader(images, batch_size, num_workers=workers):
        labels = labels.to(device, non_blocking=True)
        batch = batch.to(device, non_blocking=True)
        scores = (model(batch, averaged=True) if averaged else model(batch)).float()
        best = scores.topk(min(5, scores.shape[1])).indices == labels.unsqueeze(1)
        loss = F.cross_entropy(scores, labels, reduction="sum")
        sums += torch.stack([100.0 * best[:, 0].sum(), 100.0 * best.sum(), loss])
        count += len(labels)
    if not count:
        raise ValueError("images must hold at least one image, got none")
    names = ("top1", "top5", "loss")
    prefix = "ema_" if averaged else ""
    return {prefix + name: v / count for name, v in zip(names, sums.tolist(), strict=True)}


def fit(
    config: Config, sets: ImageSets, model: nn.Module | None = None
) -> tuple[nn.Module, TrainResult]:
    """Train a model and return it with the weights of its best epoch (the averaged ones).

    Args:
        config: Settings; `config.train` holds those of the loop.
        sets: Images; their transforms are set here. Without validation the last weights are kept.
        model: What to train; by default what `build_model` makes.

    Raises:
        ValueError: a setting differs from the run that is resumed, or FSDP is to split a model
            whose weights are averaged, in a way that does not work.
    """
    sharded = _sharded(config.ema_decay)
    model = build_model(config, sets) if model is None else model
    sets = _prepared(config, sets, resolve_data_config({}, model=model))
    loader = train_loader(
        sets.train,
        config.train.batch_size,
        repeats=config.repeats,
        num_workers=config.train.num_workers,
    )
    config = replace(config, train=_scaled(config, loader))
    extra = script_settings(config, _FREE)
    optimizer = build_optimizer(config, model)
    trained = model
    if config.ema_decay:
        trained = Averaged(model, config.ema_decay, warmup=config.ema_warmup)
        trained.follow(optimizer)
    _keep_constants(trained)
    # FSDP leaves each process a part of the weights: whole ones come from the last checkpoint
    whole = copy.deepcopy(trained) if sharded else trained
    mixup = _mixup(config, sets.num_classes) if config.mixed else None

    def loss(model: nn.Module, batch: Any) -> Tensor:
        images, labels = batch
        if mixup is not None:
            images, labels = mixup(images, labels)
            return F.cross_entropy(model(images).float(), labels)
        return F.cross_entropy(model(images).float(), labels, label_smoothing=config.smoothing)

    def validate(model: nn.Module) -> dict[str, float]:
        size = config.eval_batch_size or config.train.batch_size
        kinds = (True, False) if config.ema_decay else (False,)
        found: dict[str, float] = {}
        for averaged in kinds:
            found |= evaluate(
                model, sets.val, size, averaged=averaged, workers=config.train.num_workers
            )
        return found

    watched = None if sets.val is None else validate
    trainer = Trainer(
        config.train, trained, loss, loader, watched, optimizer=optimizer, extra=extra
    )
    result = trainer.fit()
    saved = result.best_checkpoint or (result.last_checkpoint if sharded else None)
    if saved is not None:
        load_checkpoint(saved, whole)
    best = whole.average.module if isinstance(whole, Averaged) else whole
    return best.eval(), result


def _prepared(config: Config, sets: ImageSets, data: dict[str, Any]) -> ImageSets:
    """The sets, with their transforms; held in memory if the settings say so."""
    if not config.in_memory:
        sets.train.transform = train_transform(config, data)
        if sets.val is not None:
            sets.val.transform = eval_transform(config, data)
        return sets
    kind = torch.accelerator.current_accelerator()
    device = torch.device("cpu")
    if kind is not None and torch.accelerator.is_available() and not config.train.cpu:
        # the launcher's variable, as in `_scaled`
        device = torch.device(kind.type, int(os.environ.get("LOCAL_RANK", "0")))
    train = hold_train(sets.train, config, data, device)
    val = None if sets.val is None else hold_eval(sets.val, config, data, device)
    return replace(sets, train=train, val=val)


def _sharded(ema_decay: float) -> bool:
    """Whether the launcher asked for FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    # FSDP 1 keeps weights in flat pieces, where an average does not find its own; and accelerate's
    # efficient loading takes all that a checkpoint holds for parameters, the average's count too
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true"
    if ema_decay and (efficient or os.environ.get("FSDP_VERSION", "1") == "1"):
        raise ValueError(
            f"ema_decay must be 0 under FSDP, got {ema_decay}, unless it is launched with "
            "--fsdp_version 2 --fsdp_cpu_ram_efficient_loading false"
        )
    return True


def _keep_constants(model: nn.Module) -> None:
    """Have DDP leave buffers alone that no checkpoint holds, as they follow from the settings.

    It would send them anew in every step, and scan paths that were written to are read again.
    """
    held = model.state_dict().keys()
    names = [name for name, _ in model.named_buffers() if name not in held]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _mixup(config: Config, num_classes: int) -> Mixup:
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def _scaled(config: Config, loader: DataLoader[Any]) -> TrainConfig:
    """The loop's settings with the real learning rate and warm-up steps."""
    settings = config.train
    # the launcher's variable: the process group does not exist yet
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.lr_batch:
        images = settings.batch_size * settings.accumulate * processes
        settings = replace(settings, lr=settings.lr * images / config.lr_batch)
    if config.warmup_epochs and not settings.warmup_steps:
        batches = -(-len(loader) // processes)
        steps = round(config.warmup_epochs * -(-batches // settings.accumulate))
        settings = replace(settings, warmup_steps=steps)
    return settings


def train(config: Config) -> dict[str, Any]:
    """Load the data, train, save; writes `results.json`, `curves.png` and `model/`.

    Returns:
        `best` and `last` (validation of the best and the last epoch), `best_step`, `parameters`,
        `steps`, `seconds`, `samples_per_second`, `model` (its folder), and the `history`.
    """
    sets = load_sets(config, config.train.batch_size)
    model, result = fit(config, sets)
    folder = config.train.output_dir
    summary: dict[str, Any] = {
        "best": result.best_metrics,
        "last": result.metrics,
        "best_step": result.best_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": result.seconds,
        "samples_per_second": result.samples_per_second,
        "model": str(folder / "model"),
    }
    if PartialState().is_main_process:
        save_model(model, folder / "model", _model_args(config))
        (folder / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        plot_history(result.history, folder / "curves.png")
    return {**summary, "history": result.history}


def save_model(model: nn.Module, folder: Path, model_args: Mapping[str, Any]) -> None:
    """Write what `timm.create_model(f"local-dir:{folder}", pretrained=True)` opens."""
    timm.models.save_for_hf(
        model, str(folder), model_args=dict(model_args), safe_serialization=True
    )


def parse(arguments: Sequence[str]) -> Config:
    """Settings from command-line options, on top of the recipe that they name.

    Raises:
        ValueError: there is no such recipe.
        SystemExit: an option is not known.
    """
    import argparse

    import tyro

    from .recipes import get_recipe

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe", default="digits")
    name = finder.parse_known_args(arguments)[0].recipe
    return tyro.cli(Config, default=get_recipe(name), args=arguments, description=__doc__)


def main() -> None:
    """Read the settings from the command line, train, show the results."""
    from rich.console import Console

    results = train(parse(sys.argv[1:]))
    results.pop("history")
    Console().print_json(json.dumps(results))


if __name__ == "__main__":
    main()
