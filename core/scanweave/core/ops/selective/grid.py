"""Orders in which published models scan a grid of tokens, as paths for `path_selective_scan`.

Tokens are numbered row by row: row r, column c of an (H, W) grid is token r W + c. Every order
holds for any H and W, also where a paper only has squares or powers of two. Numbers are arXiv's.

    kind          K   directions (as in)
    raster        1   row by row
    bidirectional 2   rows; reversed (Vim 2401.09417)
    cross         4   rows; columns; both reversed (VMamba 2401.10166, SS2D)
    rotations     4   rows of the grid turned by 0, 90, 180, 270 degrees (VMamba's code, v052d3)
    serpentine    4   as cross, every second line backwards (PlainMamba 2403.17695)
    zigzag        8   serpentine rows, then columns, from each corner (ZigMa 2403.13802)
    diagonal      4   diagonals; antidiagonals; both reversed (RS-Mamba 2404.02668, with cross)
    hilbert       4   curve to the right, curve to the bottom; both reversed (2405.14480)
    window        2   windows row by row, so inside; reversed (LocalMamba 2403.09338)

Letters: H rows, W columns, L = H W tokens, K directions.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def _both_ways(*ways: Tensor) -> Tensor:
    """Every way, then every way from its end."""
    paths = torch.stack([way.flatten() for way in ways])
    return torch.cat([paths, paths.flip(1)])


def _serpentine(grid: Tensor) -> Tensor:
    """The rows, every second one backwards."""
    turned = grid.clone()
    turned[1::2] = grid[1::2].flip(1)
    return turned


def _zigzag(grid: Tensor) -> Tensor:
    corners = [grid.flip(axes) for axes in ((), (1,), (0,), (0, 1))]
    ways = [_serpentine(v) for v in corners] + [_serpentine(v.t()) for v in corners]
    return torch.stack([way.flatten() for way in ways])


def _diagonals(grid: Tensor) -> Tensor:
    """The diagonals from the top left corner to the bottom right one, each read downwards."""
    rows, columns = (torch.arange(n, device=grid.device) for n in grid.shape)
    diagonal = (rows[:, None] + columns[None, :]).flatten()
    return grid.flatten()[diagonal.argsort(stable=True)]


@functools.lru_cache(maxsize=256)
def _hilbert_curve(width: int, height: int) -> np.ndarray:
    """Places (width height, 2) from one end of the width to the other, first along the height."""
    if height == 1 or width == 1:
        return np.argwhere(np.ones((width, height), dtype=bool))
    across, up = width // 2, height // 2
    # halves of even size where there is a choice: odd ones cost a diagonal step
    if 2 * width > 3 * height:
        across += across % 2 if width > 2 else 0
        rest = _hilbert_curve(width - across, height) + np.array((across, 0))
        return np.concatenate([_hilbert_curve(across, height), rest])
    up += up % 2 if height > 2 else 0
    rise = _hilbert_curve(up, across)[:, ::-1]
    over = _hilbert_curve(width, height - up) + np.array((0, up))
    fall = np.array((width - 1, up - 1)) - _hilbert_curve(up, width - across)[:, ::-1]
    return np.concatenate([rise, over, fall])


def _hilbert(grid: Tensor) -> Tensor:
    """Along the columns of the grid: starts at its top left corner, ends at its top right one."""
    curve = torch.from_numpy(_hilbert_curve(grid.shape[1], grid.shape[0])).to(grid.device)
    return grid[curve[:, 1], curve[:, 0]]


def _windows(grid: Tensor, window: tuple[int, int]) -> Tensor:
    """Window by window, row by row inside; those at the lower and right border may be smaller."""
    high, wide = window
    rows, columns = (torch.arange(n, device=grid.device) for n in grid.shape)
    per_row = -(-grid.shape[1] // wide)
    number = (rows // high)[:, None] * per_row + (columns // wide)[None, :]
    return grid.flatten()[number.flatten().argsort(stable=True)]


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "raster": lambda g: g.flatten()[None],
    "bidirectional": lambda g: _both_ways(g),
    "cross": lambda g: _both_ways(g, g.t()),
    "rotations": lambda g: torch.stack([g.rot90(k).flatten() for k in range(4)]),
    "serpentine": lambda g: _both_ways(_serpentine(g), _serpentine(g.t())),
    "zigzag": _zigzag,
    "diagonal": lambda g: _both_ways(_diagonals(g), _diagonals(g.flip(1))),
    "hilbert": lambda g: _both_ways(_hilbert(g), _hilbert(g.t())),
}


def grid_paths(
    height: int,
    width: int,
    kind: str = "cross",
    *,
    window: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Orders of the tokens of a grid, one a direction, for `path_selective_scan`.

    Several kinds are combined by `torch.cat`. Make the tensor once and keep it: its values are
    checked when it is first used. Windows at the border are smaller where `window` does not
    divide the grid; LocalMamba pads with zeros instead, which its scan then reads.

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        kind: "cross" (VMamba's SS2D), "raster", "bidirectional", "rotations", "serpentine",
            "zigzag", "diagonal", "hilbert" or "window"; directions and papers: `core/README.md`.
        window: Rows and columns of a window, or one number for both; only for "window".
        device: Where the result lies.

    Returns:
        (K, height * width) int32: token of every step.

    Raises:
        ValueError: a size is not positive, or kind or window is none of the above.

    Source: Liu et al. 2024, arXiv 2401.10166, section 4.2, and those of `core/README.md`; Hilbert
    curves of any rectangle: github.com/jakubcerveny/gilbert.
    """
    for name, size in (("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if kind != "window" and kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join([*_KINDS, 'window'])}, got {kind!r}")
    if (window is not None) != (kind == "window"):
        raise ValueError(f"window must be given for kind 'window' alone, got {window} for {kind!r}")
    grid = torch.arange(height * width, device=device).view(height, width)
    if window is None:
        paths = _KINDS[kind](grid)
    else:
        high, wide = (window, window) if isinstance(window, int) else window
        if min(high, wide) < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        paths = _both_ways(_windows(grid, (high, wide)))
    return paths.to(torch.int32)
