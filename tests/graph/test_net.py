"""The whole network: sizes, encodings, that it learns, bad input."""

import functools

import pytest
import torch
from torch import nn
from torch_geometric.nn import global_mean_pool

from scanweave.graph import GraphMambaNet, gcn_conv, gin_conv

SMALL = {"walk_length": 2, "num_walks": 2, "num_repeats": 1}


@pytest.mark.parametrize("encoder", ["mean", "gin", "rwf"])
def test_pooled_output_is_graph_by_graph(encoder, random_graphs):
    x, edges, batch = random_graphs([5, 1, 0, 9])
    pe = torch.randn(15, 3, dtype=torch.float64)
    net = GraphMambaNet(
        16, 12, 2, 4, 3, encoder=encoder, conv=gcn_conv, pool=global_mean_pool, **SMALL
    )
    net = net.double().eval()
    out = net(x, edges, batch=batch, batch_size=4, pe=pe)
    assert out.shape == (4, 4)
    for number in (0, 1, 3):
        nodes = batch == number
        first = int(nodes.nonzero()[0])
        own = edges[:, batch[edges[0]] == number] - first
        alone = net(x[nodes], own, pe=pe[nodes], batch=batch[nodes] * 0)
        torch.testing.assert_close(out[number : number + 1], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("walk_length", [0, 2])
def test_tokens_are_for_the_first_layer(walk_length, random_graphs):
    x, edges, _ = random_graphs([6])
    net = GraphMambaNet(-1, 12, 3, walk_length=walk_length, num_walks=1).double()
    assert net(x, edges).shape == (6, 12)
    assert [conv.walk_length for conv in net.convs] == [walk_length, 0, 0]
    assert [conv.seed for conv in net.convs] == [0, 1, 2]
    assert [conv.encoder is None for conv in net.convs] == [walk_length == 0, True, True]
    assert "\n" not in repr(net)


def test_edge_inputs_reach_their_layers(random_graphs):
    x, edges, _ = random_graphs([6])
    weight = torch.rand(edges.size(1), dtype=torch.float64)
    attr = torch.randn(edges.size(1), 3, dtype=torch.float64)
    weighted = GraphMambaNet(16, 12, 2, conv=gcn_conv, **SMALL).double().eval()
    assert not torch.isclose(
        weighted(x, edges, edge_weight=weight), weighted(x, edges, edge_weight=2 * weight + 1)
    ).all()
    convs = {"conv": functools.partial(gin_conv, edge_dim=3)}
    tokens = {"conv": None, "encoder": "gin", "encoder_kwargs": {"edge_dim": 3}}
    for settings in (convs, tokens, {**tokens, "conv": gcn_conv}):
        net = GraphMambaNet(16, 12, 2, **settings, **SMALL).double().eval()
        assert net.supports_edge_attr
        assert not torch.isclose(
            net(x, edges, edge_attr=attr), net(x, edges, edge_attr=attr + 1)
        ).all()


@pytest.mark.parametrize("jk", [None, "last", "cat", "max", "lstm"])
@pytest.mark.parametrize(("out_channels", "width"), [(None, 8), (3, 3)])
def test_jumping_knowledge(jk, out_channels, width, random_graphs):
    x, edges, batch = random_graphs([5, 1, 6])
    net = GraphMambaNet(16, 8, 2, out_channels, jk=jk, share_prefix=True, **SMALL).double().eval()
    assert all(conv.share_prefix for conv in net.convs)
    assert net(x, edges, batch=batch).shape == (12, width)
    first = [p for name, p in net.named_parameters() if name.startswith("convs.0.conv")]
    (net(x, edges, batch=batch) ** 2).sum().backward()
    assert all(p.grad is not None for p in first)
    if jk in ("cat", "max"):
        # the first layer's output is read directly
        seen = []
        net.jk.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
        net(x, edges, batch=batch)
        assert len(seen) == 2


def test_walks_and_order_may_be_given(random_graphs):
    x, edges, _ = random_graphs([6])
    net = GraphMambaNet(16, 12, 1, **SMALL).double().eval()
    still = torch.arange(6).expand(3, 2, 3, 6)  # walks that never leave their root
    before = net(x, edges)
    assert not before.equal(net(x, edges, walk_index=still))
    assert not before.equal(net(x, edges, node_order=torch.arange(6)))


def test_features_three_steps_away_are_learned_with_tokens():
    # node 0 of a path carries a sign that node 3 is to tell
    size, graphs = 4, 16
    sign = torch.arange(graphs) % 2 * 2.0 - 1
    x = torch.zeros(graphs, size, 1)
    x[:, 0, 0] = sign
    step = torch.arange(size - 1)
    path = torch.stack([torch.cat([step, step + 1]), torch.cat([step + 1, step])])
    edges = (path.unsqueeze(1) + size * torch.arange(graphs).view(-1, 1)).flatten(1)
    # every node is a graph of its own to the node layer; walks follow the edges all the same
    batch = torch.arange(graphs * size)
    accuracy = {}
    for walk_length in (3, 0):
        torch.manual_seed(0)
        net = GraphMambaNet(
            1, 8, 1, 2, walk_length=walk_length, num_walks=8, num_repeats=1, conv=None
        )
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for _ in range(40):
            out = net(x.view(-1, 1), edges, batch=batch, batch_size=graphs * size)[3::size]
            loss = nn.functional.cross_entropy(out, (sign > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy[walk_length] = ((out[:, 1] > out[:, 0]) == (sign > 0)).float().mean().item()
    assert accuracy[3] > 0.95
    assert accuracy[0] == 0.5


def test_reset_parameters_repeats():
    net = GraphMambaNet(4, 8, 2, 3, **SMALL)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        net.reset_parameters()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"pe_channels": -1}, "pe_channels must be at least 0, got -1"),
        ({"jk": "sum"}, "jk must be None, 'last', 'cat', 'max' or 'lstm', got 'sum'"),
    ],
)
def test_constructor_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GraphMambaNet(**{"in_channels": 4, "hidden_channels": 8, "num_layers": 1, **kwargs})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pe": torch.ones(3, 2)}, "pe must have pe_channels = 0 columns, got 2"),
        ({"edge_weight": torch.ones(1)}, "edge_weight must be None: no layer of this model"),
        ({"edge_attr": torch.ones(1, 2)}, "edge_attr must be None: no layer of this model"),
    ],
)
def test_forward_refuses(arguments, message):
    net = GraphMambaNet(4, 8, 1, **SMALL)
    with pytest.raises(ValueError, match=message):
        net(torch.ones(3, 4), torch.tensor([[0], [1]]), **arguments)
