"""Centralities, the Fiedler order and the Hilbert curve against their definitions."""

import itertools

import networkx
import pytest
import torch
from torch_geometric.utils import to_undirected

from scanweave.graph import spectral
from scanweave.graph.centrality import eigenvector_order, kcore_order, ppr_order, round_digits
from scanweave.graph.hilbert import hilbert_index, hilbert_scores
from scanweave.graph.spectral import fiedler_order, fix_signs, laplacian, smallest_vectors

PATH = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])


def one_graph(nodes: int) -> torch.Tensor:
    return torch.zeros(nodes, dtype=torch.int64)


def as_networkx(edges, nodes):
    graph = networkx.Graph(edges.t().tolist())
    graph.add_nodes_from(range(nodes))
    return graph


def grid(side: int) -> torch.Tensor:
    number = torch.arange(side * (side + 1)).view(side, side + 1)  # no square: simple eigenvalues
    pairs = [number[1:].flatten(), number[:, 1:].flatten()]
    others = [number[:-1].flatten(), number[:, :-1].flatten()]
    return to_undirected(torch.stack([torch.cat(pairs), torch.cat(others)]))


def test_ppr_matches_networkx(random_graphs):
    _, edges, _ = random_graphs([14])
    edges = torch.cat([edges, torch.stack([torch.arange(14), (torch.arange(14) + 1) % 14])], 1)
    edges = torch.unique(edges, dim=1)
    scores = ppr_order(edges, one_graph(14), roots=torch.arange(14) == 3, steps=200)
    wanted = networkx.pagerank(
        networkx.DiGraph(edges.t().tolist()), 0.85, {3: 1}, tol=1e-13, max_iter=1000
    )
    expected = torch.tensor([wanted[v] for v in range(14)], dtype=torch.float64)
    torch.testing.assert_close(scores / scores.sum(), expected, atol=1e-7, rtol=0)


def test_ppr_starts_at_the_nodes_of_most_edges():
    # a star 0 with an arm 1-2-3, and a graph of its own 4-5-6
    edges = torch.tensor([[0, 0, 0, 1, 2, 8, 4, 5], [1, 7, 8, 2, 3, 9, 5, 6]])
    batch = torch.tensor([0, 0, 0, 0, 3, 3, 3, 0, 0, 0])
    scores = ppr_order(to_undirected(edges), batch)
    assert scores[:4].argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert scores[5] > scores[4] == scores[6]
    every = ppr_order(to_undirected(edges), batch, steps=1)
    assert every[3] == 0


def test_ppr_refuses_roots_of_another_length():
    with pytest.raises(ValueError, match=r"roots must be \(5,\) bool, got \(4,\)"):
        ppr_order(PATH, one_graph(5), roots=torch.ones(4, dtype=torch.bool))


def test_eigenvector_matches_the_eigensolver(random_graphs):
    _, edges, batch = random_graphs([9, 12])
    scores = eigenvector_order(edges, batch, steps=2000)
    matrix = torch.zeros(21, 21, dtype=torch.float64).index_put_(
        (edges[1], edges[0]), torch.tensor(2.0, dtype=torch.float64), accumulate=True
    )
    for nodes in networkx.connected_components(as_networkx(edges, 21)):
        own = sorted(nodes)
        vector = torch.linalg.eigh(matrix[own][:, own]).eigenvectors[:, -1].abs()
        torch.testing.assert_close(scores[own], vector / vector.max(), atol=1e-6, rtol=0)


def test_kcore_matches_networkx(random_graphs):
    _, edges, batch = random_graphs([30, 8])
    loops = torch.tensor([[0, 1, 1], [0, 1, 2]])
    plain = edges[:, edges[0] != edges[1]]
    expected = networkx.core_number(as_networkx(torch.cat([plain, loops[:, 2:]], 1), 38))
    scores = kcore_order(torch.cat([edges, edges, loops], 1), batch)
    assert scores.tolist() == [expected[v] for v in range(38)]
    assert scores.unique().numel() > 2


def test_fiedler_goes_along_a_path_and_ties_turn_it():
    mixed = torch.tensor([2, 0, 4, 1, 3])
    ties = torch.arange(5)
    forth = torch.argsort(fiedler_order(mixed[PATH], one_graph(5), ties)).tolist()
    back = torch.argsort(fiedler_order(mixed[PATH], one_graph(5), 4 - ties)).tolist()
    # of the two ends, the one of the lower tie stands last
    assert forth == [3, 1, 4, 0, 2]
    assert back == [2, 0, 4, 1, 3]
    both = fiedler_order(mixed[PATH], one_graph(5), torch.stack([ties, 4 - ties]))
    assert both.argsort(1).tolist() == [forth, back]


def test_fiedler_is_the_second_vector_of_each_component():
    edges = torch.tensor([[0, 1, 3, 4, 5, 6], [1, 2, 4, 5, 6, 4]])
    batch = one_graph(9)  # 7 and 8 are isolated
    order = torch.argsort(fiedler_order(edges, batch)).tolist()
    assert order[:2] == [7, 8]
    assert order[2:5] in ([0, 1, 2], [2, 1, 0])
    dense = torch.from_numpy(laplacian(edges[:, 2:] - 3, 4).toarray())
    vector = torch.linalg.eigh(dense).eigenvectors[:, 1]
    vector = vector * vector[vector.abs().argmax()].sign()
    assert torch.diff(vector[[v - 3 for v in order[5:]]]).min() > -1e-9
    assert order[-1] == 3 + int(vector.argmax())


