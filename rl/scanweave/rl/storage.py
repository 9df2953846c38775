"""The two files of a stored agent: weights with everything else in their header, and JSON.

write_agent   weights and facts -> folder, each file whole or not at all
read_agent    folder -> weights and facts; nothing in it is executed
"""

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = 1


def write_agent(
    folder: str | os.PathLike[str], weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write `agent.safetensors`, with `facts` in its header, and `agent.json` for people."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"torch": str(torch.__version__), "scanweave": _own_version()}
    document = json.dumps({"format": _FORMAT, **facts, "versions": versions}, indent=2)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    partial = folder / f".agent.{os.getpid()}"
    try:
        save_file(tensors, partial, metadata={"agent": document})
        os.replace(partial, folder / "agent.safetensors")
        partial.write_text(document + "\n", encoding="utf-8")
        os.replace(partial, folder / "agent.json")
    finally:
        partial.unlink(missing_ok=True)


def read_agent(
    folder: str | os.PathLike[str], models: set[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_agent` wrote.

    Args:
        folder: Where the files are.
        models: Names that `facts["model"]` may have.

    Raises:
        FileNotFoundError: the folder holds no `agent.safetensors`.
        ValueError: the file is damaged or not an agent of this format.
    """
    path = Path(folder) / "agent.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no agent at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("agent", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: must be a whole safetensors file: {error}") from error
    if document.get("format") != _FORMAT or document.get("model") not in models:
        raise ValueError(
            f"{path}: must hold an agent of format {_FORMAT}, got format "
            f"{document.get('format')!r} and model {document.get('model')!r}"
        )
    return weights, document


def _own_version() -> str:
    try:
        return version("scanweave")
    except PackageNotFoundError:
        return "unknown"
