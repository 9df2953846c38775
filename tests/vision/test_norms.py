"""The norms: names and behaviour of PyTorch's, and one launch where kernels run."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import scanweave.vision  # noqa: F401  (registers the models)
from scanweave.core.ops.norm import cast_kernels
from scanweave.vision import norms
from scanweave.vision.norms import LayerNorm, RmsNorm, add_and_norm, at_least_float32


def tiny(**arguments: Any) -> Any:
    sizes = {"dims": 8, "depths": (1, 1), "img_size": 8, "num_classes": 5}
    return timm.create_model("test_vmamba", **{**sizes, **arguments})


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_pytorch() -> Any:
    """PyTorch's own operators in the place of the kernel."""
    return mock.patch.object(norms, "runs_kernels", return_value=False)


def away(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def test_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types, names, start and values on a CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    norm, theirs = LayerNorm(6, 0.1), nn.LayerNorm(6, 0.1)
    assert isinstance(norm, nn.LayerNorm)
    assert norm.state_dict().keys() == theirs.state_dict().keys()
    nn.init.normal_(norm.weight)
    theirs.load_state_dict(norm.state_dict())
    x, branch = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    for kind in (torch.float32, torch.float64):
        found, expected = norm.to(kind)(x.to(kind)), theirs.to(kind)(x.to(kind))
        assert torch.equal(found, expected)
    total, y = add_and_norm(x, branch, norm.float())
    assert torch.equal(total, x + branch)
    assert torch.equal(y, theirs.float()(x + branch))
    assert LayerNorm(6, dtype=torch.float64, device="meta").weight.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_norm_is_computed_in_float32(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """From any input dtype; large float16 values do not overflow when squared."""
    norm = RmsNorm(16, eps=1e-5, dtype=weight_dtype)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (300 * torch.randn(2, 3, 16)).to(dtype)
    out = norm(x)
    assert out.dtype == weight_dtype
    wide = x.double()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    limit = 8e-3 if weight_dtype == torch.bfloat16 else 1e-6
    assert (out.double() - expected).abs().max() < limit * expected.abs().max()


def test_at_least_float32() -> None:
    """Widens, never narrows."""
    assert at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_every_norm_of_a_model_is_ours() -> None:
    for stem, down in (("v1", "v1"), ("v2", "v3")):
        model = tiny(stem=stem, downsample=down)
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
        # the stem's, three a block, one a downsampling, the last
        assert len(norms) == (1 if stem == "v1" else 2) + 3 * 2 + 1 + 1
        assert all(type(m) is LayerNorm for m in norms)
        # the stream stays float32: those that begin or end it do not round
        kept = {n for n, m in model.named_modules() if m in norms and not m.rounded}
        begins = {"patch_embed.2"} if stem == "v1" else {"patch_embed.7", "layers.0.downsample.3"}
        assert kept == {"classifier.norm", *begins}


@pytest.mark.interpret
def test_kernels_give_the_same_model(assert_near: Callable[..., None]) -> None:
    """Logits and the gradients of every parameter, float32 and under autocast."""
    model = tiny(gate="silu", drop_path_rate=0.5, depths=(2, 1)).to(device()).train()
    x = torch.randn(2, 3, 8, 8, device=device())

    def run(half: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        with torch.autocast(device(), torch.bfloat16, enabled=half):
            y = model(x)
        return y.detach().float(), gradients(model, y.float().square().sum())

    with as_pytorch():
        expected = run(False)
    with mock.patch.object(cast_kernels, "forward", wraps=cast_kernels.forward) as launched:
        found = run(False)
    # two of the stem, three a block, two more; with the sum before it one a block, and one between
    # the two of the first stage
    assert launched.call_count == 2 + 3 * 3 + 2
    assert sum(call.args[1] is not None for call in launched.call_args_list) == 3 + 1
    assert_near(found[0], expected[0])
    assert away(found[1], expected[1]) < 1e-4
    half = run(True)
    assert away(half[0], expected[0]) < 5e-2
    assert away(half[1], expected[1]) < 1e-1


@pytest.mark.interpret
def test_dtypes_under_autocast() -> None:
    """What projections read has 16 bits; streams, sums included, have 32."""
    norm = LayerNorm(8, device=device())
    x = torch.randn(2, 3, 8, device=device())
    branch = x.bfloat16()
    with torch.autocast(device(), torch.bfloat16):
        assert norm(x).dtype == norm(branch).dtype == torch.bfloat16
        total, y = add_and_norm(x, branch, norm)
        assert (total.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        norm.rounded = False
        assert norm(x).dtype == norm(branch).dtype == torch.float32
    assert norm(branch).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias, 1e-5))


@pytest.mark.interpret
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_is_one_launch(weight_dtype: torch.dtype) -> None:
    """Of any stream; the result has the weight's dtype, and autocast's where it is rounded."""
    norm = RmsNorm(8, dtype=weight_dtype, device=device())
    x = torch.randn(2, 3, 8, device=device())
    branch = torch.randn(2, 3, 8, device=device()).bfloat16()
    with mock.patch.object(cast_kernels, "forward", wraps=cast_kernels.forward) as launched:
        y = norm(x)
        total, z = add_and_norm(x, branch, norm)
        # a branch wider than the stream makes the stream wider
        wide = add_and_norm(branch, x, norm)
    assert launched.call_count == 3
    assert y.dtype == z.dtype == weight_dtype
    assert total.dtype == wide[0].dtype == torch.float32
    wanted = F.rms_norm(x + branch, (8,), eps=1e-5)
    assert torch.equal(total, x + branch)
    assert away(z, wanted) < 6e-3
    assert away(wide[1], wanted) < 6e-3
    with torch.autocast(device(), torch.bfloat16):
        assert norm(x).dtype == add_and_norm(x, branch, norm)[1].dtype == torch.bfloat16
        norm.rounded = False
        assert norm(x).dtype == add_and_norm(x, branch, norm)[1].dtype == weight_dtype


class _Double(nn.Module):
    """Quick in the place of a mixer."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def blocks(count: int) -> Any:
    made = tiny(depths=(count, 1)).to(device()).eval().layers[0].blocks
    for block in made:
        block.op = _Double()
    return made


@pytest.mark.interpret
def test_watched_and_foreign_modules_are_called() -> None:
    """By hooks of every kind, a forward of one's own, or a compiler; results stay."""
    chain = blocks(4)
    x = torch.randn(2, 3, 4, 8, device=device(), requires_grad=True)
    with as_pytorch():
        expected = chain(x)
    torch.testing.assert_close(chain(x), expected)
    seen: list[str] = []
    first, second, third, fourth = chain
    first.norm2.register_forward_hook(lambda *_: seen.append("norm"))
    first.register_forward_pre_hook(lambda module, args: seen.append("before"))
    second.register_full_backward_hook(lambda *_: seen.append("backward"))
    third.forward = mock.Mock(side_effect=third.forward)
    fourth.compile(backend="eager", disable=True)
    assert norms.is_watched(fourth)
    y = chain(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert seen == ["before", "norm", "backward"]
    assert third.forward.call_count == 1
    first.norm2 = nn.LayerNorm(8, device=device())
    chain[1] = nn.Identity()
    with torch.no_grad(), as_pytorch():
        expected = chain(x)
    with torch.no_grad():
        torch.testing.assert_close(chain(x), expected)


@pytest.mark.filterwarnings("default")
def test_traced_models_keep_the_module() -> None:
    """A leaf for torch.fx, as timm takes features by it."""
    model = tiny(features_only=True, feature_cls="fx", out_indices=(0, 1)).eval()
    plain = tiny(features_only=True, out_indices=(0, 1)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert any(type(m) is LayerNorm for m in model.modules())
    with torch.no_grad():
        for feature in model(torch.randn(1, 3, 8, 8)):
            assert feature.isfinite().all()
