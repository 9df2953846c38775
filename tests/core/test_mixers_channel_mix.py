"""RWKV's channel mix against transformers' and RWKV-LM's layers, and the laws of mixers for it."""

from collections.abc import Callable

import pytest
import torch
from tests.core.op_cases import pack
from tests.core.rwkv_cases import stored, wave_weights, waves
from torch import Tensor

from scanweave.core import list_mixers
from scanweave.core.mixers import BidirectionalChannelMix, ChannelMix

Check = Callable[..., None]
BOTH = pytest.mark.parametrize("kind", [ChannelMix, BidirectionalChannelMix])


def drawn(kind: type[ChannelMix] = ChannelMix, dtype: torch.dtype = torch.float64) -> ChannelMix:
    mix = kind(6, dtype=dtype)
    with torch.no_grad():
        for p in mix.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mix


def test_equals_transformers(assert_near: Check):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from transformers.models.rwkv.modeling_rwkv import RwkvFeedForward

    config = transformers.RwkvConfig(hidden_size=16, intermediate_size=40, num_hidden_layers=2)
    theirs, ours = RwkvFeedForward(config, 0), ChannelMix(16, expand=2.5)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 9, 16, requires_grad=True)
    (expected, _), actual = theirs(x), ours(x)
    assert_near(actual, expected, factor=0.1)
    parameters = dict(theirs.named_parameters())
    g = torch.randn_like(actual)
    wanted = torch.autograd.grad(expected, [x, *parameters.values()], g)
    given = torch.autograd.grad(actual, [x, *(ours.get_parameter(k) for k in parameters)], g)
    for name, a, e in zip(["x", *parameters], given, wanted, strict=True):
        assert_near(a, e, gradient=True, factor=0.1, name=name)


@pytest.mark.parametrize(
    ("layer", "shares"), [("RWKV_CMix_x052", "time_mix_"), ("RWKV_CMix_x060", "time_maa_")]
)
def test_equals_rwkv_lm(assert_near: Check, layer: str, shares: str):
    mix = ChannelMix(8, expand=1.5, dtype=torch.float64)
    names = {"time_mix_key": f"{shares}k", "time_mix_receptance": f"{shares}r"}
    shapes = {names.get(name, name): p.shape for name, p in mix.named_parameters()}
    mix.load_state_dict(wave_weights(shapes), strict=True)
    y = mix(waves(1, 5, 8, speed=0.7))
    assert_near(y, stored(layer, "output"), dtype=torch.float32, factor=0.01)


def test_initial_values():
    mix = ChannelMix(4, layer=1, num_layers=3)
    expected = torch.tensor([(i / 4) ** (2 / 3) for i in range(4)])
    for share in (mix.time_mix_key, mix.time_mix_receptance):
        torch.testing.assert_close(share.flatten(), expected)
        assert getattr(share, "_no_weight_decay", False)
    assert mix.key.weight.shape == (16, 4)
    assert mix(torch.randn(1, 3, 4)).any()
    mix = ChannelMix(4, zero_init=True)
    assert not mix.receptance.weight.any()
    y = mix(torch.randn(1, 3, 4))
    assert not y.any()
    y.sum().backward()
    assert mix.value.weight.grad is not None
    assert mix.value.weight.grad.any()


def test_is_no_mixer_by_name():
    assert not any(name.startswith("channel_mix") for name in list_mixers())


def test_pieces_and_steps_are_the_whole(assert_near: Check):
    mix, x = drawn(), torch.randn(2, 7, 6, dtype=torch.float64)
    whole, last = mix(x, return_state=True)
    first, state = mix(x[:, :3], return_state=True)
    empty, state = mix(x[:, :0], state=state, return_state=True)
    rest, state = mix(x[:, 3:], state=state, return_state=True)
    assert_near(torch.cat([first, empty, rest], 1), whole)
    assert torch.equal(state["shift"], last["shift"])
    assert torch.equal(last["shift"], x[:, -1])
    for grad in (False, True):
        state = mix.init_state(2)
        with torch.set_grad_enabled(grad):
            for t in range(7):
                y, state = mix.step(x[:, t], state)
                assert_near(y, whole[:, t])
    assert mix.state_spec() == {"shift": ((6,), torch.float64)}


