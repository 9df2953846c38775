"""In which order the layers of a model read its tokens.

The patches of a grid follow a path of `scanweave.core.grid_paths`; class tokens keep their places
in the sequence. A kind with several directions is taken in turns, one direction a layer.

    token_orders     sequence to read, and the way back, for every direction of a kind
    dynamic_orders   the same for the grid of the image at hand
"""

# timm.layers exports its names without saying so to type checkers
# pyright: reportPrivateImportUsage=false

import functools
from collections.abc import Sequence

import torch
from timm.layers import register_notrace_function
from torch import Tensor

from scanweave.core import grid_paths

from .embed import class_rows


def place_patches(path: Tensor, rows: Sequence[int]) -> Tensor:
    """Tokens in the order of `path`, (K, M) over patches, with class tokens fixed at `rows`.

    Args:
        path: Patch of every step, for K directions.
        rows: Places of the class tokens in the whole sequence of M + len(rows) tokens, ascending.

    Returns:
        Token of every step, (K, M + len(rows)) int64.
    """
    total = path.shape[1] + len(rows)
    fixed = torch.zeros(total, dtype=torch.bool)
    fixed[list(rows)] = True
    patches = torch.arange(total)[~fixed]
    order = torch.arange(total).repeat(path.shape[0], 1)
    order[:, ~fixed] = patches[path.long()]
    return order


@functools.lru_cache(maxsize=64)
def token_orders(
    grid: tuple[int, int],
    kind: str,
    window: int | tuple[int, int] | None,
    rows: tuple[int, ...],
) -> Tensor | None:
    """Orders of all tokens of an image, and their inverses.

    Args:
        grid: Patches (h, w).
        kind: A kind of `grid_paths`.
        window: Window of kind "window".
        rows: Places of the class tokens in the sequence.

    Returns:
        (2, K, L) int64 on the CPU: token of every step, and step of every token, for K
        directions; None where the only order is that in which tokens come.

    Raises:
        ValueError: the kind or the window is not one of `grid_paths`.
    """
    # on the CPU whatever the default device: meta has no values
    with torch.device("cpu"):
        try:
            path = grid_paths(*grid, kind, window=window)
        except ValueError as error:
            raise ValueError(f"path and window must be those of grid_paths: {error}") from error
        if kind == "raster":
            return None
        order = place_patches(path, rows)
        return torch.stack([order, order.argsort(1)])


# on the device too: a copy from the host would make it wait for the device in every forward
@functools.lru_cache(maxsize=64)
def _kept_orders(
    grid: tuple[int, int],
    kind: str,
    window: tuple[int, int] | None,
    rows: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    orders = token_orders(grid, kind, window, rows)
    assert orders is not None
    return orders.to(device)


# an operator of its own: compilers and exporters need not follow how an order is made, so that
# sizes may stay symbolic
@torch.library.custom_op("scanweave::token_orders", mutates_args=())
def _orders_op(
    like: Tensor,
    height: int,
    width: int,
    kind: str,
    window: list[int],
    class_position: str,
    count: int,
) -> Tensor:
    rows = tuple(class_rows(height * width, class_position, count))
    size = (window[0], window[1]) if window else None
    # a copy, as results of operators may be written to and these are kept
    return _kept_orders((height, width), kind, size, rows, like.device).clone()


@_orders_op.register_fake
def _(
    like: Tensor,
    height: int,
    width: int,
    kind: str,
    window: list[int],
    class_position: str,
    count: int,
) -> Tensor:
    directions = grid_paths(1, 1, kind, window=1 if window else None).shape[0]
    return like.new_empty(2, directions, height * width + count)


# a leaf for torch.fx: sizes are known only when it runs
@torch.fx.wrap
@register_notrace_function
def dynamic_orders(
    orders: Tensor,
    height: int,
    width: int,
    kind: str,
    window: list[int],
    class_position: str,
    count: int,
) -> Tensor:
    """Orders as `token_orders` makes them, for another grid.

    Args:
        orders: Those of the model's own grid; the result lies on their device.
        height: Rows of patches.
        width: Columns of patches.
        kind: A kind of `grid_paths` but "raster".
        window: Rows and columns of the window of kind "window", otherwise nothing.
        class_position: Where class tokens stand, see `class_rows`.
        count: Class tokens.

    Returns:
        (2, K, L) int64.
    """
    return _orders_op(orders, height, width, kind, window, class_position, count)
