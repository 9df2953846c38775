"""Models of one width: timm's contract beyond what timm's own tests ask."""

from typing import Any

import pytest
import timm
import torch
from timm.models import get_model_input_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from scanweave.vision import Vim

SMALL = {"embed_dim": 32, "depth": 3, "img_size": 64, "num_classes": 5}


def _small(**kwargs: Any) -> Vim:
    return timm.create_model("test_vim", **{**SMALL, **kwargs}).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 64, 64))


@pytest.mark.parametrize(
    ("arguments", "key", "shape"),
    [
        ({"embed_dim": 48}, "norm_f.weight", (48,)),
        ({"depth": 5}, "layers.4.norm.weight", (32,)),
        ({"patch_size": 8}, "patch_embed.proj.weight", (32, 3, 8, 8)),
        ({"patch_size": 8}, "pos_embed", (1, 65, 32)),
        ({"patch_size": (8, 16)}, "pos_embed", (1, 33, 32)),
        ({"stride": 8}, "pos_embed", (1, 50, 32)),
        ({"img_size": 96}, "pos_embed", (1, 37, 32)),
        ({"in_chans": 4}, "patch_embed.proj.weight", (32, 4, 16, 16)),
        ({"num_classes": 7}, "head.bias", (7,)),
        ({"d_state": 4}, "layers.0.mixer.A_b_log", (64, 4)),
        ({"d_conv": 3}, "layers.0.mixer.conv1d_b.weight", (64, 1, 3)),
        ({"expand": 1}, "layers.0.mixer.in_proj.weight", (64, 32)),
        ({"dt_rank": 5}, "layers.0.mixer.dt_proj.weight", (64, 5)),
        ({"mixer_args": {"bias": True}}, "layers.0.mixer.out_proj.bias", (32,)),
        ({"mixer": "attention_bidirectional"}, "layers.2.norm.weight", (32,)),
        ({"class_token": False, "global_pool": "avg"}, "pos_embed", (1, 16, 32)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, "pos_embed", (1, 17, 32)),
    ],
)
def test_architecture_arguments_reach_the_parameters(
    arguments: dict[str, Any], key: str, shape: tuple[int, ...]
) -> None:
    """Every size can be overridden through `create_model`, and the model then runs."""
    model = _small(**arguments)
    assert tuple(model.state_dict()[key].shape) == shape
    size = model.patch_embed.img_size
    logits = model(_image(2, model.in_chans, *size))
    assert logits.shape == (2, model.num_classes)
    assert torch.isfinite(logits).all()


def test_other_arguments_reach_their_module() -> None:
    """Rates, epsilon and flags."""
    model = _small(
        drop_rate=0.1, pos_drop_rate=0.2, drop_path_rate=0.4, norm_eps=1e-3, residual_in_fp32=False
    )
    assert (model.head_drop.p, model.pos_drop.p) == (0.1, 0.2)
    assert [getattr(b.drop_path, "drop_prob", 0.0) for b in model.layers] == pytest.approx(
        [0.0, 0.2, 0.4]
    )
    assert model.layers[0].norm.eps == model.norm_f.eps == 1e-3
    assert not model.residual_in_fp32
    assert "pos_embed" not in _small(pos_embed="none").state_dict()


@pytest.mark.parametrize("position", ["middle", "first", "last"])
def test_class_token_stands_where_asked(position: str) -> None:
    """The token that is pooled is the one that was inserted, at the official places."""
    model = _small(class_token_pos=position, img_size=(48, 80))
    row = {"middle": 7, "first": 0, "last": 15}[position]
    features = model.forward_features(_image(2, 3, 48, 80))
    assert features.shape == (2, 16, 32)
    assert torch.equal(model.pool(features), features[:, row])
    rest = torch.cat([features[:, :row], features[:, row + 1 :]], 1)
    torch.testing.assert_close(model.pool(features, "avg"), rest.mean(1))
    torch.testing.assert_close(model.pool(features, "max"), rest.amax(1))
    assert model.pool(features, "") is features
    before = model._embed(_image(1, 3, 48, 80) * 0)[0, row]
    expected = model.cls_token[0, 0] + model.pos_embed[0, row]
    torch.testing.assert_close(before, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"not_an_argument": 1}, TypeError, "not_an_argument"),
        ({"mixer_args": {"heads": 1}}, TypeError, "mixer 'bimamba' does not take heads"),
        ({"mixer": "nope"}, ValueError, "mixer must be one of .*, got 'nope'"),
        ({"global_pool": "catavgmax"}, ValueError, "global_pool must be one of .*'catavgmax'"),
        ({"class_token": False}, ValueError, "global_pool must be 'avg'.* without class_token"),
        ({"class_token_pos": "end"}, ValueError, "class_token_pos must be .*, got 'end'"),
        ({"pos_embed": "sine"}, ValueError, "pos_embed must be 'learn' or 'none', got 'sine'"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"img_size": 8}, ValueError, "img_size must be at least patch_size"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    """At creation, with the argument, the rule and what was given."""
    with pytest.raises(error, match=message):
        _small(**arguments)


