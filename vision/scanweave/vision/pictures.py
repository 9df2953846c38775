"""Pictures of what vision models look at, for `scanweave.vision.explain`.

Panel         one image and its heat map
draw_maps     an image with the maps of several models
draw_fields   receptive fields beside one another
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Panel:
    """One image as one model sees it.

    Attributes:
        label: What the model is called.
        image: (C, H, W), in [0, 1].
        heat: Its map, (H, W), in [0, 1].
        said: The predicted `class`, its `probability`, and the `target` that the map explains.
    """

    label: str
    image: Tensor
    heat: Tensor
    said: dict[str, Any]


def draw_maps(path: Path, panels: Sequence[Panel]) -> None:
    """Write one picture: the image, and every model's map over it."""
    from matplotlib.figure import Figure

    count = len(panels) + 1
    # two lines of title fit above square panels
    figure = Figure(figsize=(3.2 * count, 3.7), layout="constrained", dpi=130)
    first, *others = figure.subplots(1, count)
    first.imshow(_pixels(panels[0].image))
    first.set_title("image", fontsize=9)
    for axes, panel in zip(others, panels, strict=True):
        # the image in grey under the map, which is clear where it is 0
        grey = panel.image.mean(0).numpy()
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
        heat = panel.heat.numpy()
        axes.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.6 * heat)
        said = panel.said
        title = f"{panel.label}: class {said['class']}, {100 * said['probability']:.1f} %"
        if said["target"] != said["class"]:
            title += f"\nused for class {said['target']}"
        axes.set_title(title, fontsize=9)
    for axes in (first, *others):
        axes.set_axis_off()
    figure.savefig(path)


def _pixels(image: Tensor) -> Any:
    return image.permute(1, 2, 0).expand(-1, -1, 3).numpy()


def draw_fields(path: Path, fields: Sequence[tuple[str, Tensor]]) -> None:
    """Write one picture of receptive fields (H, W), largest 1, with the models' names."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(fields) + 0.9, 3.5), layout="constrained", dpi=130)
    row = figure.subplots(1, len(fields), squeeze=False)[0]
    for axes, (label, field) in zip(row, fields, strict=True):
        # gradients span several powers of ten
        log = field.clamp(min=1e-4).log10().numpy()
        axes.imshow(log, cmap="viridis", vmin=-4, vmax=0)
        axes.set_title(label, fontsize=9)
        axes.set_axis_off()
    scale = ScalarMappable(Normalize(-4, 0), "viridis")
    figure.colorbar(scale, ax=row.tolist(), label="effective receptive field, log10, largest 1")
    figure.savefig(path)
