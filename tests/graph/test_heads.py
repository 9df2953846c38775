"""Heads for nodes, graphs and links: what they compute, that links are learned, bad input."""

import pytest
import torch
from torch import nn
from torch_geometric.nn import global_add_pool, global_mean_pool

from scanweave.graph import GraphHead, GraphMamba, LinkHead, NodeHead

PAIRS = torch.tensor([[0, 1, 2, 2], [3, 1, 4, 0]])


def test_node_head_is_an_mlp():
    h = torch.randn(5, 8)
    one = NodeHead(8, 3)
    torch.testing.assert_close(one(h), one.mlp.lins[0](h))
    three = NodeHead(8, 3, num_layers=3)
    expected = h
    for layer in three.mlp.lins[:-1]:
        expected = layer(expected).relu()
    torch.testing.assert_close(three(h), three.mlp.lins[-1](expected))


@pytest.mark.parametrize("pool", [global_add_pool, global_mean_pool])
def test_graph_head_pools_first(pool):
    h, batch = torch.randn(5, 8), torch.tensor([0, 0, 2, 2, 2])
    head = GraphHead(8, 3, 2, pool)
    out = head(h, batch, 4)
    assert out.shape == (4, 3)
    torch.testing.assert_close(out, head.mlp(pool(h, batch, 4)))
    assert head(h).shape == (1, 3)


def test_link_scores_are_what_they_say():
    h = torch.randn(5, 8)
    one, other = h[PAIRS[0]], h[PAIRS[1]]
    torch.testing.assert_close(
        LinkHead(8, score="dot", num_layers=0)(h, PAIRS), (one * other).sum(1)
    )
    dot = LinkHead(8, score="dot", num_layers=2)
    torch.testing.assert_close(dot(h, PAIRS), (dot.mlp(one) * dot.mlp(other)).sum(1))
    hadamard = LinkHead(8, 3)
    torch.testing.assert_close(hadamard(h, PAIRS), hadamard.mlp(one * other))
    concat = LinkHead(8, score="concat")
    torch.testing.assert_close(concat(h, PAIRS), concat.mlp(torch.cat([one, other], 1)).squeeze(1))


@pytest.mark.parametrize(
    ("score", "symmetric"), [("dot", True), ("hadamard", True), ("concat", False)]
)
def test_direction_of_a_pair(score, symmetric):
    h = torch.randn(5, 8)
    head = LinkHead(8, score=score)
    assert torch.allclose(head(h, PAIRS), head(h, PAIRS.flip(0))) == symmetric
    assert head(h, PAIRS[:, :0]).shape == (0,)


def test_links_are_learned_behind_a_model():
    # two rings: pairs of one ring are to be told from pairs across, by features that say nothing
    size = 6
    step = torch.arange(size)
    ring = torch.stack([step, (step + 1) % size])
    edges = torch.cat([ring, ring + size], 1)
    edges = torch.cat([edges, edges.flip(0)], 1)
    pairs = torch.combinations(torch.arange(2 * size)).t()
    target = ((pairs[0] < size) == (pairs[1] < size)).float()
    x = torch.eye(2 * size)
    model = GraphMamba(2 * size, 16, 2, order="rcm")
    head = LinkHead(16)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 0.01)
    for _ in range(60):
        scores = head(model(x, edges), pairs)
        loss = nn.functional.binary_cross_entropy_with_logits(scores, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((scores > 0) == (target > 0)).float().mean() > 0.95


@pytest.mark.parametrize(
    "make", [lambda: NodeHead(4, 2, 2), lambda: GraphHead(4, 2, 2), lambda: LinkHead(4)]
)
def test_reset_parameters_repeats(make):
    head, states = make(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        head.reset_parameters()
        states.append(torch.cat([p.detach().flatten().clone() for p in head.parameters()]))
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])
    LinkHead(4, score="dot", num_layers=0).reset_parameters()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NodeHead(4, 2, 0), "num_layers must be at least 1, got 0"),
        (lambda: GraphHead(4, 2, -1), "num_layers must be at least 1, got -1"),
        (lambda: LinkHead(4, num_layers=0), "num_layers must be at least 1, got 0"),
        (lambda: LinkHead(4, score="cosine"), "score must be 'dot', .* got 'cosine'"),
        (lambda: LinkHead(4, 2, "dot"), "out_channels must be 1 for 'dot', got 2"),
    ],
)
def test_constructor_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("pairs", [PAIRS.t(), PAIRS.float(), PAIRS[0]])
def test_pairs_of_another_shape(pairs):
    with pytest.raises(ValueError, match=r"edge_label_index must be \(2, P\) int64, got"):
        LinkHead(8)(torch.randn(5, 8), pairs)
