"""Every `test_*` model on a GPU: against float32 on the CPU, compiled, captured, without syncs."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from tests.vision.registered import TEST_MODELS, layers, small, takes
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
each = pytest.mark.parametrize("name", TEST_MODELS)
# one of each kind of mixer, patch, token and stage, at its real width and length
REAL = (
    *("vim_tiny_patch16_224", "vim_tiny_patch16_stride8_224", "local_vim_tiny_patch16_224"),
    *("mambar_tiny_patch16_224", "ssm_vit_tiny_patch16_224", "hydra_vit_tiny_patch16_224"),
    *("vmamba_tiny_s1l8", "vmamba_tiny_s2l5", "vanilla_vmamba_tiny", "local_vmamba_tiny"),
)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
# what rounding to 8 or 11 bits in every layer of a random model leaves of its outputs
LIMIT = {torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 in float32, so that differences are the scans'."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width)


def shallow(name: str) -> nn.Module:
    return small(name, **layers(name, 2, (1, 1, 1, 1)))


def away(actual: Tensor, expected: Tensor) -> float:
    """Distance relative to the length of what is expected."""
    expected = expected.double()
    return ((actual.cpu().double() - expected).norm() / expected.norm()).item()


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """All of them, one after the other, on the CPU."""
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.detach().double().cpu().flatten() for g in grads])


def on_both(
    model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits and gradients on the GPU, under autocast to `dtype`, and in float32 on the CPU."""
    y = model(x)
    expected = y.detach(), gradients(model, y.square().sum())
    model = model.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        y = model(x.cuda())
    assert y.isfinite().all()
    return (y.detach().float(), gradients(model, y.float().square().sum())), expected


@each
def test_float32_is_that_of_the_cpu(name: str) -> None:
    """Logits and the gradient of every parameter."""
    (y, grads), (y_cpu, grads_cpu) = on_both(small(name), images(3))
    assert away(y, y_cpu) < 1e-4
    assert away(grads, grads_cpu) < 1e-3


@each
@HALF
def test_autocast_is_near_float32(name: str, dtype: torch.dtype) -> None:
    """Logits and gradients, finite and off by rounding only."""
    (y, grads), (y_cpu, grads_cpu) = on_both(small(name), images(3), dtype)
    assert away(y, y_cpu) < LIMIT[dtype]
    assert grads.isfinite().all()
    assert away(grads, grads_cpu) < 2 * LIMIT[dtype]


@each
@HALF
def test_depth_24_stays_finite(name: str, dtype: torch.dtype) -> None:
    """Under autocast and with weights of 16 bits."""
    model = small(name, **layers(name, 24, (2, 2, 18, 2))).cuda()
    x = images().cuda()
    with torch.autocast("cuda", dtype):
        y = model(x)
    assert y.isfinite().all()
    assert gradients(model, y.float().logsumexp(1).sum()).isfinite().all()
    with torch.no_grad():
        y = model.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


@pytest.mark.parametrize("name", REAL)
def test_real_models(name: str) -> None:
    """At their own width, depth and number of tokens, against the CPU."""
    model = timm.create_model(name, num_classes=7).eval()
    x = images(1, 224, 224)
    with torch.no_grad():
        expected = model(x)
        model = model.cuda()
        exact = model(x.cuda())
        with torch.autocast("cuda", torch.bfloat16):
            half = model(x.cuda())
    assert away(exact, expected) < 1e-3
    assert away(half.float(), expected) < LIMIT[torch.bfloat16]


@each
@pytest.mark.parametrize(("height", "width"), [(37, 50), (33, 95), (96, 32)])
def test_any_image_size(name: str, height: int, width: int) -> None:
    """Odd and oblong images, one and several and none of them."""
    names = ("dynamic_img_size", "dynamic_img_pad")
    if not takes(name, "img_size"):
        pytest.skip("takes no image size")
    model = small(name, **{n: True for n in names if takes(name, n)})
    x = images(3, height, width)
    with torch.no_grad():
        expected = model(x)
        model = model.cuda()
        together = model(x.cuda())
        assert away(together, expected) < 1e-4
        for count in (0, 1):
            torch.testing.assert_close(model(x[:count].cuda()), together[:count])


