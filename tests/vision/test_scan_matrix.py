"""Scans of vision mixers as matrices: they give what the scans give, in the order of the image."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scanweave.core import selective_scan
from scanweave.vision.local import LocalMamba
from scanweave.vision.scan_matrix import ScanMatrix
from scanweave.vision.ss2d import SS2D, GridPaths


def drawn(length: int, channels: int, state: int, batch: int = 2) -> dict[str, Tensor]:
    kind = {"dtype": torch.float64}
    return {
        "delta": nn.functional.softplus(torch.randn(batch, length, channels, **kind)),
        "A": -torch.rand(channels, state, **kind) * 3,
        "B": torch.randn(batch, length, state, **kind),
        "C": torch.randn(batch, length, state, **kind),
        "D": torch.randn(channels, **kind),
    }


@pytest.mark.parametrize("state", [1, 3])
@pytest.mark.parametrize("length", [1, 63, 64, 130, 200])
def test_matrix_is_the_scan(length: int, state: int) -> None:
    """Below, at and over a block of rows; the mean is that of the whole."""
    given = drawn(length, 4, state)
    matrix = ScanMatrix(**given, place=torch.arange(length))
    whole = matrix.whole()
    u = torch.randn(2, length, 4, dtype=torch.float64)
    # the op takes time steps before softplus
    delta = given.pop("delta")
    y = selective_scan(u, delta.expm1().log(), **given)
    actual = (whole @ u.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    torch.testing.assert_close(actual, y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(matrix.size(), whole.abs().mean(1))


def test_long_scans_do_not_overflow() -> None:
    """Decays of e^-3000 over the length."""
    given = {k: v.float() for k, v in drawn(400, 2, 1).items()}
    given["delta"] = torch.full_like(given["delta"], 4.0)
    size = ScanMatrix(**given, place=torch.arange(400)).size()
    assert size.isfinite().all()
    assert size[0].triu(1).count_nonzero() == 0


def test_rows_and_columns_follow_the_tokens() -> None:
    """Read backwards, with a step of padding in between."""
    given = drawn(5, 2, 2)
    plain = ScanMatrix(**given, place=torch.arange(5)).whole()
    place = torch.tensor([4, 2, 0])
    matrix = ScanMatrix(**given, place=place)
    assert torch.equal(matrix.whole(), plain[:, :, place][..., place])
    assert matrix.size().shape == (2, 3, 3)


@pytest.mark.parametrize(
    "arguments", [{}, {"d_state": 4, "gate": "silu"}, {"d_conv": 1, "gate": "linear"}], ids=str
)
@pytest.mark.parametrize(("path", "count"), [("cross", 4), ("hilbert", 4), ("raster", 1)])
def test_ss2d(arguments: dict[str, Any], path: str, count: int) -> None:
    """Matrices give the core's outputs of its values, and those the mixer's output."""
    mixer = SS2D(6, GridPaths((3, 5), path), dt_rank=2, **arguments).double()
    for p in (mixer.dt_projs_bias, mixer.Ds):
        nn.init.normal_(p)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        values, outputs = mixer.core(x)
        matrix = mixer.matrix(x)
        assert matrix.shape == (2, count * 6, 15, 15)
        torch.testing.assert_close(matrix @ values, outputs)
        torch.testing.assert_close(mixer.matrix_size(x), matrix.abs().mean(1))
        y = outputs.squeeze(-1).unflatten(1, (count, 6)).sum(1).transpose(1, 2)
        y = mixer.out_norm(y.unflatten(1, (3, 5)))
        z = mixer.in_proj(x).chunk(2, -1)[1]
        gate = {"none": 1, "silu": nn.functional.silu(z), "linear": z}[mixer.gate]
        torch.testing.assert_close(mixer.out_proj(y * gate), mixer(x))


def test_ss2d_paths_show() -> None:
    """Row by row a token reads those before it in reading order; backwards those behind it."""
    mixer = SS2D(4, GridPaths((2, 3), "cross"), d_conv=1)
    first, second, third, fourth = mixer.matrix(torch.randn(1, 2, 3, 4))[0].unflatten(0, (4, 4))
    below = torch.ones(6, 6).tril().bool()
    assert torch.equal(first.ne(0).any(0), below)
    assert torch.equal(third.ne(0).any(0), below.t())
    columns = torch.tensor([0, 3, 1, 4, 2, 5])
    assert torch.equal(second[:, columns][:, :, columns].ne(0).any(0), below)
    assert torch.equal(fourth[:, columns][:, :, columns].ne(0).any(0), below.t())


def test_local_mamba() -> None:
    """Directions without padding in full; with padding, which is scanned too, its share is away."""
    mixer = LocalMamba(8, ["h", "v_flip", "w3"], d_state=3).double()
    mixer.set_grid((3, 6), (9,))
    x = torch.randn(2, 19, 8, dtype=torch.float64)
    with torch.no_grad():
        values, outputs = mixer.core(x)
        matrix = mixer.matrix(x)
        assert matrix.shape == (2, 3 * 16, 19, 19)
        torch.testing.assert_close(matrix @ values, outputs)
        torch.testing.assert_close(mixer.matrix_size(x), matrix.abs().mean(1))
        z = mixer.in_proj(x).chunk(2, -1)[1]
        parts = outputs.squeeze(-1).unflatten(1, (3, 16)).transpose(2, 3)
        total = sum(mixer.attn(parts[:, k] * nn.functional.silu(z)) for k in range(3))
        torch.testing.assert_close(mixer.out_proj(total), mixer(x))
        padded = LocalMamba(8, ["w2"], d_state=3)
        padded.set_grid((3, 6), (9,))
        assert padded.matrix(x.float()).shape == (2, 16, 19, 19)
