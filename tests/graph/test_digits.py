"""Pixel graphs against the pictures they come from."""

import sys

import pytest
import torch

from scanweave.graph import digit_graphs

datasets = pytest.importorskip("sklearn.datasets")


@pytest.fixture(scope="module")
def digits():
    return datasets.load_digits(return_X_y=True)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_nodes_are_the_pixels_with_ink(threshold, digits):
    pixels, labels = digits
    graphs = digit_graphs(threshold)
    assert len(graphs) == 1797
    assert [int(graph.y) for graph in graphs] == labels.tolist()
    for graph, picture in list(zip(graphs, pixels, strict=True))[::400]:
        drawn = torch.zeros(8, 8, dtype=torch.float64)
        rows, columns = graph.pos.long().unbind(1)
        drawn[rows, columns] = graph.x[:, 0].double() * 16
        expected = torch.as_tensor(picture).view(8, 8)
        assert drawn.equal(expected * (expected > 16 * threshold))


def test_edges_join_touching_pixels():
    graph = digit_graphs()[7]
    place = graph.pos.tolist()
    expected = {
        (i, j)
        for i, a in enumerate(place)
        for j, b in enumerate(place)
        if i != j and abs(a[0] - b[0]) <= 1 and abs(a[1] - b[1]) <= 1
    }
    assert {tuple(edge) for edge in graph.edge_index.t().tolist()} == expected
    assert graph.edge_index.size(1) == len(expected)
    assert graph.is_undirected()
    graph.validate()


@pytest.mark.parametrize("coordinates", [0, 1, 2])
def test_coordinates_are_those_of_the_pixel(coordinates):
    graph = digit_graphs(coordinates=coordinates)[3]
    assert graph.x.shape == (graph.num_nodes, 1 + coordinates)
    torch.testing.assert_close(graph.x[:, 1:], graph.pos[:, :coordinates] / 3.5 - 1)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\), got 1.0"):
        digit_graphs(1.0)
    with pytest.raises(ValueError, match="coordinates must be 0, 1 or 2, got 3"):
        digit_graphs(coordinates=3)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'scanweave\[demo\]'"):
        digit_graphs()
