"""The gated convolution: its equation, its place in Graph-Mamba's block, forms of edges."""

import pytest
import torch
from torch_geometric import EdgeIndex
from torch_geometric.nn import Linear
from torch_geometric.utils import to_torch_csr_tensor

from scanweave.graph import GatedGCNConv, GraphMamba, GraphMambaConv, gated_gcn_conv


def by_the_equation(conv, x, edges, attr):
    hat = {}
    for number, (j, i) in enumerate(edges.t().tolist()):
        e = torch.zeros(conv.channels, dtype=x.dtype) if attr is None else attr[number]
        hat[number, i, j] = conv.lin_D(x[i]) + conv.lin_E(x[j]) + conv.lin_C(e)
    rows = []
    for v in range(x.size(0)):
        gates = [(torch.sigmoid(h), j) for (_, i, j), h in hat.items() if i == v]
        top = sum((g * conv.lin_B(x[j]) for g, j in gates), torch.zeros_like(x[0]))
        rows.append(conv.lin_A(x[v]) + top / (sum((g for g, _ in gates), 0) + 1e-6))
    out = conv.norm_x(torch.stack(rows)).relu()
    if attr is None:
        return out, None
    return out, attr + conv.norm_e(torch.stack(list(hat.values()))).relu()


@pytest.mark.parametrize("training", [True, False])
def test_equation(training, random_graphs):
    x, edges, _ = random_graphs([6], channels=4)
    edges = edges[:, :-3]  # not symmetric
    conv = GatedGCNConv(4).double().train(training)
    attr = torch.randn(edges.size(1), 4, dtype=torch.float64)
    out, after = conv(x, edges, attr)
    expected, expected_edges = by_the_equation(conv, x, edges, attr)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, expected_edges)
    torch.testing.assert_close(conv(x, edges), by_the_equation(conv, x, edges, None)[0])


def test_block_has_the_parameters_of_graph_mamba():
    block = GraphMambaConv(96, GatedGCNConv(96), "mamba", bidirectional=False)
    assert sum(p.numel() for p in block.parameters()) == 118_752


def test_edge_features_go_from_layer_to_layer(random_graphs):
    x, edges, batch = random_graphs([5, 1, 7], channels=4)
    model = GraphMamba(4, 8, 2, 3, conv=gated_gcn_conv).double().eval()
    attr = Linear(3, 8).double()(torch.randn(edges.size(1), 3, dtype=torch.float64))
    out = model(x, edges, edge_attr=attr, batch=batch)
    assert not torch.isclose(model(x, edges, edge_attr=-attr, batch=batch), out).all()
    (out**2).sum().backward()
    unused = ("convs.1.conv.norm_e.weight", "convs.1.conv.norm_e.bias")
    for name, parameter in model.named_parameters():
        # nothing reads the edge features of the last layer
        assert (parameter.grad is None) == (name in unused), name


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_forms_of_adjacency(random_graphs):
    x, edges, _ = random_graphs([8], channels=4)
    edges = edges.unique(dim=1)[:, :-3].contiguous()
    conv = GatedGCNConv(4).double().eval()
    expected = conv(x, edges)
    torch.testing.assert_close(conv(x, EdgeIndex(edges, sparse_size=(8, 8))), expected)
    csr = to_torch_csr_tensor(edges.flip(0), size=(8, 8))
    torch.testing.assert_close(conv(x, csr), expected, atol=1e-6, rtol=0)


def test_without_edges():
    conv = GatedGCNConv(4).train()
    none, attr = torch.empty(2, 0, dtype=torch.int64), torch.empty(0, 4)
    out, after = conv(torch.randn(3, 4), none, attr)
    assert out.isfinite().all()
    assert after.shape == (0, 4)


def test_reset_parameters_repeats():
    conv, states = GatedGCNConv(4), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        conv.reset_parameters()
        states.append(torch.cat([p.detach().flatten().clone() for p in conv.parameters()]))
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])
    assert repr(conv) == "GatedGCNConv(4)"


def test_edge_features_of_another_width():
    with pytest.raises(ValueError, match=r"edge_attr must be \(E, 4\), got \(1, 3\)"):
        GatedGCNConv(4)(torch.ones(2, 4), torch.tensor([[0], [1]]), torch.ones(1, 3))
