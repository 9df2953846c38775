"""Any convolution of PyG as the local part."""

import pytest
import torch
from torch import nn
from torch_geometric import nn as pyg

from scanweave.graph import GMNConv, GraphMambaConv


def mlp(width=16):
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


PLAIN = {
    "ARMAConv": lambda: pyg.ARMAConv(16, 16),
    "ChebConv": lambda: pyg.ChebConv(16, 16, K=3),
    "ClusterGCNConv": lambda: pyg.ClusterGCNConv(16, 16),
    "EdgeConv": lambda: pyg.EdgeConv(nn.Linear(32, 16)),
    "GATConv": lambda: pyg.GATConv(16, 4, heads=4),
    "GATv2Conv": lambda: pyg.GATv2Conv(16, 4, heads=4),
    "GCNConv": lambda: pyg.GCNConv(16, 16),
    "GENConv": lambda: pyg.GENConv(16, 16),
    "GINConv": lambda: pyg.GINConv(mlp(), train_eps=True),
    "GatedGraphConv": lambda: pyg.GatedGraphConv(16, num_layers=2),
    "GraphConv": lambda: pyg.GraphConv(16, 16),
    "PNAConv": lambda: pyg.PNAConv(
        16, 16, ["mean", "max", "std"], ["identity", "amplification"], torch.tensor([1, 4, 9, 2])
    ),
    "ResGatedGraphConv": lambda: pyg.ResGatedGraphConv(16, 16),
    "SAGEConv": lambda: pyg.SAGEConv(16, 16),
    "SGConv": lambda: pyg.SGConv(16, 16, K=2),
    "TAGConv": lambda: pyg.TAGConv(16, 16),
    "TransformerConv": lambda: pyg.TransformerConv(16, 4, heads=4),
}

WITH_EDGES = {
    "GATConv": lambda: pyg.GATConv(16, 16, edge_dim=3),
    "GENConv": lambda: pyg.GENConv(16, 16, edge_dim=3),
    "GINEConv": lambda: pyg.GINEConv(mlp(), edge_dim=3),
    "PNAConv": lambda: pyg.PNAConv(
        16, 16, ["mean"], ["identity"], torch.tensor([1, 4, 9]), edge_dim=3
    ),
    "ResGatedGraphConv": lambda: pyg.ResGatedGraphConv(16, 16, edge_dim=3),
    "TransformerConv": lambda: pyg.TransformerConv(16, 16, edge_dim=3),
}


@pytest.mark.parametrize(
    "make", [GraphMambaConv, lambda c, conv: GMNConv(c, c, 2, 2, 1, conv=conv)]
)
@pytest.mark.parametrize("name", PLAIN)
def test_plain(name, make, random_graphs):
    x, edges, batch = random_graphs([6, 1, 9])
    layer = make(16, conv=PLAIN[name]()).double().eval()
    layer.reset_parameters()
    out = layer(x, edges, batch)
    assert out.shape == (16, 16)
    # the local part is in it: without edges the result is another
    assert not torch.isclose(out, layer(x, edges[:, :0], batch)).all()
    alone = layer(x[7:], edges[:, batch[edges[0]] == 2] - 7)
    torch.testing.assert_close(out[7:], alone, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    "make", [GraphMambaConv, lambda c, conv: GMNConv(c, c, 2, 2, 1, conv=conv)]
)
@pytest.mark.parametrize("name", WITH_EDGES)
def test_with_edge_features(name, make, random_graphs):
    x, edges, batch = random_graphs([6, 1, 9])
    layer = make(16, conv=WITH_EDGES[name]()).double().eval()
    attr = torch.randn(edges.size(1), 3, dtype=torch.float64)
    out = layer(x, edges, batch, edge_attr=attr)
    assert not torch.isclose(out, layer(x, edges, batch, edge_attr=attr + 1)).all()
