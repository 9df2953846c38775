"""Seeds and random states."""

import random

import numpy as np
import pytest
import torch

from scanweave.core.training import derive_seed, isolated_random_state, seed_everything
from scanweave.core.training.runtime import random_state, seed_host, set_random_state


def draw() -> list[float]:
    # the odd number of normals leaves one cached in Python's and NumPy's generators
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        torch.rand(()).item(),
        torch.randn(3)[2].item(),
    ]


@pytest.mark.parametrize("seed", [0, 5, 2**63 + 1])
def test_seed_decides_all_generators(seed: int) -> None:
    seed_everything(seed)
    first = draw()
    other = draw()
    seed_everything(seed)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))
    seed_host(seed)
    assert draw() == first


def test_torch_stream_is_the_plain_seed() -> None:
    seed_everything(3)
    ours = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(ours, torch.rand(4))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\*\*64\), got {seed}"):
        seed_everything(seed)


def test_state_round_trip() -> None:
    draw()
    state = random_state()
    assert all(tensor.ndim == 1 for tensor in state.values())
    first = draw()
    set_random_state(state)
    assert draw() == first


def test_state_may_be_a_row_of_several_processes() -> None:
    seed_everything(1)
    first = random_state()
    seed_everything(2)
    second = random_state()
    expected = draw()
    rows = {name: torch.stack([first[name], second[name]]) for name in first}
    set_random_state({name: row[1] for name, row in rows.items()})
    assert draw() == expected


def test_incomplete_state_is_refused() -> None:
    state = random_state()
    del state["numpy"]
    with pytest.raises(ValueError, match="state must hold every generator, missing numpy"):
        set_random_state(state)


def test_isolated_block_changes_nothing_outside() -> None:
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with isolated_random_state(7):
        inside = draw()
    assert draw() == expected
    seed_everything(7)
    assert draw() == inside


def test_isolated_block_restores_after_an_error() -> None:
    seed_everything(1)
    expected = draw()
    seed_everything(1)

    def fail() -> None:
        with isolated_random_state():
            draw()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draw() == expected


def test_derived_seeds_differ() -> None:
    paths = [(), (0,), (1,), (0, 1), (1, 0), (0, 0, 1)]
    assert len({derive_seed(5, *path) for path in paths}) == len(paths)
    assert derive_seed(5, 1) != derive_seed(6, 1)
