"""`AddNodeOrder` stores what a layer would compute."""

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.transforms import ToSparseTensor

from scanweave.graph import AddNodeOrder, GraphMambaConv


@pytest.mark.parametrize("order", ["degree", "fiedler", "rcm", ["degree", "random"]])
def test_stored_order_gives_the_layer_the_same_output(order, random_graphs):
    graphs = []
    for size in (6, 1, 9):
        x, edge_index, _ = random_graphs([size], seed=size)
        graphs.append(Data(x=x, edge_index=edge_index))
    transform = AddNodeOrder(order, seed=4)
    batch = Batch.from_data_list([transform(graph) for graph in graphs])
    assert batch.node_order.sort().values.tolist() == sorted([*range(6), 0, *range(9)])
    conv = GraphMambaConv(16, order=order, seed=4).double().eval()
    stored = conv(batch.x, batch.edge_index, batch.batch, node_order=batch.node_order)
    assert stored.equal(conv(batch.x, batch.edge_index, batch.batch))


def test_input_is_left_alone_and_the_name_is_free(random_graphs):
    x, edge_index, _ = random_graphs([6])
    data = Data(x=x, edge_index=edge_index)
    out = AddNodeOrder("bfs", attr_name="rank")(data)
    assert "rank" in out
    assert "rank" not in data
    assert out.rank.sort().values.equal(torch.arange(6))


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_transposed_adjacency(random_graphs):
    x, edge_index, _ = random_graphs([6])
    data = Data(x=x, edge_index=edge_index[:, :-3])
    expected = AddNodeOrder("degree")(data).node_order
    sparse = ToSparseTensor()(data)
    assert AddNodeOrder("degree")(sparse).node_order.equal(expected)


def test_graph_without_nodes():
    data = Data(x=torch.empty(0, 3), edge_index=torch.empty(2, 0, dtype=torch.int64))
    assert AddNodeOrder()(data).node_order.shape == (0,)


def test_orders_from_what_the_graph_holds():
    edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    pos = torch.tensor([[0.0, 0], [1, 1], [0, 1], [1, 0]])
    data = Data(edge_index=edges, pos=pos, score=torch.tensor([2.0, 0, 1, 0]), num_nodes=4)
    # the curve goes around three sides of the square
    around = AddNodeOrder("hilbert")(data).node_order
    assert sorted(around[[0, 3]].tolist()) == [0, 3]
    assert abs(int(around[0] - around[2])) == abs(int(around[2] - around[1])) == 1
    assert AddNodeOrder(["data.score", "index"])(data).node_order.tolist() == [3, 0, 2, 1]
    assert repr(AddNodeOrder(["data.score", "ppr"])) == "AddNodeOrder(data.score+ppr)"


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("hilbert", "data must hold pos for the order 'hilbert', got none"),
        ("data.score", "data must hold score for the order 'data.score', got none"),
        ("data.x", r"data.x must give one score per node: got \(2, 3\)"),
    ],
)
def test_refuses_data_without_what_the_order_needs(order, message):
    data = Data(x=torch.empty(2, 3), edge_index=torch.empty(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        AddNodeOrder(order)(data)


def test_refuses_no_order_at_all():
    with pytest.raises(ValueError, match="order must hold at least one name or function"):
        AddNodeOrder([])


def test_refuses_data_without_edges():
    with pytest.raises(ValueError, match="data must hold edge_index or adj_t, got neither"):
        AddNodeOrder()(Data(x=torch.empty(2, 3)))


def test_repr():
    assert repr(AddNodeOrder(["degree", "bfs"])) == "AddNodeOrder(degree+bfs)"
