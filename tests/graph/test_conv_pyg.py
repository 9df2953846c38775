"""`GraphMambaConv` keeps the promises of PyG's own layers, `GPSConv`'s above all."""

import inspect

import pytest
import torch
import torch_geometric.typing
from torch import Tensor, nn
from torch.nn import functional
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import GCNConv, GPSConv, HeteroConv, SAGEConv
from torch_geometric.testing import assert_module
from torch_geometric.utils import (
    k_hop_subgraph,
    to_torch_coo_tensor,
    to_torch_csc_tensor,
    to_torch_csr_tensor,
)

from scanweave.graph import GatedGCNConv, GMNConv, GraphMamba, GraphMambaConv, GraphMambaNet

# torch announces, once per process, that sparse tensors are young and unchecked; PyG, that its
# convolutions would rather have CSR, and that nodes of type b are not updated
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR:UserWarning"),
    pytest.mark.filterwarnings("ignore:There exist node types:UserWarning"),
]

NORMS = [None, "batch_norm", "layer_norm", "graph_norm", "instance_norm", "pair_norm"]
MIXERS = ["attention_bidirectional", "bimamba", "mamba"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_pyg_asserts_of_gps_conv(mixer, norm, four_nodes):
    x, edge_index, batch = four_nodes
    conv = GraphMambaConv(16, conv=SAGEConv(16, 16), mixer=mixer, norm=norm)
    conv.reset_parameters()
    assert str(conv) == (
        "GraphMambaConv(16, conv=SAGEConv(16, 16, aggr=mean), "
        f"mixer={mixer}, order=degree, bidirectional=True)"
    )
    # in training mode, as PyG's test does: two calls agree
    adj = to_torch_csc_tensor(edge_index, size=(4, 4))
    for graph_ids in (None, batch):
        out = conv(x, edge_index, graph_ids)
        assert out.size() == (4, 16)
        torch.testing.assert_close(conv(x, adj.t(), graph_ids), out, atol=1e-6, rtol=0)


def test_arguments_of_gps_conv_are_there():
    ours = inspect.signature(GraphMambaConv).parameters
    theirs = inspect.signature(GPSConv).parameters
    for name, parameter in theirs.items():
        if name in ("heads", "attn_type", "attn_kwargs"):  # here: mixer and mixer_kwargs
            continue
        assert name in ours
        if parameter.default is not inspect.Parameter.empty:
            assert ours[name].default == parameter.default
    assert list(ours)[:2] == list(theirs)[:2]
    forward = list(inspect.signature(GraphMambaConv.forward).parameters)
    assert forward[:4] == list(inspect.signature(GPSConv.forward).parameters)[:4]


def test_layer_with_attention_computes_what_gps_conv_does(random_graphs):
    x, edge_index, batch = random_graphs([5, 7, 3])
    theirs = GPSConv(16, SAGEConv(16, 16), heads=4).double().eval()
    ours = GraphMambaConv(
        16, SAGEConv(16, 16), "attention_bidirectional", mixer_kwargs={"num_heads": 4}
    )
    ours.double().eval()
    rename = {"attn.in_proj_": "mixer.in_proj.", "attn.out_proj": "mixer.out_proj"}
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in rename.items():
            name = name.replace(old, new)
        state[name] = value
    ours.load_state_dict(state)
    torch.testing.assert_close(
        ours(x, edge_index, batch), theirs(x, edge_index, batch), atol=1e-12, rtol=1e-10
    )


FORMS = ["coo", "csc", "csr", "edge_index_class", "sparse_tensor"]


def in_form(edge_index: Tensor, nodes: int, form: str):
    flipped = edge_index.flip(0)
    if form == "edge_index_class":
        return EdgeIndex(edge_index, sparse_size=(nodes, nodes)).sort_by("col").values
    if form == "sparse_tensor":
        if not torch_geometric.typing.WITH_TORCH_SPARSE:
            pytest.skip("torch_sparse is not installed")
        return torch_geometric.typing.SparseTensor.from_edge_index(
            flipped, sparse_sizes=(nodes,) * 2
        )
    makers = {"coo": to_torch_coo_tensor, "csr": to_torch_csr_tensor, "csc": to_torch_csc_tensor}
    return makers[form](flipped, size=(nodes, nodes))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["bfs", "degree", "pagerank", "rcm"])
def test_every_adjacency_form_gives_the_same_output(order, form, random_graphs):
    x, edge_index, batch = random_graphs([6, 8])
    x = x.float()
    edge_index = edge_index[:, :-5]  # not symmetric
    conv = GraphMambaConv(16, SAGEConv(16, 16), order=order).eval()
    expected = conv(x, edge_index, batch)
    adj = in_form(edge_index, 14, form)
    torch.testing.assert_close(conv(x, adj, batch), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["conv", "gated", "gin", "mean", "model", "rwf"])
def test_what_pyg_asserts_of_its_modules(kind, random_graphs):
    x, edge_index, batch = random_graphs([6, 8], channels=8)
    edge_index = edge_index.unique(dim=1)[:, torch.randperm(30)]
    further = {"batch": batch, "batch_size": 2}
    if kind == "conv":
        module = GraphMambaConv(8, SAGEConv(8, 8))
    elif kind == "gated":
        module, further = GatedGCNConv(8), {}
    elif kind == "model":
        module = GraphMamba(8, 8, 2, conv=lambda channels: SAGEConv(channels, channels))
    else:
        module = GMNConv(8, 8, 2, 2, 1, kind, SAGEConv(8, 8))
    # output size, edges in another order, sparse layouts
    assert_module(
        *(module.eval(), x.float(), edge_index), expected_size=(14, 8), atol=1e-5, **further
    )


