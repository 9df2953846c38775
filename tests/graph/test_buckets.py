"""Graphs cut at random into several sequences (Graph-Mamba's recipe for large graphs)."""

import itertools

import pytest
import torch

from scanweave.graph import GraphMamba, GraphMambaConv, mixing

SIZES = [20, 1, 0, 3]


def layer(**kwargs):
    return GraphMambaConv(8, **{"norm": None, "buckets": 3, **kwargs}).double().eval()


@pytest.mark.parametrize("perms", [1, 2])
@pytest.mark.parametrize("ties", ["noise", "index", "fresh"])
def test_every_node_is_in_one_sequence_of_its_graph(ties, perms, random_graphs):
    _, edges, batch = random_graphs(SIZES)
    conv = layer(ties=ties, num_perms=perms).train()
    nodes, places, borders = conv.sequences(edges, batch, 4)
    assert borders.numel() == perms * 4 * 3 + 1
    assert nodes[places].equal(torch.arange(24).expand(perms, 24))
    degree = torch.bincount(edges.flatten(), minlength=24)
    for number, (start, end) in enumerate(itertools.pairwise(borders.tolist())):
        own = nodes[start:end]
        assert (batch[own] == number // 3 % 4).all()
        assert degree[own].equal(degree[own].sort().values)
    used = borders.diff().view(perms, 4, 3)
    assert used.sum(2).tolist() == [SIZES] * perms
    # twenty nodes leave no bucket empty, and do not fall into equal parts in every order
    assert (used[:, 0] > 0).all()


def test_buckets_do_not_see_each_other(random_graphs):
    x, edges, batch = random_graphs([12], channels=8)
    conv = layer()
    nodes, _, borders = conv.sequences(edges, batch, 1)
    changed = x.clone()
    changed[nodes[0]] += 1
    same = (conv(x, edges) == conv(changed, edges)).all(1)
    first = torch.zeros(12, dtype=torch.bool)
    first[nodes[: borders[1]]] = True
    assert same.equal(~first)


def test_buckets_do_not_depend_on_batch_mates_and_follow_the_seed(random_graphs):
    x, edges, batch = random_graphs(SIZES, channels=8)
    conv = layer(num_perms=2)
    together = conv(x, edges, batch)
    own = edges[:, batch[edges[0]] == 3] - 21
    torch.testing.assert_close(conv(x[21:], own), together[21:])
    assert conv(x, edges, batch).equal(together)
    other = layer(seed=1).sequences(edges, batch, 4).cu_seqlens
    assert not other.equal(layer().sequences(edges, batch, 4).cu_seqlens)
    fresh = layer(ties="fresh").train()
    borders = [fresh.sequences(edges, batch, 4).cu_seqlens for _ in range(2)]
    assert not borders[0].equal(borders[1])


def test_layers_of_a_model_have_buckets_of_their_own(random_graphs):
    x, edges, batch = random_graphs(SIZES, channels=8)
    model = GraphMamba(8, 8, 3, mixer="mamba", buckets=3, num_perms=2).double().eval()
    shared = mixing.shared_sequences(model.convs, x, edges, batch, 4, None)
    for conv, own in zip(model.convs, shared, strict=True):
        alone = conv.sequences(edges, batch, 4)
        assert all(a.equal(b) for a, b in zip(own, alone, strict=True))
    assert not shared[0].cu_seqlens.equal(shared[1].cu_seqlens)
    assert model(x, edges, batch=batch).shape == (24, 8)
