"""Layers that leave their last sum to the next norm, which makes it in its launch on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import scanweave.vision  # noqa: F401  (registers the models)
from scanweave.core.ops.norm import cast, cast_kernels
from scanweave.vision import norms, tokens

# attention is quick where kernels are interpreted
QUICK = {"mixer": "attention_bidirectional", "mixer_args": {"num_heads": 2}}
SIZES = {"embed_dim": 8, "depth": 3, "img_size": 16, "patch_size": 8, "num_classes": 5}

pytestmark = pytest.mark.interpret


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def tiny(**arguments: Any) -> Any:
    torch.manual_seed(1)
    model = timm.create_model("test_vim", **{**SIZES, **QUICK, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(device()).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, device=device())


@contextmanager
def as_pytorch() -> Iterator[None]:
    """PyTorch's own operators in the place of the kernel."""
    with ExitStack() as stack:
        for module in (cast, norms, tokens):
            stack.enter_context(mock.patch.object(module, "runs_kernels", return_value=False))
        yield


@contextmanager
def launched() -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of every norm's launch."""
    calls: list[tuple[Any, ...]] = []
    run = cast_kernels.forward

    def note(*args: Any) -> Any:
        calls.append(args)
        return run(*args)

    with mock.patch.object(cast_kernels, "forward", note):
        yield calls


def sums(calls: list[tuple[Any, ...]]) -> int:
    return sum(args[1] is not None for args in calls)


def away(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def near(actual: Tensor, expected: Tensor) -> None:
    """Equal, but for the order in which two forms of a kernel may add squares."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def outputs(model: nn.Module, x: Tensor, half: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and the gradients of all parameters."""
    torch.manual_seed(3)
    with torch.autocast(device(), torch.bfloat16, enabled=half):
        y = model(x)
    grads = torch.autograd.grad(y.float().square().sum(), list(model.parameters()))
    return y.detach().float(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mlp_ratio": 2.0},
        {"path": "serpentine", "drop_path_rate": 0.5},
        {"class_token_pos": "first", "global_pool": "avg", "residual_in_fp32": False},
        {"mixer": "bimamba", "mixer_args": {}, "depth": 2},
        {"registers": 2, "register_reduce": 2},
    ],
    ids=["vim", "mlp", "paths", "pool", "bimamba", "registers"],
)
def test_kernels_give_the_same_model(
    arguments: dict[str, Any], assert_near: Callable[..., None]
) -> None:
    """Logits and the gradients of every parameter, float32 and under autocast."""
    model, x = tiny(**arguments).train(), images()
    with as_pytorch():
        expected = outputs(model, x)
    with launched() as calls:
        found = outputs(model, x)
    # all norms are launches, and all but the first make the sum before them
    last = 1 if "registers" in arguments else 0
    layers = len(model.layers) * (2 if "mlp_ratio" in arguments else 1)
    assert (len(calls), sums(calls)) == (layers + 1 + last, layers)
    assert_near(found[0], expected[0])
    assert away(found[1], expected[1]) < 1e-4
    half = outputs(model, x, half=True)
    assert away(half[0], expected[0]) < 5e-2
    assert away(half[1], expected[1]) < 1e-1


def test_dtypes_of_stream_and_branches() -> None:
    """Streams are float32 under autocast and in 16-bit models; projections read 16 bits."""
    for half in (False, True):
        model = tiny()
        if half:
            model = model.bfloat16()
        x = images().to(model.head.weight.dtype)
        with (
            launched() as calls,
            torch.no_grad(),
            torch.autocast(device(), torch.bfloat16, enabled=not half),
        ):
            features = model.forward_features(x)
        assert features.dtype == model.head.weight.dtype
        for i, (stream, branch, _, bias, _, dtype) in enumerate(calls):
            assert stream.dtype == torch.float32
            assert branch is None if i == 0 else branch.dtype == torch.bfloat16
            assert bias is None
            assert dtype == (features.dtype if i == 3 else torch.bfloat16)
        assert len(calls) == 4


def test_intermediates_are_the_streams() -> None:
    """What is taken is what hooks see, and the features stay."""
    model, x = tiny(mlp_ratio=1.0), images()
    with torch.no_grad():
        expected = model.forward_features(x)
        with launched() as calls:
            features, taken = model.forward_intermediates(x, [0, 2], output_fmt="NLC")
        # the sums after layers 0 and 2 are made for their own sake
        assert (len(calls), sums(calls)) == (7, 4)
        near(features, expected)
        normed = model.forward_intermediates(
            x, 1, norm=True, output_fmt="NLC", intermediates_only=True
        )
        early = model.forward_intermediates(
            x, [0], stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        seen: list[Tensor] = []
        for layer in model.layers:
            layer.register_forward_hook(lambda module, args, y: seen.append(y))
        near(model.forward_features(x), expected)
    assert len(seen) == 3
    patches = [0, 1, 3, 4]
    near(taken[0], seen[0][:, patches])
    near(taken[1], seen[2][:, patches])
    near(early[0], seen[0][:, patches])
    near(normed[0], expected[:, patches])


def test_what_is_watched_is_called() -> None:
    """By hooks of every kind, a forward of one's own, or a compiler; results stay."""
    model, x = tiny(depth=5, mlp_ratio=1.0), images()
    with as_pytorch():
        expected = model(x)
    seen: list[str] = []
    first, second, third, fourth, fifth = model.layers
    first.norm2.register_forward_hook(lambda *_: seen.append("norm"))
    first.register_forward_pre_hook(lambda module, args: seen.append("before"))
    second.register_full_backward_hook(lambda *_: seen.append("backward"))
    third.forward = mock.Mock(side_effect=third.forward)
    fourth.compile(backend="eager", disable=True)
    fifth.norm.register_forward_hook(lambda *_: seen.append("fifth"))
    model.norm_f.register_forward_pre_hook(lambda *_: seen.append("last"))
    y = model(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert seen == ["before", "norm", "fifth", "last", "backward"]
    assert third.forward.call_count == 1


def test_hooks_on_all_modules_see_all() -> None:
    model, x = tiny(), images()
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert [m for m in seen if m in (*model.layers, model.norm_f)] == [*model.layers, model.norm_f]


def test_other_norms_and_layers_get_the_sum() -> None:
    """Pruned, or put in their place by somebody."""
    model, x = tiny(), images()
    model.layers[1].norm = nn.RMSNorm(8, eps=1e-5, device=device())
    model.norm_f = nn.Identity()
    with torch.no_grad():
        with as_pytorch():
            expected = model(x)
        torch.testing.assert_close(model(x), expected)

    class Other(nn.Module):
        def forward(self, x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
            return 2 * x

    model.layers[1] = Other()
    with torch.no_grad():
        with as_pytorch():
            expected = model(x)
        torch.testing.assert_close(model(x), expected)


def test_turned_and_recomputed_streams_are_whole() -> None:
    """Rotations read the stream before every layer, checkpoints keep it."""
    x = images()
    rope = tiny(rope=True, class_token=False, global_pool="avg")
    checkpointed = tiny()
    checkpointed.set_grad_checkpointing()
    for model in (rope, checkpointed):
        model.train()
        with as_pytorch():
            expected = outputs(model, x)
        with launched() as calls:
            found = outputs(model, x)
        assert sums(calls) == 0
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        assert away(found[1], expected[1]) < 1e-4


@pytest.mark.filterwarnings("default")
def test_compilers_see_operators() -> None:
    torch._dynamo.reset()
    model, x = tiny(mlp_ratio=1.0), images()
    expected = model(x)
    with launched() as calls:
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    assert not calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
