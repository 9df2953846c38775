"""Orders and encodings from files are those that are computed."""

import pytest
import torch
from torch_geometric.data import Data

from scanweave.graph import AddLapPE, AddNodeOrder, AddRWSE, bfs_order
from scanweave.graph.precompute import add_encoding, add_order


def rings(sizes=(5, 3, 300)) -> list[Data]:
    """Rings with a tail, the last of them too long for numbers of one byte."""
    graphs = []
    for size in sizes:
        step = torch.arange(size)
        pair = torch.stack([step, (step + 1) % (size - 1)])
        edge_index = torch.cat([pair, pair.flip(0)], 1)
        graphs.append(Data(x=torch.rand(size, 2), edge_index=edge_index))
    return graphs


def test_orders_are_kept(tmp_path, monkeypatch):
    computed, file = rings(), tmp_path / "new" / "set-bfs.npz"
    add_order(computed, ["bfs"], file)
    for graph in computed:
        assert graph.node_order.equal(AddNodeOrder("bfs")(graph.clone()).node_order)
    monkeypatch.setattr(AddNodeOrder, "forward", lambda *_: pytest.fail("computed again"))
    stored = rings()
    add_order(stored, ["bfs"], file)
    for one, other in zip(computed, stored, strict=True):
        assert one.node_order.equal(other.node_order)
        assert other.node_order.dtype == torch.int64
    assert [path.name for path in file.parent.iterdir()] == ["set-bfs.npz"]


def test_encodings_are_the_same_with_and_without_a_file(tmp_path):
    columns = []
    for folder in (None, tmp_path, tmp_path):
        graphs = rings()
        own = [graph.x for graph in graphs]
        add_encoding(graphs, rwse=4, lap_pe=3, folder=folder, name="rings")
        assert all(g.x[:, :2].equal(x) for g, x in zip(graphs, own, strict=True))
        columns.append(torch.cat([graph.x[:, 2:] for graph in graphs]))
    assert columns[0].shape == (308, 7)
    assert columns[0].equal(columns[1])
    assert columns[0].equal(columns[2])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["rings-lap_pe3.npz", "rings-rwse4.npz"]


def test_encodings_are_standardized_and_cut_off():
    graphs = rings((5, 300))
    add_encoding(graphs, rwse=3, lap_pe=0, folder=None, name="x")
    found = torch.cat([graph.x[:, 2:] for graph in graphs])
    plain = torch.cat([AddRWSE(3)(graph.clone()).rwse for graph in graphs])
    expected = ((plain - plain.mean(0)) / plain.std(0).clamp(min=1e-9)).clamp(-10, 10)
    # columns of zeros stay; others agree up to the rounding to float16
    torch.testing.assert_close(found[:, 1], expected[:, 1], atol=0.05, rtol=0.01)
    assert found[:, 0].eq(0).all()
    # a triangle among many rings stands far out
    assert found.abs().max() <= 10


def test_vectors_keep_their_signs():
    graphs = rings((6,))
    add_encoding(graphs, lap_pe=2, folder=None, name="x")
    expected = AddLapPE(2)(rings((6,))[0]).lap_pe
    expected = (expected - expected.mean(0)) / expected.std(0)
    torch.testing.assert_close(graphs[0].x[:, 2:], expected, atol=5e-3, rtol=5e-3)


def test_file_of_another_set_is_refused(tmp_path):
    file = tmp_path / "x.npz"
    add_order(rings(), ["bfs"], file)
    with pytest.raises(ValueError, match=r"file must fit the graphs of the set, got .*x.npz; del"):
        add_order(rings((5, 3)), [bfs_order], file)
