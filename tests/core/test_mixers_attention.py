"""Rotary positions of attention, and attention whose state is its window."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from scanweave.core import create_mixer
from scanweave.core.mixers.attention import place_angles
from scanweave.core.ops.rotate import rotate_both

Check = Callable[..., None]


def join(theirs: nn.Module) -> dict[str, torch.Tensor]:
    """Transformers' three projections as our one."""
    names = ("q_proj", "k_proj", "v_proj")
    state = {"in_proj.weight": torch.cat([theirs.get_parameter(f"{n}.weight") for n in names])}
    state["out_proj.weight"] = theirs.get_parameter("o_proj.weight")
    state["out_proj.bias"] = theirs.get_parameter("o_proj.bias")
    return {name: v.detach() for name, v in state.items()}


@pytest.mark.parametrize("heads", [(4, 1), (2, 2)])
def test_equals_recurrent_gemma(assert_near: Check, heads: tuple[int, int]):
    """Window, half of the channels rotated, one head of keys and values."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaAttention,
    )

    config = transformers.RecurrentGemmaConfig(
        hidden_size=32,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        attn_implementation="eager",
    )
    theirs = RecurrentGemmaAttention(config, 0)
    ours = create_mixer(
        "local_attention",
        32,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        window=5,
        rope_fraction=0.5,
        bias=False,
        out_bias=True,
    )
    ours.load_state_dict(join(theirs), strict=True)
    x, place = torch.randn(2, 23, 32), torch.arange(23)
    lag = place.unsqueeze(1) - place
    mask = torch.where((lag >= 0) & (lag < 5), 0.0, float("-inf"))[None, None]
    expected, _ = theirs(x, place.expand(2, -1), mask)
    assert_near(ours(x), expected, factor=0.2)
    state, parts = ours.init_state(2), []
    with torch.no_grad():
        for t in range(23):
            y, state = ours.step(x[:, t], state)
            parts.append(y)
    assert_near(torch.stack(parts, 1), expected, factor=0.2)


def test_rotations_depend_on_distances(assert_near: Check):
    q, k = torch.randn(1, 9, 2, 8).double(), torch.randn(1, 9, 2, 8).double()
    scores = []
    for start in (0, 1000):
        place = torch.arange(start, start + 9).unsqueeze(0)
        a, b = rotate_both(q, k, place_angles(place, 6, 100.0, q.dtype), halves=True)
        assert torch.equal(a[..., 6:], q[..., 6:])
        scores.append(torch.einsum("blhp,bmhp->bhlm", a, b))
    assert_near(scores[0], scores[1])
    assert not torch.allclose(scores[0], torch.einsum("blhp,bmhp->bhlm", q, k))


def test_local_is_attention_with_a_window(assert_near: Check):
    size: dict[str, Any] = {"num_heads": 2, "window": 4, "prefix": 2, "rope_fraction": 0.5}
    local, full = create_mixer("local_attention", 16, **size), create_mixer("attention", 16, **size)
    full.load_state_dict(local.state_dict(), strict=True)
    x = torch.randn(2, 20, 16)
    assert_near(local(x), full(x), factor=0.1)
    # what has left the window changes nothing, what is in the prefix does
    other = x.clone()
    other[:, 2:16] = torch.randn(2, 14, 16)
    assert torch.equal(local(other)[:, 19], local(x)[:, 19])
    other[:, 0] += 1
    assert not torch.allclose(local(other)[:, 19], local(x)[:, 19])


@pytest.mark.parametrize("name", ["attention", "local_attention", "attention_bidirectional"])
@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"prefix": -1}, "prefix must be at least 0, got -1"),
        ({"expand": 0}, r"expand \* d_model must be at least 1, got 0"),
        ({"expand": 2, "num_heads": 5}, r"num_heads must divide expand \* d_model 16, got 5"),
        ({"rope_fraction": 1.5}, "rope_fraction must leave an even share of the 8 channels"),
        ({"rope_fraction": -0.5}, "rope_fraction must leave an even share"),
        ({"rope_fraction": 0.01}, "rope_fraction must leave an even share"),
        ({"num_heads": 8, "rope_fraction": 1.0}, "even share of the 1 channels of a head, got 1"),
    ],
)
def test_refusals(name: str, config: dict[str, Any], rule: str):
    with pytest.raises(ValueError, match=rule):
        create_mixer(name, 8, **config)
