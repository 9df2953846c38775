"""Orders of tokens: paths of patches, class tokens that stay, inverses."""

import pytest
import torch

from scanweave.core import grid_paths
from scanweave.vision.paths import dynamic_orders, place_patches, token_orders

KINDS = ["bidirectional", "cross", "rotations", "serpentine", "zigzag", "diagonal", "hilbert"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [(), (0,), (7,), (15,), (3, 7, 11)])
def test_orders_follow_the_path_around_class_tokens(kind: str, rows: tuple[int, ...]) -> None:
    """Class tokens are read where they stand, patches along the path; the inverse undoes it."""
    paths = grid_paths(3, 5, kind)
    orders = token_orders((3, 5), kind, None, rows)
    assert orders is not None
    length = 15 + len(rows)
    assert orders.shape == (2, len(paths), length)
    tokens = torch.arange(length)
    patches = torch.tensor([t for t in range(length) if t not in rows])
    for path, order, inverse in zip(paths, *orders, strict=True):
        assert torch.equal(order[inverse], tokens)
        assert torch.equal(order[list(rows)], tokens[list(rows)])
        assert torch.equal(order[patches], patches[path.long()])


def test_window_path() -> None:
    """Windows of two rows and three columns, read one after the other."""
    orders = token_orders((2, 6), "window", (2, 3), ())
    assert orders is not None
    assert orders[0, 0].tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]


def test_raster_needs_no_order() -> None:
    """Tokens come row by row already."""
    assert token_orders((3, 5), "raster", None, (7,)) is None


@pytest.mark.parametrize(
    ("kind", "window", "message"),
    [
        ("spiral", None, "path and window must be those of grid_paths: kind must be .*'spiral'"),
        ("window", None, "path and window must be .*: window must be given for kind 'window'"),
        ("cross", 2, "path and window must be .*: window must be given for kind 'window' alone"),
    ],
)
def test_unknown_paths_are_refused(kind: str, window: int | None, message: str) -> None:
    """With the kinds that exist."""
    with pytest.raises(ValueError, match=message):
        token_orders((3, 5), kind, window, ())


def test_meta_default_device_makes_real_orders() -> None:
    """As timm's tests create models."""
    token_orders.cache_clear()
    with torch.device("meta"):
        orders = token_orders((2, 3), "cross", None, (3,))
    assert orders is not None
    assert orders.device.type == "cpu"


@pytest.mark.parametrize(
    ("kind", "window"), [("cross", []), ("zigzag", []), ("hilbert", []), ("window", [2, 3])]
)
@pytest.mark.parametrize("position", ["", "middle", "first", "last", "even"])
def test_dynamic_orders_are_those_of_the_grid(kind: str, window: list[int], position: str) -> None:
    """The class token's place follows the number of patches; the operator holds for compilers."""
    rows = {"": (), "middle": (5,), "first": (0,), "last": (10,), "even": (3, 7)}[position]
    expected = token_orders((2, 5), kind, (2, 3) if window else None, rows)
    own = torch.zeros(1, dtype=torch.int64)
    assert expected is not None
    got = dynamic_orders(own, 2, 5, kind, window, position, len(rows))
    assert torch.equal(got, expected)
    got.zero_()
    assert torch.equal(dynamic_orders(own, 2, 5, kind, window, position, len(rows)), expected)
    operator = torch.ops.scanweave.token_orders.default
    torch.library.opcheck(operator, (own, 2, 5, kind, window, position, len(rows)))


def test_place_patches_keeps_every_direction() -> None:
    """Two directions, one class token in the middle."""
    path = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    assert place_patches(path, (1,)).tolist() == [[2, 1, 0], [0, 1, 2]]
