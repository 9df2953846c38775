"""What must hold of a scan along paths whatever its numbers are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.core.op_cases import (
    Inputs,
    assert_all_near,
    assert_equal,
    compare,
    evaluate,
    pack,
)
from tests.core.path_cases import path_inputs, random_paths
from torch import Tensor

from scanweave.core import (
    bidirectional_selective_scan,
    grid_paths,
    path_selective_scan,
    selective_scan,
)
from scanweave.core.ops.selective import selective_scan_ref

pytestmark = pytest.mark.poison
Check = Callable[..., None]
ALL: dict[str, Any] = {"return_final_state": True}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
STACKED = {"dt": 2, "B": 2, "C": 2, "A": 0, "D": 0, "dt_bias": 0, "initial_state": 0}


def identity(length: int, count: int = 1) -> Tensor:
    return torch.arange(length, dtype=torch.int32).repeat(count, 1)


def unstacked(inputs: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Arguments of `selective_scan` for one direction."""
    return {
        name: v.select(STACKED[name], k) if name in STACKED else v for name, v in inputs.items()
    }


@DTYPES
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_natural_path_is_a_plain_scan(dtype: torch.dtype, reverse: bool, packed: bool):
    lengths = (5, 0, 40, 1) if packed else None
    inputs = path_inputs(
        1 if packed else 2, 46, 20, 3, 1, groups=2, sequences=4 if packed else None, dtype=dtype
    )
    options: dict[str, Any] = {"cu_seqlens": pack(lengths) if lengths else None, **ALL}

    def plain(**kw: Tensor) -> tuple[Tensor, Tensor]:
        out, state = selective_scan(**unstacked(kw, 0), reverse=reverse, **options)
        return out, state.unsqueeze(0)

    expected = evaluate(plain, inputs)
    options |= {"paths": identity(46), "reverse": (reverse,)}
    assert_equal(evaluate(path_selective_scan, inputs, **options), expected)


@DTYPES
def test_there_and_back_is_the_bidirectional_scan(assert_near: Check, dtype: torch.dtype):
    inputs = path_inputs(2, 40, 20, 3, 2, dtype=dtype)

    def both(x: Tensor, z: Tensor, **kw: Tensor) -> tuple[Tensor, Tensor]:
        pairs: Any = {name: v.unbind(STACKED[name]) for name, v in kw.items()}
        out, states = bidirectional_selective_scan((x, x), z=z, **pairs, **ALL)
        return out, torch.stack(states)

    expected = evaluate(both, inputs)
    there = identity(40)
    for options in (
        {"paths": torch.cat([there, there.flip(1)])},
        {"paths": torch.cat([there, there]), "reverse": (False, True)},
        {"paths": torch.cat([there.flip(1), there.flip(1)]), "reverse": (True, False)},
    ):
        assert_all_near(
            assert_near, evaluate(path_selective_scan, inputs, **options, **ALL), expected
        )


@DTYPES
def test_reverse_walks_the_path_from_its_end(dtype: torch.dtype):
    lengths = (5, 0, 40, 1)
    inputs = path_inputs(1, 46, 20, 3, 2, sequences=4, dtype=dtype)
    paths = random_paths(2, 46, lengths=lengths)
    back = torch.cat([part.flip(1) for part in paths.split(lengths, 1)], 1)
    options: dict[str, Any] = {"cu_seqlens": pack(lengths), **ALL}
    expected = evaluate(path_selective_scan, inputs, paths=back, **options)
    actual = evaluate(path_selective_scan, inputs, paths=paths, reverse=(True, True), **options)
    assert_equal(actual, expected)


@DTYPES
def test_numbering_of_tokens_does_not_matter(assert_near: Check, dtype: torch.dtype):
    inputs = path_inputs(2, 40, 20, 3, 3, dtype=dtype)
    paths, order = random_paths(3, 40), random_paths(1, 40, seed=1)[0].long()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(40))

    def renumbered(**kw: Tensor) -> tuple[Tensor, Tensor]:
        moved: Any = {
            name: v[:, order] if name in ("x", "z", "dt", "B", "C") else v for name, v in kw.items()
        }
        out, states = path_selective_scan(**moved, paths=place[paths.long()], **ALL)
        return out[:, place], states

    expected = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    assert_all_near(assert_near, evaluate(renumbered, inputs), expected)


