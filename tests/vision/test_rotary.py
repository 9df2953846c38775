"""Rotary positions: angles, sizes, checkpoints, refusals."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from scanweave.vision import Vim
from scanweave.vision.rotary import RotaryPositions
from scanweave.vision.vim import checkpoint_filter_fn

SMALL = {"embed_dim": 32, "depth": 2, "img_size": 64, "num_classes": 5}
DIRECTIONS = (("h", "w3"), ("v_flip",))


def _small(**kwargs: Any) -> Vim:
    given = {**SMALL, "directions": DIRECTIONS, **kwargs}
    return timm.create_model("local_vim_tiny_rope_patch16_224", **given).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(size or (2, 3, 64, 64))


def test_pairs_are_rotated_by_row_and_column() -> None:
    """Two rows and seven columns, of 14 places each; lengths of pairs stay."""
    rope = RotaryPositions(8, (2, 7))
    x = torch.randn(1, 14, 8)
    y = rope(x)
    for place in range(14):
        row, column = divmod(place, 7)
        angles = [7.0 * row, 7.0 * row / 100, 2.0 * column, 2.0 * column / 100]
        for i, angle in enumerate(angles):
            a, b = x[0, place, 2 * i : 2 * i + 2].tolist()
            expected = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
            assert y[0, place, 2 * i : 2 * i + 2].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(y[:, :1], x[:, :1])
    assert rope(x.bfloat16()).dtype == torch.bfloat16


def test_every_layer_is_rotated() -> None:
    model, x = _small(), _image()
    seen: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, taps = model.forward_intermediates(x, output_fmt="NLC")
    torch.testing.assert_close(seen[0], model.rope(model._embed(x)))
    torch.testing.assert_close(seen[1], model.rope(taps[0]))


def test_size_follows_set_input_size() -> None:
    """As a model made with it; a checkpoint of another size loads too."""
    model, target = _small(), _small(img_size=(48, 80))
    state = dict(model.state_dict())
    assert state["rope.freqs_cos"].shape == (16, 32)
    target.load_state_dict(checkpoint_filter_fn(state, target))
    model.set_input_size((48, 80))
    assert model.rope.freqs_sin.shape == (15, 32)
    x = _image(2, 3, 48, 80)
    torch.testing.assert_close(target(x), model(x))


def test_usable_after_to_empty_compiled_and_trained() -> None:
    model = timm.create_model(
        "local_vim_tiny_rope_patch16_224", device="meta", directions=DIRECTIONS, **SMALL
    ).to_empty(device="cpu")
    model.init_weights()
    torch.testing.assert_close(model.rope.freqs_cos, RotaryPositions(32, (4, 4)).freqs_cos)
    x = _image()
    torch.compiler.reset()
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), compiled(x))


@pytest.mark.filterwarnings("ignore:Mapping deprecated model")
@pytest.mark.parametrize(
    ("official", "width", "tokens"),
    [
        ("local_vim_tiny", 192, 0),
        ("local_vim_small", 384, 0),
        ("local_vim_tiny_middle_cls_token", 192, 1),
    ],
)
def test_official_names(official: str, width: int, tokens: int) -> None:
    model = timm.create_model(official, device="meta")
    assert (model.embed_dim, model.num_prefix_tokens, len(model.layers)) == (width, tokens, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_token": True, "global_pool": "token"}, "rope must be without class_token .* True"),
        ({"dynamic_img_size": True}, "rope must be without .* got False and True"),
        ({"embed_dim": 30}, "embed_dim must be a multiple of 4 with rope, got 30"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _small(**arguments)