def test_fiedler_puts_neighbours_closer_than_chance():
    edges = grid(6)
    mixed = torch.randperm(42)
    rank = fiedler_order(mixed[edges], one_graph(42))
    span = (rank[mixed[edges][0]] - rank[mixed[edges][1]]).abs().double().mean()
    assert span < 0.5 * 42 / 3


def test_sparse_eigenvectors_are_the_dense_ones(monkeypatch):
    for normalization in ("none", "sym"):
        matrix = laplacian(grid(7), 56, normalization)
        values, vectors = smallest_vectors(matrix, 5)
        with monkeypatch.context() as patch:
            patch.setattr(spectral, "_DENSE", 10)
            again, sparse = smallest_vectors(matrix, 5)
            assert smallest_vectors(matrix, 5)[1].equal(sparse)
        torch.testing.assert_close(again, values, atol=1e-9, rtol=0)
        torch.testing.assert_close(sparse.abs(), vectors.abs(), atol=1e-6, rtol=0)


def test_laplacian_of_a_simple_graph():
    edges = torch.tensor([[0, 1, 0, 2, 2], [1, 0, 1, 2, 1]])  # double, loop, one way
    expected = [[1, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 1, 0], [0, 0, 0, 0]]
    assert laplacian(edges, 4).toarray().tolist() == expected
    scale = torch.tensor([1, 2**-0.5, 1, 0], dtype=torch.float64)
    scaled = torch.tensor(expected) * scale * scale.unsqueeze(1)
    found = torch.from_numpy(laplacian(edges, 4, "sym").toarray())
    torch.testing.assert_close(found, scaled)
    with pytest.raises(ValueError, match="normalization must be 'sym' or 'none', got 'rw'"):
        laplacian(edges, 4, "rw")


def test_signs_follow_the_first_greatest_entry():
    vectors = torch.tensor([[-0.5, 0.1], [0.5 + 1e-9, -0.7], [0.2, 0.3]], dtype=torch.float64)
    assert fix_signs(vectors).sign().tolist() == [[1, -1], [-1, 1], [-1, -1]]


def test_rounding_keeps_nine_digits():
    scores = torch.tensor([0.0, 1 / 3, 1e-30 / 3, 1e20 / 3], dtype=torch.float64)
    assert round_digits(scores * (1 + 1e-15)).equal(round_digits(scores))
    torch.testing.assert_close(round_digits(scores), scores, rtol=2e-9, atol=0)


@pytest.mark.parametrize(("axes", "bits"), [(2, 1), (2, 4), (3, 1), (3, 3)])
def test_hilbert_visits_every_cell_in_steps_of_one(axes, bits):
    cells = torch.tensor(list(itertools.product(range(2**bits), repeat=axes)))
    place = hilbert_index(cells, bits)
    assert place.sort().values.equal(torch.arange(cells.size(0)))
    assert torch.diff(cells[place.argsort()], dim=0).abs().sum(1).eq(1).all()


def test_hilbert_scores_use_the_box_of_each_graph():
    pos = torch.rand(40, 2)
    batch = torch.randint(0, 3, (40,)) * 2
    shift = torch.tensor([5.0, -7.0])
    moved = torch.where((batch == 2).unsqueeze(1), pos * 8 + shift, pos)
    scores = hilbert_scores(pos, batch)
    for number in (0, 2, 4):
        own = batch == number
        assert hilbert_scores(pos[own]).equal(scores[own])
        order = hilbert_scores(moved, batch)[own].argsort()
        assert order.equal(scores[own].argsort())
    assert hilbert_scores(torch.ones(3, 3)).tolist() == [0, 0, 0]
    assert hilbert_scores(torch.empty(0, 2)).shape == (0,)


@pytest.mark.parametrize(
    ("pos", "bits", "message"),
    [
        (torch.ones(3, 4), None, r"pos must be \(n, 2\) or \(n, 3\), got \(3, 4\)"),
        (torch.ones(3, 2), 21, r"bits must be in \[1, 20\], got 21"),
        (torch.tensor([[0.0, torch.nan]]), None, "pos must be finite, got NaN or infinity"),
    ],
)
def test_hilbert_refuses(pos, bits, message):
    with pytest.raises(ValueError, match=message):
        hilbert_scores(pos, bits=bits)


@pytest.mark.parametrize("order", [ppr_order, eigenvector_order, kcore_order])
def test_nodes_that_a_symmetry_swaps_stay_tied(order):
    ring = torch.arange(7)
    edges = to_undirected(torch.stack([ring, (ring + 1) % 7]))
    assert order(edges[:, torch.randperm(14)], one_graph(7)).unique().numel() == 1


def test_rounding_is_to_thirty_bits():
    exact = torch.rand(1000, dtype=torch.float64) * 10.0 ** torch.randint(-9, 9, (1000,))
    rounded = round_digits(exact)
    assert ((rounded - exact).abs() <= exact.abs() * 2**-30).all()
    assert not rounded.equal(exact)
    # on a grid of 30 bits, where the last digits of a sum are gone
    mantissa, _ = torch.frexp(rounded)
    assert (mantissa * 2**30).equal((mantissa * 2**30).round())
    assert round_digits(exact * (1 + 2**-50)).eq(rounded).double().mean() > 0.99
    assert round_digits(torch.zeros(2, dtype=torch.float64)).equal(torch.zeros(2).double())
