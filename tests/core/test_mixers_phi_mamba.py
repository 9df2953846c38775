"""Phi-Mamba's mixer against the published code (stored values), and as a student of attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.wave_cases import check_stored, fill_with_waves, results, waves

from scanweave.core import Mixer, create_mixer

Check = Callable[..., None]
# outputs and gradients in float64 of goombalab/phi-mamba's discrete_mamba2 (commit b2e405f7), 4
# heads in 2 groups, with its ssd_minimal_discrete for the kernel of mamba_ssm; and the matrix of
# its materialize_mixer for 4 groups. Parameters, input and cotangent of `waves`
STORED = Path(__file__).parent / "data" / "phi_mamba.npz"


def with_waves(ngroups: int, dtype: torch.dtype) -> Mixer:
    mixer = create_mixer(
        "phi_mamba", 8, d_state=3, headdim=2, ngroups=ngroups, d_conv=3, dtype=dtype
    )
    return fill_with_waves(mixer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_equals_the_published_code(assert_near: Check, dtype: torch.dtype):
    actual = results(with_waves(2, dtype))
    actual["matrix"] = with_waves(4, dtype).matrix(waves(2, 6, 8, speed=0.7).to(dtype))
    check_stored(assert_near, actual, STORED)


def test_student_is_its_teachers_linear_attention(assert_near: Check):
    """Decays of 1, taps of 1 and constant gates leave q k^T v, with the teacher's projections."""
    mixer = create_mixer("phi_mamba", 8, d_state=4, headdim=4, dtype=torch.float64)
    v, k, q = torch.randn(3, 8, 8, dtype=torch.float64)
    x = torch.rand(2, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        for p in mixer.parameters():
            p.zero_()
        inputs = mixer.get_parameter("in_proj.weight")
        for i, w in enumerate((v, k, q)):
            inputs[8 * i : 8 * i + 8] = w
        inputs[-2:] = -100  # positive inputs: no decay
        mixer.get_parameter("conv1d.weight")[..., -1] = 1
        mixer.get_parameter("z_bias").fill_(1)
        mixer.get_parameter("out_proj.weight").copy_(torch.eye(8))
    heads = (u.unflatten(-1, (2, 4)).transpose(1, 2) for u in (x @ q.T, x @ k.T, x @ v.T))
    queries, keys, values = heads
    attended = (queries @ keys.transpose(-1, -2)).tril() @ values
    gate = torch.sigmoid(torch.ones((), dtype=torch.float64))
    assert_near(mixer(x), gate * attended.transpose(1, 2).flatten(2))


def test_sizes():
    mixer = create_mixer("phi_mamba", 2048, device="meta")
    assert mixer.state_spec() == {
        "conv": ((3, 2048 + 2 * 32 * 64), torch.float32),
        "h": ((32, 64, 64), torch.float32),
    }
    for name in ("D", "z_bias"):
        assert mixer.get_parameter(name)._no_weight_decay  # type: ignore[attr-defined]
    assert (create_mixer("phi_mamba", 8).get_parameter("D") == 1).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"expand": 0}, r"expand \* d_model must be at least 1, got 0"),
        ({"headdim": 3}, "headdim must divide the 8 inner channels, got 3"),
        ({"headdim": 2, "ngroups": 3}, "ngroups must divide the 4 heads, got 3"),
        ({"ngroups": 0}, "ngroups must divide the 1 heads, got 0"),
    ],
    ids=str,
)
def test_errors(options: dict[str, Any], match: str):
    with pytest.raises(ValueError, match=match):
        create_mixer("phi_mamba", 8, **options)


def test_step_refuses_other_widths():
    mixer = create_mixer("phi_mamba", 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"x must be \(B, 8\)"):
        mixer.step(torch.randn(2, 7), mixer.init_state(2))
