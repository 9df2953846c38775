"""Mega against fairseq's layer (stored values), chunks, states, initial values, errors.

`data/mixers_mega.json` holds what MovingAverageGatedAttention of facebookresearch/mega (commit
aeaa4b4, fairseq/modules/moving_average_gated_attention.py; 4 channels, 3 of keys and values, 2
averages) gives in float64 with the weights, inputs and cotangents of `waves`: outputs with the
input added, the gradient of the input, and of every weight the sum of its gradient times a wave of
speed 0.37. It was given masks of causal attention, and transforms in float64. A case's number is
its chunk, or for 9 the size of the table of positions, without chunks.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from tests.core.wave_cases import waves
from torch import Tensor

from scanweave.core import Mixer, create_mixer
from scanweave.core.mixers.mega import Mega
from scanweave.core.training import param_groups

Check = Callable[..., None]
DATA = json.loads((Path(__file__).parent / "data" / "mixers_mega.json").read_text())
CASES = [tuple(key.split("-")) for key in DATA]


def stored(values: Any) -> Tensor:
    """Numbers of the file in float64."""
    return torch.tensor(values, dtype=torch.float64)


def stepped(mixer: Mixer, x: Tensor) -> Tensor:
    """Outputs token by token."""
    with torch.no_grad():
        state, rows = mixer.init_state(x.shape[0]), []
        for token in x.unbind(1):
            row, state = mixer.step(token, state)
            rows.append(row)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("mode", ["scan", "conv"])
@pytest.mark.parametrize(("way", "attention", "chunk"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_equals_the_published_layer(
    assert_near: Check, way: str, attention: str, chunk: str, mode: str, dtype: torch.dtype
):
    name, case = "mega" if way == "causal" else "mega_bidirectional", f"{way}-{attention}-{chunk}"
    sizes = {"d_attn": 3, "expand": 0.75, "d_state": 2, "chunk_size": int(chunk)}
    mixer = create_mixer(
        name, 4, **sizes, attention=attention, norm=True, mode=mode, dtype=dtype
    )  # fmt: skip
    names, values = sorted(k for k, _ in mixer.named_parameters()), DATA[case]
    with torch.no_grad():
        for i, key in enumerate(names):
            p = mixer.get_parameter(key)
            p.copy_(0.5 * waves(*p.shape, speed=0.3 + 0.1 * i) + (key == "gamma"))
    length = 7 if chunk == "9" else 8
    x, g = (waves(1, length, 4, speed=speed).to(dtype) for speed in (0.7, 0.9))
    x.requires_grad_()
    y = mixer(x) + x
    assert_near(y, stored(values["y"]), factor=0.1)
    grads = torch.autograd.grad((y * g).sum(), [x, *(mixer.get_parameter(k) for k in names)])
    assert_near(grads[0], stored(values["gx"]), gradient=True, factor=0.1)
    for key, v in zip(names, grads[1:], strict=True):
        total = (v.double() * waves(*v.shape, speed=0.37)).sum()
        # sums cancel
        expected = stored(values["sums"][key])
        assert_near(total, expected, dtype=dtype, gradient=True, name=key, factor=5)
    packed = mixer(torch.cat([x, x], 1), cu_seqlens=pack((length, length)))
    assert_near(packed, torch.cat([y - x] * 2, 1), factor=0.1)
    if way == "causal":
        assert_near(stepped(mixer, x), y - x, factor=0.2)


@pytest.mark.parametrize("attention", ["softmax", "laplace"])
def test_chunks_are_apart_but_for_the_averages(assert_near: Check, attention: str):
    mixer = create_mixer("mega", 4, chunk_size=3, attention=attention, dtype=torch.float64)
    x = torch.randn(2, 8, 4, dtype=torch.float64)
    matrix = mixer.matrix(x)
    chunk = torch.arange(8) // 3
    assert not matrix[:, :, chunk[:, None] != chunk].any()
    assert (matrix[:, 0, -1, 6:] != 0).all()
    if attention == "softmax":
        assert_near(matrix.sum(-1), torch.ones(2, 1, 8, dtype=torch.float64))
    other = x.clone()
    other[:, 0] += 1
    assert (mixer(other)[:, -1] != mixer(x)[:, -1]).all()


@pytest.mark.parametrize("attention", ["softmax", "laplace"])
def test_states_at_any_place_of_a_chunk(assert_near: Check, attention: str):
    """Rows of a batch whose chunks are filled to different places, stepped and then continued."""
    mixer = create_mixer("mega", 4, chunk_size=4, attention=attention, dtype=torch.float64)
    lengths = (1, 3, 4, 0, 6)
    x, more = torch.randn(1, 14, 4).double(), torch.randn(5, 9, 4).double()
    _, state = mixer(x, cu_seqlens=pack(lengths), return_state=True)
    assert state["filled"].flatten().tolist() == [1, 3, 0, 0, 2]
    for name in ("k", "v"):  # nothing is kept of full chunks
        for row, held in zip(state[name], (1, 3, 0, 0, 2), strict=True):
            assert row[:held].any() == (held > 0)
            assert not row[held:].any()
    wholes = [mixer(torch.cat([p, m[None]], 1)) for p, m in
              zip(x.split(lengths, 1), more, strict=True)]  # fmt: skip
    with torch.no_grad():
        for t in range(3):
            y, state = mixer.step(more[:, t], state)
            expected = torch.stack([w[0, w.shape[1] - 9 + t] for w in wholes])
            assert_near(y, expected)
    # what is left of the chunk before lies behind the present token and is not read
    state = {k: v.masked_fill(torch.arange(4)[:, None] >= state["filled"][..., None], 1e3)
             if k in "kv" else v for k, v in state.items()}  # fmt: skip
    rest = mixer(more[:, 3:], state=state)
    assert_near(rest, torch.cat([w[:, -6:] for w in wholes]))


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in Mega(8, chunk_size=5).state_dict().items()}
    move = {f"move.{k}": (8, 16, 1) for k in ("delta", "alpha", "beta")}
    move |= {"move.gamma": (8, 16), "move.omega": (8,)}
    linear = {"v_proj.weight": (16, 8), "mx_proj.weight": (36, 8), "h_proj.weight": (8, 16)}
    linear |= {k.replace("weight", "bias"): v[:1] for k, v in linear.items()}
    own = {"gamma": (2, 4), "beta": (2, 4), "rel_pos_bias.rel_pos_bias": (9,)}
    assert shapes == move | linear | own
    both = create_mixer("mega_bidirectional", 8, norm=True)
    assert both.get_parameter("move.gamma").shape == (16, 16)
    assert both.get_parameter("norm.norm.weight").shape == (8,)
    names = {id(p): k for k, p in both.named_parameters()}
    groups = param_groups(both, 0.1, lr=0.01)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {"v_proj.weight", "mx_proj.weight", "h_proj.weight"}


def test_initial_values():
    mixer = Mega(64, d_attn=200)
    move = mixer.move
    for p, mean, std in (
        (move.delta, 0, 0.2),
        (move.alpha, 0, 0.2),
        (move.beta[:, ::2], 1, 0.02),
        (move.beta[:, 1::2], -1, 0.02),
        (move.gamma, 0, 1),
        (mixer.gamma, 0, 0.02),
        (mixer.mx_proj.weight, 0, 0.02),
        (mixer.rel_pos_bias["rel_pos_bias"], 0, 0.02),
    ):
        assert abs(p.mean() - mean) < 0.25 * std
        assert abs(p.std() / std - 1) < 0.25
    assert not mixer.beta.any()
    (terms,) = move()
    assert (terms.log_a < 0).all()
    assert len(create_mixer("mega_bidirectional", 4).get_submodule("move")()) == 2


def test_errors():
    for config, match in (
        ({"d_attn": 0}, "d_attn must be at least 1, got 0"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"expand": 0.1}, r"expand \* d_model must be at least 1, got 0"),
        ({"attention": "relu"}, "attention must be one of softmax, laplace, got relu"),
        ({"mode": "fft"}, "mode must be one of auto, conv, scan, got fft"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("mega", 8, **config)
