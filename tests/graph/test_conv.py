"""The layer: its equation, packing, what may and may not change its output, bad input."""

import copy

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv, GINConv, GINEConv, SAGEConv

from scanweave.core import create_mixer
from scanweave.graph import GraphMambaConv, gin_conv
from scanweave.graph.ordering import tie_noise

MIXERS = ["attention", "attention_bidirectional", "bimamba", "gated_cnn_bidirectional", "mamba"]
SIZES = [5, 1, 0, 12, 3, 0, 30]


def layer(mixer="bimamba", channels=16, conv="gin", dtype=torch.float64, **kwargs):
    local = gin_conv(channels) if conv == "gin" else conv
    return GraphMambaConv(channels, local, mixer, **kwargs).to(dtype).eval()


def one_by_one(conv, x, edge_index, batch, num_graphs, **per_node):
    """The layer on each graph alone, put together again."""
    out = torch.empty_like(x)
    for number in range(num_graphs):
        nodes = (batch == number).nonzero().squeeze(1)
        if not nodes.numel():
            continue
        local = torch.full_like(batch, -1)
        local[nodes] = torch.arange(nodes.numel())
        own = batch[edge_index[0]] == number
        extra = {name: value[nodes] for name, value in per_node.items()}
        out[nodes] = conv(x[nodes], local[edge_index[:, own]], **extra)
    return out


def by_the_equation(conv, x, edge_index):
    """One graph, one order, written out; `conv` breaks ties with seed 0."""
    degree = torch.bincount(edge_index.flatten(), minlength=x.size(0)).tolist()
    noise = tie_noise(torch.arange(x.size(0)), conv.eval_perms, 0).tolist()
    mixed = torch.zeros_like(x)
    for row in noise:
        order = sorted(range(x.size(0)), key=lambda v: (degree[v], row[v]))
        mixed[order] += conv.mixer(x[order].unsqueeze(0))[0]
        if conv.mixer_backward is not None:
            order = order[::-1]
            mixed[order] += conv.mixer_backward(x[order].unsqueeze(0))[0]
    z = conv.norm1(x + conv.conv(x, edge_index)) + conv.norm2(x + mixed / len(noise))
    return conv.norm3(z + conv.mlp(z))


