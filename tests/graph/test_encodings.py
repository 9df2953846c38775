"""Encodings against PyG's and against definitions, on graphs of any size."""

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE, AddRandomWalkPE
from torch_geometric.utils import to_undirected

from scanweave.graph import AddLapPE, AddRWSE, GraphMambaNet, encodings
from scanweave.graph.encodings import return_chances


def connected(nodes: int) -> Data:
    step = torch.arange(max(nodes - 1, 0))
    more = torch.randint(0, max(nodes, 1), (2, nodes))
    edges = torch.cat([torch.stack([step, step + 1]), more[:, more[0] != more[1]]], 1)
    return Data(edge_index=to_undirected(edges, num_nodes=nodes), num_nodes=nodes)


def test_vectors_are_those_of_pyg_but_for_signs():
    data = connected(20)
    mine = AddLapPE(6)(data).lap_pe
    theirs = AddLaplacianEigenvectorPE(6, attr_name="pe", is_undirected=True)(data).pe
    torch.testing.assert_close(mine.abs(), theirs.abs(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["sym", "none"])
def test_vectors_and_values_solve_the_eigenproblem(normalization):
    data = AddLapPE(5, normalization, skip_first=False, add_values=True)(connected(9))
    matrix = torch.from_numpy(encodings.laplacian(data.edge_index, 9, normalization).toarray())
    values = data.lap_values[0]
    assert data.lap_values.equal(values.expand(9, 5))
    assert values.diff().min() >= 0
    assert values[0].abs() < 1e-6
    torch.testing.assert_close(matrix.float() @ data.lap_pe, data.lap_pe * values)
    torch.testing.assert_close(data.lap_pe.T @ data.lap_pe, torch.eye(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("nodes", [0, 1, 2, 5, 10, 11, 12])
def test_small_graphs_are_padded(nodes):
    data = AddRWSE(4)(AddLapPE(10)(connected(nodes)))
    assert data.lap_pe.shape == (nodes, 10)
    assert data.rwse.shape == (nodes, 4)
    assert data.lap_pe.isfinite().all()
    used = data.lap_pe.abs().amax(0) > 0 if nodes else torch.zeros(10, dtype=torch.bool)
    assert used.tolist() == [column < nodes - 1 for column in range(10)]


def test_without_edges():
    empty = Data(edge_index=torch.empty(2, 0, dtype=torch.int64), num_nodes=3)
    assert AddRWSE(3)(empty).rwse.equal(torch.zeros(3, 3))
    pe = AddLapPE(3, skip_first=False, add_values=True)(empty)
    assert pe.lap_pe.equal(torch.eye(3))
    assert pe.lap_values.equal(torch.zeros(3, 3))


def test_calls_repeat_and_edges_may_be_stored_in_any_order():
    data = connected(15)
    mixed = Data(edge_index=data.edge_index[:, torch.randperm(data.num_edges)], num_nodes=15)
    transform = AddLapPE(6)
    assert transform(data).lap_pe.equal(transform(data).lap_pe)
    assert transform(data).lap_pe.equal(transform(mixed).lap_pe)
    assert AddRWSE(6)(data).rwse.equal(AddRWSE(6)(mixed).rwse)
    assert "lap_pe" not in data


def test_signs_are_fixed():
    pe = AddLapPE(6)(connected(15)).lap_pe
    greatest = pe.gather(0, pe.abs().argmax(0, keepdim=True))
    assert (greatest > 0).all()


@pytest.mark.parametrize("chunk", [4, 256])
def test_return_chances_are_those_of_pyg(chunk, monkeypatch):
    monkeypatch.setattr(encodings, "_CHUNK", chunk)
    data = connected(13)
    theirs = AddRandomWalkPE(7, attr_name="pe")(data).pe
    torch.testing.assert_close(AddRWSE(7)(data).rwse, theirs)


def test_return_chances_walk_one_way_and_count_double_edges():
    edges = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 0]])
    assert return_chances(edges, 3, 4).tolist() == [
        pytest.approx([0, 2 / 3, 0, 4 / 9]),
        pytest.approx([0, 2 / 3, 0, 4 / 9]),
        [0, 0, 0, 0],
    ]


def test_encodings_batch_and_feed_the_network():
    graphs = [AddRWSE(3)(AddLapPE(4)(connected(nodes))) for nodes in (3, 9)]
    for graph in graphs:
        graph.x = torch.ones(graph.num_nodes, 2)
    batch = Batch.from_data_list(graphs)
    net = GraphMambaNet(2, 8, 1, pe_channels=7, walk_length=1, num_walks=1)
    pe = torch.cat([batch.lap_pe, batch.rwse], 1)
    assert net(batch.x, batch.edge_index, batch=batch.batch, pe=pe).shape == (12, 8)


def test_names_are_free():
    data = AddRWSE(3, attr_name="b")(AddLapPE(4, attr_name="a")(connected(5)))
    assert data.a.shape == (5, 4)
    assert data.b.shape == (5, 3)
    assert repr(AddLapPE(4)) == "AddLapPE(k=4, normalization='sym')"
    assert repr(AddRWSE(3)) == "AddRWSE(k=3)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AddLapPE(0), "k must be at least 1, got 0"),
        (lambda: AddLapPE(2, "rw"), "normalization must be 'sym' or 'none', got 'rw'"),
        (lambda: AddRWSE(0), "k must be at least 1, got 0"),
        (lambda: AddRWSE(2)(Data(x=torch.ones(2, 2))), "data must hold edge_index or adj_t"),
        (lambda: AddLapPE(2)(Data(x=torch.ones(2, 2))), "data must hold edge_index or adj_t"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
