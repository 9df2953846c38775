"""Images: a Vision Mamba learns to read scanned handwritten digits.

The set is the 1,797 digits that ship inside scikit-learn: real scans, 8 x 8 pixels, 16 greys.
About a minute on one CPU core.

    run   train, test, draw; what `scanweave demo` calls
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from scanweave.core import Mixer
from scanweave.core.report import OTHER, OURS, DemoResult, Figure, Row, figure_style, save_figure
from scanweave.core.training import TrainConfig, Trainer, TrainResult, seed_everything

from .vim import Vim

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# three times the scans' size, so that a patch of 4 covers little more than one of their pixels
_SIZE, _PATCH = 24, 4
_SHIFT = 2
_TEST_SHARE = 0.25
_GOAL = 95.0


class _Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images moved by up to `_SHIFT` pixels in both directions, anew each time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = F.pad(images, [_SHIFT] * 4), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(2 * _SHIFT + 1, (2,)).tolist()
        image = self.images[index, :, down : down + _SIZE, right : right + _SIZE]
        return image, self.labels[index]


def run(folder: Path, *, fast: bool = False, seed: int = 0) -> DemoResult:
    """Train a small Vim on three quarters of the digits and test it on the rest.

    Args:
        folder: Where the run and the plots go.
        fast: A few steps, to see that everything works.
        seed: Seed of split, weights and training.

    Returns:
        Test accuracy after the last epoch (no epoch is picked), and plots.
    """
    (images, labels), (test_images, test_labels) = _digits(seed)
    seed_everything(seed)
    model = timm.create_model(
        "vim_tiny_patch16_224",
        img_size=_SIZE,
        patch_size=_PATCH,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=3,
        d_state=4,
    )
    assert isinstance(model, Vim)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    def evaluate(model: nn.Module) -> dict[str, float]:
        right = _predict(model, test_images) == test_labels
        return {"accuracy": 100 * right.float().mean().item()}

    config = TrainConfig(
        output_dir=folder / "run",
        epochs=14,
        max_steps=15 if fast else 0,
        batch_size=32,
        lr=4e-3,
        warmup_steps=5 if fast else 80,
        seed=seed,
        tensorboard=False,
        keep_last=1,
    )
    loader = DataLoader(_Shifted(images, labels), config.batch_size, shuffle=True)
    result = Trainer(config, model, loss, loader, evaluate).fit()

    model.eval()
    predicted = _predict(model, test_images)
    errors = int((predicted != test_labels).sum())
    accuracy = 100 * (1 - errors / len(test_labels))
    parameters = sum(p.numel() for p in model.parameters())
    with figure_style():
        figures = [
            _draw_reading(folder, model, test_images, predicted, test_labels),
            _draw_curves(folder, result),
        ]
        if 0 < errors <= len(test_labels) // 10:
            figures.append(_draw_errors(folder, test_images, predicted, test_labels))
    return DemoResult(
        title="Images: Vision Mamba",
        text=f"{len(labels)} scanned digits to train on, {len(test_labels)} to test on (a random "
        f"split: the same writers on both sides), enlarged to {_SIZE} x {_SIZE} pixels. The model "
        f"comes from timm.create_model: {_SIZE // _PATCH} x {_SIZE // _PATCH} patches and a class "
        f"token in their middle, {len(model.layers)} layers, each scanning in both directions.",
        rows=[
            Row(
                f"Vim, {parameters:,} parameters",
                "% of test digits right",
                accuracy,
                detail=f"{errors} of {len(test_labels)} wrong after {result.steps} steps",
            ),
            Row("training", "digits per second", result.samples_per_second, 0),
        ],
        figures=figures,
        goal="" if fast else f"at least {_GOAL:.0f} % of the test digits right",
        reached=accuracy >= _GOAL,
    )


def _digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 1, 24, 24) of mean 0 and deviation 1 with labels, to train on and to test on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "scanweave.vision.demo needs scikit-learn: pip install 'scanweave[demo]'"
        ) from error
    pixels, numbers = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=_SIZE, mode="bilinear", align_corners=False)
    labels = torch.as_tensor(numbers, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(_TEST_SHARE * len(order))])
    images = (images - images[train].mean()) / images[train].std()
    return (images[train], labels[train]), (images[test], labels[test])


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(256)])


def _draw_curves(folder: Path, result: TrainResult) -> Figure:
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 2.8))
    left, right = canvas.subplots(1, 2)
    for axes, name, color, title in (
        (left, "loss", OTHER, "Training loss"),
        (right, "eval/accuracy", OURS, "Test accuracy, %"),
    ):
        points = [(row["epoch"], row[name]) for row in result.history if name in row]
        axes.plot(*zip(*points, strict=True), color=color, marker="o" if axes is right else "")
        axes.set(title=title, xlabel="epoch")
    right.axhline(_GOAL, color="#8a919c", linestyle=":", linewidth=1.2)
    right.set_ylim(top=100.5)
    return save_figure(
        canvas,
        folder,
        "curves",
        "Training. Label smoothing keeps the loss above 0.50; the dotted line is the goal.",
    )


def _draw_reading(
    folder: Path, model: Vim, images: Tensor, predicted: Tensor, labels: Tensor
) -> Figure:
    """Scan order, what the class token reads in each layer, and which pixels matter."""
    from matplotlib.figure import Figure as Canvas

    chosen = _one_of_each(predicted, labels, digits=(3, 5, 8))
    titles = ["What the model gets"]
    titles += [f"Class token, layer {number}" for number in range(1, len(model.layers) + 1)]
    titles += ["Input gradient"]
    canvas = Canvas(figsize=(1.75 * len(titles), 1.85 * len(chosen) + 0.2))
    grid = canvas.subplots(len(chosen), len(titles), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    edges = (-0.5, _SIZE - 0.5, _SIZE - 0.5, -0.5)
    for line, index in zip(grid, chosen, strict=True):
        picture = images[index, 0].numpy()
        line[0].imshow(picture, cmap="gray_r")
        _draw_path(line[0], model)
        for axes, read in zip(line[1:-1], _class_token_reads(model, images[index]), strict=True):
            axes.imshow(read.numpy(), cmap="Blues", extent=edges)
            axes.contour(picture, levels=[0.5], colors="#1f2937", linewidths=0.6)
        line[-1].imshow(_gradient(model, images[index]).numpy(), cmap="Oranges")
        line[-1].contour(picture, levels=[0.5], colors="#1f2937", linewidths=0.6)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8.5)
    return save_figure(
        canvas,
        folder,
        "reading",
        "Left: patches are read line by line, forwards and backwards; the class token (dot) stands "
        "in the middle of the sequence. Middle: how strongly each patch enters the class token, "
        "from the mixers' token-to-token matrices (mean absolute value over channels, both "
        "directions). Right: absolute gradient of the winning class with respect to the pixels.",
    )


def _draw_path(axes: "Axes", model: Vim) -> None:
    """The order in which patches are scanned, and the place of the class token."""
    rows, columns = model.patch_embed.grid_size
    centre = (_PATCH - 1) / 2
    across = [centre + _PATCH * (place % columns) for place in range(rows * columns)]
    down = [centre + _PATCH * (place // columns) for place in range(rows * columns)]
    axes.plot(across, down, color=OURS, linewidth=0.8, alpha=0.8)
    axes.plot(across, down, ".", color=OURS, markersize=2)
    middle = rows * columns // 2
    between = slice(middle - 1, middle + 1)
    axes.plot(sum(across[between]) / 2, sum(down[between]) / 2, "o", color=OTHER, markersize=5)


@torch.no_grad()
def _class_token_reads(model: Vim, image: Tensor) -> list[Tensor]:
    """Per layer, how much of every patch enters the class token: (rows, columns), largest 1."""
    seen: list[Tensor] = []
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    hooks = [
        mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for mixer in mixers
    ]
    model(image.unsqueeze(0).to(next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    rows, columns = model.patch_embed.grid_size
    middle = rows * columns // 2
    reads = []
    for mixer, x in zip(mixers, seen, strict=True):
        read = mixer.matrix(x)[0, :, middle].abs().mean(0).cpu()
        read = torch.cat([read[:middle], read[middle + 1 :]])
        reads.append((read / read.max()).view(rows, columns))
    return reads


def _gradient(model: Vim, image: Tensor) -> Tensor:
    """|d winning score / d pixel|, (H, W)."""
    pixels = image.unsqueeze(0).to(next(model.parameters()).device).requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels).max(), pixels)
    return gradient[0, 0].abs().cpu()


def _one_of_each(predicted: Tensor, labels: Tensor, digits: Sequence[int]) -> list[int]:
    """The first image of each digit that was read correctly, or at all."""
    chosen = []
    for digit in digits:
        right = ((labels == digit) & (predicted == digit)).nonzero()
        found = right if len(right) else (labels == digit).nonzero()
        chosen.append(int(found[0]))
    return chosen


def _draw_errors(folder: Path, images: Tensor, predicted: Tensor, labels: Tensor) -> Figure:
    from matplotlib.figure import Figure as Canvas

    wrong = (predicted != labels).nonzero().flatten()[:10].tolist()
    canvas = Canvas(figsize=(8, 1.0))
    grid = canvas.subplots(1, 10, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, wrong, strict=False):
        axes.imshow(images[index, 0].numpy(), cmap="gray_r")
        axes.set_title(f"{labels[index]} read as {predicted[index]}", fontsize=6.5)
    return save_figure(canvas, folder, "errors", "Test digits that it gets wrong (at most ten).")