@BOTH
def test_packed_and_masked_are_separate(assert_near: Check, kind: type[ChannelMix]):
    mix, lengths = drawn(kind), (3, 0, 1, 4)
    x = torch.randn(1, 8, 6, dtype=torch.float64, requires_grad=True)
    packed = mix(x, cu_seqlens=pack(lengths))
    separate = torch.cat([mix(v) for v in x.split(lengths, 1)], 1)
    assert_near(packed, separate)
    g, given = torch.randn_like(packed), [x, *mix.parameters()]
    expected = torch.autograd.grad(separate, given, g)
    for a, e in zip(torch.autograd.grad(packed, given, g), expected, strict=True):
        assert_near(a, e, gradient=True)
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]]).bool()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    y = mix(x, mask=mask)
    assert not y[~mask].any()
    for i in range(2):
        assert_near(y[i : i + 1, mask[i]], mix(x[i : i + 1, mask[i]]))


def test_packed_states(assert_near: Check):
    mix, lengths = drawn(), (3, 0, 2)
    x, more = (torch.randn(1, n, 6, dtype=torch.float64) for n in (5, 3))
    _, state = mix(x, cu_seqlens=pack(lengths), return_state=True)
    y, state = mix(more, state=state, cu_seqlens=pack((0, 1, 2)), return_state=True)
    rows: list[tuple[Tensor, ...]] = list(
        zip(x.split(lengths, 1), more.split((0, 1, 2), 1), strict=True)
    )
    wholes = [mix(torch.cat(parts, 1))[:, parts[0].shape[1] :] for parts in rows]
    assert_near(y, torch.cat(wholes, 1))
    assert torch.equal(state["shift"][0], x[0, 2])


@BOTH
def test_reads_neighbours_alone(kind: type[ChannelMix]):
    mix, x = drawn(kind), torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)
    y = mix(x)
    for t in range(6):
        (g,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        seen = {int(s) for s in g[0].any(-1).nonzero()}
        near = {t - 1, t} if mix.causal else {t - 1, t, t + 1}
        assert seen == near & set(range(6))
    (g,) = torch.autograd.grad(y[0, 3].sum(), x)
    assert g[0, 2, :3].all()
    assert g[0, 2, 3:].any() == mix.causal


@BOTH
def test_gradients_by_finite_differences(kind: type[ChannelMix]):
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(drawn(kind), (x,))


@BOTH
def test_other_dtypes(assert_near: Check, kind: type[ChannelMix]):
    exact = drawn(kind)
    for dtype in (torch.bfloat16, torch.float16):
        mix = kind(6, dtype=dtype)
        exact.load_state_dict(mix.state_dict())
        x = torch.randn(2, 5, 6).to(dtype)
        y = mix(x)
        assert y.dtype == dtype
        assert_near(y, exact(x.double()))
    mix, x = drawn(kind, dtype=torch.float32), torch.randn(2, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = mix(x)
        if mix.causal:
            assert mix(x, return_state=True)[1]["shift"].dtype == torch.float32
            _, state = mix.step(x[:, 0], mix.init_state(2))
            assert state["shift"].dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert_near(y, mix(x), factor=2)


@BOTH
def test_builds_on_the_meta_device_and_compiles(assert_near: Check, kind: type[ChannelMix]):
    mix = kind(6, device="meta").to_empty(device="cpu")
    mix.reset_parameters()
    torch._dynamo.reset()
    f = torch.compile(mix, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, length in ((3, 9), (2, 5)):
        x = torch.randn(batch, length, 6)
        assert_near(f(x), mix(x))


def test_errors():
    with pytest.raises(ValueError, match=r"expand \* d_model must be at least 1, got 0"):
        ChannelMix(6, expand=0.1)
    with pytest.raises(ValueError, match="layer must be from 0 to num_layers - 1 = 0, got 1"):
        ChannelMix(6, layer=1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 6\)"):
        drawn().step(torch.randn(2, 5), {})
    both = drawn(BidirectionalChannelMix)
    with pytest.raises(ValueError, match="state needs a causal mixer, channel_mix_bidirectional"):
        both.step(torch.randn(2, 6, dtype=torch.float64), {})
    with pytest.raises(ValueError, match="state needs a recurrent mixer, channel_mix_bidirect"):
        both.init_state(1)