@each
@pytest.mark.filterwarnings("default")
def test_compiles_as_one_graph(name: str) -> None:
    """With the default compiler, for inference, in bfloat16 as it is served."""
    torch._dynamo.reset()
    model, x = shallow(name).cuda(), images().cuda()
    with torch.no_grad():
        exact = model(x)
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        with torch.autocast("cuda", torch.bfloat16):
            y = compiled(x)
    assert away(y.float(), exact.cpu()) < LIMIT[torch.bfloat16]


@each
@pytest.mark.filterwarnings("default")
def test_compiles_for_training(name: str) -> None:
    """Gradients of the compiled model are those of the model."""
    torch._dynamo.reset()
    model, x = shallow(name).cuda(), images().cuda()
    expected = gradients(model, model(x).square().sum())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert away(gradients(model, compiled(x).square().sum()), expected) < 1e-4


@each
@pytest.mark.parametrize("half", [False, True])
def test_inference_is_captured(name: str, half: bool) -> None:
    """In a CUDA graph, replayed on images that it has not seen."""
    model = shallow(name).cuda()
    x = images().cuda()

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=half):
            return model(x)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # autocast keeps what it has cast, which a graph must not read later
    with torch.cuda.graph(graph):
        y = run()
    for _ in range(2):
        x.copy_(images())
        graph.replay()
        torch.testing.assert_close(y, run(), rtol=1e-3, atol=1e-4)


@each
@pytest.mark.parametrize("half", [False, True])
def test_a_step_waits_for_nothing(name: str, half: bool, never_waiting: Callable[..., Any]) -> None:
    """Forward, backward and optimiser only queue work."""
    model = shallow(name).cuda().train()
    x, labels = images().cuda(), torch.tensor([1, 3]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    # kernels are chosen and tables uploaded in the first
    losses = [step()]
    with never_waiting():
        losses += [step() for _ in range(3)]
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < losses[0]


@each
def test_other_sizes_wait_for_nothing(name: str, never_waiting: Callable[..., Any]) -> None:
    """Orders and paths of a size that the model was not made for are kept on the device."""
    dynamic = {"dynamic_img_size": True} if takes(name, "dynamic_img_size") else {}
    model = shallow(name) if not dynamic else small(name, **dynamic, depth=2)
    model, x = model.cuda(), images(2, 48, 96).cuda()
    with torch.no_grad():
        expected = model(x)
        with never_waiting():
            y = model(x)
    torch.testing.assert_close(y, expected)


@each
def test_checkpointing_changes_nothing(name: str) -> None:
    """Outputs and gradients are those without."""
    model, x = shallow(name).cuda().train(), images().cuda()
    plain = model(x)
    expected = gradients(model, plain.square().sum())
    model.set_grad_checkpointing()
    y = model(x)
    torch.testing.assert_close(y, plain)
    assert away(gradients(model, y.square().sum()), expected) < 1e-4


@each
def test_memory_formats_are_alike(name: str) -> None:
    """Images and weights channels last, as timm's `--channels-last` has them."""
    model, x = shallow(name).cuda(), images().cuda()
    with torch.no_grad():
        expected = model(x)
        last: Any = model.to(memory_format=torch.channels_last)
        actual = last(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@each
def test_heat_maps(name: str) -> None:
    """What a prediction used is the same on both devices."""
    pytest.importorskip("accelerate")
    from scanweave.vision.explain import effective_receptive_field, heat_map

    model, x = shallow(name), images()
    maps, _ = heat_map(model, x)
    field = effective_receptive_field(model, x)
    model = model.cuda()
    assert away(heat_map(model, x.cuda())[0], maps) < 1e-2
    assert away(effective_receptive_field(model, x.cuda()), field) < 1e-2
