"""What a prediction used, as pictures: `python -m scanweave.vision.explain`.

    python -m scanweave.vision.explain --model local-dir:runs/vision/model --images cat.png dogs/

Two pictures. Per image, a heat map: every mixer is a token-to-token matrix M (`Mixer.matrix`), and
what the head reads is traced back through these, layer by layer:

    A_l[t, s] = w_l[s] mean over channels of |M_l[t, s]|, rows divided by their sums
    r         <- (r + r A_l) / 2          from the last layer to the first

starting from the class tokens, or from all patches where they are pooled. w_l is 1 in the form
"attention", which shows what was read; in the form "gradient" w_l[s] is how much the layer's input
at token s counts for the score of the class, |input . d score / d input|, which shows what of it
was used. And per model, the effective receptive field: |d feature in the middle / d pixel|,
averaged over the images.

    token_matrices              every layer's A_l, its tokens' grid and the class tokens' places
    heat_map                    images -> (B, H, W), between 0 and 1
    effective_receptive_field   images -> (H, W), largest 1
    explain                     files in, pictures out: what `main` runs

Sources: Ali, Zimerman & Wolf 2024, The Hidden Attention of Mamba Models, arXiv 2403.01590 (M as
attention; their gradient form weights channels by their slopes, ours tokens by theirs); Abnar &
Zuidema 2020, arXiv 2005.00928 (tracing through layers); Luo et al. 2016, arXiv 1701.04128
(effective receptive field).
"""
# timm exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor, nn

from .block import MixerBlock
from .data import DataConfig, eval_transform
from .embed import class_rows, split_tokens
from .pictures import Panel, draw_fields, draw_maps

Form = Literal["attention", "gradient"]
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Config:
    """Settings of one run."""

    model: tuple[str, ...]
    """Any models of timm whose mixers have a matrix, `local-dir:` and `hf-hub:` included; several
    are drawn beside one another."""
    images: tuple[Path, ...]
    """Image files, and folders of them."""
    pretrained: bool = True
    """Load the model's weights; without, it is as drawn."""
    output_dir: Path = Path("runs/explain")
    """Folder for the pictures: `000-<image>.png`, ..., `receptive_field.png`, and
    `predictions.json`."""
    form: Form = "gradient"
    """`attention` for what was read, `gradient` for what of it spoke for the class."""
    target: int = -1
    """Class to explain; -1 for the predicted one."""
    receptive_field: bool = True
    """Also draw the effective receptive field."""


@dataclass
class TokenMatrix:
    """How one layer mixes tokens.

    Attributes:
        weights: A_l, (B, L, L) in the tokens' natural order; rows sum to 1.
        grid: Rows and columns of the patches.
        class_places: Where class tokens and registers stand among the L tokens, ascending.
    """

    weights: Tensor
    grid: tuple[int, int]
    class_places: tuple[int, ...]


