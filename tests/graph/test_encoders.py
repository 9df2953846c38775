"""Encoders of encodings: what they compute, that they are blind to signs, bad input."""

import pytest
import torch
from torch_geometric.data import Batch, Data

from scanweave.graph import AddLapPE, AddRWSE, LapPEEncoder, RWSEEncoder


@pytest.fixture
def batch(random_graphs):
    graphs = []
    for size in (7, 2, 5):
        x, edges, _ = random_graphs([size], seed=size)
        graph = Data(x=x, edge_index=edges)
        graphs.append(AddRWSE(4)(AddLapPE(4, add_values=True)(graph)))
    return Batch.from_data_list(graphs)


def test_sum_over_eigenvectors_that_exist(batch):
    encoder = LapPEEncoder(6).eval()
    out = encoder(batch.lap_pe, batch.lap_values, batch.batch, 3)
    for node in (0, 7, 10):
        total = torch.zeros(6)
        for entry, value in zip(batch.lap_pe[node], batch.lap_values[node], strict=True):
            if entry != 0 or value != 0:
                total = total + encoder.mlp(torch.stack([entry, value]))
        torch.testing.assert_close(out[node], total)
    # a graph of two nodes has one eigenvector beside the constant one
    assert (batch.lap_values[7] != 0).sum() == 1


def test_training_flips_signs_graph_by_graph(batch):
    encoder = LapPEEncoder(6).train()
    arguments = (batch.lap_pe, batch.lap_values, batch.batch, 3)
    seen = [encoder(*arguments) for _ in range(20)]
    assert not seen[0].equal(seen[1])
    flipped = LapPEEncoder(6, flip_signs=False).train()
    flipped.load_state_dict(encoder.state_dict())
    still = flipped(*arguments)
    assert still.equal(encoder.eval()(*arguments))
    # both signs of the smallest graph's one eigenvector come up, for both of its nodes at once
    other = flipped(-batch.lap_pe, *arguments[1:])
    for out in seen:
        assert torch.allclose(out[7:9], still[7:9]) or torch.allclose(out[7:9], other[7:9])
    assert any(torch.allclose(out[7:9], other[7:9]) for out in seen)


def test_one_graph_needs_no_batch(batch):
    encoder = LapPEEncoder(6)
    assert encoder(batch.lap_pe[:7], batch.lap_values[:7]).shape == (7, 6)


def test_return_probabilities_are_normed_and_mapped(batch):
    encoder = RWSEEncoder(4, 6)
    out = encoder(batch.rwse)
    torch.testing.assert_close(out, encoder.lin(encoder.norm(batch.rwse)))
    assert out.shape == (14, 6)


@pytest.mark.parametrize("make", [lambda: LapPEEncoder(6), lambda: RWSEEncoder(4, 6)])
def test_reset_parameters_repeats(make):
    encoder, states = make(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        encoder.reset_parameters()
        states.append(torch.cat([p.detach().flatten().clone() for p in encoder.parameters()]))
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])


def test_shapes_must_match():
    with pytest.raises(
        ValueError, match=r"lap_values must match lap_pe .* got \(3, 2\), .* \(3, 4\)"
    ):
        LapPEEncoder(6)(torch.ones(3, 4), torch.ones(3, 2))
