"""The training loop: one optimiser step after the other, logged, evaluated, saved, resumable.

    one step:   for every micro-batch: backward(loss(model, batch) / micro-batches)
                clip the gradients' common norm, set the learning rate by step, step

What is random (order, augmentation, dropout) follows from the seed and the states in the last
checkpoint, so a run that was killed and resumed ends at the same weights as one that was not.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, send_to_device
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from ..stack import MoE, scale_balance
from .batches import ResumableLoader
from .checkpoint import claim_run, find_checkpoint, link_checkpoint, prune_checkpoints
from .config import TrainConfig
from .interrupt import StopSignals
from .log import Row, RunLog
from .params import param_groups
from .returned import checked_metrics, split_loss
from .runtime import isolated_random_state, leave_group_at_exit
from .schedule import schedule_factor
from .state import RunState

LossResult = Tensor | tuple[Tensor, Mapping[str, Tensor | float]]
Loss = Callable[[nn.Module, Any], LossResult]
Evaluate = Callable[[nn.Module], Mapping[str, float]]

_LOWER_IS_BETTER = ("loss", "error", "mae", "mse", "rmse", "perplexity")


@dataclass
class TrainResult:
    """What a run gave; with several processes, history and metrics are the main process's.

    Attributes:
        steps: Optimiser steps made, earlier attempts included.
        history: Rows of metrics.csv; evaluation metrics are named "eval/...".
        metrics: What the last evaluation returned.
        best_metrics: What the best evaluation returned.
        best_step: Its step; 0 without evaluation.
        last_checkpoint: Folder of the newest checkpoint.
        best_checkpoint: Folder of the best evaluation's checkpoint.
        seconds: Wall time, evaluation and earlier attempts included.
        samples_per_second: Training throughput of all processes, without evaluating and saving.
    """

    steps: int
    history: list[Row]
    metrics: dict[str, float]
    best_metrics: dict[str, float]
    best_step: int
    last_checkpoint: Path | None
    best_checkpoint: Path | None
    seconds: float
    samples_per_second: float


class Trainer:
    """Trains a model; the domains' scripts differ in what they pass to it."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        loss: Loss,
        loader: DataLoader[Any],
        evaluate: Evaluate | None = None,
        *,
        optimizer: Optimizer | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Check and keep what a run needs; nothing is written before `fit`.

        Args:
            config: Settings.
            model: The model, on any device.
            loss: Called as `loss(model, batch)` in training mode; returns a scalar, or a scalar
                and a dict of numbers to log. Under DDP and FSDP it must run the model by calling
                it, and log the same names on every process.
            loader: Any torch DataLoader; batches may be tensors, tuples, dicts, or objects with
                `to(device)`. See `ResumableLoader` for what makes its order resumable.
            evaluate: Called as `evaluate(model)` in evaluation mode without gradients; returns
                numbers to log. Runs on the main process only, except under FSDP. Its random draws
                do not change the training.
            optimizer: An optimiser of the model's parameters; AdamW on `param_groups` if absent.
            extra: JSON values to keep in config.json beside the settings, such as the model's
                arguments.

        Raises:
            ValueError: the loader is not usable, the length of the run is unknown, warm-up is
                longer than the run, fp16 is asked for without a GPU, or the launcher asked for a
                kind of parallelism other than DDP and FSDP.
        """
        # a second trainer in one program may have another precision; the process group stays
        AcceleratorState._reset_state(reset_partial_state=True)
        cpu = config.cpu or not torch.accelerator.is_available()
        if cpu and config.precision == "fp16":
            raise ValueError("precision must be no or bf16 without a GPU, got fp16")
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.precision,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=config.unused_parameters),
                # the other processes wait while the main one evaluates
                InitProcessGroupKwargs(timeout=timedelta(hours=4)),
            ],
        )
        leave_group_at_exit()
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
            raise ValueError(f"accelerate launch must use one process, DDP or FSDP, got {kind}")
        self.config = config
        self.settings = {"train": asdict(config), "extra": dict(extra or {})}
        self.loader = ResumableLoader(
            loader,
            config.seed,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        self.total_steps = self._count_steps()
        if config.warmup_steps > self.total_steps:
            raise ValueError(
                f"warmup_steps must be at most the run's {self.total_steps} steps, "
                f"got {config.warmup_steps}"
            )
        if optimizer is None:
            groups = param_groups(model, config.weight_decay, lr=config.lr)
            optimizer = AdamW(groups, lr=config.lr, betas=config.betas)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if config.compile != "no":
            model.compile(mode=config.compile)
        self._model, self._optimizer = model, optimizer
        self._loss, self._evaluate_with = loss, evaluate
        self._has_experts = any(isinstance(part, MoE) for part in model.modules())
        # a GPU would have to be waited for
        self._look_each_step = self.accelerator.device.type == "cpu"

    def fit(self) -> TrainResult:
        """Train to the end, or until Ctrl-C or SIGTERM.

        On a signal the step in hand is finished and saved, and the program ends with exit code
        128 + signal; a second signal ends it at once, without saving.

        Returns:
            What the run gave; at once if the checkpoint to resume is already at the end.

        Raises:
            ValueError: `output_dir` holds a run and neither `resume` nor `overwrite` is set; the
                checkpoint does not fit the model, the settings or the number of processes; or
                `loss` or `evaluate` return something else than they must.
            FloatingPointError: the loss or the gradients are not finite; nothing is saved then.
                A GPU is asked about it when a row is due, and before every checkpoint.
            SystemExit: a signal stopped the run.
        """
        config, accelerator = self.config, self.accelerator
        if accelerator.is_main_process:
            claim_run(config.output_dir, resume=config.resume, overwrite=config.overwrite)
            text = json.dumps(self.settings, indent=1, default=str)
            (config.output_dir / "config.json").write_text(text, encoding="utf-8")
        accelerator.wait_for_everyone()
        start = find_checkpoint(config.output_dir) if config.resume else None
        self._state = RunState(
            accelerator,
            self._model,
            self._optimizer,
            settings=self.settings,
            batches=self.loader.length,
            resume=start,
        )
        progress = self._state.progress
        # step with the first infinite loss, found without waiting for the device
        self._bad_step = torch.full((), -1, device=accelerator.device)
        self._window = progress.samples, progress.training_seconds
        log = RunLog(
            config,
            total=self.total_steps,
            step=progress.step,
            settings=self.settings,
            main=accelerator.is_main_process,
        )
        if config.resume:
            log.note(f"going on from {start}" if start else "no checkpoint yet, starting anew")
        try:
            with StopSignals(repeat_aborts=accelerator.num_processes == 1) as stop:
                self._train(log, stop)
        finally:
            log.close()
            self._state.release()
        return TrainResult(
            steps=progress.step,
            history=log.history,
            metrics=progress.metrics,
            best_metrics=progress.best_metrics,
            best_step=progress.best_step,
            last_checkpoint=find_checkpoint(config.output_dir),
            best_checkpoint=find_checkpoint(config.output_dir, "best"),
            seconds=progress.seconds,
            samples_per_second=progress.samples / max(progress.training_seconds, 1e-9),
        )

    def _count_steps(self) -> int:
        if self.config.max_steps:
            return self.config.max_steps
        if self.loader.length is None:
            raise ValueError("max_steps must be set for a loader without a length, got 0")
        return self.config.epochs * math.ceil(self.loader.length / self.config.accumulate)

    def _train(self, log: RunLog, stop: StopSignals) -> None:
        progress = self._state.progress
        started = time.perf_counter() - progress.seconds
        self._state.model.train()
        while progress.step < self.total_steps:
            batches = self.loader.epoch(progress.epoch, progress.position)
            while progress.step < self.total_steps:
                begin = time.perf_counter()
                group = list(islice(batches, self.config.accumulate))
                if not group:
                    break
                self._step(group)
                now = time.perf_counter()
                progress.training_seconds += now - begin
                progress.seconds = now - started
                log.advance(progress.step)
                self._after_step(log)
                progress.seconds = time.perf_counter() - started
                if number := self._stop_number(stop):
                    self._stop(log, number)
            else:
                return
            if progress.position == 0:
                raise ValueError("loader must yield at least one batch per epoch, got none")
            progress.epoch, progress.position = progress.epoch + 1, 0

    def _step(self, group: list[tuple[Any, int]]) -> None:
        config, accelerator, state = self.config, self.accelerator, self._state
        device, model = accelerator.device, state.model
        # without a loss scale accelerate's wrapper adds nothing but 0.5 ms of looking for packages
        scaled = accelerator.scaler is not None
        optimizer = state.optimizer if scaled else state.optimizer.optimizer
        factor = schedule_factor(
            state.progress.step,
            self.total_steps,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            final=config.final_lr,
        )
        for options in optimizer.param_groups:
            options["lr"] = options["initial_lr"] * factor
        if self._has_experts:
            scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
            scale_balance(model, scale / len(group))
        total = torch.zeros((), device=device)
        for number, (batch, samples) in enumerate(group, 1):
            batch = send_to_device(batch, device, non_blocking=device.type == "cuda")
            last = number == len(group)
            with nullcontext() if last else accelerator.no_sync(model):
                loss, metrics = split_loss(self._loss(model, batch))
                accelerator.backward(loss / len(group))
            total += loss.detach()
            state.means.add({"loss": loss, **metrics}, device)
            state.progress.samples += samples * accelerator.num_processes
        norm = accelerator.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        # FSDP 2 returns a distributed tensor
        norm = torch.as_tensor(getattr(norm, "full_tensor", lambda: norm)(), device=device)
        state.means.add({"grad_norm": norm}, device)
        # loss scaling skips steps with infinite gradients and lowers the scale: nothing is wrong
        watched = total if scaled else total + norm
        bad = ~torch.isfinite(watched) & (self._bad_step < 0)
        self._bad_step = torch.where(bad, state.progress.step + 1, self._bad_step)
        if self._look_each_step:
            self._refuse_bad_step()
        optimizer.step()
        optimizer.zero_grad()
        state.progress.step += 1
        state.progress.position += len(group)

    def _refuse_bad_step(self) -> None:
        if (step := int(self._bad_step)) >= 0:
            raise FloatingPointError(
                f"loss and gradients must be finite, got NaN or infinity in step {step} (newest "
                f"checkpoint: {find_checkpoint(self.config.output_dir) or 'none'}); a lower lr, "
                "warmup_steps or clip_grad may help"
            )

    def _due(self, every: int) -> bool:
        progress = self._state.progress
        if progress.step == self.total_steps:
            return True
        return progress.step % every == 0 if every else progress.position == self.loader.length

    def _after_step(self, log: RunLog) -> None:
        config, progress = self.config, self._state.progress
        row: Row = {}
        improved = False
        if self._due(config.log_every):
            self._refuse_bad_step()
            row |= self._training_row()
        if self._evaluate_with is not None and self._due(config.eval_every):
            self._refuse_bad_step()
            improved = self._evaluate(self._evaluate_with)
            row |= {f"eval/{name}": value for name, value in progress.metrics.items()}
        if row:
            done = progress.position / self.loader.length if self.loader.length else 0.0
            place = {"step": progress.step, "epoch": round(progress.epoch + done, 4)}
            log.write({**place, "seconds": round(progress.seconds, 3), **row})
        # after the row: whoever resumes here must find it in metrics.csv
        if improved:
            self._save("best")
        if self._due(config.save_every):
            self._refuse_bad_step()
            self._save("step")

    def _training_row(self) -> Row:
        progress, optimizer = self._state.progress, self._state.optimizer
        samples, seconds = self._window
        self._window = progress.samples, progress.training_seconds
        speed = (progress.samples - samples) / max(progress.training_seconds - seconds, 1e-9)
        lr = max(group["lr"] for group in optimizer.param_groups)
        means = self._state.means.pop(self.accelerator)
        return {"samples_per_second": round(speed, 2), "lr": float(lr), **means}

    def _evaluate(self, evaluate: Evaluate) -> bool:
        """Evaluate on the main process; True on every process if it is the best so far."""
        accelerator, state = self.accelerator, self._state
        # a split model can only run on all processes together
        sharded = accelerator.distributed_type == DistributedType.FSDP
        improved = False
        if sharded or accelerator.is_main_process:
            model = state.model if sharded else accelerator.unwrap_model(state.model)
            model.eval()
            with torch.no_grad(), isolated_random_state():
                metrics = checked_metrics(evaluate(model))
            model.train()
            progress = state.progress
            progress.metrics = metrics
            improved = accelerator.is_main_process and self._is_best(metrics)
            if improved:
                progress.best_metrics, progress.best_step = metrics, progress.step
        flag = accelerator.reduce(torch.tensor(float(improved), device=accelerator.device))
        assert isinstance(flag, Tensor)
        return bool(flag > 0)

    def _is_best(self, metrics: Mapping[str, float]) -> bool:
        config = self.config
        name = config.best_metric or next(iter(metrics))
        if name not in metrics:
            raise ValueError(f"best_metric must be one of {', '.join(metrics)}, got {name!r}")
        value, best = metrics[name], self._state.progress.best_metrics.get(name, math.nan)
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        lower = config.best_mode == "min" or (
            config.best_mode == "auto" and name.endswith(_LOWER_IS_BETTER)
        )
        return value < best if lower else value > best

    def _save(self, kind: str) -> Path:
        folder = self.config.output_dir / "checkpoints"
        number = f"{self._state.progress.step:08d}"
        path = folder / f"{kind}-{number}"
        twin = folder / f"best-{number}"
        if kind == "best" or not twin.exists():
            self._state.save(path)
        elif self.accelerator.is_main_process:
            link_checkpoint(twin, path)
        if self.accelerator.is_main_process:
            prune_checkpoints(self.config.output_dir, self.config.keep_last)
        return path

    def _stop_number(self, stop: StopSignals) -> int:
        """The signal that some process has got, 0 if none; the same on every process."""
        accelerator, step = self.accelerator, self._state.progress.step
        if step == self.total_steps:
            return 0
        if accelerator.num_processes == 1:
            return stop.number
        # agreeing costs a round of messages: not in every step
        if step % self.config.log_every:
            return 0
        numbers = accelerator.gather(torch.tensor([stop.number], device=accelerator.device))
        assert isinstance(numbers, Tensor)
        return int(numbers.max())

    def _stop(self, log: RunLog, number: int) -> None:
        self._refuse_bad_step()
        step = self._state.progress.step
        saved = find_checkpoint(self.config.output_dir)
        if saved is None or int(saved.name.rpartition("-")[2]) < step:
            saved = self._save("step")
        log.note(
            f"stopped at step {step} of {self.total_steps}, saved {saved}; the same command with "
            "resume set goes on from there",
            always=True,
        )
        raise SystemExit(128 + number)
