"""Checkpoints: folders of safetensors and JSON files that appear whole or not at all.

    checkpoints/step-00001200/
        model.safetensors       weights and buffers under the names of the state dict
        optimizer.safetensors   tensors of the optimiser, "<parameter>/<key>"
        process.safetensors     what differs per process, one row each: random states, running means
        state.json              step, position in the data, optimiser's groups, loss scale, metrics
        config.json             settings, for people and scripts
    checkpoints/best-00000800/  the same, of the best evaluation

A checkpoint is written into a hidden sibling folder, flushed to the disk and renamed, so a crash
leaves the older ones and no half of a new one. Nothing is pickled, in either direction.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

FORMAT = 1
_NAME = re.compile(r"(step|best)-(\d+)")
_RUN_FILES = ("checkpoints", "metrics.csv", "config.json", "tensorboard")


@dataclass
class Checkpoint:
    """What a checkpoint holds besides the weights and the optimiser's state.

    Attributes:
        path: Its folder.
        step: Optimiser steps made.
        state: JSON values that were saved with it.
        config: Settings that were saved with it.
        process: Tensors with one row per process.
    """

    path: Path
    step: int
    state: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    process: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    path: str | Path,
    model: nn.Module | Mapping[str, Tensor],
    *,
    optimizer: Optimizer | Mapping[str, Any] | None = None,
    step: int = 0,
    state: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    process: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint folder, whole or not at all.

    Args:
        path: The folder to create; must not exist.
        model: A model, or its state dict.
        optimizer: An optimiser of the model's parameters, or what `named_optimizer_state`
            returned.
        step: Optimiser steps made.
        state: JSON values to keep.
        config: Settings to keep; values JSON does not know are kept as text.
        process: Tensors to keep that differ per process, one row each.

    Returns:
        The folder.

    Raises:
        ValueError: `path` exists, the model's state holds something other than tensors, or the
            optimiser has parameters that are not the model's, or `state` is not JSON.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"path must not exist, got {path}")
    if isinstance(optimizer, Optimizer):
        if not isinstance(model, nn.Module):
            raise ValueError("optimizer must be a named state where model is a state dict")
        optimizer = named_optimizer_state(model, optimizer)
    weights = unwrap(model).state_dict() if isinstance(model, nn.Module) else model
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"model state must hold tensors, got {type(value).__name__} {name}")
    document = {"format": FORMAT, "step": step, "state": dict(state or {})}
    tensors = {"model": dict(weights), "process": dict(process or {})}
    if optimizer is not None:
        tensors["optimizer"], document["optimizer"] = _split_optimizer_state(optimizer)
    # everything that can be refused is refused before the first byte is written
    try:
        texts = {
            "state.json": json.dumps(document, indent=1),
            "config.json": json.dumps(dict(config or {}), indent=1, default=str),
        }
    except TypeError as error:
        raise ValueError(f"state must hold JSON values, got: {error}") from error

    def fill(folder: Path) -> None:
        for name, entries in tensors.items():
            save_file(_storable(entries), folder / f"{name}.safetensors")
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    _create_folder(path, fill)
    return path


def load_checkpoint(
    path: str | Path, model: nn.Module | None = None, *, optimizer: Optimizer | None = None
) -> Checkpoint:
    """Read a checkpoint folder, after checking that it is whole and fits.

    Args:
        path: The folder of one checkpoint; `find_checkpoint` finds it in a run's folder.
        model: Gets the weights, strictly; its dtypes and devices stay.
        optimizer: Gets its state; needs `model`.

    Returns:
        The rest of the checkpoint.

    Raises:
        ValueError: a file is missing or truncated, or keys or shapes differ from the model's or
            the optimiser's; the message names the file, the keys and the shapes.
    """
    path = Path(path)
    if not (path / "state.json").is_file():
        raise ValueError(f"path must be a checkpoint folder with a state.json, got {path}")
    document = _read_json(path / "state.json")
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} must have format {FORMAT}, got {document.get('format')}")
    checkpoint = Checkpoint(
        path,
        step=document["step"],
        state=document["state"],
        config=_read_json(path / "config.json"),
        process=_read_tensors(path / "process.safetensors"),
    )
    if optimizer is not None and model is None:
        raise ValueError("model must be given together with optimizer, got None")
    # the optimiser is read before the model is changed: a bad file must not leave half a load
    named = None if optimizer is None else read_optimizer_state(path)
    if model is not None:
        _load_weights(unwrap(model), _read_tensors(path / "model.safetensors"), path)
        if optimizer is not None and named is not None:
            load_named_optimizer_state(model, optimizer, named)
    return checkpoint


def find_checkpoint(run: str | Path, which: Literal["last", "best"] = "last") -> Path | None:
    """The newest or the best checkpoint in a run's folder; None where there is none."""
    found = _checkpoints(Path(run) / "checkpoints")
    if which == "best":
        found = [entry for entry in found if entry[1] == "best"]
    return found[-1][2] if found else None


