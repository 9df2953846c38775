"""Models of stages: timm's contract beyond what timm's own tests ask."""

from typing import Any

import pytest
import timm
import torch
from timm.models import get_model_input_config
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from scanweave.vision.vmamba import VMamba

SMALL = {"dims": 8, "depths": (1, 2), "img_size": 32, "num_classes": 5}


def _small(**kwargs: Any) -> VMamba:
    return timm.create_model("test_vmamba", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "key", "shape"),
    [
        ({"dims": (8, 24)}, "layers.1.blocks.0.norm.weight", (24,)),
        ({"depths": (1, 1, 1)}, "classifier.norm.weight", (32,)),
        ({"d_state": 4}, "layers.0.blocks.0.op.A_logs", (32, 4)),
        ({"ssm_ratio": 2.0}, "layers.0.blocks.0.op.out_proj.weight", (8, 16)),
        ({"dt_rank": 3}, "layers.0.blocks.0.op.dt_projs_weight", (4, 8, 3)),
        ({"d_conv": 5}, "layers.0.blocks.0.op.conv2d.weight", (8, 1, 5, 5)),
        ({"d_conv": 1}, "layers.0.blocks.0.op.Ds", (32,)),
        ({"conv_bias": True}, "layers.0.blocks.0.op.conv2d.bias", (8,)),
        ({"gate": "silu"}, "layers.0.blocks.0.op.in_proj.weight", (16, 8)),
        ({"gate": "linear"}, "layers.0.blocks.0.op.in_proj.weight", (16, 8)),
        ({"path": "raster"}, "layers.0.blocks.0.op.x_proj_weight", (1, 3, 8)),
        ({"path": "zigzag"}, "layers.0.blocks.0.op.dt_projs_bias", (8, 8)),
        ({"path": "window", "window": 3}, "layers.0.blocks.0.op.Ds", (16,)),
        ({"path": "window", "window": (2, 4)}, "layers.0.blocks.0.op.Ds", (16,)),
        ({"mlp_ratio": 2.0}, "layers.0.blocks.0.mlp.fc1.weight", (16, 8)),
        ({"stem": "v1"}, "patch_embed.0.weight", (8, 3, 4, 4)),
        ({"downsample": "v1"}, "layers.0.downsample.reduction.weight", (16, 32)),
        ({"downsample": "v2"}, "layers.0.downsample.1.weight", (16, 8, 2, 2)),
        ({"in_chans": 4}, "patch_embed.0.weight", (4, 4, 3, 3)),
        ({"num_classes": 7}, "classifier.head.bias", (7,)),
        ({"global_pool": "catavgmax"}, "classifier.head.weight", (5, 32)),
    ],
)
def test_arguments_reach_the_parameters(
    arguments: dict[str, Any], key: str, shape: tuple[int, ...]
) -> None:
    """Every size can be overridden through `create_model`, and the model then runs."""
    model = _small(**arguments)
    assert tuple(model.state_dict()[key].shape) == shape
    logits = model(_image(2, model.in_chans, 45, 29))
    assert logits.shape == (2, model.num_classes)
    assert torch.isfinite(logits).all()


