"""LocalVMamba: windowed scans on the grids of VMamba's stages."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from scanweave.vision import VMamba
from scanweave.vision.local import directions_of, local_order, window_side
from scanweave.vision.local_ss2d import LocalPaths, LocalSS2D

SMALL = {
    "dims": 8,
    "depths": (1, 2),
    "d_state": 2,
    "img_size": 32,
    "num_classes": 5,
    "directions": (("h", "w3"), ("v_flip",), ("w2_flip", "h_flip", "v")),
}


def _small(**kwargs: Any) -> VMamba:
    return timm.create_model("local_vmamba_tiny", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 32, 32))


@pytest.mark.parametrize(("name", "count"), [("tiny", 25.5), ("small", 49.7)])
def test_published_sizes(name: str, count: float) -> None:
    """The paper's millions of parameters; four scans a block."""
    model = timm.create_model(f"local_vmamba_{name}", device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == count
    mixers = [m for m in model.modules() if isinstance(m, LocalSS2D)]
    assert [m.count for m in mixers] == [4] * (15 if name == "tiny" else 33)


def test_short_names() -> None:
    assert directions_of("h v_, w7_") == (("h", "v_flip"), ("w7_flip",))
    assert [window_side(d) for d in ("h", "v_flip", "w2", "w12_flip")] == [1, 1, 2, 12]


def test_scan_follows_the_equations() -> None:
    """Against one token at a time: 3 x 5 places, a window of 2 that is filled with zeros."""
    mixer = LocalSS2D(4, LocalPaths((3, 5), ("v", "w2_flip")), d_state=2, dt_rank=2, gate="silu")
    mixer = mixer.double()
    for p in (mixer.dt_projs_bias, mixer.Ds):
        torch.nn.init.normal_(p)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    u, z = mixer._inputs(x)
    total = torch.zeros_like(u)
    A, D = -mixer.A_logs.exp().view(2, 4, 2), mixer.Ds.view(2, 4)
    for k, direction in enumerate(("v", "w2_flip")):
        h, y = torch.zeros(2, 4, 2).double(), torch.zeros_like(u)
        for place in local_order((3, 5), direction)[0].tolist():
            token = u[:, place] if place < 15 else torch.zeros_like(u[:, 0])
            dt, B, C = (token @ mixer.x_proj_weight[k].T).split([2, 2, 2], -1)
            delta = dt @ mixer.dt_projs_weight[k].T + mixer.dt_projs_bias[k]
            delta = torch.nn.functional.softplus(delta)[..., None]
            h = torch.exp(delta * A[k]) * h + delta * token[..., None] * B[:, None]
            if place < 15:
                y[:, place] = (h * C[:, None]).sum(-1) + D[k] * token
        total = total + mixer.multi_scan["attn"](y)
    y = mixer.out_norm(total.view(2, 3, 5, 4)) * torch.nn.functional.silu(z)
    torch.testing.assert_close(mixer(x), mixer.out_proj(y))


@pytest.mark.parametrize("size", [(32, 32), (37, 50), (9, 64)])
def test_any_image_size(size: tuple[int, int]) -> None:
    """Other sizes than the model's own, and the same after `set_input_size`."""
    model, x = _small(), _image(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), expected)
        model.set_input_size(size)
        torch.testing.assert_close(model(x), expected)
    assert model(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_compiles_as_one_graph(size: tuple[int, int]) -> None:
    """For training, at the model's own size and at another."""
    torch.compiler.reset()
    model, x = _small().train(), _image(2, 3, *size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for candidate in (compiled, model):
        out = candidate(x)
        grads.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_exports_with_any_batch() -> None:
    model = _small()
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (_image(),), dynamic_shapes={"x": {0: batch}})
        for count in (1, 3):
            x = _image(count, 3, 32, 32)
            torch.testing.assert_close(program.module()(x), model(x))


def test_op_is_registered_rightly() -> None:
    like = torch.zeros(1)
    for direction in ("h", "v_flip", "w3", "w2_flip"):
        torch.library.opcheck(torch.ops.scanweave.local_order, (like, 4, 5, direction))


def test_usable_after_to_empty() -> None:
    """Orders are made again, parameters drawn, decays exempt from weight decay."""
    model = timm.create_model("local_vmamba_tiny", device="meta", **SMALL).to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights()
    assert torch.isfinite(model(_image())).all()
    paths = model.layers[0].blocks[0].op.paths
    assert torch.equal(paths.order_1, local_order((8, 8), "w3")[0])
    assert "layers.0.blocks.0.op.A_logs" in model.no_weight_decay()


def test_half_precision_and_checkpointing() -> None:
    model, x = _small().train(), _image()
    with torch.no_grad():
        assert model.to(torch.bfloat16)(x.bfloat16()).isfinite().all()
    model = _small().train()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    expected = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": (("h",),)}, "directions must have one entry a block, 3, got 1"),
        ({"path": "hilbert"}, "path and window must be left out with directions.* 'hilbert'"),
        ({"window": 2}, "path and window must be left out with directions.* and 2"),
        ({"directions": (("h",), ("x",), ("v",))}, "direction must be h, v or w<K>"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """At creation."""
    with pytest.raises(ValueError, match=message):
        _small(**arguments)
