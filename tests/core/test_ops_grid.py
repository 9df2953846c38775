"""Orders of a grid: permutations for any size, and what each published order promises."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scanweave.core import grid_paths

COUNTS = {
    "raster": 1,
    "bidirectional": 2,
    "cross": 4,
    "rotations": 4,
    "serpentine": 4,
    "zigzag": 8,
    "diagonal": 4,
    "hilbert": 4,
    "window": 2,
}
SIZES = [(1, 1), (1, 7), (6, 1), (2, 3), (3, 2), (5, 5), (4, 8), (13, 6), (7, 7), (14, 14)]
EACH_SIZE = pytest.mark.parametrize(("height", "width"), SIZES)


def paths_of(height: int, width: int, kind: str) -> Tensor:
    return grid_paths(height, width, kind, window=(3, 2) if kind == "window" else None)


def steps(paths: Tensor, width: int) -> Tensor:
    """Rows and columns moved from each token to the next, (K, L - 1, 2)."""
    places = torch.stack([paths // width, paths % width], -1)
    return (places[:, 1:] - places[:, :-1]).abs()


@EACH_SIZE
@pytest.mark.parametrize("kind", COUNTS)
def test_every_row_is_a_permutation(kind: str, height: int, width: int):
    paths = paths_of(height, width, kind)
    assert paths.dtype == torch.int32
    assert paths.is_contiguous()
    assert paths.shape == (COUNTS[kind], height * width)
    tokens = torch.arange(height * width, dtype=torch.int32).expand_as(paths)
    assert torch.equal(paths.sort(1).values, tokens)


@EACH_SIZE
@pytest.mark.parametrize(
    "kind", ["bidirectional", "cross", "serpentine", "diagonal", "hilbert", "window"]
)
def test_second_half_is_the_first_reversed(kind: str, height: int, width: int):
    first, second = paths_of(height, width, kind).chunk(2)
    assert torch.equal(first.flip(1), second)


@EACH_SIZE
@pytest.mark.parametrize("kind", ["cross", "serpentine", "hilbert", "zigzag"])
def test_transposed_grid_swaps_rows_and_columns(kind: str, height: int, width: int):
    """What the paths do along the rows of a grid, they also do along its columns."""
    there, back = paths_of(height, width, kind), paths_of(width, height, kind)
    moved = back % height * width + back // height
    assert {tuple(v) for v in moved.tolist()} == {tuple(v) for v in there.tolist()}


@EACH_SIZE
@pytest.mark.parametrize("kind", ["serpentine", "zigzag"])
def test_serpentines_only_visit_neighbours(kind: str, height: int, width: int):
    assert (steps(paths_of(height, width, kind), width).sum(-1) == 1).all()


@pytest.mark.parametrize(("height", "width"), [*SIZES, (40, 17), (9, 64), (31, 30), (2, 50)])
def test_hilbert_visits_neighbours(height: int, width: int):
    """One diagonal step at most, where an odd side is run along an even one."""
    moved = steps(grid_paths(height, width, "hilbert"), width)
    assert moved.numel() == 0 or moved.max() == 1
    diagonal = (moved.sum(-1) == 2).sum(1).tolist()
    along, across = width % 2 > height % 2, height % 2 > width % 2
    assert all(n <= odd for n, odd in zip(diagonal, (along, across) * 2, strict=True))


@pytest.mark.parametrize("side", [2, 4, 8, 16])
def test_hilbert_fills_quadrants_one_after_another(side: int):
    """The classical curve: at every scale a block is left only when it is full."""
    for path in grid_paths(side, side, "hilbert"):
        size = side
        while size > 1:
            size //= 2
            block = path // side // size * side + path % side // size
            assert len(torch.unique_consecutive(block)) == (side // size) ** 2


def test_small_grids_are_as_drawn():
    assert grid_paths(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]
    assert grid_paths(2, 3, "serpentine")[:2].tolist() == [[0, 1, 2, 5, 4, 3], [0, 3, 4, 1, 2, 5]]
    assert grid_paths(2, 3, "diagonal")[:2].tolist() == [[0, 1, 3, 2, 4, 5], [2, 1, 5, 0, 4, 3]]
    assert grid_paths(2, 2, "hilbert").tolist() == [
        [0, 2, 3, 1],
        [0, 1, 3, 2],
        [1, 3, 2, 0],
        [2, 3, 1, 0],
    ]
    assert grid_paths(2, 2, "zigzag").tolist() == [
        [0, 1, 3, 2],
        [1, 0, 2, 3],
        [2, 3, 1, 0],
        [3, 2, 0, 1],
        [0, 2, 3, 1],
        [1, 3, 2, 0],
        [2, 0, 1, 3],
        [3, 1, 0, 2],
    ]
    assert grid_paths(3, 5, "window", window=2)[0].tolist() == [
        *(0, 1, 5, 6),
        *(2, 3, 7, 8),
        *(4, 9),
        *(10, 11),
        *(12, 13),
        14,
    ]


def test_a_window_over_everything_is_raster_order():
    whole = grid_paths(3, 5, "window", window=(3, 5))
    assert torch.equal(whole, grid_paths(3, 5, "bidirectional"))
    assert torch.equal(grid_paths(3, 5, "window", window=1), whole)


def test_vmamba_scans_in_these_orders(goldens: Path):
    orders = json.loads((goldens / "vmamba_scan_orders_H2_W3.json").read_text())
    raster, both = grid_paths(2, 3, "raster"), grid_paths(2, 3, "bidirectional")
    assert grid_paths(2, 3, "cross").tolist() == orders["cross2d"]
    assert grid_paths(2, 3, "rotations").tolist() == orders["rot90"]
    assert raster.repeat(4, 1).tolist() == orders["unidi"]
    assert both.repeat_interleave(2, 0).tolist() == orders["bidi"]


@pytest.mark.parametrize("kind", COUNTS)
def test_device(kind: str):
    expected = paths_of(2, 5, kind)
    options: dict[str, Any] = {"window": (3, 2)} if kind == "window" else {}
    assert grid_paths(2, 5, kind, device="meta", **options).is_meta
    with torch.device("meta"):
        assert grid_paths(2, 5, kind, **options).shape == expected.shape
        assert torch.equal(grid_paths(2, 5, kind, device="cpu", **options), expected)


ERRORS: list[tuple[tuple, dict[str, Any], str]] = [
    ((0, 3), {}, "height must be at least 1, got 0"),
    ((3, -1), {}, "width must be at least 1, got -1"),
    ((3, 3, "spiral"), {}, "kind must be one of raster, bidirectional, cross, "),
    ((3, 3, "window"), {}, "window must be given for kind 'window' alone, got None for 'window'"),
    ((3, 3), {"window": 2}, "window must be given for kind 'window' alone, got 2 for 'cross'"),
    ((3, 3, "window"), {"window": (2, 0)}, "window must be at least 1, got (2, 0)"),
]


@pytest.mark.parametrize(("args", "options", "message"), ERRORS, ids=[e[2] for e in ERRORS])
def test_names_the_bad_argument(args: tuple, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        grid_paths(*args, **options)