ACTIVATIONS = [None, "leaky_relu", torch.relu_, functional.elu, nn.ReLU()]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("jk", [None, "cat"])
def test_arguments_that_pyg_tests_its_models_with(jk, act):
    x, edge_index = torch.randn(3, 8), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    model = GraphMamba(8, 16, 3, 5, dropout=0.5, act=act, norm="layer_norm", jk=jk)
    assert model(x, edge_index).size() == (3, 5)
    model.reset_parameters()
    values = torch.randn(4, 32)
    between = model.convs[0].mlp[1](values.clone())
    if act is None:
        assert between.equal(values)
    else:
        assert not between.equal(values)


def test_order_of_edges_changes_nothing(random_graphs):
    x, edge_index, batch = random_graphs([6, 8])
    conv = GraphMambaConv(16, SAGEConv(16, 16), order="rcm").double().eval()
    mixed = edge_index[:, torch.randperm(edge_index.size(1))]
    torch.testing.assert_close(conv(x, mixed, batch), conv(x, edge_index, batch))


def test_same_type_edges_in_a_hetero_conv():
    data = HeteroData()
    data["a"].x, data["b"].x = torch.randn(5, 8), torch.randn(3, 8)
    data["a", "to", "a"].edge_index = torch.tensor([[0, 1, 2], [1, 2, 4]])
    data["b", "to", "a"].edge_index = torch.tensor([[0, 1], [3, 4]])
    same = GraphMambaConv(8, SAGEConv(8, 8)).eval()
    other = SAGEConv(8, 8)
    both = HeteroConv({("a", "to", "a"): same, ("b", "to", "a"): other})
    out = both(data.x_dict, data.edge_index_dict)["a"]
    expected = same(data["a"].x, data["a", "to", "a"].edge_index)
    expected = expected + other((data["b"].x, data["a"].x), data["b", "to", "a"].edge_index)
    torch.testing.assert_close(out, expected)
    tokens = HeteroConv({("a", "to", "a"): GMNConv(8, 8, 2, 2, 1)}).eval()
    assert tokens(data.x_dict, data.edge_index_dict)["a"].shape == (5, 8)
    for layer, message in (
        (GraphMambaConv(8, SAGEConv(8, 8)), "x must be one tensor, got a tuple of 2"),
        (GMNConv(8, 8, 2, 2, 1), r"x must be \(n, 8\), got tuple"),
    ):
        wrong = HeteroConv({("b", "to", "a"): layer})
        with pytest.raises(ValueError, match=message):
            wrong(data.x_dict, data.edge_index_dict)


@pytest.mark.parametrize("kind", [GraphMamba, GraphMambaNet])
def test_explainer_runs_and_finds_edges(kind, random_graphs):
    x, edge_index, _ = random_graphs([10])
    model = kind(16, 16, 2, 3, conv=lambda channels: GCNConv(channels, channels))
    explainer = Explainer(
        model.eval(),
        GNNExplainer(epochs=3),
        explanation_type="model",
        node_mask_type="attributes",
        edge_mask_type="object",
        model_config={
            "mode": "multiclass_classification",
            "task_level": "node",
            "return_type": "raw",
        },
    )
    explanation = explainer(x.float(), edge_index, index=4)
    assert explanation.node_mask.shape == (10, 16)
    assert explanation.edge_mask.shape == (edge_index.size(1),)
    assert explanation.edge_mask.max() > 0
    # the mixer lets distant nodes matter: more nodes than those within two edges get a mask
    near = k_hop_subgraph(4, 2, edge_index, num_nodes=10)[0]
    assert int((explanation.node_mask.abs().sum(1) > 0).sum()) >= near.numel()


def test_sampled_subgraph_runs_as_one_graph(random_graphs):
    x, edge_index, _ = random_graphs([30])
    model = GraphMamba(16, 16, 2, 3).double().eval()
    nodes, own_edges, seed, _ = k_hop_subgraph(
        [3, 9], 1, edge_index, relabel_nodes=True, num_nodes=30
    )
    out = model(x[nodes], own_edges)
    assert out[seed].shape == (2, 3)


def test_batches_of_a_loader_and_the_same_batch_by_hand(random_graphs):
    graphs = []
    for size in (4, 1, 6):
        x, edge_index, _ = random_graphs([size], seed=size)
        graphs.append(Data(x=x, edge_index=edge_index))
    batch = Batch.from_data_list(graphs)
    conv = GraphMambaConv(16, SAGEConv(16, 16)).double().eval()
    together = conv(batch.x, batch.edge_index, batch.batch, batch_size=batch.num_graphs)
    alone = torch.cat([conv(graph.x, graph.edge_index) for graph in graphs])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("mixer", "num_perms", "backend"),
    [
        ("bimamba", 2, "eager"),
        pytest.param("bimamba", 1, "aot_eager", marks=pytest.mark.slow),
        pytest.param("mamba", 2, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_with_changing_sizes(mixer, num_perms, backend, random_graphs):
    torch.compiler.reset()
    conv = GraphMambaConv(8, SAGEConv(8, 8), mixer, num_perms=num_perms)
    compiled = torch.compile(conv, dynamic=True, fullgraph=True, backend=backend)
    for sizes in ([5, 3, 9], [4, 11]):
        x, edge_index, batch = random_graphs(sizes, channels=8)
        results = []
        for run in (conv, compiled):
            leaf = x.float().requires_grad_()
            out = run(leaf, edge_index, batch, batch_size=len(sizes))
            results.append((out.detach(), torch.autograd.grad((out**2).sum(), leaf)[0]))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
