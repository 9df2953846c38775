"""The stack of layers: BasicGNN's manners, pooling, edge inputs, and that it learns."""

import functools

import pytest
import torch
from torch import nn
from torch_geometric.nn import MessagePassing, global_add_pool, global_mean_pool

from scanweave.graph import GraphMamba, gcn_conv, gin_conv, mixing

SIZES = [5, 1, 8]


class EdgeUpdate(nn.Module):
    """A conv that hands its edge features on, increased by one."""

    def forward(self, x, edge_index, edge_attr):
        return x, edge_attr + 1


@pytest.mark.parametrize("jk", [None, "last", "cat", "max", "lstm"])
@pytest.mark.parametrize(("out_channels", "width"), [(None, 16), (3, 3)])
def test_output_sizes_and_attributes(jk, out_channels, width, random_graphs):
    x, edge_index, batch = random_graphs(SIZES, channels=4)
    model = GraphMamba(4, 16, 2, out_channels, jk=jk).double().eval()
    assert model(x, edge_index, batch=batch).shape == (14, width)
    assert (model.in_channels, model.hidden_channels, model.out_channels) == (4, 16, width)
    assert model.num_layers == 2


@pytest.mark.parametrize("mixer", ["bimamba", "mamba", None])
def test_pooled_output_is_graph_by_graph(mixer, random_graphs):
    x, edge_index, batch = random_graphs(SIZES, channels=4)
    model = GraphMamba(4, 16, 2, 3, mixer=mixer, pool=global_mean_pool, num_perms=2)
    model.double().eval()
    out = model(x, edge_index, batch=batch, batch_size=4)
    assert out.shape == (4, 3)
    for number in range(3):
        own = batch == number
        start = int(own.nonzero()[0])
        edges = edge_index[:, own[edge_index[0]]] - start
        torch.testing.assert_close(model(x[own], edges)[0], out[number], atol=1e-11, rtol=1e-9)
    # a graph without nodes gets what the last layer makes of zero
    torch.testing.assert_close(out[3], model.lin_out.bias)


def test_in_channels_may_be_left_to_the_first_input(random_graphs):
    x, edge_index, batch = random_graphs(SIZES, channels=7)
    model = GraphMamba(-1, 16, 1, 3).double()
    assert model(x, edge_index, batch=batch).shape == (14, 3)
    assert model.lin_in.in_channels == 7


def test_edge_weights_reach_the_convolutions(random_graphs):
    x, edge_index, batch = random_graphs(SIZES, channels=4)
    model = GraphMamba(4, 16, 2, conv=gcn_conv).double().eval()
    assert model.supports_edge_weight
    assert not model.supports_edge_attr
    ones = torch.ones(edge_index.size(1), dtype=torch.float64)
    same = model(x, edge_index, edge_weight=ones, batch=batch)
    torch.testing.assert_close(same, model(x, edge_index, batch=batch))
    assert not torch.allclose(model(x, edge_index, edge_weight=2 * ones, batch=batch), same)


def test_edge_features_reach_the_convolutions(random_graphs):
    x, edge_index, batch = random_graphs(SIZES, channels=4)
    model = GraphMamba(4, 16, 2, conv=functools.partial(gin_conv, edge_dim=3)).double().eval()
    assert model.supports_edge_attr
    edge_attr = torch.randn(edge_index.size(1), 3, dtype=torch.float64)
    out = model(x, edge_index, edge_attr=edge_attr, batch=batch)
    assert not torch.allclose(model(x, edge_index, edge_attr=-edge_attr, batch=batch), out)


def test_edge_features_are_handed_from_layer_to_layer(random_graphs):
    x, edge_index, _ = random_graphs([5], channels=4)
    seen = []
    model = GraphMamba(4, 16, 3, conv=lambda _: EdgeUpdate()).double()
    for layer in model.convs:
        layer.conv.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(float(kwargs["edge_attr"])), with_kwargs=True
        )
    model(x, edge_index, edge_attr=torch.zeros((), dtype=torch.float64))
    assert seen == [0, 1, 2]


def test_node_order_replaces_the_order(random_graphs):
    x, edge_index, batch = random_graphs([9], channels=4)
    model = GraphMamba(4, 16, 2, order="index").double().eval()
    score = torch.arange(9)
    torch.testing.assert_close(
        model(x, edge_index, node_order=score), model(x, edge_index, batch=batch)
    )
    changed = model(x, edge_index, node_order=score.roll(4))
    assert not torch.allclose(changed, model(x, edge_index))


def test_layers_break_ties_differently():
    model = GraphMamba(4, 16, 3, order="random", seed=5)
    assert [layer.seed for layer in model.convs] == [5, 6, 7]


