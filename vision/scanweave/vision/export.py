"""Vision models in ONNX, for other runtimes: `python -m scanweave.vision.export`.

    python -m scanweave.vision.export --model local-dir:runs/vision/model --output model.onnx

The model is traced at one image size; the number of images stays free. Its scans are written in
standard operators (`scanweave.core.decompositions`), as passes over all tokens at once.

    Config       settings of one run
    to_onnx      model in, file out
    image_size   the size that a model is made for
"""
# timm exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from scanweave.core import decompositions


@dataclass(frozen=True)
class Config:
    """Settings of one run."""

    model: str
    """Any model of timm or scanweave, `local-dir:` and `hf-hub:` included."""
    output: Path = Path("model.onnx")
    """The file to write."""
    img_size: int = 0
    """Image height and width; 0 for the model's own."""
    pretrained: bool = True
    """Load the model's weights; without, it is as drawn."""


def image_size(model: nn.Module) -> tuple[int, int]:
    """Height and width that a timm model is made for."""
    embed: Any = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None)
    if size is None:
        size = resolve_data_config({}, model=model)["input_size"][1:]
    return int(size[0]), int(size[1])


def to_onnx(
    model: nn.Module, path: Path | str, size: int | tuple[int, int] | None = None
) -> tuple[int, int, int]:
    """Write a model for images (batch, C, H, W), any batch, as `path`.

    Args:
        model: A timm model in evaluation mode, on the CPU.
        path: The file.
        size: H and W; the model's own when None.

    Returns:
        (C, H, W) of the images that the file takes as "image"; it answers with "logits".

    Raises:
        ImportError: onnxscript is missing, which torch exports with.
        ValueError: the model is in training mode or half precision.
        RuntimeError: the model cannot be traced, or has an operator that ONNX lacks.
    """
    try:
        import onnxscript  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ImportError("to_onnx needs onnxscript: pip install onnx onnxscript") from error
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode; call model.eval()")
    weight = next(model.parameters())
    if weight.dtype != torch.float32:
        raise ValueError(f"model must be float32, got {weight.dtype}; call model.float()")
    height, width = image_size(model) if size is None else _both(size)
    channels = int(getattr(model, "in_chans", 3))
    # of one image torch would conclude that there is never more than one
    x = torch.randn(2, channels, height, width, device=weight.device)
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
            table: Any = decompositions()
            # runtimes optimise what they load; doing it here as well doubles the time
            exported = torch.onnx.export(
                program.run_decompositions(table),
                dynamo=True,
                verbose=False,
                optimize=False,
                input_names=["image"],
                output_names=["logits"],
            )
    except AssertionError:
        # the model's own words for an image that it does not take
        raise
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} cannot be written as ONNX at {height} x {width}: {error}"
        ) from error
    assert exported is not None
    _name_batch(exported.model)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    exported.save(str(path))
    return channels, height, width


def _both(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _name_batch(model: Any) -> None:
    """Call the free side what it is; torch writes the name of its own symbol."""
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape[0] = onnx_ir.SymbolicDim("batch")


def main() -> None:
    """Read the settings from the command line, write the file, say what it takes."""
    import tyro
    from rich.console import Console

    config = tyro.cli(Config, description=__doc__)
    arguments: dict[str, Any] = {"img_size": config.img_size} if config.img_size else {}
    model = timm.create_model(config.model, pretrained=config.pretrained, **arguments).eval()
    channels, height, width = to_onnx(model, config.output)
    shape = f"(batch, {channels}, {height}, {width})"
    Console().print(f"{config.output}: image {shape} float32 -> logits (batch, classes)")


if __name__ == "__main__":
    main()
