"""Every `test_*` model compiled, exported, in ONNX, in 16 bits at depth 24, at any image size."""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tests.vision.registered import FAMILIES, TEST_MODELS, layers, small, takes
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from scanweave.vision import export
from scanweave.vision.export import image_size, to_onnx

each = pytest.mark.parametrize("name", TEST_MODELS)


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width)


def test_families_are_here() -> None:
    assert set(TEST_MODELS) >= FAMILIES


def shallow(name: str) -> nn.Module:
    return small(name, **layers(name, 2, (1, 1, 1, 1)))


@each
def test_compiles_as_one_graph(name: str) -> None:
    """At a fixed shape for inference."""
    torch.compiler.reset()
    model, x = shallow(name), images(1)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))


@each
def test_compiles_for_training_with_any_batch(name: str) -> None:
    torch.compiler.reset()
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module)
        return aot_eager(module, inputs)

    model = shallow(name)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 3):
        x = images(batch)
        torch._dynamo.mark_dynamic(x, 0)
        y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(y.square().sum(), parameters)
        wanted = torch.autograd.grad(expected.square().sum(), parameters)
        torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@each
def test_exports_with_any_batch(name: str) -> None:
    model = shallow(name)
    with torch.no_grad():
        program = torch.export.export(model, (images(),))
        torch.testing.assert_close(program.module()(x := images()), model(x))
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (images(),), dynamic_shapes={"x": {0: batch}})
        for count in (1, 3):
            x = images(count)
            torch.testing.assert_close(program.module()(x), model(x))


# the exporter's own, and of libraries that it calls
@pytest.mark.filterwarnings("default")
@each
def test_onnx_with_any_batch(name: str, tmp_path: Path) -> None:
    """The runtime knows no operators of ours, and is given one image, and three."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    # half the layers of the other tests: this one takes the longest
    model = small(name, **layers(name, 1, (1, 1, 1, 1)), **dict(_sizes(name)))
    assert to_onnx(model, tmp_path / "model.onnx", 32) == (3, 32, 32)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (given,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("image", ["batch", 3, 32, 32])
    assert (answer.name, answer.shape) == ("logits", ["batch", 5])
    for count in (1, 3):
        x = images(count, 32, 32)
        (actual,) = session.run(None, {"image": x.numpy()})
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-5)


def _sizes(name: str) -> dict[str, Any]:
    return {"img_size": 32} if takes(name, "img_size") else {}


class _Spectrum(nn.Module):
    """An operator that the standard lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(self.weight * x)


@pytest.mark.filterwarnings("default")
def test_what_onnx_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with what to do about it."""
    pytest.importorskip("onnxscript")
    model, path = shallow("test_vim"), tmp_path / "model.onnx"
    assert image_size(model) == (64, 64)
    assert image_size(timm.create_model("test_resnet")) == (160, 160)
    with pytest.raises(ValueError, match=r"evaluation mode, got training mode; call model.eval"):
        to_onnx(model.train(), path)
    with pytest.raises(ValueError, match=r"must be float32, got torch.float16; call model.float"):
        to_onnx(model.eval().half(), path)
    with pytest.raises(AssertionError, match="image height must be 64, got 48; see img_size"):
        to_onnx(model.float(), path, (48, 64))
    with pytest.raises(RuntimeError, match="_Spectrum cannot be written as ONNX at 8 x 8: "):
        to_onnx(_Spectrum().eval(), path, 8)
    assert not path.exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="to_onnx needs onnxscript: pip install onnx onnxscript"):
        to_onnx(model, path)


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro")
    written = []

    def write(model: nn.Module, path: Path) -> tuple[int, int, int]:
        written.append((model, path))
        return (3, *image_size(model))

    monkeypatch.setattr(export, "to_onnx", write)
    options = f"--model test_vim --no-pretrained --img-size 32 --output {tmp_path / 'a.onnx'}"
    monkeypatch.setattr(sys, "argv", ["export", *options.split()])
    export.main()
    ((model, path),) = written
    assert not model.training
    assert path == tmp_path / "a.onnx"
    said = " ".join(capsys.readouterr().out.split())
    assert "image (batch, 3, 32, 32) float32 -> logits (batch, classes)" in said


def deep(name: str) -> nn.Module:
    """24 layers, in VMamba's stages as in its small model but for some of the third."""
    return small(name, **layers(name, 24, (2, 2, 18, 2)))


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_at_depth_24(name: str, dtype: torch.dtype) -> None:
    """Outputs and gradients are finite, and outputs are those of float32 but for rounding."""
    model = deep(name)
    x = images()
    expected = model(x).detach()
    with torch.autocast("cpu", dtype):
        y = model(x)
        loss = y.float().logsumexp(1).sum()
    loss.backward()
    assert y.isfinite().all()
    error = (y.float() - expected).norm() / expected.norm()
    assert error < (5e-2 if dtype == torch.bfloat16 else 1e-2)
    gradients = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_weights_at_depth_24(name: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        y = deep(name).to(dtype)(images().to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


@each
@pytest.mark.parametrize(("height", "width"), [(37, 50), (33, 95), (96, 32)])
def test_any_image_size(name: str, height: int, width: int) -> None:
    """Odd and oblong images; a batch equals its images one by one."""
    names = ("dynamic_img_size", "dynamic_img_pad")
    model = small(name, **{n: True for n in names if takes(name, n)})
    x = images(3, height, width)
    with torch.no_grad():
        together = model(x)
        assert together.isfinite().all()
        torch.testing.assert_close(together, torch.cat([model(one[None]) for one in x]))
