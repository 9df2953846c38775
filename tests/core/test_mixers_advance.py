"""A few tokens at once give what single steps give, outputs and states."""

import pytest
import torch

from scanweave.core import create_mixer, list_mixers


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", list_mixers(causal=True, recurrent=True))
def test_advance_equals_steps(name, grad):
    torch.manual_seed(0)
    mixer = create_mixer(name, 32).eval()
    x = torch.randn(2, 11, 32)
    with torch.set_grad_enabled(grad):
        one, many = mixer.init_state(2), mixer.init_state(2)
        expected = []
        for t in range(x.shape[1]):
            y, one = mixer.step(x[:, t], one)
            expected.append(y)
        found = []
        # a first token, a few, more than a few
        for part in x.split([1, 3, 7], dim=1):
            y, many = mixer.advance(part, many)
            found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), torch.stack(expected, 1), atol=2e-5, rtol=1e-4)
    for key, value in one.items():
        torch.testing.assert_close(many[key], value, atol=2e-5, rtol=1e-4)


def test_advance_refuses():
    mixer = create_mixer("mamba", 8).requires_grad_(False)
    state = mixer.init_state(2)
    advance = torch.no_grad()(mixer.advance)
    with pytest.raises(ValueError, match=r"x must be \(B, L, 8\), got \(2, 3, 4\)"):
        advance(torch.zeros(2, 3, 4), state)
    mixer = create_mixer("bimamba", 8)
    with pytest.raises(ValueError, match="state needs a causal mixer, bimamba reads the future"):
        mixer.advance(torch.zeros(2, 3, 8), {})