def test_without_mixers_the_model_is_local():
    model = GraphMamba(4, 16, 2, mixer=None)
    assert all(layer.mixer is None for layer in model.convs)
    assert any(isinstance(module, MessagePassing) for module in model.modules())
    only_mixers = GraphMamba(4, 16, 2, conv=None)
    assert not any(isinstance(module, MessagePassing) for module in only_mixers.modules())


def one_after_another(model, x, edge_index, batch):
    """The model with every layer sorting the nodes itself."""
    h = model.lin_in(x)
    for layer in model.convs:
        h = layer(h, edge_index, batch)
    return model.lin_out(h)


@pytest.mark.parametrize("order", ["degree", "rcm", "random"])
@pytest.mark.parametrize("num_perms", [1, 3])
def test_nodes_are_sorted_once_for_all_layers(num_perms, order, random_graphs, monkeypatch):
    x, edge_index, batch = random_graphs([7, 1, 12], channels=4)
    model = GraphMamba(4, 8, 3, 2, mixer="mamba", order=order, num_perms=num_perms)
    model.double().eval()
    expected = one_after_another(model, x, edge_index, batch)
    calls = []
    pack = mixing.pack_nodes
    monkeypatch.setattr(mixing, "pack_nodes", lambda *args: calls.append(0) or pack(*args))
    assert model(x, edge_index, batch=batch).equal(expected)
    assert len(calls) == 1
    # a layer that was changed by hand sorts by itself, and so do the others then
    model.convs[1].ties = "index"
    changed = model(x, edge_index, batch=batch)
    assert changed.equal(one_after_another(model, x, edge_index, batch))
    assert not changed.equal(expected)


def test_fresh_noise_differs_between_layers(random_graphs):
    x, edge_index, batch = random_graphs([40], channels=4)
    model = GraphMamba(4, 8, 2, order="random", ties="fresh", num_perms=2).double().train()
    one, other = mixing.shared_sequences(model.convs, x, edge_index, batch, None, None)
    assert one.nodes.numel() == 80
    assert not one.nodes.equal(other.nodes)
    again, _ = mixing.shared_sequences(model.convs, x, edge_index, batch, None, None)
    assert not again.nodes.equal(one.nodes)


@pytest.mark.parametrize("jk", [None, "cat", "lstm"])
def test_reset_parameters_repeats(jk):
    model = GraphMamba(4, 16, 2, 3, jk=jk)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.reset_parameters()
        states.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])


def test_repr_is_one_line():
    text = repr(GraphMamba(4, 8, 2, 3, conv=gcn_conv))
    assert text == (
        "GraphMamba(4, 3, num_layers=2, layer=GraphMambaConv(8, conv=GCNConv(8, 8), "
        "mixer=bimamba, order=degree, bidirectional=True))"
    )


def test_distance_along_a_path_is_learned_only_with_a_mixer():
    # both ends of a path carry a sign; the class is whether they agree, two layers see two steps
    size, graphs = 8, 24
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(graphs, size, 1)
    x[:, [0, -1]] = torch.randint(0, 2, (graphs, 2, 1), generator=generator) * 2.0 - 1
    y = (x[:, 0, 0] == x[:, -1, 0]).long()
    step = torch.arange(size - 1)
    path = torch.stack([torch.cat([step, step + 1]), torch.cat([step + 1, step])])
    edge_index = (path.unsqueeze(1) + size * torch.arange(graphs).view(-1, 1)).flatten(1)
    batch = torch.arange(graphs).repeat_interleave(size)
    accuracy = {}
    for mixer in ("bimamba", None):
        torch.manual_seed(0)
        model = GraphMamba(
            1, 16, 2, 2, mixer=mixer, order="rcm", pool=functools.partial(last_node, size=size)
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(90):
            out = model(x.view(-1, 1), edge_index, batch=batch, batch_size=graphs)
            loss = nn.functional.cross_entropy(out, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy[mixer] = (out.argmax(1) == y).float().mean().item()
    assert accuracy["bimamba"] > 0.95
    assert accuracy[None] < 0.8


def last_node(x, batch, batch_size, *, size):
    return x[size - 1 :: size]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"jk": "sum"}, "jk must be None, 'last', 'cat', 'max' or 'lstm', got 'sum'"),
    ],
)
def test_constructor_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GraphMamba(**{"in_channels": 4, "hidden_channels": 8, "num_layers": 1, **kwargs})


@pytest.mark.parametrize("name", ["edge_weight", "edge_attr"])
def test_edge_inputs_that_no_convolution_takes(name, random_graphs):
    x, edge_index, _ = random_graphs([5], channels=4)
    model = GraphMamba(4, 8, 1, pool=global_add_pool).double()
    with pytest.raises(ValueError, match=f"{name} must be None: the convolutions"):
        model(x, edge_index, **{name: torch.ones(edge_index.size(1))})
