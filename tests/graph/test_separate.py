"""Two complete Mamba blocks and a common last layer."""

import pytest
import torch

from scanweave.core import create_mixer
from scanweave.graph import GMNConv, GraphMambaConv, GraphMambaNet, SeparateBiMamba
from scanweave.graph.packing import mirrored


def test_equation():
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    mixer = SeparateBiMamba(6).double()
    expected = mixer.out(mixer.forth(x) + mixer.back(x.flip(1)).flip(1))
    torch.testing.assert_close(mixer(x), expected)


def test_packed_equals_one_by_one():
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    mixer = SeparateBiMamba(6).double()
    borders = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)
    alone = [mixer(part) for part in x.split([5, 1, 6], 1)]
    torch.testing.assert_close(mixer(x, cu_seqlens=borders), torch.cat(alone, 1))
    order = mirrored(12, borders, torch.device("cpu"))
    assert order.tolist() == [4, 3, 2, 1, 0, 5, 11, 10, 9, 8, 7, 6]


def test_layers_take_it_by_name(random_graphs):
    x, edges, batch = random_graphs([5, 1, 7])
    conv = GraphMambaConv(16, mixer="bimamba_separate").double().eval()
    one = sum(p.numel() for p in create_mixer("mamba", 16, expand=1).parameters())
    assert sum(p.numel() for p in conv.mixer.parameters()) == 2 * one + 16 * 16
    assert conv.mixer_backward is None
    assert "mixer=bimamba_separate" in repr(conv)
    assert conv(x, edges, batch).shape == (13, 16)
    tokens = GMNConv(16, 16, 2, 2, 1, mixer="bimamba_separate", mixer_kwargs={"d_state": 4})
    assert tokens.double()(x, edges, batch).shape == (13, 16)
    assert GraphMambaNet(16, 8, 2, mixer="bimamba_separate").double()(x, edges).shape == (13, 8)


def test_reset_parameters_repeats():
    mixer, states = SeparateBiMamba(6), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        mixer.reset_parameters()
        states.append(torch.cat([p.detach().flatten().clone() for p in mixer.parameters()]))
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])


def test_unknown_argument():
    with pytest.raises(TypeError, match="heads"):
        GraphMambaConv(8, mixer="bimamba_separate", mixer_kwargs={"heads": 2})