@pytest.mark.parametrize("num_perms", [1, 3])
@pytest.mark.parametrize("mixer", ["bimamba", "mamba"])
def test_equation(mixer, num_perms, random_graphs):
    x, edge_index, _ = random_graphs([19])
    conv = layer(mixer, num_perms=num_perms)
    torch.testing.assert_close(
        conv(x, edge_index), by_the_equation(conv, x, edge_index), atol=1e-10, rtol=1e-10
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_perms", [1, 3])
@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_equals_graph_by_graph(mixer, num_perms, dtype, tolerance, random_graphs):
    x, edge_index, batch = random_graphs(SIZES)
    x = x.to(dtype)
    conv = layer(mixer, num_perms=num_perms, dtype=dtype, norm="layer_norm")
    for batch_size in (None, 7, 9):
        packed = conv(x, edge_index, batch, batch_size=batch_size)
        alone = one_by_one(conv, x, edge_index, batch, 7)
        torch.testing.assert_close(packed, alone, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("order", ["bfs", "degree", "index", "pagerank", "random", "rcm"])
def test_output_does_not_depend_on_batch_mates(order, random_graphs):
    x, edge_index, batch = random_graphs([9, 14, 7])
    conv = layer(order=order, num_perms=2)
    together = conv(x, edge_index, batch)
    alone = one_by_one(conv, x, edge_index, batch, 3)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)


def test_gradients_packed_equal_graph_by_graph(random_graphs):
    x, edge_index, batch = random_graphs(SIZES)
    conv = layer("mamba", num_perms=2)
    weight = torch.randn_like(x)
    grads = []
    for run in (conv, lambda *args: one_by_one(conv, *args, 7)):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *conv.parameters()]
        grads.append(torch.autograd.grad((run(leaf, edge_index, batch) * weight).sum(), inputs))
    for packed, alone in zip(*grads, strict=True):
        torch.testing.assert_close(packed, alone, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mixer", ["bimamba", "mamba"])
def test_every_parameter_and_input_gets_a_gradient(mixer, random_graphs):
    x, edge_index, batch = random_graphs([8, 9])
    conv = layer(mixer).train()
    x.requires_grad_()
    (conv(x, edge_index, batch) * torch.randn_like(x)).sum().backward()
    for name, tensor in [("x", x), *conv.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize("mixer", ["bimamba", "mamba"])
def test_average_over_permutations_is_the_mean_of_separate_runs(mixer, random_graphs):
    x, edge_index, batch = random_graphs([6, 11])
    conv = layer(mixer, order="random", num_perms=4)
    sequences = conv.sequences(edge_index, batch, 2)
    position = torch.cat([torch.arange(6), torch.arange(11)])
    noise = tie_noise(position, 4, 0)
    runs = []
    for row in noise:
        single = copy.deepcopy(conv)
        single.eval_perms = 1
        runs.append(single._mix(x, single.sequences(edge_index, batch, 2, row)))
    assert not torch.allclose(runs[0], runs[1])
    torch.testing.assert_close(conv._mix(x, sequences), torch.stack(runs).mean(0))


def test_evaluation_may_average_more_orders_than_training(random_graphs):
    _x, edge_index, batch = random_graphs([6])
    conv = layer(num_perms=1, eval_perms=5, norm=None)
    assert conv.sequences(edge_index, batch, 1).places.shape == (5, 6)
    assert conv.train().sequences(edge_index, batch, 1).places.shape == (1, 6)


def test_relabelling_nodes_with_distinct_scores_relabels_the_output(random_graphs):
    x, edge_index, batch = random_graphs([13, 8])
    score = torch.randn(21)
    conv = layer(num_perms=2)
    moved = torch.randperm(21)  # mixes the two graphs as well: batch is not sorted any more
    back = torch.argsort(moved)
    before = conv(x, edge_index, batch, node_order=score)
    after = conv(x[back], moved[edge_index], batch[back], node_order=score[back])
    torch.testing.assert_close(after[moved], before, atol=1e-12, rtol=1e-12)


def test_distinct_degrees_make_the_layer_equivariant():
    # node i of this threshold graph has a degree of its own, except for one tied pair of twins
    nodes = 9
    pairs = [(i, j) for i in range(nodes) for j in range(i) if i + j >= nodes]
    edge_index = torch.tensor(pairs).t()
    edge_index = torch.cat([edge_index, edge_index.flip(0)], 1)
    x = torch.randn(nodes, 16, dtype=torch.float64)
    degree = torch.bincount(edge_index[0], minlength=nodes)
    twins = [v for v in range(nodes) if int((degree == degree[v]).sum()) > 1]
    x[twins] = x[twins[0]].clone()
    moved = torch.randperm(nodes)
    conv = layer()
    before = conv(x, edge_index)
    after = conv(x[torch.argsort(moved)], moved[edge_index])
    torch.testing.assert_close(after[moved], before, atol=1e-12, rtol=1e-12)


def test_unsorted_batch_gives_the_same_output(random_graphs):
    x, edge_index, batch = random_graphs([6, 1, 10, 4])
    conv = layer(num_perms=2)
    # nodes of different graphs interleave, the order inside each graph stays
    mixed = torch.argsort(
        torch.cat(
            [torch.rand(6).sort()[0] if n == 6 else torch.rand(n).sort()[0] for n in (6, 1, 10, 4)]
        )
    )
    place = torch.argsort(mixed)
    after = conv(x[mixed], place[edge_index], batch[mixed])
    assert not batch[mixed].equal(batch)
    torch.testing.assert_close(after, conv(x, edge_index, batch)[mixed], atol=1e-12, rtol=1e-12)


def test_graph_ids_may_have_gaps(random_graphs):
    x, edge_index, batch = random_graphs([6, 9])
    conv = layer()
    expected = conv(x, edge_index, batch)
    for ids, batch_size in (([2, 7], None), ([2, 7], 8), ([0, 5], 20)):
        torch.testing.assert_close(
            conv(x, edge_index, torch.tensor(ids)[batch], batch_size=batch_size), expected
        )


@pytest.mark.parametrize("order", ["bfs", "degree", "pagerank", "rcm", ["degree", "index"]])
@pytest.mark.parametrize("nodes", [0, 1, 2, 5])
@pytest.mark.parametrize("mixer", ["bimamba", "mamba"])
def test_graphs_without_edges(mixer, nodes, order):
    x = torch.randn(nodes, 16, dtype=torch.float64, requires_grad=True)
    empty = torch.empty(2, 0, dtype=torch.int64)
    conv = layer(mixer, order=order)
    for batch, batch_size in (
        (None, None),
        (torch.zeros(nodes).long(), None),
        (torch.arange(nodes), 6),
    ):
        out = conv(x, empty, batch, batch_size=batch_size)
        assert out.shape == x.shape
        assert out.isfinite().all()
    out.sum().backward()
    assert x.grad is not None


def test_loops_and_isolated_nodes(random_graphs):
    x, _, _ = random_graphs([4])
    edges = torch.tensor([[0, 1, 1], [0, 1, 2]])
    for conv in (layer(conv=None), layer(conv=SAGEConv(16, 16))):
        assert conv(x, edges).isfinite().all()


def test_noise_is_the_same_in_every_call_unless_fresh(random_graphs):
    x, edge_index, batch = random_graphs([20, 20])
    seeded = layer(order="random")
    assert seeded(x, edge_index, batch).equal(seeded(x, edge_index, batch))
    seeded.train()
    assert seeded(x, edge_index, batch).equal(seeded(x, edge_index, batch))
    fresh = layer(order="random", ties="fresh")
    assert fresh(x, edge_index, batch).equal(fresh(x, edge_index, batch))
    fresh.train()
    assert not fresh(x, edge_index, batch).equal(fresh(x, edge_index, batch))
    torch.manual_seed(3)
    first = fresh(x, edge_index, batch)
    torch.manual_seed(3)
    assert fresh(x, edge_index, batch).equal(first)


def test_ties_by_index_keep_the_stored_order(random_graphs):
    _x, edge_index, batch = random_graphs([9])
    by_index = layer(order="random", ties="index")
    assert by_index.sequences(edge_index, batch, 1).nodes.equal(torch.arange(9))
    other_seed = layer(order="random", seed=1).sequences(edge_index, batch, 1).nodes
    assert not layer(order="random").sequences(edge_index, batch, 1).nodes.equal(other_seed)


def test_order_may_be_a_function_of_the_user(random_graphs):
    _x, edge_index, batch = random_graphs([5, 6])

    def backwards_order(edges, graph, ties):
        assert edges.equal(edge_index)
        assert graph.equal(batch)
        assert ties.shape == (2, 11)
        return -torch.arange(11)

    conv = layer(order=backwards_order, num_perms=2)
    expected = [4, 3, 2, 1, 0, 10, 9, 8, 7, 6, 5]
    assert conv.sequences(edge_index, batch, 2).nodes.tolist() == 2 * expected
    assert "order=backwards" in repr(conv)


def test_several_orders_are_compared_one_after_another():
    edges = torch.tensor([[0, 2], [1, 3]])  # all of one degree, but for node 4

    conv = layer(order=("degree", "index"), conv=None)
    assert conv.sequences(edges, torch.zeros(5).long(), 1).nodes.tolist() == [4, 0, 1, 2, 3]


def test_mixer_may_be_a_module():
    x, edges = torch.randn(5, 16), torch.tensor([[0, 1], [1, 2]])
    mamba = create_mixer("mamba", 16, d_state=4)
    conv = GraphMambaConv(16, mixer=mamba)
    assert conv.mixer is mamba
    assert not conv.mixer_backward.in_proj.weight.equal(mamba.in_proj.weight)
    assert conv(x, edges).shape == (5, 16)
    assert GraphMambaConv(16, mixer=mamba, bidirectional=False).mixer_backward is None


def test_mamba_layer_has_the_parameters_of_the_paper():
    conv = GraphMambaConv(96, mixer="mamba", bidirectional=False)
    assert sum(p.numel() for p in conv.mixer.parameters()) == 34_080
    wide = GraphMambaConv(96, mixer="mamba", mixer_kwargs={"expand": 2, "d_state": 8})
    assert wide.mixer.d_inner == 192
    assert wide.mixer.d_state == 8


def test_one_directional_layer_is_causal_in_its_order():
    x = torch.randn(6, 16, dtype=torch.float64)
    none = torch.empty(2, 0, dtype=torch.int64)
    conv = layer("mamba", conv=None, order="index", bidirectional=False)
    changed = x.clone()
    changed[3] += 1
    same = (conv(x, none) == conv(changed, none)).all(1)
    assert same.tolist() == [True, True, True, False, False, False]


def test_without_mixer_nodes_far_apart_do_not_meet():
    x = torch.randn(6, 16, dtype=torch.float64)
    path = torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    changed = x.clone()
    changed[0] += 1
    plain, mixed = layer(None), layer("bimamba")
    assert plain(x, path)[2:].equal(plain(changed, path)[2:])
    assert not torch.isclose(mixed(x, path)[5], mixed(changed, path)[5]).all()
    assert plain.norm2 is None


class EdgeUpdate(nn.Module):
    """A conv that also updates edge features."""

    def __init__(self, channels):
        super().__init__()
        self.lin = nn.Linear(channels, channels)

    def forward(self, x, edge_index, edge_attr):
        return self.lin(x), edge_attr + x[edge_index[0]]


def test_conv_may_return_edge_features_too(random_graphs):
    x, edge_index, batch = random_graphs([5, 4])
    edge_attr = torch.zeros(edge_index.size(1), 16, dtype=torch.float64)
    conv = layer(conv=EdgeUpdate(16))
    out, edges = conv(x, edge_index, batch, edge_attr=edge_attr)
    assert out.shape == x.shape
    assert edges.equal(x[edge_index[0]])
    conv.reset_parameters()  # the conv has no such method, its linear layer does


def test_keyword_arguments_reach_the_conv(random_graphs):
    x, edge_index, batch = random_graphs([5, 4])
    edge_attr = torch.randn(edge_index.size(1), 3, dtype=torch.float64)
    conv = layer(conv=gin_conv(16, edge_dim=3))
    out = conv(x, edge_index, batch, edge_attr=edge_attr)
    assert not out.equal(conv(x, edge_index, batch, edge_attr=edge_attr + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_follows_x(dtype, random_graphs):
    x, edge_index, batch = random_graphs([5, 4])
    conv = layer(dtype=dtype, num_perms=2, norm="layer_norm")
    out = conv(x.to(dtype), edge_index, batch)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_autocast(random_graphs):
    x, edge_index, batch = random_graphs([5, 4])
    conv = layer(dtype=torch.float32)
    expected = conv(x.float(), edge_index, batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x.float(), edge_index, batch)
    assert (out.float() - expected).abs().max() < 0.1


def test_device_follows_x():
    with torch.device("meta"):
        conv = GraphMambaConv(16, SAGEConv(16, 16))
    assert {p.device.type for p in conv.parameters()} == {"meta"}


@pytest.mark.parametrize("order", ["bfs", "degree", "pagerank"])
def test_inputs_are_not_changed(order, random_graphs):
    x, edge_index, batch = random_graphs([5, 4])
    score = torch.randn(9)
    inputs = (x, edge_index, batch, score)
    copies = [t.clone() for t in inputs]
    conv = layer(order=order, num_perms=2).train()
    conv(x, edge_index, batch)
    conv(x, edge_index, batch, node_order=score)
    assert all(a.equal(b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("mixer", ["bimamba", "mamba"])
def test_reset_parameters_starts_anew_and_again(mixer):
    conv = layer(
        mixer, conv=GINConv(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    )
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        conv.reset_parameters()
        states.append({name: p.clone() for name, p in conv.named_parameters()})
    for name, value in states[0].items():
        assert value.equal(states[1][name]), name
    # A, D, norms and the skip start from fixed values, everything else is drawn
    drawn = [name for name, value in states[0].items() if not value.equal(states[2][name])]
    fixed = set(states[0]) - set(drawn)
    assert all(
        name.startswith("norm") or ".A" in name or name.split(".")[-1].startswith("D")
        for name in fixed
    )
    assert "mixer.dt_proj.bias" in drawn


def test_repr_is_one_line():
    conv = GraphMambaConv(96, GINEConv(nn.Sequential(nn.Linear(96, 96), nn.ReLU())))
    assert repr(conv) == (
        "GraphMambaConv(96, conv=GINEConv(nn=Sequential( (0): Linear(in_features=96, "
        "out_features=96, bias=True) (1): ReLU() )), mixer=bimamba, order=degree, "
        "bidirectional=True)"
    )
    assert str(GraphMambaConv(8, SAGEConv(8, 8), None, ["degree", "bfs"])) == (
        "GraphMambaConv(8, conv=SAGEConv(8, 8, aggr=mean), mixer=None, order=degree+bfs, "
        "bidirectional=True)"
    )


def test_a_few_graphs_are_learned_by_heart(random_graphs):
    x, edge_index, batch = random_graphs([7, 9, 5, 8], seed=3)
    x, target = x.float(), torch.tensor([0, 1, 1, 0])[batch]
    conv = GraphMambaConv(16, GCNConv(16, 16)).train()
    head = nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*conv.parameters(), *head.parameters()], 0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(head(conv(x, edge_index, batch)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
