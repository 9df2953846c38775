"""What every registered mixer must satisfy: a new one is tested by being registered."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.core.mixer_variants import VARIANTS
from tests.core.op_cases import pack
from torch import Tensor
from torch.func import functional_call

from scanweave.core import Mixer, create_mixer, list_mixers

Check = Callable[..., None]
DIM = 8
# a token that is alone is its own mean but for eps, so that gradients of its weight are as small as
# eps is, and of them only rounding is left
COMMON: dict[str, dict[str, Any]] = {
    f"{name}{ways}": {"eps": 0.1}
    for name in ("based", "linear_attention")
    for ways in ("", "_bidirectional")
}
Case = tuple[str, dict[str, Any]]


def cases(**wanted: bool) -> pytest.MarkDecorator:
    """All mixers, or the causal or recurrent ones, each with all its variants."""
    every = [(name, v) for name in list_mixers(**wanted) for v in ({}, *VARIANTS.get(name, ()))]
    return pytest.mark.parametrize("case", every, ids=lambda c: f"{c[0]}-{c[1] or 'defaults'}")


def build(case: Case, dtype: torch.dtype = torch.float64, dim: int = DIM) -> Mixer:
    """A mixer none of whose parameters are equal, zero or one."""
    name, config = case
    mixer = create_mixer(name, dim, dtype=dtype, **(COMMON.get(name, {}) | config))
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def as_real(v: Tensor) -> Tensor:
    """Real and imaginary parts of complex numbers."""
    return torch.view_as_real(v.resolve_conj()) if v.is_complex() else v


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.clone() for name, v in state.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@cases(causal=True)
def test_pieces_with_states_are_the_whole(assert_near: Check, case: Case, dtype: torch.dtype):
    mixer, x = build(case, dtype), draw(2, 13, DIM, dtype=dtype).requires_grad_()
    whole = mixer(x)
    for cuts in ((1, 2, 3), (5,), (0, 7, 7, 12)):
        state, parts = None, []
        for piece in x.tensor_split(cuts, 1):
            y, state = mixer(piece, state=state, return_state=True)
            parts.append(y)
        pieces = torch.cat(parts, 1)
        assert_near(pieces, whole, factor=0.1)
        g = draw(*whole.shape, dtype=dtype)
        given = [x, *mixer.parameters()]
        expected = torch.autograd.grad(whole, given, g, retain_graph=True)
        actual = torch.autograd.grad(pieces, given, g)
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, gradient=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("training", [False, True])
@cases(causal=True)
def test_steps_are_the_whole(assert_near: Check, case: Case, training: bool, dtype: torch.dtype):
    mixer, x = build(case, dtype), draw(3, 9, DIM, dtype=dtype)
    with torch.set_grad_enabled(training):
        whole, last = mixer(x, return_state=True)
        state, parts = mixer.init_state(3), []
        for t in range(9):
            y, state = mixer.step(x[:, t], state)
            assert y.shape == (3, DIM)
            parts.append(y)
        assert_near(torch.stack(parts, 1), whole, factor=0.2)
        # both states lead to the same future
        more = draw(3, 4, DIM, dtype=dtype)
        assert_near(mixer(more, state=state), mixer(more, state=last), factor=0.2)
    if training:
        (g,) = torch.autograd.grad(parts[-1].sum(), [next(mixer.parameters())])
        assert g.any()


@cases(causal=True)
def test_steps_after_a_prompt(assert_near: Check, case: Case):
    mixer, x = build(case), draw(2, 10, DIM)
    whole = mixer(x)
    with torch.no_grad():
        _, state = mixer(x[:, :6], return_state=True)
        for t in range(6, 10):
            y, state = mixer.step(x[:, t], state)
            assert_near(y, whole[:, t])


@cases()
def test_packed_is_separate(assert_near: Check, case: Case):
    mixer = build(case)
    for lengths in ((3, 0, 1, 6, 1, 0), (0, 2), (4,), (1, 1, 1)):
        x = draw(1, sum(lengths), DIM).requires_grad_()
        packed = mixer(x, cu_seqlens=pack(lengths))
        separate = torch.cat([mixer(v) for v in x.split(lengths, 1)], 1)
        assert_near(packed, separate, factor=0.1)
        g, given = draw(*packed.shape), [x, *mixer.parameters()]
        expected = torch.autograd.grad(separate, given, g)
        for a, e in zip(torch.autograd.grad(packed, given, g), expected, strict=True):
            assert_near(a, e, gradient=True)


@cases(causal=True)
def test_packed_states_are_separate(assert_near: Check, case: Case):
    """Two packed pieces of four sequences, the second one continuing the first."""
    mixer, first, second = build(case), (3, 0, 1, 4), (2, 1, 0, 3)
    x, more = draw(1, sum(first), DIM), draw(1, sum(second), DIM)
    y, state = mixer(x, cu_seqlens=pack(first), return_state=True)
    later, state = mixer(more, state=state, cu_seqlens=pack(second), return_state=True)
    third = draw(4, 2, DIM)  # a dense batch continues a packed one
    last = mixer(third, state=state)
    pieces = zip(x.split(first, 1), more.split(second, 1), third.split(1), strict=True)
    for i, parts in enumerate(pieces):
        whole = mixer(torch.cat(parts, 1))
        ours = torch.cat([y.split(first, 1)[i], later.split(second, 1)[i], last[i : i + 1]], 1)
        assert_near(ours, whole, factor=0.1)


@cases(causal=True)
def test_causal_ones_never_read_the_future(case: Case):
    mixer, x = build(case), draw(2, 9, DIM).requires_grad_()
    # a transform spreads its rounding over all places
    leak = 1e-13 if mixer.info.primitive == "fft_conv" else 0.0
    y = mixer(x)
    for place in (1, 4, 8):
        other = x.detach().clone()
        other[:, place:] = draw(2, 9 - place, DIM)
        torch.testing.assert_close(mixer(other)[:, :place], y[:, :place], atol=leak, rtol=0)
        (g,) = torch.autograd.grad(y[:, :place].sum(), x, retain_graph=True)
        assert g[:, place:].abs().max() <= leak


@cases(causal=False)
def test_others_do_read_the_future(case: Case):
    mixer, x = build(case), draw(2, 4, DIM).requires_grad_()
    (g,) = torch.autograd.grad(mixer(x)[:, 0].sum(), x)
    # one tap reaches no neighbour
    reach = 1 if mixer.info.primitive == "symmetric_conv1d" else 3
    assert g[:, reach].any()


MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0] * 6 + [1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1] + [0] * 6],
    "middle": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0], [0] * 7],
}


@pytest.mark.parametrize("side", MASKS)
@cases()
def test_masked_is_unpadded(assert_near: Check, case: Case, side: str):
    mixer, mask = build(case), torch.tensor(MASKS[side]).bool()
    x = draw(3, 7, DIM)
    x[~mask] = 1e3 * draw(int((~mask).sum()), DIM)
    x.requires_grad_()
    y = mixer(x, mask=mask)
    assert not y[~mask].any()
    rows = [mixer(x[i : i + 1, mask[i]]) for i in range(3)]
    for i, row in enumerate(rows):
        assert_near(y[i : i + 1, mask[i]], row, factor=0.1)
    g, given = draw(3, 7, DIM), [x, *mixer.parameters()]
    actual = torch.autograd.grad(y, given, g)
    assert not actual[0][~mask].any()
    expected = torch.autograd.grad(rows, given, [g[i : i + 1, mask[i]] for i in range(3)])
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, gradient=True)


@pytest.mark.parametrize("side", MASKS)
@cases(causal=True)
def test_masked_states_are_unpadded(assert_near: Check, case: Case, side: str):
    mixer, mask = build(case), torch.tensor(MASKS[side]).bool()
    x, more, last = draw(3, 7, DIM), draw(3, 7, DIM), draw(3, 2, DIM)
    x[~mask] = 1e3
    more[~mask] = 1e3
    _, state = mixer(x, mask=mask, return_state=True)
    later, state = mixer(more, mask=mask, state=copied(state), return_state=True)
    y = mixer(last, state=state)
    for i in range(3):
        real = mask[i]
        whole = mixer(torch.cat([x[i, real], more[i, real], last[i]]).unsqueeze(0))[0]
        count = int(real.sum())
        assert_near(later[i, real], whole[count : 2 * count], factor=0.1)
        assert_near(y[i], whole[2 * count :], factor=0.1)


@cases()
def test_full_mask_is_no_mask(assert_near: Check, case: Case):
    mixer, x = build(case), draw(2, 5, DIM)
    assert_near(mixer(x, mask=torch.ones(2, 5, dtype=torch.bool)), mixer(x), factor=0.1)


@cases()
def test_matrix_maps_values_to_outputs(assert_near: Check, case: Case):
    mixer, x = build(case), draw(2, 9, DIM)
    values, outputs = mixer.core(x)
    matrix = mixer.matrix(x)
    assert matrix.shape == (*values.shape[:2], 9, 9)
    assert_near(as_real(matrix @ values), as_real(outputs))
    if mixer.causal:
        assert not matrix.triu(1).any()
    single = build(case, torch.float32)
    x = x.float()
    assert_near(as_real(single.matrix(x) @ single.core(x)[0]), as_real(single.core(x)[1]))


@cases()
def test_gradients_by_finite_differences(case: Case):
    mixer, x = build(case, dim=4), draw(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def f(*values: Tensor) -> Tensor:
        return functional_call(mixer, dict(zip(names, values, strict=True)), (x.detach(),))

    assert torch.autograd.gradcheck(f, parameters, fast_mode=True)


@cases(causal=True)
def test_state_gradients_by_finite_differences(case: Case):
    mixer = build(case, dim=4)
    _, state = mixer(draw(2, 3, 4), return_state=True)
    smooth = {k: v for k, v in state.items() if v.is_floating_point() or v.is_complex()}
    floating = {k: v.detach().requires_grad_() for k, v in smooth.items()}
    rest = {k: v for k, v in state.items() if k not in floating}
    x = draw(2, 3, 4)

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        given = rest | dict(zip(floating, values, strict=True))
        y, after = mixer(x, state=given, return_state=True)
        return (y, *(after[k] for k in floating))

    # entry by entry takes minutes for matrix states
    large = sum(v.numel() for v in floating.values()) > 500
    assert torch.autograd.gradcheck(f, list(floating.values()), fast_mode=large)


@cases()
def test_every_parameter_gets_a_gradient(case: Case):
    mixer = create_mixer(case[0], DIM, **case[1])
    mixer(torch.randn(2, 6, DIM)).square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name


@cases(recurrent=True)
def test_state_looks_as_declared(case: Case):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        mixer = build(case, dtype)
        spec = mixer.state_spec()
        x = draw(3, 5, DIM, dtype=dtype)
        packed = mixer(x[:1], cu_seqlens=pack((2, 0, 3)), return_state=True)[1]
        stepped = mixer.step(x[:, 0], mixer.init_state(3))[1]
        masked = mixer(x, mask=torch.ones(3, 5, dtype=torch.bool), return_state=True)[1]
        dense = mixer(x, return_state=True)[1]
        for state in (mixer.init_state(3), dense, packed, stepped, masked):
            assert state.keys() == spec.keys()
            for name, (shape, kind) in spec.items():
                assert state[name].shape == (3, *shape), name
                assert state[name].dtype == kind, name
                assert kind in (torch.float32, torch.float64, torch.complex64, torch.complex128)


@cases(recurrent=True)
def test_state_is_float32_under_autocast(case: Case):
    mixer = build(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(torch.randn(2, 6, DIM), return_state=True)
        assert y.dtype == torch.bfloat16
        _, after = mixer.step(torch.randn(2, DIM), copied(state))
    for v in (*state.values(), *after.values()):
        assert v.dtype in (torch.float32, torch.complex64)


@cases()
def test_trains_under_autocast(assert_near: Check, case: Case):
    mixer, x = build(case, torch.float32), torch.randn(2, 6, DIM)
    exact = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    assert_near(y, exact, factor=2)
    y.float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in mixer.parameters())


@cases(recurrent=True)
def test_state_is_as_large_at_any_length(case: Case):
    mixer = build(case)
    sizes = [
        {k: v.shape for k, v in mixer(draw(2, length, DIM), return_state=True)[1].items()}
        for length in (1, 3, 40)
    ]
    assert sizes[0] == sizes[1] == sizes[2]


@cases(causal=True)
def test_first_state_is_no_state(assert_near: Check, case: Case):
    mixer, x = build(case), draw(2, 7, DIM)
    assert_near(mixer(x, state=mixer.init_state(2)), mixer(x), factor=0.1)
    cu = pack((3, 0, 4))
    packed = mixer(x[:1], state=mixer.init_state(3), cu_seqlens=cu)
    assert_near(packed, mixer(x[:1], cu_seqlens=cu), factor=0.1)


@cases()
def test_row_does_not_depend_on_its_batch(assert_near: Check, case: Case):
    mixer, x = build(case), draw(4, 6, DIM)
    together = mixer(x)
    for i in range(4):
        assert_near(mixer(x[i : i + 1])[0], together[i], factor=0.1)


@cases()
def test_leaves_input_and_state_alone(case: Case):
    mixer, x = build(case), draw(2, 6, DIM)
    before = x.clone()
    if not mixer.causal:
        mixer(x)
    else:
        _, state = mixer(x, return_state=True)
        kept = copied(state)
        with torch.no_grad():
            mixer(x, state=state, return_state=True)
        for name, v in state.items():
            assert torch.equal(v, kept[name]), name
    assert torch.equal(x, before)


@cases()
def test_works_in_inference_mode(case: Case):
    mixer, x = build(case), draw(2, 6, DIM)
    expected = mixer(x)
    with torch.inference_mode():
        assert torch.equal(mixer(x), expected)
        mixer(x[:1], cu_seqlens=pack((2, 0, 4)))
        mixer(x, mask=torch.ones(2, 6, dtype=torch.bool))
