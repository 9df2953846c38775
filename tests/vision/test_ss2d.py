"""SS2D: its equations, the paths of its grids, its start, its scripted form."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from scanweave.core import grid_paths
from scanweave.vision.ss2d import SS2D, GridPaths
from scanweave.vision.vmamba import VMamba

SMALL = {"dims": 8, "depths": (1, 2), "img_size": 32, "num_classes": 5}


def _small(**kwargs: Any) -> VMamba:
    return timm.create_model("test_vmamba", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 32, 32))


def test_official_scan_orders(goldens: Path) -> None:
    """Official names of orders, and the kinds that follow them."""
    orders = json.loads((goldens / "vmamba_scan_orders_H2_W3.json").read_text(encoding="utf-8"))
    for official, kind in (("cross2d", "cross"), ("rot90", "rotations")):
        assert GridPaths((2, 3), kind)(2, 3).tolist() == orders[official]


def test_paths_are_kept() -> None:
    """The model's own, shared by a stage; other sizes' are kept too, and can be trained with."""
    model = _small(depths=(2, 1))
    first, second = (block.op.paths for block in model.layers[0].blocks)
    assert first is second
    assert first(8, 8) is first.paths
    with torch.inference_mode():
        other = first(5, 9)
        assert torch.isfinite(model(_image(1, 3, 20, 36))).all()
    assert first(5, 9) is other
    assert not other.is_inference()
    model.train()(_image(1, 3, 20, 36)).sum().backward()


def test_scan_follows_the_equations() -> None:
    """SS2D and every gradient, against its equations one direction and token at a time."""
    torch.manual_seed(1)
    mixer = SS2D(6, GridPaths((3, 4)), d_state=2, dt_rank=2, gate="silu").double()
    nn.init.normal_(mixer.dt_projs_bias)
    nn.init.normal_(mixer.Ds)
    x = torch.randn(2, 3, 4, 6).double().requires_grad_()
    u, z = mixer.in_proj(x).chunk(2, -1)
    assert mixer.conv2d is not None
    u = mixer.conv2d(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    u = nn.functional.silu(u).flatten(1, 2)
    y = torch.zeros_like(u)
    A, D = -mixer.A_logs.exp().view(4, 6, 2), mixer.Ds.view(4, 6)
    for k, path in enumerate(grid_paths(3, 4).tolist()):
        h = torch.zeros(2, 6, 2).double()
        for p in path:
            dt, B, C = (u[:, p] @ mixer.x_proj_weight[k].T).split([2, 2, 2], -1)
            delta = dt @ mixer.dt_projs_weight[k].T + mixer.dt_projs_bias[k]
            delta = nn.functional.softplus(delta)[..., None]
            h = torch.exp(delta * A[k]) * h + delta * u[:, p, :, None] * B[:, None]
            y[:, p] += (h * C[:, None]).sum(-1) + D[k] * u[:, p]
    y = mixer.out_norm(y.view(2, 3, 4, 6)) * nn.functional.silu(z)
    actual, expected = mixer(x), mixer.out_proj(y)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    cotangent = torch.randn(2, 3, 4, 6).double()
    inputs = [x, *mixer.parameters()]
    expected = torch.autograd.grad(expected, inputs, cotangent)
    for got, want in zip(torch.autograd.grad(actual, inputs, cotangent), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_initialisation() -> None:
    """Decays 1 .. N, skips 1, steps in [0.001, 0.1], projections of their width."""
    op = _small(dims=64, d_state=4).layers[0].blocks[0].op
    torch.testing.assert_close(op.A_logs.exp(), torch.arange(1.0, 5).expand(256, 4))
    assert (op.Ds == 1).all()
    steps = nn.functional.softplus(op.dt_projs_bias)
    assert 9e-4 < steps.min() < steps.max() < 0.11
    assert 0.95 * 4**-0.5 < op.dt_projs_weight.abs().max() <= 4**-0.5
    assert 0.95 / 8 < op.x_proj_weight.abs().max() <= 1 / 8
    assert 0.017 < op.in_proj.weight.std() < 0.023


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_beside_models_that_torchscript_cannot_compile(tmp_path: Path) -> None:
    """What their layers leave to Python is theirs alone: both kinds have the same norm."""
    timm.create_model("local_vim_tiny_patch16_224")
    torch.jit.save(torch.jit.script(_small()), tmp_path / "model.pt")
    assert torch.isfinite(torch.jit.load(tmp_path / "model.pt")(_image())).all()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_model_is_the_model(tmp_path: Path) -> None:
    """TorchScript's own loop: values, gradients, other sizes, saved and loaded; other kinds."""
    model = _small(d_state=2, gate="silu", in_chans=1)
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    scripted = torch.jit.load(tmp_path / "model.pt")
    for size in ((32, 32), (9, 14)):
        x, y = (_image(2, 1, *size).requires_grad_() for _ in range(2))
        y.data.copy_(x.data)
        torch.testing.assert_close(scripted(y), model(x))
        scripted(y).square().sum().backward()
        model(x).square().sum().backward()
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-4, atol=1e-8)
    scripted = torch.jit.script(_small(path="hilbert"))
    assert torch.isfinite(scripted(_image())).all()
    with pytest.raises(torch.jit.Error, match="kind must be 'cross' for other sizes"):
        scripted(_image(1, 3, 40, 32))