@DTYPES
def test_order_of_directions_does_not_matter(assert_near: Check, dtype: torch.dtype):
    inputs, paths = path_inputs(2, 40, 20, 3, 3, dtype=dtype), random_paths(3, 40)
    turn = torch.tensor([2, 0, 1])

    def turned(**kw: Tensor) -> tuple[Tensor, Tensor]:
        moved: Any = {
            name: v.index_select(STACKED[name], turn) if name in STACKED else v
            for name, v in kw.items()
        }
        out, states = path_selective_scan(**moved, paths=paths[turn], **ALL)
        return out, states[turn.argsort()]

    expected = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    assert_all_near(assert_near, evaluate(turned, inputs), expected)


@DTYPES
def test_packed_sequences_are_scans_of_their_own(assert_near: Check, dtype: torch.dtype):
    lengths = (5, 0, 40, 1)
    inputs = path_inputs(1, 46, 20, 3, 2, sequences=4, dtype=dtype)
    paths = random_paths(2, 46, lengths=lengths)

    def alone(**kw: Tensor) -> tuple[Tensor, Tensor]:
        outs, states, start = [], [], 0
        for i, length in enumerate(lengths):
            here = slice(start, start + length)
            given: Any = {
                name: v[:, here] if name in ("x", "z", "dt", "B", "C") else v
                for name, v in kw.items()
            }
            given["initial_state"] = kw["initial_state"][:, i : i + 1]
            out, state = path_selective_scan(**given, paths=paths[:, here] - start, **ALL)
            outs.append(out)
            states.append(state)
            start += length
        return torch.cat(outs, 1), torch.cat(states, 1)

    options: dict[str, Any] = {"paths": paths, "cu_seqlens": pack(lengths), **ALL}
    actual = evaluate(path_selective_scan, inputs, **options)
    assert_all_near(assert_near, actual, evaluate(alone, inputs))


@DTYPES
def test_pieces_with_states_equal_the_whole(assert_near: Check, dtype: torch.dtype):
    inputs = path_inputs(2, 40, 20, 3, 2, dtype=dtype)
    paths = random_paths(2, 40, lengths=(17, 23))

    def pieces(**kw: Tensor) -> tuple[Tensor, Tensor]:
        outs, state = [], kw.pop("initial_state")
        for here in (slice(0, 17), slice(17, 40)):
            given: Any = {
                name: v[:, here] if name in ("x", "z", "dt", "B", "C") else v
                for name, v in kw.items()
            }
            options: Any = {"paths": paths[:, here] - here.start, **ALL}
            out, state = path_selective_scan(**given, initial_state=state, **options)
            outs.append(out)
        return torch.cat(outs, 1), state

    expected = evaluate(path_selective_scan, inputs, paths=paths, **ALL)
    assert_all_near(assert_near, evaluate(pieces, inputs), expected)


@DTYPES
def test_batch_row_does_not_depend_on_its_batch(dtype: torch.dtype):
    inputs = {k: v.detach() for k, v in path_inputs(3, 40, 20, 3, 2, dtype=dtype).items()}
    options: dict[str, Any] = {"paths": random_paths(2, 40)}
    together = path_selective_scan(**inputs, **options)
    for i in range(3):
        row: Any = {
            name: v[i : i + 1] if name in ("x", "z", "dt", "B", "C") else v
            for name, v in inputs.items()
        }
        row["initial_state"] = inputs["initial_state"][:, i : i + 1]
        assert torch.equal(path_selective_scan(**row, **options)[0], together[i])


@DTYPES
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "initial_state"])
def test_nan_stays_in_its_sequence(name: str, dtype: torch.dtype):
    lengths = (9, 20, 11)
    inputs = path_inputs(1, 40, 20, 3, 2, sequences=3, dtype=dtype)
    paths = random_paths(2, 40, lengths=lengths)
    spoiled = inputs[name].detach().clone()
    spoiled[(slice(None), 1) if name == "initial_state" else (0, slice(9, 29))] = float("nan")
    options: dict[str, Any] = {"paths": paths, "cu_seqlens": pack(lengths), **ALL}
    clean = evaluate(path_selective_scan, inputs, **options)
    actual = evaluate(path_selective_scan, inputs | {name: spoiled.requires_grad_()}, **options)
    rest = [*range(9), *range(29, 40)]
    for key, v in actual.items():
        if key == "output 1" or key.endswith("initial_state"):
            assert torch.equal(v[:, [0, 2]], clean[key][:, [0, 2]]), key
        elif key == "output 0" or key[-2:] in (" x", "dt", " B", " C", " z"):
            assert torch.equal(v[:, rest], clean[key][:, rest]), key


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_by_finite_differences(packed: bool):
    lengths = (2, 0, 3)
    inputs = path_inputs(
        1, 5, 2, 2, 2, groups=None if packed else 2, sequences=3 if packed else None
    )
    paths = random_paths(2, 5, lengths=lengths if packed else None)
    cu = pack(lengths) if packed else None
    names = list(inputs)

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given: Any = dict(zip(names, tensors, strict=True))
        return path_selective_scan(
            **given, paths=paths, reverse=(False, True), cu_seqlens=cu, **ALL
        )

    assert torch.autograd.gradcheck(f, list(inputs.values()))


