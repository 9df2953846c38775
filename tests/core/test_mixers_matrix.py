"""Who contributes to whom: taking contributions away, by the matrix and by the ops themselves."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.core.test_mixers_laws import DIM, Case, build, cases, draw
from torch import Tensor

from scanweave.core import Mixer, create_mixer, list_mixers

Check = Callable[..., None]


def finishes(mixer: Mixer) -> bool:
    return type(mixer).finish is not Mixer.finish


def test_every_mixer_but_stacks_of_others_finishes_its_core():
    without = [m for m in (create_mixer(n, DIM) for n in list_mixers()) if not finishes(m)]
    assert all(type(m).__module__.startswith("scanweave.core.stack") for m in without)


@cases()
def test_finished_core_is_the_output(assert_near: Check, case: Case):
    mixer, x = build(case), draw(2, 9, DIM)
    if not finishes(mixer):
        with pytest.raises(NotImplementedError):
            mixer.knock_out(x, torch.ones(9, dtype=torch.bool))
        return
    whole = mixer(x)
    assert_near(mixer.finish(x, mixer.core(x)[1]), whole)
    nobody, everybody = torch.zeros(9, dtype=torch.bool), torch.ones(9, dtype=torch.bool)
    assert_near(mixer.knock_out(x, nobody), whole)
    values, outputs = mixer.core(x)
    silent = mixer.finish(x, torch.zeros_like(outputs))
    size = whole.abs().max().item()
    torch.testing.assert_close(mixer.knock_out(x, everybody), silent, rtol=0, atol=1e-10 * size)
    # only those who do not hear change
    sources, targets = draw(2, 9) > 0, draw(9) > 0
    y = mixer.knock_out(x, sources, targets)
    assert_near(y[:, ~targets], whole[:, ~targets])
    # by the matrix itself, one entry at a time
    matrix = mixer.matrix(x).clone()
    matrix[:, :, targets] = matrix[:, :, targets].masked_fill(sources[:, None, None], 0)
    assert_near(y, mixer.finish(x, matrix @ values))


def random_masks() -> tuple[Tensor, Tensor]:
    sources = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0, 1], dtype=torch.bool)
    targets = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
    return sources, targets


def test_attention_loses_weights_and_does_not_share_them_out(assert_near: Check):
    mixer, x = build(("attention", {"num_heads": 2})), draw(2, 9, DIM)
    sources, targets = random_masks()
    q, k, v = mixer.get_submodule("in_proj")(x).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1)
    weights = weights.masked_fill(targets[:, None] & sources, 0)
    expected = mixer.get_submodule("out_proj")((weights @ v).transpose(1, 2).flatten(2))
    assert_near(mixer.knock_out(x, sources, targets), expected)


def test_mamba_loses_what_two_scans_say(assert_near: Check):
    """Outputs at targets are those of a scan over all inputs less that over the sources' alone."""
    mixer, x = build(("mamba", {})), draw(2, 9, DIM)
    sources, targets = random_masks()
    weights = dict(mixer.named_parameters())
    u, z = mixer.get_submodule("in_proj")(x).chunk(2, -1)
    taps = weights["conv1d.weight"][:, 0]
    near = F.pad(u, (0, 0, 3, 0))
    u = F.silu(sum(taps[:, j] * near[:, j : j + 9] for j in range(4)) + weights["conv1d.bias"])
    r, B, C = mixer.get_submodule("x_proj")(u).split([1, 16, 16], -1)
    dt = F.softplus(mixer.get_submodule("dt_proj")(r))
    A = -weights["A_log"].exp()

    def scanned(inputs: Tensor) -> Tensor:
        h, rows = torch.zeros(2, *A.shape, dtype=x.dtype), []
        for t in range(9):
            step = dt[:, t, :, None]
            h = torch.exp(step * A) * h + step * inputs[:, t, :, None] * B[:, t, None]
            rows.append((h * C[:, t, None]).sum(-1) + weights["D"] * inputs[:, t])
        return torch.stack(rows, 1)

    y = scanned(u)
    lost = scanned(u.masked_fill(~sources[:, None], 0))
    y = torch.where(targets[:, None], y - lost, y)
    expected = mixer.get_submodule("out_proj")(y * F.silu(z))
    assert_near(mixer.knock_out(x, sources, targets), expected)


def test_knocking_out_some_channels(assert_near: Check):
    mixer, x = build(("mamba", {})), draw(2, 9, DIM)
    sources, targets = random_masks()
    some = torch.arange(16) % 3 == 0
    outputs, all_lost = mixer.core(x)[1].clone(), mixer.matrix(x)
    values = mixer.core(x)[0].masked_fill(~sources[:, None], 0)
    lost = (all_lost @ values)[:, some][:, :, targets]
    outputs[:, some.nonzero(), targets] -= lost
    expected = mixer.finish(x, outputs)
    assert_near(mixer.knock_out(x, sources, targets, channels=some), expected)
    everything = torch.ones(16, dtype=torch.bool)
    whole = mixer.knock_out(x, sources, targets, channels=everything)
    assert_near(whole, mixer.knock_out(x, sources, targets))


def test_gradients_flow(assert_near: Check):
    mixer, x = build(("mamba2", {})), draw(1, 9, DIM).requires_grad_()
    sources, targets = random_masks()
    y = mixer.knock_out(x, sources, targets)
    (g,) = torch.autograd.grad(y[:, 7].sum(), x)
    assert torch.isfinite(g).all()
    assert g[0, 3].any()


def test_bad_masks():
    mixer, x = create_mixer("mamba", DIM), torch.randn(2, 5, DIM)
    good = torch.ones(5, dtype=torch.bool)
    for bad in (torch.ones(5), good[:4], torch.ones(3, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"sources must be bool \(L,\) or \(B, L\) = \(2, 5\)"):
            mixer.knock_out(x, bad)
        with pytest.raises(ValueError, match=r"targets must be bool \(L,\) or \(B, L\)"):
            mixer.knock_out(x, good, bad)
        with pytest.raises(ValueError, match=r"channels must be bool \(C,\) = \(16,\), got"):
            mixer.knock_out(x, good, channels=bad)