def test_reset_classifier_checks_and_keeps_the_pool() -> None:
    """None keeps it; an unknown one is refused; 0 classes give features."""
    model = _small(global_pool="max")
    x = _image()
    expected = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert model.get_classifier() is model.head
    torch.testing.assert_close(model(x), expected)
    model.reset_classifier(9, "avg")
    assert model(x).shape == (2, 9)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(9, "catavgmax")


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (16, 16), (33, 64)])
@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_and_batches(size: tuple[int, int], batch: int) -> None:
    """Odd and non-square images, a single patch, batch 1; no image sees another."""
    model = _small(img_size=size, num_classes=0, in_chans=1)
    x = _image(batch, 1, *size)
    out = model(x)
    assert out.shape == (batch, 32)
    alone = torch.cat([model(x[i : i + 1]) for i in range(batch)])
    torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)


def test_empty_batch() -> None:
    """No images, no logits."""
    assert _small()(_image(0, 3, 64, 64)).shape == (0, 5)


def test_dynamic_image_size_equals_set_input_size() -> None:
    """Interpolating in `forward` and once beforehand is the same model."""
    dynamic, fixed = _small(dynamic_img_size=True), _small()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((96, 48))
    assert get_model_input_config(fixed)["input_size"] == (3, 96, 48)
    x = _image(2, 3, 96, 48)
    torch.testing.assert_close(dynamic(x), fixed(x))
    final, maps = dynamic.forward_intermediates(x, output_fmt="NCHW")
    assert [m.shape for m in maps] == [(2, 32, 6, 3)] * 3
    torch.testing.assert_close(final, fixed.forward_features(x))


def test_set_input_size_changes_patches_and_stride() -> None:
    """Stride and patch size too, with truthful feature_info and frozen parameters kept so."""
    model = _small().requires_grad_(False)
    model.set_input_size(stride=8)
    assert model.pos_embed.shape == (1, 50, 32)
    assert [i["reduction"] for i in model.feature_info] == [8, 8, 8]
    assert model(_image()).shape == (2, 5)
    model = _small().requires_grad_(False)
    model.set_input_size(img_size=32, patch_size=8)
    assert model.patch_embed.grid_size == (4, 4)
    assert model(_image(2, 3, 32, 32)).shape == (2, 5)
    assert not any(p.requires_grad for p in model.parameters())


def test_wrong_images_are_refused() -> None:
    """Size and channels, by timm's kind of check, which can be traced."""
    with pytest.raises(AssertionError, match="image height must be 64, got 48"):
        _small()(_image(1, 3, 48, 64))
    with pytest.raises(AssertionError, match="image must have 3 channels, got 1; see in_chans"):
        _small()(_image(1, 1, 64, 64))


def test_features_only_gives_maps() -> None:
    """As timm users ask for them: maps of the layers listed, stride 8, class token gone."""
    model = timm.create_model(
        "test_vim", features_only=True, out_indices=(0, -1), **{**SMALL, "stride": 8}
    )
    assert model.feature_info.reduction() == [8, 8]
    maps = model(_image(2, 3, 64, 64))
    assert [m.shape for m in maps] == [(2, 32, 7, 7)] * 2