def token_matrices(
    model: nn.Module, images: Tensor, form: Form = "attention", target: Tensor | None = None
) -> tuple[list[TokenMatrix], Tensor]:
    """Run the model and collect every mixer's matrix; memory grows with L^2 a channel.

    Args:
        model: A model in evaluation mode, with mixers that have `matrix(x)`, or the mean of its
            absolute values over channels, `matrix_size(x)`.
        images: (B, C, H, W).
        form: "attention" or "gradient".
        target: Class of every image for the gradient, (B,); the predicted one when None.

    Returns:
        One entry per layer, first to last, and the scores, (B, classes).

    Raises:
        ValueError: `form` is unknown, or no layer has a matrix.
    """
    if form not in ("attention", "gradient"):
        raise ValueError(f"form must be attention or gradient, got {form!r}")
    seen: list[tuple[Any, Tensor]] = []
    inverses: dict[int, Tensor | None] = {}

    def keep(mixer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((mixer, inputs[0]))

    def before(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = inputs[2] if len(inputs) > 2 else named.get("inverse")
        inverses[id(getattr(block, "mixer", None))] = given

    hooks = []
    for module in model.modules():
        if callable(getattr(module, "matrix", None)):
            hooks.append(module.register_forward_pre_hook(keep))
        if isinstance(module, MixerBlock):
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        with torch.set_grad_enabled(form == "gradient"):
            # frozen weights would leave nothing to differentiate
            scores = model(images.detach().requires_grad_(form == "gradient"))
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(
            f"model must have mixers with matrix(x), {type(model).__name__} has none; "
            "effective_receptive_field works for every model"
        )
    weights: Sequence[Tensor | None] = [None] * len(seen)
    if form == "gradient":
        classes = scores.argmax(1) if target is None else target
        total = scores.gather(1, classes.unsqueeze(1)).sum()
        inputs = [x for _, x in seen]
        pairs = zip(inputs, torch.autograd.grad(total, inputs), strict=True)
        weights = [(x * g).sum(-1).abs().flatten(1).detach() for x, g in pairs]
    layers = []
    for (mixer, x), weight in zip(seen, weights, strict=True):
        with torch.no_grad():
            matrix = _sizes(mixer, x.detach())
            if weight is not None:
                # relative to the largest, so that slopes of 1e-30 do not vanish in the sum below
                weight = weight / weight.amax(1, keepdim=True).clamp(min=1e-30)
                matrix = matrix * weight.float().unsqueeze(1)
            inverse = inverses.get(id(mixer))
            if inverse is not None:
                matrix = matrix[:, inverse][:, :, inverse]
            matrix = matrix / matrix.sum(-1, keepdim=True).clamp(min=1e-30)
        layers.append(TokenMatrix(matrix, *_places(model, images, x)))
    return layers, scores.detach()


def _sizes(mixer: Any, x: Tensor) -> Tensor:
    """Mean over channels of |M|, (B, L, L); one image after the other, M being large."""
    sizes = []
    for one in x.split(1):
        if hasattr(mixer, "matrix_size"):
            sizes.append(mixer.matrix_size(one).float())
        else:
            sizes.append(mixer.matrix(one).abs().mean(1).float())
    return torch.cat(sizes)


def _places(model: nn.Module, images: Tensor, x: Tensor) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Grid of the patches that a mixer sees, and where its class tokens stand."""
    if x.ndim == 4:
        return (x.shape[1], x.shape[2]), ()
    embed: Any = getattr(model, "patch_embed", None)
    size: Callable[..., tuple[int, int]] | None = getattr(embed, "dynamic_feat_size", None)
    if size is not None:
        grid = size((images.shape[2], images.shape[3]))
        patches = grid[0] * grid[1]
        count = x.shape[1] - patches
        if count == int(getattr(model, "num_prefix_tokens", 0)):
            return grid, tuple(class_rows(patches, getattr(model, "class_position", ""), count))
    raise ValueError(
        f"model must have one token per patch and num_prefix_tokens others, got {x.shape[1]} tokens"
    )


def heat_map(
    model: nn.Module, images: Tensor, form: Form = "gradient", target: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which pixels a prediction used, at the resolution of the patches.

    Args:
        model: As in `token_matrices`; with several stages the map is resized between them.
        images: (B, C, H, W).
        form: "attention" or "gradient", see the module's text.
        target: Class of every image, (B,); the predicted one when None.

    Returns:
        Maps (B, H, W) between 0 and 1, and the scores (B, classes).

    Raises:
        ValueError: as in `token_matrices`, or the tokens form no grid.
    """
    layers, scores = token_matrices(model, images, form, target)
    last = layers[-1]
    read = last.weights.new_zeros(last.weights.shape[:2])
    classes = list(last.class_places)
    if classes and getattr(model, "global_pool", "avg") == "token":
        read[:, classes] = 1
    else:
        read.fill_(1)
        read[:, classes] = 0
    grid = last.grid
    for layer in reversed(layers):
        if layer.grid != grid:
            read = _resized(read.unflatten(1, grid), layer.grid).flatten(1)
            grid = layer.grid
        read = (read + (read.unsqueeze(1) @ layer.weights).squeeze(1)) / 2
        read = read / read.sum(1, keepdim=True).clamp(min=1e-30)
    if layers[0].class_places:
        read = split_tokens(read.unsqueeze(-1), list(layers[0].class_places))[1].squeeze(-1)
    maps = _resized(read.unflatten(1, grid), (images.shape[2], images.shape[3]))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-30), scores


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps.unsqueeze(1), size, mode="bilinear", align_corners=False)[:, 0]