def test_other_arguments_reach_their_module() -> None:
    """Rates and epsilon; no convolution where none is asked for."""
    model = _small(drop_rate=0.1, drop_path_rate=0.4, norm_eps=1e-3)
    assert model.classifier.drop.p == 0.1
    blocks = [b for stage in model.layers for b in stage.blocks]
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks] == pytest.approx([0, 0.2, 0.4])
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-3}
    assert not any("conv2d" in key for key in _small(d_conv=0).state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"not_an_argument": 1}, TypeError, "not_an_argument"),
        ({"depths": ()}, ValueError, r"depths must be positive, got \(\)"),
        ({"depths": (1, 0)}, ValueError, r"depths must be positive, got \(1, 0\)"),
        ({"dims": (8, 16, 32)}, ValueError, "dims must be one width over 1 a stage"),
        ({"img_size": 0}, ValueError, "img_size must be one or two positive integers, got 0"),
        ({"stem": "v1", "img_size": 3}, ValueError, "img_size must leave a pixel to every stage"),
        ({"stem": "v3"}, ValueError, "stem must be 'v1' or 'v2', got 'v3'"),
        ({"downsample": "v4"}, ValueError, "downsample must be 'v1', 'v2' or 'v3', got 'v4'"),
        ({"d_state": 0}, ValueError, "d_state must be at least 1, got 0"),
        ({"ssm_ratio": 0.01}, ValueError, r"ssm_ratio \* dim must be at least 1, got 0"),
        ({"dt_rank": 0}, ValueError, "dt_rank must be at least 1, got 0"),
        ({"d_conv": 4}, ValueError, "d_conv must be odd, got 4"),
        ({"gate": "gelu"}, ValueError, "gate must be one of .*, got 'gelu'"),
        ({"path": "spiral"}, ValueError, "kind must be one of .*, got 'spiral'"),
        ({"path": "window"}, ValueError, "window must be given for kind 'window'"),
        ({"global_pool": "token"}, ValueError, "global_pool must be one of .*, got 'token'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """At creation, with the argument, the rule and what was given."""
    with pytest.raises(error, match=message):
        _small(**arguments)


def test_wrong_images_are_refused() -> None:
    """Channels, dimensions, and too small a side, by checks that can be traced."""
    with pytest.raises(AssertionError, match="image must have 3 channels, got 1; see in_chans"):
        _small()(_image(1, 1, 32, 32))
    with pytest.raises(AssertionError, match=r"image must be \(B, C, H, W\)"):
        _small()(_image(3, 32, 32))
    with pytest.raises(AssertionError, match="image height must be >= 4, got 3"):
        _small(stem="v1")(_image(1, 3, 3, 32))
    with pytest.raises(AssertionError, match="image width must be >= 4, got 2"):
        _small(stem="v1")(_image(1, 3, 32, 2))


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1), (7, 40)])
@pytest.mark.parametrize("downsample", ["v1", "v3"])
def test_sizes_and_batches(size: tuple[int, int], downsample: str) -> None:
    """Odd, non-square, single pixels, batches of 0 to 2; no image sees another."""
    model = _small(downsample=downsample, num_classes=0)
    x = _image(2, 3, *size)
    out = model(x)
    assert out.shape == (2, 16)
    alone = torch.cat([model(x[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)
    assert model(x[:0]).shape == (0, 16)


def test_memory_format_changes_nothing() -> None:
    """Images and weights channels last in memory."""
    model, x = _small(), _image(2, 3, 33, 20)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_set_input_size_changes_the_paths_alone() -> None:
    """The same numbers as before, for the new size and the old one."""
    model = _small()
    x, y = _image(), _image(2, 3, 48, 20)
    expected = model(x), model(y)
    model.set_input_size((48, 20))
    assert [stage.blocks[0].op.paths.grid for stage in model.layers] == [(12, 5), (6, 3)]
    assert get_model_input_config(model)["input_size"] == (3, 48, 20)
    model.set_input_size()
    assert torch.equal(model(x), expected[0])
    assert torch.equal(model(y), expected[1])


def test_features_only_and_intermediates() -> None:
    """Maps before downsampling, with truthful reductions; norm, format and early stop."""
    maps = timm.create_model("test_vmamba", features_only=True)(_image(1, 3, 64, 96))
    assert [m.shape for m in maps] == [
        (1, 16, 16, 24),
        (1, 32, 8, 12),
        (1, 64, 4, 6),
        (1, 128, 2, 3),
    ]
    some = timm.create_model("test_vmamba", features_only=True, out_indices=(0, -2))
    assert some.feature_info.reduction() == [4, 16]
    assert some.feature_info.channels() == [16, 64]
    model, x = _small(), _image()
    final, taps = model.forward_intermediates(x, norm=True, output_fmt="NHWC")
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(taps[-1].permute(0, 3, 1, 2), final)
    early, first = model.forward_intermediates(x, [0], stop_early=True)
    assert torch.equal(early, first[0])
    assert torch.equal(first[0].permute(0, 2, 3, 1), taps[0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got NLC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_heads() -> None:
    """None keeps the pooling; no pooling classifies every place."""
    model, x = _small(global_pool="max"), _image()
    features = model.forward_features(x)
    vector = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(vector, features.amax((2, 3)))
    model.reset_classifier(0)
    assert torch.equal(model(x), vector)
    model.reset_classifier(9, "catavgmax")
    assert model.head_hidden_size == 32
    assert model(x).shape == (2, 9)
    model.reset_classifier(3, "")
    assert model(x).shape == (2, 3, 4, 4)
    torch.testing.assert_close(
        model(x)[..., 1, 2], model.get_classifier()(features[..., 1, 2]), rtol=1e-4, atol=1e-6
    )


def test_weight_decay_and_groups() -> None:
    """Decays, skips, steps, norms and biases are exempt; layers are sorted by depth."""
    model = _small()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", weight_decay=0.1).param_groups
    decayed = {names[id(p)] for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    exempt = ("A_logs", "Ds", "dt_projs_bias", "bias")
    expected = {n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith(exempt)}
    assert decayed == expected
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    order = ["patch_embed.0", "layers.0.blocks.0", "layers.0.downsample.1", "layers.1.blocks.1"]
    ranks = [layers[f"{key}{'.norm' if 'blocks' in key else ''}.weight"] for key in order]
    assert ranks == sorted(set(ranks))


def test_checkpointing_changes_nothing() -> None:
    """Outputs and gradients are those without."""
    model, x = _small().train(), _image()
    results = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        final, maps = model.forward_intermediates(x)
        (model(x).square().mean() + final.square().mean()).backward()
        results.append([final, *maps, *(p.grad for p in model.parameters())])
    for with_it, without in zip(*results, strict=True):
        torch.testing.assert_close(with_it, without)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Autocast and converted models, 24 blocks deep, stay near float32; decays stay float32."""
    model, x = _small(depths=(2, 22), d_state=2), _image()
    with torch.no_grad():
        expected = model.forward_features(x)
        with torch.autocast("cpu", dtype=dtype):
            cast = model.forward_features(x).float()
        converted = model.to(dtype).forward_features(x.to(dtype)).float()
    for features in (cast, converted):
        error = (features - expected).norm() / expected.norm()
        assert error < 2e-2, f"relative error {error:.3g}"
    made = _small(dtype=dtype)
    assert made.layers[0].blocks[0].op.A_logs.dtype == torch.float32
    assert made(x.to(dtype)).dtype == dtype


def test_autocast_trains() -> None:
    """Gradients in float32, finite, for every parameter."""
    model = _small().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(_image()).float().square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32, name
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_compiles_as_one_graph(size: tuple[int, int]) -> None:
    """Without graph breaks, with the same values and gradients; also at another size."""
    model, x = _small(depths=(1,)).train(), _image(2, 3, *size)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for candidate in (compiled, model):
        model.zero_grad()
        out = candidate(x)
        out.square().mean().backward()
        grads.append([out, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(grads[0], grads[1])


def test_exports() -> None:
    """`torch.export` with a batch of any size."""
    model = _small(depths=(1, 1))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (_image(),), dynamic_shapes={"x": {0: batch}})
    x = _image(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_overfits_a_handful_of_images() -> None:
    """Eight random images are learned by heart."""
    model = _small(num_classes=8, depths=(1, 1)).train()
    x, target = _image(8, 3, 16, 16), torch.arange(8)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert torch.equal(model.eval()(x).argmax(1), target)