def test_intermediates_options() -> None:
    """Tokens, prefix tokens, norm, early stop; and an unknown format."""
    model, x = _small(), _image()
    features = model.forward_features(x)
    final, taps = model.forward_intermediates(
        x, indices=[0, 2], norm=True, return_prefix_tokens=True, output_fmt="NLC"
    )
    assert torch.equal(final, features)
    patches, token = taps[-1]
    assert torch.equal(token[:, 0], model.pool(features))
    assert torch.equal(torch.cat([patches[:, :8], token, patches[:, 8:]], 1), features)
    early = model.forward_intermediates(
        x, indices=[0], norm=True, stop_early=True, intermediates_only=True, output_fmt="NLC"
    )
    torch.testing.assert_close(early[0], taps[0][0])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got NHWC"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_weight_decay_reaches_projections_only() -> None:
    """Decays, skips, steps, norms, biases, positions and class token are exempt."""
    model = _small()
    names = {id(p): n for n, p in model.named_parameters()}
    expected = {n for n in names.values() if n.endswith("weight") and "norm" not in n}
    # copies and `to_empty` lose marks on parameters; the names must survive
    meta = timm.create_model("test_vim", device="meta", **SMALL).to_empty(device="cpu")
    for candidate in (model, meta):
        names = {id(p): n for n, p in candidate.named_parameters()}
        groups = create_optimizer_v2(candidate, opt="adamw", weight_decay=0.1).param_groups
        decayed = [g for g in groups if g["weight_decay"] > 0]
        assert {names[id(p)] for g in decayed for p in g["params"]} == expected


@pytest.mark.parametrize("features_only", [False, True])
def test_checkpointing_changes_nothing(features_only: bool) -> None:
    """Outputs and gradients are those without."""
    kwargs = {"features_only": True, "out_indices": (0, 2)} if features_only else {}
    model = timm.create_model("test_vim", **SMALL, **kwargs).train()
    results = []
    x = _image()
    for enable in (False, True):
        model.zero_grad()
        (model.model if features_only else model).set_grad_checkpointing(enable)
        outputs = model(x) if features_only else [model(x)]
        sum(y.square().mean() for y in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters())])
    for with_it, without in zip(*results, strict=True):
        torch.testing.assert_close(with_it, without)


def test_residual_stream_dtype() -> None:
    """Float32 between the layers of a bfloat16 model, bfloat16 outside; off when told."""
    seen: list[torch.dtype] = []
    for flag in (True, False):
        model = _small(residual_in_fp32=flag, dtype=torch.bfloat16)
        model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        x = _image().bfloat16()
        assert model(x).dtype == model.forward_features(x).dtype == torch.bfloat16
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert {m.dtype for m in maps} == {torch.bfloat16}
    assert set(seen[:3]) == {torch.float32}
    assert set(seen[3:]) == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_depth_24(dtype: torch.dtype) -> None:
    """Autocast and a converted model stay finite and near float32."""
    model = _small(depth=24)
    x = _image(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_features(x)
        with torch.autocast("cpu", dtype=dtype):
            cast = model.forward_features(x).float()
        converted = model.to(dtype).forward_features(x.to(dtype)).float()
    for features in (cast, converted):
        assert torch.isfinite(features).all()
        error = (features - expected).norm() / expected.norm()
        assert error < 2e-2, f"relative error {error:.3g}"


def test_autocast_trains() -> None:
    """Gradients in float32, finite, for every parameter."""
    model = _small(depth=8).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(_image()).float().square().mean()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == torch.float32, name
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("train", [False, True])
def test_compiles_as_one_graph(train: bool) -> None:
    """Without graph breaks, with the same values and gradients."""
    model = _small(depth=2).train(train)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = _image()
    torch.testing.assert_close(compiled(x), model(x))
    if train:
        grads = []
        for candidate in (compiled, model):
            model.zero_grad()
            candidate(x).square().mean().backward()
            grads.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(grads[0], grads[1])


def test_exports() -> None:
    """`torch.export` with a batch of any size."""
    model = _small(depth=2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (_image(),), dynamic_shapes={"x": {0: batch}})
    x = _image(5, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_overfits_a_handful_of_images() -> None:
    """Eight random images are learned by heart."""
    model = _small(depth=2, num_classes=8).train()
    x, target = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.0)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert torch.equal(model.eval()(x).argmax(1), target)


def test_every_token_sees_every_token() -> None:
    """Both directions are at work: a change in any patch moves the class token."""
    model, x = _small(depth=1).double(), _image(1, 3, 64, 64).double()
    plain = model.pool(model.forward_features(x))
    for row, column in ((0, 0), (3, 3)):
        changed = x.clone()
        changed[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1
        assert (model.pool(model.forward_features(changed)) - plain).abs().max() > 1e-8
