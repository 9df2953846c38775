"""Every `test_*` model compiled, exported, in ONNX, in 16 bits at depth 24, at any image size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.vision.registered import FAMILIES, TEST_MODELS, layers, small, takes
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from scanweave.core import decompositions

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
def test_onnx(name: str, tmp_path: Path) -> None:
    """By the way that the README shows; the runtime knows no operators of ours."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = shallow(name)
    x = images()
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions(decompositions())
        # unoptimised: halves the time, and the runtime optimises what it loads
        exported = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False)
        expected = model(x)
    assert exported is not None
    exported.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.filterwarnings("default")
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    readme = Path(__file__).parents[2] / "vision" / "README.md"
    section = readme.read_text(encoding="utf-8").partition("## Loading and exporting\n")[2]
    block = section.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(readme), "exec"), {})
    model = onnx.load(tmp_path / "vim.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
