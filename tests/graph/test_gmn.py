"""The layer with subgraph tokens: its equation, what may change its output, bad input."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GCNConv, GINEConv, SAGEConv
from torch_geometric.utils import to_torch_csc_tensor

from scanweave.graph import AddWalkTokens, GMNConv, MeanEncoder
from scanweave.graph.ordering import tie_noise
from scanweave.graph.walks import Neighbours, random_walks

SIZES = [5, 1, 0, 9, 3, 0]
ENCODERS = ["gin", "mean", "rwf"]


def layer(encoder="mean", conv="sage", in_channels=16, dtype=torch.float64, **kwargs):
    sizes = {"walk_length": 2, "num_walks": 2, "num_repeats": 2, **kwargs}
    local = SAGEConv(in_channels, 12) if conv == "sage" else conv
    return GMNConv(in_channels, 12, encoder=encoder, conv=local, **sizes).to(dtype).eval()


def one_by_one(conv, x, edge_index, batch, num_graphs):
    """The layer on each graph alone, put together again."""
    out = x.new_empty(x.size(0), conv.out_channels)
    for number in range(num_graphs):
        nodes = (batch == number).nonzero().squeeze(1)
        local = torch.full_like(batch, -1)
        local[nodes] = torch.arange(nodes.numel())
        own = batch[edge_index[0]] == number
        out[nodes] = conv(x[nodes], local[edge_index[:, own]])
    return out


@pytest.mark.parametrize("mixer", ["bimamba", "mamba"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_equation(encoder, mixer, random_graphs):
    x, edges, _ = random_graphs([10])
    conv = layer(encoder, mixer=mixer, num_token_layers=2, seed=5)
    every = torch.arange(10)
    neighbours = Neighbours(edges, 10)
    z = conv.encoder(x, random_walks(neighbours, every, every, 2, 2, 2, seed=5), neighbours)
    assert z.shape == (10, 5, 12)
    for block in conv.token_layers:
        h = block.norm(z)
        z = z + block.mixer(h)
        if mixer == "mamba":
            z = z + block.mixer_backward(h.flip(1)).flip(1)
    z = z[:, -1]
    degree = torch.bincount(edges.flatten(), minlength=10).tolist()
    noise = tie_noise(every, 1, 5)[0].tolist()
    order = sorted(range(10), key=lambda v: (degree[v], noise[v]))
    mixed = torch.zeros_like(z)
    mixed[order] = conv.mixer(conv.norm(z)[order].unsqueeze(0))[0]
    if mixer == "mamba":
        back = order[::-1]
        mixed[back] += conv.mixer_backward(conv.norm(z)[back].unsqueeze(0))[0]
    torch.testing.assert_close(conv(x, edges), z + mixed + conv.conv(x, edges))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_packed_equals_graph_by_graph(encoder, dtype, tolerance, random_graphs):
    x, edges, batch = random_graphs(SIZES)
    x = x.to(dtype)
    conv = layer(encoder, dtype=dtype, num_perms=2)
    alone = one_by_one(conv, x, edges, batch, 6)
    for batch_size in (None, 6, 8):
        packed = conv(x, edges, batch, batch_size=batch_size)
        torch.testing.assert_close(packed, alone, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_batch_mates_do_not_change_a_bit(encoder, random_graphs):
    x, edges, batch = random_graphs([7, 9, 6])
    conv = layer(encoder, num_perms=2)
    before = conv(x, edges, batch)
    # the graphs around the second one are replaced by others of other edges
    mates = batch != 1
    x = torch.where(mates.unsqueeze(1), torch.randn_like(x), x)
    other = random_graphs([7, 9, 6], seed=1)[1]
    kept = torch.cat([edges[:, batch[edges[0]] == 1], other[:, batch[other[0]] != 1]], 1)
    after = conv(x, kept, batch)
    assert after[~mates].equal(before[~mates])
    assert not after[mates].equal(before[mates])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_unsorted_batch_gives_the_same_output(encoder, random_graphs):
    x, edges, batch = random_graphs([6, 1, 10, 4])
    conv = layer(encoder)
    # nodes of different graphs interleave, the order inside each graph stays
    mixed = torch.argsort(torch.cat([torch.rand(size).sort()[0] for size in (6, 1, 10, 4)]))
    after = conv(x[mixed], torch.argsort(mixed)[edges], batch[mixed])
    assert not batch[mixed].equal(batch)
    torch.testing.assert_close(after, conv(x, edges, batch)[mixed], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_graphs_without_edges(encoder, nodes):
    x = torch.randn(nodes, 16, dtype=torch.float64, requires_grad=True)
    empty = torch.empty(2, 0, dtype=torch.int64)
    conv = layer(encoder)
    for batch, batch_size in ((None, None), (torch.zeros(nodes).long(), None), (None, 1)):
        out = conv(x, empty, batch, batch_size=batch_size)
        assert out.shape == (nodes, 12)
        assert out.isfinite().all()
    conv(x, empty, torch.arange(nodes), batch_size=6).sum().backward()
    assert x.grad is not None


def test_loops_double_edges_and_isolated_nodes(random_graphs):
    x, _, _ = random_graphs([4])
    edges = torch.tensor([[0, 1, 1, 1], [0, 1, 2, 2]])
    for encoder in ENCODERS:
        assert layer(encoder)(x, edges).isfinite().all()


def test_edges_in_another_order_change_nothing(random_graphs):
    x, edges, batch = random_graphs([8, 6])
    for encoder in ENCODERS:
        conv = layer(encoder)
        mixed = edges[:, torch.randperm(edges.size(1))]
        torch.testing.assert_close(conv(x, mixed, batch), conv(x, edges, batch))


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_adjacency_may_be_a_sparse_matrix(random_graphs):
    x, edges, batch = random_graphs([8, 6])
    edges = edges.unique(dim=1).contiguous()
    adjacency = to_torch_csc_tensor(edges, size=(14, 14)).to(torch.float64)
    for encoder in ENCODERS:
        conv = layer(encoder, conv=GCNConv(16, 12, normalize=False, add_self_loops=False))
        expected = conv(x, edges, batch)
        torch.testing.assert_close(conv(x, adjacency.t(), batch), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(conv(x, EdgeIndex(edges, sparse_size=(14, 14)), batch), expected)


def test_evaluation_repeats_and_training_draws_new_walks(random_graphs):
    x, edges, batch = random_graphs([20, 12])
    conv = layer()
    assert conv(x, edges, batch).equal(conv(x, edges, batch))
    conv.train()
    assert not conv(x, edges, batch).equal(conv(x, edges, batch))
    torch.manual_seed(3)
    first = conv(x, edges, batch)
    torch.manual_seed(3)
    assert conv(x, edges, batch).equal(first)
    still = layer(resample=False)
    assert still(x, edges, batch).equal(still.train()(x, edges, batch))
    # another seed, other walks
    other = copy.deepcopy(still.eval())
    other.seed = 1
    order = torch.arange(32)
    before = still(x, edges, batch, node_order=order)
    assert not before.equal(other(x, edges, batch, node_order=order))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_chunks_change_neither_output_nor_gradients(encoder, random_graphs):
    x, edges, batch = random_graphs([8, 9])
    results = []
    for size in (None, 5):
        torch.manual_seed(0)
        conv = layer(encoder, token_chunk_size=size).train()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = conv(leaf, edges, batch)
        inputs = [leaf, *conv.parameters()]
        grads = torch.autograd.grad((out * torch.linspace(0, 1, 12)).sum(), inputs)
        with torch.no_grad():
            results.append([out, conv.eval()(x, edges, batch), *grads])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_and_input_gets_a_gradient(encoder, random_graphs):
    x, edges, batch = random_graphs([8, 9])
    conv = layer(encoder, mixer="mamba", num_token_layers=2).train()
    x.requires_grad_()
    (conv(x, edges, batch) * torch.randn(17, 12)).sum().backward()
    # the last layer keeps the place where its backward scan starts, before any decay
    unused = "token_layers.1.mixer_backward.A_log"
    for name, tensor in [("x", x), *conv.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert (tensor.grad.abs().max() > 0) == (name != unused), name


def test_gradients_are_those_of_differences(random_graphs):
    x, edges, _ = random_graphs([4], channels=3)
    for encoder in ENCODERS:
        conv = GMNConv(3, 4, 2, 2, 1, encoder, mixer_kwargs={"d_state": 2}).double().eval()
        assert torch.autograd.gradcheck(lambda h: conv(h, edges), x.requires_grad_())  # noqa: B023


def test_stored_walks_give_the_same_output(random_graphs):
    graphs = []
    for size in (6, 1, 9):
        x, edges, _ = random_graphs([size], seed=size)
        graphs.append(Data(x=x, edge_index=edges))
    transform = AddWalkTokens(2, 2, 2, seed=4)
    batch = Batch.from_data_list([transform(graph) for graph in graphs])
    assert batch.walk_index.shape == (5, 2, 3, 16)
    assert "walk_index" not in graphs[0]
    conv = layer(seed=4)
    stored = conv(batch.x, batch.edge_index, batch.batch, walk_index=batch.walk_index)
    assert stored.equal(conv(batch.x, batch.edge_index, batch.batch))
    assert "num_walks=2" in repr(transform)


def test_nodes_only():
    x, edges = torch.randn(5, 12), torch.tensor([[0, 1], [1, 2]])
    same, wider = GMNConv(12, 12, 0), GMNConv(12, 20, 0)
    assert same.encoder is None
    assert not same.token_layers
    assert same(x, edges).shape == (5, 12)
    assert wider(x, edges).shape == (5, 20)


def test_tokens_carry_features_as_far_as_walks_go():
    x = torch.randn(8, 16, dtype=torch.float64)
    step = torch.arange(7)
    path = torch.cat([torch.stack([step, step + 1]), torch.stack([step + 1, step])], 1)
    conv = layer(conv=None, num_walks=30)
    changed = x.clone()
    changed[0] += 1
    graphs = torch.zeros(8, dtype=torch.int64)
    a, b = (conv._encode(h, path, None, graphs, 1, None) for h in (x, changed))
    assert (a != b).any(1).tolist() == [True] * 3 + [False] * 5


def test_encoder_may_be_a_module_and_take_edge_features(random_graphs):
    x, edges, _ = random_graphs([6])
    encoder = MeanEncoder(16, 12).double()
    conv = layer(encoder)
    assert conv.encoder is encoder
    attr = torch.randn(edges.size(1), 3, dtype=torch.float64)
    for name, local in itertools.product(("gin", "rwf"), (None, GINEConv)):
        made = None if local is None else GINEConv(nn.Linear(16, 12), edge_dim=3)
        conv = layer(name, conv=made, encoder_kwargs={"edge_dim": 3})
        out = conv(x, edges, edge_attr=attr)
        assert not torch.isclose(out, conv(x, edges, edge_attr=attr + 1)).all()
    # features for the encoder do not disturb a convolution that takes none
    assert layer("gin", encoder_kwargs={"edge_dim": 3})(x, edges, edge_attr=attr).shape == (6, 12)


def test_reset_parameters_repeats():
    for encoder in ENCODERS:
        conv = layer(encoder)
        states = []
        for _ in range(2):
            torch.manual_seed(0)
            conv.reset_parameters()
            states.append({name: value.clone() for name, value in conv.state_dict().items()})
        assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_repr_is_one_line():
    text = repr(layer("rwf", num_walks=3))
    assert "\n" not in text
    assert text.startswith("GMNConv(16, 12, walk_length=2, num_walks=3, num_repeats=2, encoder=RWF")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"walk_length": -1}, "walk_length must be at least 0, got -1"),
        ({"num_walks": 0}, "num_walks must be at least 1, got 0"),
        ({"num_repeats": 0}, "num_repeats must be at least 1, got 0"),
        ({"num_token_layers": 0}, "num_token_layers must be at least 1, got 0"),
        ({"token_chunk_size": -5}, "token_chunk_size must be at least 1, got -5"),
        ({"encoder": "sum"}, "encoder must be a module or one of gin, mean, rwf, got 'sum'"),
        (
            {"encoder": MeanEncoder(8, 8), "encoder_kwargs": {"window": 2}},
            "encoder_kwargs must be None unless encoder is a name",
        ),
        ({"mixer": None}, "mixer must be a name, got NoneType"),
        ({"bidirectional": False}, "bidirectional must be True .* got False for bimamba"),
        ({"ties": "maybe"}, "ties must be 'noise', 'fresh' or 'index', got 'maybe'"),
        ({"eval_perms": 0}, "eval_perms must be at least 1, got 0"),
    ],
)
def test_constructor_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GMNConv(8, 8, **kwargs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (torch.randn(4, 8), torch.randn(4, 8))}, r"x must be \(n, 8\), got tuple"),
        ({"x": torch.randn(4, 7)}, r"x must be \(n, 8\), got \(4, 7\)"),
        ({"edge_index": torch.tensor([[-1], [0]])}, r"edge_index must hold node ids in \[0, 4\)"),
        ({"batch": torch.zeros(3).long()}, r"batch must be \(4,\) int64 like x"),
        ({"batch": torch.ones(4).long(), "batch_size": 1}, r"batch_size must be at least .* = 2"),
        ({"node_order": torch.zeros(3)}, "node_order must give one score per node"),
        (
            {"walk_index": torch.zeros(9, 4, 4, 4).long()},
            r"walk_index must be \(9, 4, 5, 4\) int64, got \(9, 4, 4, 4\)",
        ),
        ({"walk_index": torch.zeros(9, 4, 5, 4)}, "walk_index must be .* got .* torch.float32"),
        ({"walk_index": torch.zeros(1, device="meta")}, "walk_index must be on cpu like x"),
        ({"edge_attr": torch.ones(1, 2), "conv": None}, "conv must be a layer to take edge_attr"),
        ({"conv": SAGEConv(8, 6)}, r"conv must return \(4, 8\), got \(4, 6\)"),
    ],
)
def test_forward_refuses(arguments, message):
    arguments = {"x": torch.randn(4, 8), "edge_index": torch.tensor([[0], [1]]), **arguments}
    conv = GMNConv(8, 8, conv=arguments.pop("conv", None))
    with pytest.raises(ValueError, match=message):
        conv(**arguments)