def block_inputs(batch: int, height: int, width: int, dim: int, state: int) -> Inputs:
    """What a 2-D block of VMamba has: a map, and four sets of weights."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rank = 2
    values = {
        "image": draw(batch, height, width, dim),
        "x_proj": draw(4, rank + 2 * state, dim) / dim**0.5,
        "dt_proj": draw(4, dim, rank),
        "dt_bias": draw(4, dim),
        "A": -torch.exp(0.5 * draw(4, dim, state)),
        "D": draw(4, dim),
    }
    return {name: v.requires_grad_() for name, v in values.items()}


def ss2d(
    image: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """SS2D with one projection of the map in natural order and no copies of it."""
    batch, height, width, dim = image.shape
    state, rank = A.shape[2], dt_proj.shape[2]
    x = image.flatten(1, 2)
    projected = F.linear(x, x_proj.flatten(0, 1)).unflatten(2, (4, -1))
    dt, B, C = projected.split([rank, state, state], -1)
    dt = torch.einsum("blkr,kdr->blkd", dt, dt_proj)
    out = path_selective_scan(
        x, dt, A, B, C, D, dt_bias=dt_bias, paths=grid_paths(height, width, "cross")
    )
    return out.view(batch, height, width, dim)


def ss2d_ref(
    image: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor
) -> Tensor:
    """SS2D as it is written: copies of the map, flipped and transposed, projected, scanned."""
    batch, height, width, dim = image.shape
    state, rank = A.shape[2], dt_proj.shape[2]
    total = torch.zeros_like(image)
    for k in range(4):
        turned = image if k % 2 == 0 else image.transpose(1, 2)
        sequence = turned.reshape(batch, height * width, dim)
        if k >= 2:
            sequence = sequence.flip(1)
        dt, B, C = (sequence @ x_proj[k].t()).split([rank, state, state], -1)
        y = selective_scan_ref(sequence, dt @ dt_proj[k].t(), A[k], B, C, D[k], dt_bias=dt_bias[k])
        assert isinstance(y, Tensor)
        if k >= 2:
            y = y.flip(1)
        y = y.view(turned.shape)
        total = total + (y if k % 2 == 0 else y.transpose(1, 2))
    return total


@pytest.mark.parametrize("state", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(3, 5), (4, 4), (1, 6), (7, 2)])
def test_ss2d_equals_flips_and_transposes(assert_near: Check, height: int, width: int, state: int):
    inputs = block_inputs(2, height, width, 6, state)
    compare(assert_near, ss2d, ss2d_ref, inputs)
    single = {k: v.detach().float().requires_grad_() for k, v in inputs.items()}
    # gradients pass through projections in float32, which round more than the scan
    compare(assert_near, ss2d, ss2d_ref, single, factor=2)


def test_scan_and_merge_without_states_is_a_sum(assert_near: Check):
    """Where nothing is remembered, every direction reads each token once."""
    x = torch.randn(2, 35, 6, dtype=torch.float64)
    for kind in ("cross", "serpentine", "diagonal", "hilbert", "zigzag"):
        paths = grid_paths(5, 7, kind)
        count = paths.shape[0]
        silent = torch.zeros(2, 35, count, 6, dtype=torch.float64)
        vectors = torch.ones(2, 35, count, 3, dtype=torch.float64)
        out = path_selective_scan(
            x,
            silent,
            -vectors.new_ones(count, 6, 3),
            vectors,
            vectors,
            x.new_ones(count, 6),
            dt_softplus=False,
            paths=paths,
        )
        assert_near(out, count * x)
