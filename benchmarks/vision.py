# ruff: noqa: T201 (talks to people)
"""Measure whole vision models: `python -m benchmarks.vision`; see benchmarks/README.md.

Images a second of inference and training, ours beside the official models with the same weights.
Every implementation is compared first, logits and gradients, and not timed if it is off.
"""

import argparse
import copy
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .check import CheckError
from .report import Environment, environment, markdown, version, write_csv
from .timing import Timing, measure, peak_memory
from .vision_check import LIMITS, check, flat, gradients, relative
from .vision_models import (
    CLASSES,
    MODELS,
    Implementation,
    VisionModel,
    blocks_of,
    implementations,
)
from .vision_profile import Share, profile_call, shares_table

PASSES = ("inference", "training")
# how a model is run: as it is, with its layers compiled, as a whole
MODES = ("eager", "graph", "blocks", "blocks+graph", "compiled", "reduce-overhead")


@dataclass(frozen=True)
class VisionRow:
    """One implementation of one model, one pass, one mode; None where not measured."""

    model: str
    batch: int
    size: int
    dtype: str
    passes: str
    mode: str
    implementation: str
    version: str
    images_s: float | None = None
    images_s_p20: float | None = None
    images_s_p80: float | None = None
    median_ms: float | None = None
    samples: int = 0
    peak_mb: float | None = None
    error: float | None = None
    checked_by: str = ""
    note: str = ""


@dataclass
class Settings:
    """What the command line asks for."""

    device: torch.device
    dtype: torch.dtype
    passes: Sequence[str] = PASSES
    modes: Sequence[str] = ("eager",)
    folder: Path | None = None
    toy: bool = False
    profile: bool = False
    checkpointing: bool = False
    warm: bool = False
    # by the monotonic clock; nothing new is started after it
    deadline: float = float("inf")
    say: Callable[[str], None] = lambda text: None

    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline


def _captured(call: Callable[[], object], pool: Any) -> Callable[[], object]:
    """The call as a CUDA graph's replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = call()

    def replay() -> object:
        graph.replay()
        return out

    return replay


def prepare(
    spec: VisionModel,
    one: Implementation,
    passes: str,
    mode: str,
    x: Tensor,
    target: Tensor,
    settings: Settings,
    pool: Any = None,
) -> Callable[[], object]:
    """A call of one pass in one mode: gives logits, or gradients."""
    model: Any = one.model
    if mode.startswith("blocks"):
        model = copy.deepcopy(one.model)
        for block in blocks_of(spec, model):
            block.compile(fullgraph=one.name != "official", dynamic=False)
    elif mode == "compiled":
        model = torch.compile(copy.deepcopy(one.model), fullgraph=one.name == "scanweave")
    elif mode == "reduce-overhead":
        whole = one.name == "scanweave"
        model = torch.compile(copy.deepcopy(one.model), fullgraph=whole, mode="reduce-overhead")
    training = passes == "training"
    model.train(training)
    if training and settings.checkpointing:
        model.set_grad_checkpointing()

    def call() -> object:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        if training:
            return gradients(model, x, target, settings.dtype)
        with torch.no_grad(), torch.autocast(x.device.type, settings.dtype, _half(settings)):
            return model(x)

    call()
    return _captured(call, pool) if mode.endswith("graph") else call


def _half(settings: Settings) -> bool:
    return settings.dtype != torch.float32


def _row(out: object) -> Tensor:
    """Logits as they are, gradients one after another."""
    if isinstance(out, tuple):
        return flat(out)
    assert isinstance(out, Tensor)
    return out


def _agree(call: Callable[[], object], eager: Tensor, limit: float) -> None:
    """Refuse a mode that gives something else than the model as it is."""
    out = call()
    off = relative(_row(out), eager)
    if not off <= limit:
        raise CheckError(f"off by {off:.2g} from eager mode, more than {limit}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def measure_model(
    spec: VisionModel, settings: Settings, emit: Callable[[VisionRow | Share], None]
) -> list[str]:
    """Check, then time one model and its official form.

    Args:
        spec: What to measure.
        settings: How.
        emit: Takes every row, and shares of the time if asked for, as soon as they are known.

    Returns:
        A line for every implementation that is wrong.
    """
    device = settings.device
    found, why = implementations(spec, device, settings.folder)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(spec.batch, 3, spec.size, spec.size, generator=rng).to(device)
    target = torch.randint(0, CLASSES, (spec.batch,), generator=rng).to(device)
    kind = str(settings.dtype).removeprefix("torch.")
    shared = (spec.name, spec.batch, spec.size, kind)
    versions = {"scanweave": version("scanweave"), "timm": version("timm"), "official": ""}
    if why:
        emit(VisionRow(*shared, "", "", "official", "", note=f"skipped: {why}"))
    try:
        errors, refused, by = check(found, x, target, settings.dtype)
    except Exception as reason:
        if len(found) < 2:
            raise
        # the official code on a platform that it may not know
        note = f"fails: {_first_line(reason)}"
        emit(VisionRow(*shared, "", "", "official", "", note=note))
        found = found[:1]
        errors, refused, by = check(found, x, target, settings.dtype)
    wrong = [f"{spec.name} {name}: not timed, {text}" for name, text in refused.items()]
    for passes in settings.passes:
        # graphs of one pass share memory, as only one runs at a time
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        peaks: dict[tuple[str, str], float | None] = {}
        for one in found:
            if one.name not in errors:
                continue
            eager: Tensor | None = None
            for mode in settings.modes:
                if settings.late():
                    break
                if mode.startswith("blocks") and one.name == "official":
                    continue
                settings.say(f"{spec.name} {passes} {one.name} {mode}")
                key = (one.name, mode)
                try:
                    call = prepare(spec, one, passes, mode, x, target, settings, pool)
                    if eager is None:
                        eager = _row(call()).clone()
                    else:
                        _agree(call, eager, LIMITS[settings.dtype])
                    # a replay allocates nothing
                    replays = mode.endswith("graph")
                    peaks[key] = None if replays else peak_memory(call, device)
                    calls[key] = call
                except Exception as reason:
                    # compilers and captures raise anything; the official code is not ours to mend
                    settings.say(traceback.format_exc())
                    note = f"fails: {_first_line(reason)}"
                    row = (*shared, passes, mode, one.name, versions[one.name])
                    emit(VisionRow(*row, note=note))
        if settings.warm:
            calls.clear()
        names = {f"{name} {mode}": call for (name, mode), call in calls.items()}
        times = measure(names, device, settings.toy)
        for name, mode in calls:
            row = (*shared, passes, mode, name, versions[name])
            rates = _rates(spec, times[f"{name} {mode}"])
            emit(VisionRow(*row, *rates, peaks[name, mode], errors[name], by))
        for (name, mode), call in calls.items():
            if settings.profile and mode in ("eager", "blocks") and not settings.late():
                for share in profile_call(call, device, (spec.name, passes, mode, name)):
                    emit(share)
        calls.clear()
        names.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return wrong


def _rates(spec: VisionModel, time_: Timing) -> tuple[float, float, float, float, int]:
    """Images a second (median, p20, p80), milliseconds, samples."""
    rates = [1e6 * spec.batch / t for t in (time_.median, time_.p80, time_.p20)]
    return rates[0], rates[1], rates[2], time_.median / 1e3, time_.samples


def _table(rows: Sequence[VisionRow]) -> str:
    header = ["model", "pass", "mode", "implementation", "images/s", "p20 .. p80", "peak MB"]
    lines = [
        [
            f"{r.model} ({r.batch} x {r.size})",
            r.passes,
            r.mode,
            r.implementation,
            f"{r.images_s:,.0f}",
            f"{r.images_s_p20:,.0f} .. {r.images_s_p80:,.0f}",
            "-" if r.peak_mb is None else f"{r.peak_mb:,.0f}",
            f"{r.error:.1e}",
        ]
        for r in rows
        if r.images_s is not None
    ]
    return markdown([*header, "error"], lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="names with commas between")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--modes", help=f"among {', '.join(MODES)}; default eager, graph on a GPU")
    parser.add_argument("--batch", type=int, help="images at a time, instead of the models' own")
    parser.add_argument("--peers-dir", type=Path, help="checkouts of hustvl/Vim, MzeroMiko/VMamba")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--toy", action="store_true", help="small models, to see that all run")
    parser.add_argument("--profile", action="store_true", help="also write where the time goes")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers in training")
    parser.add_argument("--warm", action="store_true", help="only fill the compilers' caches")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after")
    parser.add_argument("--out", type=Path, help="CSV to append to; the profile goes beside it")
    parser.add_argument("--commit", help="commit to write where there is no git checkout")
    return parser


def _names(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list:
    names = text.split(",")
    if set(names) - set(known):
        parser.error(f"--{option} must be among {list(known)}, got {text}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 if a check failed."""
    parser = _parser()
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    kind = args.dtype or ("bfloat16" if gpu else "float32")
    settings = Settings(
        device=device,
        dtype=getattr(torch, kind),
        passes=_names(parser, "passes", args.passes, PASSES),
        modes=_names(parser, "modes", args.modes or ("eager,graph" if gpu else "eager"), MODES),
        folder=args.peers_dir,
        toy=args.toy,
        profile=args.profile,
        checkpointing=args.checkpointing,
        warm=args.warm,
        deadline=time.monotonic() + args.seconds,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    where: Environment = environment(device, args.commit)
    rows: list[VisionRow] = []
    wrong: list[str] = []

    shares: list[Share] = []

    def emit(row: VisionRow | Share) -> None:
        out = args.out
        if isinstance(row, Share):
            shares.append(row)
            out = None if out is None else out.with_suffix(".profile.csv")
        else:
            rows.append(row)
        if out is not None:
            write_csv(out, where, [row])

    for name in _names(parser, "models", args.models, list(MODELS)):
        if settings.late():
            settings.say(f"{name}: not started, time is up")
            continue
        spec = MODELS[name].toy() if args.toy else MODELS[name]
        if args.batch:
            spec = VisionModel(**(vars(spec) | {"batch": args.batch}))
        wrong += measure_model(spec, settings, emit)
        print(_table([row for row in rows if row.model == spec.name]), flush=True)
    if shares:
        print(shares_table(shares))
    for row in rows:
        if row.note:
            print(f"{row.model} {row.passes} {row.implementation} {row.mode} {row.note}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
