"""Mixers as modules: empty input, bad input, dtypes, copies, the meta device, the compiler."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.op_cases import pack

from scanweave.core import Mixer, create_mixer, list_mixers, mixer_info

Check = Callable[..., None]
DIM = 8
# parameters that stay float32: few numbers, and rates depend on them steeply
SENSITIVE = r"A_(b_)?log|D(_b)?|(dt|B|C)_bias|rg_lru\.recurrent_param|(nu|theta|gamma)_log"
SENSITIVE += r"|filter_fn\.pos_emb\.z|ssm_k_D|kernel\.kernel\.\w+"
SENSITIVE += r"|Lambda_(re|im)|log_step"
SENSITIVE += r"|time_(decay|first|faaaa)"
SENSITIVE += r"|kernel\.(log_dt|log_A_real|A_imag)"
SENSITIVE += r"|kernel\.Lambda(_\w+)?"
SENSITIVE += r"|dss\.(Lambda_(real|imag)|param_D)"
SENSITIVE += r"|kernel\.(A|B|P|A_real)"
SENSITIVE += r"|move\.(delta|alpha)"
# mixers in mixers
SENSITIVE += r"|(forth|back|mixers\.\d|layers\.\d\.\d\.body)\.(A_log|A_b_log|D|D_b)"
EACH = pytest.mark.parametrize("name", list_mixers())
CAUSAL = pytest.mark.parametrize("name", list_mixers(causal=True))
RECURRENT = pytest.mark.parametrize("name", list_mixers(recurrent=True))


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("sizes", [(2, 0), (0, 5), (0, 0)], ids=str)
@EACH
def test_empty_batch(name: str, sizes: tuple[int, int]):
    mixer = create_mixer(name, DIM)
    x = torch.zeros(*sizes, DIM, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None
    assert mixer(x, mask=torch.ones(*sizes, dtype=torch.bool)).shape == x.shape
    if mixer.causal:
        y, state = mixer(x, return_state=True)
        more = torch.randn(sizes[0], 3, DIM)
        torch.testing.assert_close(mixer(more, state=state), mixer(more))
        y, state = mixer(x, state=mixer.init_state(sizes[0]), return_state=True)
        torch.testing.assert_close(mixer(more, state=state), mixer(more))


@pytest.mark.parametrize("count", [0, 1, 3])
@EACH
def test_empty_pack(name: str, count: int):
    mixer = create_mixer(name, DIM)
    x, cu = torch.zeros(1, 0, DIM, requires_grad=True), pack([0] * count)
    y = mixer(x, cu_seqlens=cu)
    assert y.shape == x.shape
    y.sum().backward()
    if mixer.causal:
        more = torch.randn(count, 3, DIM)
        y, state = mixer(x, cu_seqlens=cu, return_state=True)
        assert y.shape == x.shape
        torch.testing.assert_close(mixer(more, state=state), mixer(more))
        before = mixer.init_state(count)
        y, state = mixer(x, cu_seqlens=cu, state=before, return_state=True)
        torch.testing.assert_close(mixer(more, state=state), mixer(more))


def test_empty_pieces_return_states_like_any_other():
    for name in list_mixers(causal=True):
        mixer = create_mixer(name, DIM)
        x = torch.zeros(1, 0, DIM)
        for result in (
            mixer(x, return_state=True),
            mixer(x, cu_seqlens=pack((0, 0)), return_state=True),
        ):
            assert isinstance(result, tuple), name
            y, state = result
            assert y.shape == x.shape
            assert isinstance(state, dict)


@EACH
def test_bad_input(name: str):
    mixer = create_mixer(name, DIM)
    x = torch.randn(2, 5, DIM)
    for bad in (torch.randn(5, DIM), torch.randn(2, 5, DIM + 1), torch.randn(DIM)):
        with pytest.raises(
            ValueError, match=re.escape(f"x must be (B, L, 8), got {tuple(bad.shape)}")
        ):
            mixer(bad)
    cu = ints(0, 2, 5)
    with pytest.raises(ValueError, match="mask must be None with cu_seqlens"):
        mixer(x[:1], cu_seqlens=cu, mask=torch.ones(1, 5, dtype=torch.bool))
    for mask in (torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bool), torch.ones(5).bool()):
        with pytest.raises(ValueError, match=r"mask must be bool \(B, L\) = \(2, 5\), got"):
            mixer(x, mask=mask)
    with pytest.raises(ValueError, match=r"x must have batch 1 with cu_seqlens"):
        mixer(x, cu_seqlens=cu)
    with pytest.raises(ValueError, match=r"cu_seqlens must be a tensor \(S \+ 1,\)"):
        mixer(x[:1], cu_seqlens=cu.view(1, 3))
    with pytest.raises(ValueError, match="cu_seqlens must be int32 or int64"):
        mixer(x[:1], cu_seqlens=cu.float())
    for values in ((0, 3, 1, 5), (0, 4), (0, 6), (1, 5)):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            mixer(x[:1], cu_seqlens=ints(*values))


@pytest.mark.parametrize("name", list_mixers(causal=False))
def test_no_state_of_what_reads_the_future(name: str):
    mixer, x = create_mixer(name, DIM), torch.randn(2, 5, DIM)
    rule = f"state needs a causal mixer, {name} reads the future"
    for call in (
        lambda: mixer(x, return_state=True),
        lambda: mixer(x, state={}),
        lambda: mixer.step(x[:, 0], {}),
    ):
        with pytest.raises(ValueError, match=rule):
            call()
    with pytest.raises(ValueError, match=f"state needs a recurrent mixer, {name} is not one"):
        mixer.state_spec()
    with pytest.raises(ValueError, match="state needs a recurrent mixer"):
        mixer.init_state(2)


@CAUSAL
def test_bad_states(name: str):
    mixer, x = create_mixer(name, DIM), torch.randn(2, 5, DIM)
    good = mixer.init_state(2)
    with pytest.raises(ValueError, match=re.escape(f"state must hold {sorted(good)}, got []")):
        mixer(x, state={})
    with pytest.raises(ValueError, match=re.escape(f"state must hold {sorted(good)}")):
        mixer(x, state=good | {"other": x})
    first = next(iter(good))
    with pytest.raises(ValueError, match=r"state\['\w+'\] must be \(2, "):
        mixer(x, state=mixer.init_state(3))
    with pytest.raises(ValueError, match=r"state\['\w+'\] must be \(2, "):
        mixer(x[:1], state=mixer.init_state(3), cu_seqlens=ints(0, 2, 5))
    own = first.rpartition(".")[2]  # of a mixer in a stack
    with pytest.raises(ValueError, match=rf"state\['{own}'\] must be"):
        mixer(x, state=good | {first: good[first][..., None]})
    for token in (torch.randn(2, 1, DIM), torch.randn(2, DIM + 1)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="x must be"):
                mixer.step(token, mixer.init_state(2))
    with torch.no_grad(), pytest.raises(ValueError, match="must be"):
        mixer.step(torch.randn(2, DIM), mixer.init_state(3))


BAD_CONFIGS = [
    ("mamba", {"d_state": 0}, "d_state must be at least 1, got 0"),
    ("mamba", {"d_conv": 0}, "d_conv must be at least 1, got 0"),
    ("mamba", {"dt_rank": 0}, "dt_rank must be at least 1, got 0"),
    ("mamba", {"expand": 0.1}, "expand * d_model must be at least 1, got 0"),
    ("mamba", {"dt_min": 0.0}, "dt_min must be in (0, dt_max], got 0.0 and 0.1"),
    ("bimamba", {"dt_min": 1.0}, "dt_min must be in (0, dt_max], got 1.0 and 0.1"),
    ("bimamba", {"d_state": -1}, "d_state must be at least 1, got -1"),
    ("attention", {"num_heads": 3}, "num_heads must divide d_model 8, got 3"),
    ("attention", {"num_heads": 0}, "num_heads must divide d_model 8, got 0"),
    (
        "attention",
        {"num_heads": 4, "num_kv_heads": 3},
        "num_kv_heads must divide num_heads 4, got 3",
    ),
    ("attention", {"window": 0}, "window must be at least 1, got 0"),
    ("attention_bidirectional", {"num_heads": -1}, "num_heads must divide d_model 8, got -1"),
    ("gated_cnn", {"conv_ratio": 0.0}, "conv_ratio * d_model must be from 1 to"),
    ("gated_cnn", {"conv_ratio": 3.0}, "expansion * d_model = 21, got 24"),
    ("gated_cnn_bidirectional", {"kernel_size": 4}, "kernel_size must be odd, got 4"),
]


@pytest.mark.parametrize(("name", "config", "message"), BAD_CONFIGS)
def test_bad_configurations(name: str, config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_mixer(name, DIM, **config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@EACH
def test_half_precision_models(assert_near: Check, name: str, dtype: torch.dtype):
    mixer = create_mixer(name, DIM, dtype=dtype)
    exact = create_mixer(name, DIM, dtype=torch.float64)
    exact.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 9, DIM).to(dtype)
    y = mixer(x)
    assert y.dtype == dtype
    assert_near(y, exact(x.double()))
    y.float().square().sum().backward()
    for key, p in mixer.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
    if mixer.causal:
        state, parts = mixer.init_state(2), []
        with torch.no_grad():
            for t in range(9):
                token, state = mixer.step(x[:, t], state)
                parts.append(token)
        assert_near(torch.stack(parts, 1), exact(x.double()))


@EACH
def test_copies_are_equal_and_apart(name: str):
    mixer, x = create_mixer(name, DIM), torch.randn(2, 5, DIM)
    expected = mixer(x)
    loaded = create_mixer(name, DIM)
    assert not torch.equal(loaded(x), expected)
    loaded.load_state_dict(mixer.state_dict(), strict=True)
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer)), loaded):
        assert isinstance(other, Mixer)
        assert torch.equal(other(x), expected)
        assert other.info is mixer.info
        assert {k: p.requires_grad for k, p in other.named_parameters()} == {
            k: p.requires_grad for k, p in mixer.named_parameters()
        }
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1)
        assert torch.equal(mixer(x), expected)
    deep = mixer.double()
    assert deep(x.double()).dtype == torch.float64


@EACH
def test_builds_on_the_meta_device(name: str):
    torch.manual_seed(3)
    expected = create_mixer(name, DIM)
    expected_marks = {k for k, p in expected.named_parameters() if hasattr(p, "_no_weight_decay")}
    torch.manual_seed(5)
    expected.reset_parameters()
    mixer = create_mixer(name, DIM, device="meta")
    assert all(p.is_meta for p in mixer.parameters())
    assert not list(mixer.buffers())
    y = mixer(torch.empty(2, 5, DIM, device="meta"))
    assert y.shape == (2, 5, DIM)
    assert y.is_meta
    mixer = mixer.to_empty(device="cpu")
    torch.manual_seed(5)
    mixer.reset_parameters()
    for key, p in mixer.named_parameters():
        assert torch.equal(p, expected.get_parameter(key)), key
        assert hasattr(p, "_no_weight_decay") == (key in expected_marks), key
    with torch.device("meta"):
        assert all(p.is_meta for p in create_mixer(name, DIM).parameters())


@EACH
def test_dtype_and_device_of_parameters(name: str):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mixer = create_mixer(name, DIM, dtype=dtype, device="cpu")
        for key, p in mixer.named_parameters():
            full = re.fullmatch(SENSITIVE, key) is not None
            wanted = torch.promote_types(dtype, torch.float32) if full else dtype
            assert p.dtype == wanted, key


def compiled(mixer: Mixer, **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(mixer, fullgraph=True, backend="aot_eager", **options)


@EACH
def test_compiles_for_any_size(assert_near: Check, name: str):
    mixer = create_mixer(name, DIM)
    f = compiled(mixer, dynamic=True)
    given = list(mixer.parameters())
    for batch, length in ((3, 19), (2, 5), (5, 31)):
        x = torch.randn(batch, length, DIM)
        with torch._dynamo.config.patch(error_on_recompile=batch != 3):
            y = f(x)
        expected = mixer(x)
        assert_near(y, expected)
        wanted = torch.autograd.grad(expected.square().sum(), given)
        for a, e in zip(torch.autograd.grad(y.square().sum(), given), wanted, strict=True):
            assert_near(a, e, gradient=True)


@EACH
def test_compiles_with_a_mask(assert_near: Check, name: str):
    mixer = create_mixer(name, DIM)
    f = compiled(mixer, dynamic=True)
    for batch, length in ((3, 19), (2, 5)):
        x, mask = torch.randn(batch, length, DIM), torch.rand(batch, length) > 0.4
        with torch._dynamo.config.patch(error_on_recompile=batch != 3):
            y = f(x, mask=mask)
        assert_near(y, mixer(x, mask=mask))


# these gather packed tokens into a batch as long as the longest sequence, a size that a compiler
# cannot know
GATHERING = ("sequence_attention", "fft_conv", "those of its mixers")


@pytest.mark.parametrize(
    "name", [n for n in list_mixers() if mixer_info(n).primitive not in GATHERING]
)
def test_compiles_packed(assert_near: Check, name: str):
    mixer = create_mixer(name, DIM)
    f = compiled(mixer, dynamic=True)
    for lengths in ((3, 0, 9), (4, 1, 1, 7, 10)):
        x, cu = torch.randn(1, sum(lengths), DIM), pack(lengths)
        with torch._dynamo.config.patch(error_on_recompile=len(lengths) != 3):
            y = f(x, cu_seqlens=cu)
        assert_near(y, mixer(x, cu_seqlens=cu))


@RECURRENT
def test_compiled_steps(assert_near: Check, name: str):
    mixer, x = create_mixer(name, DIM), torch.randn(2, 4, DIM)
    torch._dynamo.reset()
    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    state, parts = mixer.init_state(2), []
    with torch.no_grad():
        for t in range(4):
            y, state = step(x[:, t], state)
            parts.append(y)
        assert_near(torch.stack(parts, 1), mixer(x))


@EACH
def test_exports(assert_near: Check, name: str):
    mixer = create_mixer(name, DIM)
    shapes = {"x": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=512)}}
    program = torch.export.export(
        mixer, (torch.randn(3, 19, DIM),), dynamic_shapes=shapes, strict=False
    ).module()
    x = torch.randn(2, 7, DIM)
    assert_near(program(x), mixer(x))