def effective_receptive_field(model: nn.Module, images: Tensor) -> Tensor:
    """How much each pixel moves the last feature map in its middle.

    Args:
        model: Any timm model with `forward_intermediates`, in evaluation mode.
        images: (B, C, H, W), the more the smoother the picture.

    Returns:
        (H, W), largest 1.

    Raises:
        ValueError: the model has no `forward_intermediates`.
    """
    features: Any = getattr(model, "forward_intermediates", None)
    if features is None:
        raise ValueError(f"model must have forward_intermediates, got {type(model).__name__}")
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        last = features(pixels, indices=1, intermediates_only=True)[-1]
        middle = last[:, :, last.shape[2] // 2, last.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.sum(), pixels)
    field = gradient.abs().sum((0, 1))
    return field / field.max().clamp(min=1e-30)


def explain(config: Config) -> dict[str, Any]:
    """Draw every image with its heat maps, and the receptive fields.

    Returns:
        `images`: by file, its `picture`, and for every model the predicted `class`, its
        `probability`, and the explained `target`; `receptive_field`: the picture's path, or None.

    Raises:
        ValueError: there are no images, or no models.
    """
    files = _image_files(config.images)
    if not config.model:
        raise ValueError("model must name at least one model, got none")
    found: dict[str, Any] = {}
    panels: list[list[Panel]] = [[] for _ in files]
    fields: list[tuple[str, Tensor]] = []
    for name in config.model:
        label = _label(name)
        seen, field = _explain_one(name, files, config)
        for file, panel, row in zip(files, seen, panels, strict=True):
            row.append(panel)
            found.setdefault(str(file), {"models": {}})["models"][name] = panel.said
        if field is not None:
            fields.append((label, field))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    for number, (file, row) in enumerate(zip(files, panels, strict=True)):
        # folders may hold files of the same name
        path = config.output_dir / f"{number:03d}-{file.stem}.png"
        found[str(file)]["picture"] = str(path)
        draw_maps(path, row)
    path = None
    if fields:
        path = config.output_dir / "receptive_field.png"
        draw_fields(path, fields)
    (config.output_dir / "predictions.json").write_text(
        json.dumps(found, indent=1), encoding="utf-8"
    )
    return {"images": found, "receptive_field": None if path is None else str(path)}


def _explain_one(
    name: str, files: Sequence[Path], config: Config
) -> tuple[list[Panel], Tensor | None]:
    """One model: every image's panel, and the mean of their receptive fields."""
    model = timm.create_model(name, pretrained=config.pretrained).eval()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or torch.device("cpu")
    model = model.to(device)
    data = resolve_data_config({}, model=model)
    data = {**data, "input_size": (getattr(model, "in_chans", 3), *data["input_size"][1:])}
    prepare = eval_transform(DataConfig(), data)
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    panels, field = [], None
    for file in files:
        with Image.open(file) as picture:
            image = prepare(picture).to(device)
        target = torch.tensor([config.target], device=device) if config.target >= 0 else None
        maps, scores = heat_map(model, image.unsqueeze(0), config.form, target)
        guess = int(scores.argmax(1))
        said = {
            "class": guess,
            "probability": round(float(scores.softmax(1)[0, guess]), 4),
            "target": guess if target is None else config.target,
        }
        shown = (image.cpu() * std + mean).clamp(0, 1)
        panels.append(Panel(_label(name), shown, maps[0].cpu(), said))
        if config.receptive_field:
            one = effective_receptive_field(model, image.unsqueeze(0)).cpu()
            field = one if field is None else field + one
    return panels, None if field is None else field / field.max()


def _label(name: str) -> str:
    """What a picture calls a model: the name, or the run's folder."""
    parts = [part for part in name.partition(":")[2].split("/") if part not in ("", "model")]
    return parts[-1] if parts else name


def _image_files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS)
        files += inside if path.is_dir() else [path]
    if not files:
        raise ValueError(f"images must name at least one image, got {list(map(str, paths))}")
    return files


def main() -> None:
    """Read the settings from the command line, draw, show what was found."""
    import tyro
    from rich.console import Console

    Console().print_json(json.dumps(explain(tyro.cli(Config, description=__doc__))))


if __name__ == "__main__":
    main()
