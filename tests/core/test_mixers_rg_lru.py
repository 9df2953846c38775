"""RG-LRU against transformers' RecurrentGemma, and its rule for the first token of a sequence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack
from torch import nn

from scanweave.core import create_mixer
from scanweave.core.mixers.rg_lru import RGLRU, RGLRUBlock
from scanweave.core.training import param_groups

Check = Callable[..., None]
NAMES = {
    "linear_y.weight": (32, 16),
    "linear_y.bias": (32,),
    "linear_x.weight": (32, 16),
    "linear_x.bias": (32,),
    "linear_out.weight": (16, 32),
    "linear_out.bias": (16,),
    "conv_1d.weight": (32, 1, 4),
    "conv_1d.bias": (32,),
    "rg_lru.recurrent_param": (32,),
    "rg_lru.input_gate_weight": (4, 8, 8),
    "rg_lru.input_gate_bias": (4, 8),
    "rg_lru.recurrent_gate_weight": (4, 8, 8),
    "rg_lru.recurrent_gate_bias": (4, 8),
}


def official(**size: Any) -> nn.Module:
    """The block of transformers, in plain PyTorch on a CPU, with none of its parameters 0."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaRecurrentBlock,
    )

    config = transformers.RecurrentGemmaConfig(hidden_size=16, num_hidden_layers=1, **size)
    theirs = RecurrentGemmaRecurrentBlock(config, 0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(std=0.5)
            if name.endswith("recurrent_param"):
                p.uniform_(-5, 0)
    return theirs


@pytest.mark.parametrize(
    ("size", "config"),
    [
        ({"lru_width": 16, "num_attention_heads": 2}, {"headdim": 8}),
        (
            {"lru_width": 32, "num_attention_heads": 8, "conv1d_width": 2},
            {"headdim": 4, "expand": 2, "d_conv": 2},
        ),
    ],
    ids=["equal_width", "wide"],
)
def test_equals_transformers(assert_near: Check, size: dict[str, Any], config: dict[str, Any]):
    theirs, ours = official(**size), create_mixer("rg_lru", 16, **config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x, places = torch.randn(2, 23, 16, requires_grad=True), torch.arange(23).expand(2, -1)
    expected, _ = theirs(x, places, None, use_cache=False)
    actual = ours(x)
    assert_near(actual, expected, name="output", factor=0.2)
    g = torch.randn_like(actual)
    parameters = dict(theirs.named_parameters())
    wanted = torch.autograd.grad(expected, [x, *parameters.values()], g)
    given = torch.autograd.grad(actual, [x, *(ours.get_parameter(k) for k in parameters)], g)
    for name, a, e in zip(["x", *parameters], given, wanted, strict=True):
        assert_near(a, e, gradient=True, name=name)


def test_decodes_as_transformers(assert_near: Check):
    theirs, ours = official(lru_width=16, num_attention_heads=2), RGLRUBlock(16, headdim=8)
    ours.load_state_dict(theirs.state_dict())
    x, places = torch.randn(2, 9, 16), torch.arange(9).expand(2, -1)
    with torch.no_grad():
        expected = [theirs(x[:, :5], places[:, :5], None)[0]]
        y, state = ours(x[:, :5], return_state=True)
        actual = [y]
        for t in range(5, 9):
            expected.append(theirs(x[:, t : t + 1], places[:, t : t + 1], None)[0])
            y, state = ours.step(x[:, t], state)
            actual.append(y.unsqueeze(1))
    assert_near(torch.cat(actual, 1), torch.cat(expected, 1), factor=0.2)


def test_documents_begin_as_in_transformers(assert_near: Check):
    """Positions 0 within a row restart their recurrence; one tap leaves nothing else to share."""
    theirs = official(lru_width=16, num_attention_heads=2, conv1d_width=1)
    ours = RGLRUBlock(16, headdim=8, d_conv=1)
    ours.load_state_dict(theirs.state_dict())
    lengths = (3, 1, 5)
    x = torch.randn(1, 9, 16)
    places = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    expected, _ = theirs(x, places, None, use_cache=False)
    assert_near(ours(x, cu_seqlens=pack(lengths)), expected, factor=0.2)


def test_first_token_is_written_as_it_is(assert_near: Check):
    mixer = RGLRUBlock(4, d_conv=1, dtype=torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    (values, outputs), matrix = mixer.core(x), mixer.matrix(x)
    w = mixer.rg_lru
    gate = torch.einsum("bhp,hpq->bhq", values[:, None, :, 0, 0], w.input_gate_weight)
    i = torch.sigmoid(gate + w.input_gate_bias).flatten(1)
    assert_near(matrix[:, :, 0, 0], i)
    assert_near(outputs[:, :, 0, 0], i * values[:, :, 0, 0])
    # a token that continues a sequence is scaled, however long ago that began
    state = mixer(x[:, :0], return_state=True)[1]
    assert not state["started"].any()
    assert_near(mixer(x, state=state), mixer(x))
    _, state = mixer(x[:, :1], state=state, return_state=True)
    _, state = mixer(x[:, :0], state=state, return_state=True)
    assert state["started"].all()
    state["h"].zero_()
    assert not torch.allclose(mixer(x, state=state), mixer(x))


def test_decays_near_one_have_finite_gradients():
    for dtype in (torch.float32, torch.float64):
        gates = RGLRU(4, 4, (0.9, 0.999), dtype=dtype)
        gates.reset_parameters()
        with torch.no_grad():
            gates.recurrent_param.copy_(torch.tensor([-200.0, -40.0, -17.0, 0.0]))
        w = torch.randn(1, 3, 4, dtype=dtype, requires_grad=True)
        log_a, factor = gates(w, torch.zeros(1, 3, 1, dtype=torch.bool))
        assert (log_a <= 0).all()
        (factor.sum() + log_a.sum()).backward()
        for v in (w, *gates.parameters()):
            assert v.grad is not None
            assert torch.isfinite(v.grad).all()


def test_root_is_exact_and_its_slope_bounded(assert_near: Check):
    gates = RGLRU(5, 1, (0.9, 0.999), dtype=torch.float64)
    nn.init.zeros_(gates.input_gate_weight)
    nn.init.zeros_(gates.recurrent_gate_weight)
    nn.init.constant_(gates.input_gate_bias, 40.0)
    nn.init.constant_(gates.recurrent_gate_bias, 40.0)
    rest = torch.tensor([1e-12, 1e-8, 1e-6, 0.1, 0.9], dtype=torch.float64)
    softplus = -torch.log1p(-rest) / 16
    with torch.no_grad():
        gates.recurrent_param.copy_(torch.log(torch.expm1(softplus)))
    w = torch.ones(1, 1, 5, dtype=torch.float64)
    _, factor = gates(w, torch.zeros(1, 1, 1, dtype=torch.bool))
    assert_near(factor[0, 0], rest.sqrt())
    factor.sum().backward()
    slope = torch.minimum(0.5 / rest.sqrt(), torch.tensor(1000.0))
    # d rest / d parameter
    inner = 16 * (1 - rest) * torch.sigmoid(gates.recurrent_param.detach())
    assert_near(gates.recurrent_param.grad, slope * inner, gradient=True)


def test_official_names_and_shapes():
    mixer = create_mixer("rg_lru", 16, expand=2, headdim=8)
    assert {k: tuple(v.shape) for k, v in mixer.state_dict().items()} == NAMES
    for dim, width in ((768, 64), (96, 48), (50, 50), (67, 1)):
        assert create_mixer("rg_lru", dim, device="meta").headdim == width


def test_initial_values():
    mixer = RGLRUBlock(1024, headdim=64)
    decays = torch.exp(-2 * nn.functional.softplus(mixer.rg_lru.recurrent_param))
    assert decays.min() >= 0.9**2 - 1e-5
    assert decays.max() <= 0.999**2 + 1e-5
    assert abs(decays.mean() - (0.9**2 + 0.999**2) / 2) < 0.01
    gates = mixer.rg_lru
    for weight, std in (
        (mixer.linear_x.weight, 1024**-0.5),
        (mixer.linear_y.weight, 1024**-0.5),
        (mixer.linear_out.weight, 1024**-0.5),
        (mixer.conv_1d.weight, 0.05),
        (gates.input_gate_weight, 0.125),
        (gates.recurrent_gate_weight, 0.125),
    ):
        assert abs(weight.std() / std - 1) < 0.06
    biases = {k for k, p in mixer.named_parameters() if not p.any()}
    assert biases == {k for k in NAMES if k.endswith("bias")}
    for dtype in (torch.bfloat16, torch.float16):
        half = create_mixer("rg_lru", 16, dtype=dtype)
        kept = {k for k, v in half.state_dict().items() if v.dtype == torch.float32}
        assert kept == {"rg_lru.recurrent_param"}


def test_decays_and_biases_have_no_weight_decay():
    mixer = RGLRUBlock(16)
    names = {id(p): k for k, p in mixer.named_parameters()}
    free = set()
    for group in param_groups(mixer, weight_decay=0.1):
        if not group["weight_decay"]:
            free |= {names[id(p)] for p in group["params"]}
    assert free == {k for k in NAMES if k.endswith(("bias", "recurrent_param"))}


def test_save_and_load_are_exact():
    first, second = create_mixer("rg_lru", 16), create_mixer("rg_lru", 16)
    x = torch.randn(2, 5, 16)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(x), second(x))


def test_errors():
    for config, match in (
        ({"headdim": 5}, "headdim must divide the 16 inner channels, got 5"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"expand": 0}, r"expand \* d_model must be at least 1, got 0"),
        ({"decay_range": (0.0, 0.9)}, r"decay_range must be \(low, high\) within \(0, 1\)"),
        ({"decay_range": (0.9, 1.0)}, r"decay_range must be \(low, high\) within \(0, 1\)"),
        ({"decay_range": (0.9, 0.8)}, r"decay_range must be \(low, high\) within \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=match):
            create_mixer("rg_lru", 16, **config)
    mixer = create_mixer("rg_lru", 16)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 16\)"):
        mixer.step(torch.randn(2, 15), mixer.init_state(2))
