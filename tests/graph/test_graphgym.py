"""GraphGym's registrations: the classes, and with yacs a model from a configuration."""

import dataclasses

import pytest
import torch
from torch import nn
from torch_geometric.data import Batch, Data

from scanweave.graph import AddLapPE, AddNodeOrder, AddRWSE, AddWalkTokens, graphgym
from scanweave.graph.graphgym import LayerConfig, Settings, init_weights, register

SIZES = (6, 1, 9)


@pytest.fixture
def batch(random_graphs):
    graphs = []
    for size in SIZES:
        x, edges, _ = random_graphs([size], channels=5, seed=size)
        attr = torch.randn(edges.size(1), 3)
        graphs.append(
            Data(x=x.float(), edge_index=edges, edge_attr=attr, y=torch.tensor([size % 2]))
        )
    return Batch.from_data_list(graphs)


def config(**kwargs):
    return LayerConfig(**{"dim_in": 5, "dim_out": 8, "edge_dim": 3, "act": "prelu", **kwargs})


def test_names_are_registered():
    assert register.layer_dict["graph_mamba"] is graphgym.GraphMambaLayer
    assert register.layer_dict["gmn"] is graphgym.GMNLayer
    assert register.network_dict["graph_mamba"] is graphgym.GraphMambaNetwork
    assert register.head_dict["graph_mamba_link"] is graphgym.GraphMambaLinkHead
    assert register.config_dict["graph_mamba"] is graphgym.add_settings
    assert {"graph_mamba_lap_pe", "graph_mamba_rwse"} <= set(register.node_encoder_dict)
    with pytest.raises(KeyError, match="graph_mamba"):
        register.register_layer("graph_mamba", nn.Linear)


@pytest.mark.parametrize("conv", ["gin", "gcn", "none"])
@pytest.mark.parametrize("name", ["graph_mamba", "gmn"])
def test_layer_is_the_layer_it_says(name, conv, batch):
    own = Settings(conv=conv, order="degree+index", num_perms=2, dim_pe=4, num_walks=2)
    layer = register.layer_dict[name](config(dropout=0.2), own).eval()
    inner = layer.layer
    assert (inner.dropout, inner.num_perms, len(inner.orders)) == (0.2, 2, 2)
    expected = inner(layer.lin(batch.x), batch.edge_index, batch.batch)
    edges = batch.edge_attr
    after = layer(batch.clone())
    torch.testing.assert_close(after.x, expected)
    assert after.edge_attr.equal(edges)
    same = register.layer_dict[name](config(dim_in=8), own)
    assert isinstance(same.lin, nn.Identity)


def test_layer_takes_one_graph_and_what_transforms_stored(batch):
    data = AddWalkTokens()(AddNodeOrder("rcm")(batch[0]))
    layer = graphgym.GMNLayer(config(), Settings(norm="none", conv="none")).eval()
    expected = layer.layer(
        *(layer.lin(data.x), data.edge_index),
        walk_index=data.walk_index,
        node_order=data.node_order,
    )
    torch.testing.assert_close(layer(data.clone()).x, expected)


def test_edge_features_reach_the_convolution_and_come_back(batch):
    layer = graphgym.GraphMambaLayer(config(), Settings(edge_features=True)).eval()
    other = batch.clone()
    other.edge_attr = other.edge_attr + 1
    assert not torch.isclose(layer(batch.clone()).x, layer(other).x).all()
    gated = graphgym.GraphMambaLayer(config(), Settings(edge_features=True, conv="gated_gcn"))
    wide = batch.clone()
    wide.edge_attr = torch.randn(batch.num_edges, 8)
    before = wide.edge_attr.clone()
    assert not gated(wide).edge_attr.equal(before)