def link_checkpoint(source: Path, path: Path) -> Path:
    """A second folder of the same checkpoint, sharing the files where the file system can.

    Raises:
        ValueError: `path` exists.
    """
    if path.exists():
        raise ValueError(f"path must not exist, got {path}")

    def fill(folder: Path) -> None:
        for file in source.iterdir():
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)

    _create_folder(path, fill)
    return path


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest best checkpoint and the `keep` newest others."""
    found = _checkpoints(run / "checkpoints")
    for kind, count in (("step", keep), ("best", 1)):
        for _, _, path in [entry for entry in found if entry[1] == kind][:-count]:
            # renamed first: a crash while deleting must not leave a folder that looks whole
            hidden = path.with_name(f".{path.name}.tmp")
            os.replace(path, hidden)
            shutil.rmtree(hidden)


def claim_run(run: Path, *, resume: bool, overwrite: bool) -> None:
    """Make sure that a run may write into a folder, and remove what crashes left there.

    Raises:
        ValueError: the folder holds a run, and neither flag says what to do with it.
    """
    present = [run / name for name in _RUN_FILES if (run / name).exists()]
    if present and overwrite:
        # only what a run writes: output_dir may be a folder with other things in it
        for path in present:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif present and not resume:
        last = find_checkpoint(run)
        raise ValueError(
            f"output_dir must not hold a run, got {run} (newest checkpoint: "
            f"{last.name if last else 'none'}): set resume to go on with that run, overwrite to "
            "delete it, or choose another folder"
        )
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    for leftover in (run / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(leftover)


def named_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's state dict with parameter names in place of numbers.

    Raises:
        ValueError: the optimiser has parameters that are not the model's.
    """
    names = _optimizer_names(model, optimizer)
    state = optimizer.state_dict()
    return {
        "state": {names[index]: entries for index, entries in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def load_named_optimizer_state(
    model: nn.Module, optimizer: Optimizer, named: Mapping[str, Any]
) -> None:
    """Give an optimiser the state that `named_optimizer_state` returned.

    Raises:
        ValueError: the optimiser's groups hold other parameters.
    """
    names = _optimizer_names(model, optimizer)
    index = {name: number for number, name in enumerate(names)}
    saved = [list(group["params"]) for group in named["param_groups"]]
    state = optimizer.state_dict()
    own = [[names[number] for number in group["params"]] for group in state["param_groups"]]
    if saved != own:
        changed = sorted({n for g in saved for n in g} ^ {n for g in own for n in g})
        raise ValueError(
            "optimizer must have the checkpoint's parameter groups, "
            + (f"only one of them has {_some(changed)}" if changed else "the groups differ")
        )
    optimizer.load_state_dict(
        {
            "state": {index[name]: entries for name, entries in named["state"].items()},
            "param_groups": [
                {**group, "params": [index[name] for name in group["params"]]}
                for group in named["param_groups"]
            ],
        }
    )


def read_optimizer_state(path: Path) -> dict[str, Any]:
    """What `named_optimizer_state` returned, from a checkpoint's files.

    Raises:
        ValueError: the checkpoint has no optimiser, or its files do not fit each other.
    """
    document = _read_json(path / "state.json").get("optimizer")
    if document is None:
        raise ValueError(f"{path} must hold an optimizer's state, it was saved without")
    tensors = _read_tensors(path / "optimizer.safetensors")
    state: dict[str, dict[str, Any]] = {name: {} for name in document["names"]}
    for entries in (tensors, document["scalars"]):
        for key, value in entries.items():
            name, _, entry = key.rpartition("/")
            if name not in state:
                raise ValueError(f"{path} must fit its state.json, optimizer state has {key}")
            state[name][entry] = value
    groups = [
        {key: tuple(v) if isinstance(v, list) and key != "params" else v for key, v in g.items()}
        for g in document["groups"]
    ]
    return {"state": state, "param_groups": groups}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s wrapper, so that names do not depend on compiling."""
    return getattr(model, "_orig_mod", model)


def _split_optimizer_state(named: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, entries in named["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{name}/{key}"] = value
    groups = [
        {key: v.item() if isinstance(v, Tensor) else v for key, v in group.items()}
        for group in named["param_groups"]
    ]
    return tensors, {"names": list(named["state"]), "scalars": scalars, "groups": groups}


def _optimizer_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    names = {id(param): name for name, param in unwrap(model).named_parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(id(param) not in names for param in params):
        raise ValueError("optimizer must hold parameters of the model only, got others")
    return [names[id(param)] for param in params]


def _load_weights(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    own = {name: v.shape for name, v in model.state_dict().items() if isinstance(v, Tensor)}
    problems = []
    if missing := sorted(own.keys() - tensors.keys()):
        problems.append(f"missing {_some(missing)}")
    if extra := sorted(tensors.keys() - own.keys()):
        problems.append(f"unexpected {_some(extra)}")
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name])}"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name]
    ]
    if shapes:
        problems.append(f"other shapes: {_some(shapes)}")
    if problems:
        raise ValueError(f"{path / 'model.safetensors'} must fit the model: {'; '.join(problems)}")
    model.load_state_dict(tensors)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _storable(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, such as tied weights: later ones are copied
    seen: set[int] = set()
    result = {}
    for name, value in entries.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a whole safetensors file, got: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{file} must be a whole JSON file, got: {error}") from error


def _checkpoints(folder: Path) -> list[tuple[int, str, Path]]:
    """Step, kind and path of every checkpoint, oldest first; at equal steps best before step."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            found.append((int(match[2]), match[1], path))
    return sorted(found)


def _create_folder(path: Path, fill: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    if hidden.exists():
        shutil.rmtree(hidden)
    hidden.mkdir()
    fill(hidden)
    for file in (*hidden.iterdir(), hidden):
        _flush(file)
    os.rename(hidden, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