@pytest.mark.parametrize("name", ["graph_mamba", "gmn"])
def test_graphgyms_initialisation_leaves_time_steps_alone(name):
    layer = register.layer_dict[name](config(), Settings(mixer="mamba"))
    nn.ModuleList([layer]).apply(init_weights)
    mixers = [m for m in layer.modules() if hasattr(m, "dt_proj")]
    assert len(mixers) == (2 if name == "graph_mamba" else 4)
    for mixer in mixers:
        steps = nn.functional.softplus(mixer.dt_proj.bias)
        assert steps.max() <= 0.1 + 1e-6
        assert steps.min() >= 1e-4 - 1e-6
    # the rest is GraphGym's
    assert layer.lin.bias.abs().max() > 0  # PyG's linear layers are not torch's
    if name == "graph_mamba":
        assert layer.layer.mlp[0].bias.abs().max() == 0


def test_node_encoders(batch, monkeypatch):
    own = Settings(dim_pe=4, num_steps=6)
    monkeypatch.setattr(graphgym, "current_settings", lambda: own)
    transform = [AddLapPE(3, add_values=True), AddRWSE(6)]
    graphs = []
    for graph in batch.to_data_list():
        for add in transform:
            graph = add(graph)
        graphs.append(graph)
    batch = Batch.from_data_list(graphs)
    for name in ("graph_mamba_lap_pe", "graph_mamba_rwse"):
        encoder = register.node_encoder_dict[name](12).eval()
        out = encoder(batch.clone()).x
        assert out.shape == (16, 12)
        torch.testing.assert_close(out[:, :8], encoder.lin(batch.x))
        torch.testing.assert_close(encoder(graphs_alone(graphs[0])).x, out[:6])
    with pytest.raises(ValueError, match=r"dim_pe must be in \(0, 4\), got 4"):
        register.node_encoder_dict["graph_mamba_rwse"](4)


def graphs_alone(graph):
    return Batch.from_data_list([graph])


def test_link_head_reads_the_split(batch):
    head = graphgym.GraphMambaLinkHead(5, 1)
    batch.edge_label_index = torch.tensor([[0, 1], [2, 3]])
    batch.edge_label = torch.tensor([0.0, 1.0])
    scores, label = head(batch)
    assert scores.shape == (2,)
    assert label is batch.edge_label
    batch.split = "val"
    batch.val_edge_index, batch.val_edge_label = torch.tensor([[0], [4]]), torch.ones(1)
    scores, label = head(batch)
    assert scores.shape == (1,)
    assert label is batch.val_edge_label


def test_what_is_refused():
    with pytest.raises(
        ValueError, match="conv must be one of gin, gcn, gated_gcn, none, got 'gat'"
    ):
        graphgym.GraphMambaLayer(config(), Settings(conv="gat"))
    with pytest.raises(ValueError, match="conv must be gin, gcn or none for the layer gmn"):
        graphgym.GMNLayer(config(), Settings(conv="gated_gcn"))


def test_networks_need_a_configuration(monkeypatch):
    monkeypatch.setattr(graphgym, "cfg", None)
    assert graphgym.current_settings() == Settings()
    with pytest.raises(ImportError, match=r"scanweave.graph.graphgym needs yacs for networks"):
        graphgym.GraphMambaNetwork(5, 2)


@pytest.fixture
def cfg():
    pytest.importorskip("yacs")
    from torch_geometric.graphgym.config import set_cfg

    yield set_cfg(graphgym.cfg) or graphgym.cfg
    set_cfg(graphgym.cfg)


def test_configuration_holds_our_settings(cfg):
    assert {f.name for f in dataclasses.fields(Settings)} == set(cfg.graph_mamba)
    cfg.graph_mamba.mixer = "mamba"
    assert graphgym.current_settings() == Settings(mixer="mamba")


@pytest.mark.parametrize("kind", ["gnn", "graph_mamba"])
def test_model_from_a_configuration_learns(kind, cfg, batch):
    cfg.model.type, cfg.gnn.head, cfg.model.loss_fun = kind, "graph", "cross_entropy"
    cfg.gnn.layer_type, cfg.gnn.dim_inner, cfg.gnn.layers_mp = "graph_mamba", 16, 2
    cfg.dataset.edge_dim = 3
    cfg.graph_mamba.edge_features = True
    cfg.model.graph_pooling = "mean"
    torch.manual_seed(0)
    model = register.network_dict[kind](dim_in=5, dim_out=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        scores, label = model(batch.clone())
        loss = nn.functional.cross_entropy(scores, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
