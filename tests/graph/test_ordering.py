"""Orders against their definitions, and that they depend on the graph and on nothing else."""

import networkx
import pytest
import torch
from torch_geometric.utils import to_undirected

from scanweave.graph import ordering
from scanweave.graph.ordering import hash_bits, lexsort, rank_of, score_limit, tie_noise
from scanweave.graph.orders import ORDERS, order_name, resolve_order

PATH = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])


def one_graph(nodes: int) -> torch.Tensor:
    return torch.zeros(nodes, dtype=torch.int64)


def sequence(scores: torch.Tensor) -> list[int]:
    return torch.argsort(scores, stable=True).tolist()


def test_degree_counts_edge_ends_and_loops_twice():
    edges = torch.tensor([[0, 0, 1, 2], [1, 2, 2, 2]])
    assert ordering.degree_order(edges, one_graph(4)).tolist() == [2, 2, 4, 0]


def test_pagerank_matches_networkx(random_graphs):
    _, edges, batch = random_graphs([9, 14])
    edges = edges[:, torch.arange(edges.size(1)) % 3 > 0]  # directed, some nodes without out-edges
    scores = ordering.pagerank_order(edges, batch)
    for number in range(2):
        nodes = (batch == number).nonzero().squeeze(1).tolist()
        graph = networkx.DiGraph()
        graph.add_nodes_from(nodes)
        graph.add_edges_from([e for e in edges.t().tolist() if e[0] in nodes])
        expected = networkx.pagerank(graph, alpha=0.85, tol=1e-12, max_iter=1000)
        mine = scores[nodes] / scores[nodes].sum()
        wanted = torch.tensor([expected[node] for node in nodes], dtype=torch.float64)
        torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=0)


def test_pagerank_ties_nodes_that_a_symmetry_swaps():
    ring = torch.arange(7)
    edges = to_undirected(torch.stack([ring, (ring + 1) % 7]))
    scores = ordering.pagerank_order(edges[:, torch.randperm(14)], one_graph(7))
    assert scores.unique().numel() == 1


def test_bfs_goes_along_a_path():
    # both ends have degree 1, the tie number chooses one
    assert ordering.bfs_order(PATH, one_graph(5)).tolist() == [0, 1, 2, 3, 4]
    ties = torch.tensor([4, 3, 2, 1, 0])
    assert ordering.bfs_order(PATH, one_graph(5), ties).tolist() == [4, 3, 2, 1, 0]


def test_bfs_orders_children_by_parent_then_tie():
    # star of three arms of two nodes around node 0; the walk starts at the end of the arm 5-2-0
    edges = torch.tensor([[0, 0, 0, 1, 2, 3], [1, 2, 3, 4, 5, 6]])
    ties = torch.tensor([0, 9, 8, 7, 3, 1, 2])
    assert sequence(ordering.bfs_order(edges, one_graph(7), ties)) == [5, 2, 0, 3, 1, 6, 4]


def test_bfs_visits_component_after_component():
    edges = torch.tensor([[0, 1, 3], [1, 2, 4]])
    order = sequence(ordering.bfs_order(edges, one_graph(6)))
    # the isolated node has the least degree, then the components by their first node
    assert order == [5, 0, 1, 2, 3, 4]


def test_bfs_levels_match_networkx(random_graphs):
    _, edges, batch = random_graphs([40])
    order = sequence(ordering.bfs_order(edges, batch))
    graph = networkx.Graph(edges.t().tolist())
    graph.add_nodes_from(range(40))
    seen = 0
    while seen < 40:
        component = networkx.node_connected_component(graph, order[seen])
        depth = networkx.single_source_shortest_path_length(graph, order[seen])
        part = order[seen : seen + len(component)]
        assert set(part) == component
        depths = [depth[node] for node in part]
        assert depths == sorted(depths)
        seen += len(component)


def test_rcm_bandwidth_is_that_of_scipy(random_graphs):
    scipy_graphs = pytest.importorskip("scipy.sparse.csgraph")
    sparse = pytest.importorskip("scipy.sparse")

    def bandwidth(order: list[int], edges: torch.Tensor) -> int:
        place = torch.empty(len(order), dtype=torch.int64)
        place[torch.tensor(order)] = torch.arange(len(order))
        return int((place[edges[0]] - place[edges[1]]).abs().max())

    side = 7
    number = torch.arange(side * side).view(side, side)
    pairs = [number[1:].flatten(), number[:, 1:].flatten()]
    others = [number[:-1].flatten(), number[:, :-1].flatten()]
    grid = torch.stack([torch.cat(pairs), torch.cat(others)])
    mixed = torch.randperm(side * side)
    grid = to_undirected(mixed[grid])
    mine = bandwidth(sequence(ordering.rcm_order(grid, one_graph(49))), grid)
    matrix = sparse.coo_matrix((torch.ones(grid.size(1)).numpy(), grid.numpy())).tocsr()
    theirs = bandwidth(scipy_graphs.reverse_cuthill_mckee(matrix, True).tolist(), grid)
    assert mine <= theirs + 1
    assert mine < bandwidth(list(range(49)), grid)


def test_rcm_runs_from_end_to_end_of_a_path():
    mixed = torch.tensor([2, 0, 4, 1, 3])
    order = sequence(ordering.rcm_order(mixed[PATH], one_graph(5)))
    assert order in ([2, 0, 4, 1, 3], [3, 1, 4, 0, 2])


@pytest.mark.parametrize("name", ["bfs", "rcm"])
def test_walks_take_one_row_of_ties_per_permutation(name, random_graphs):
    _, edges, batch = random_graphs([12, 8])
    ties = tie_noise(torch.arange(20), 3, 0)
    together = ORDERS[name](edges, batch, ties)
    assert together.shape == (3, 20)
    nodes = [(batch == number).nonzero().squeeze(1) for number in (0, 1)]
    for row, alone in zip(together, ties, strict=True):
        single = ORDERS[name](edges, batch, alone)
        for part in nodes:
            assert sequence(row[part]) == sequence(single[part])


@pytest.mark.parametrize("name", sorted(set(ORDERS) - {"index"}))
def test_order_does_not_depend_on_batch_mates(name, random_graphs):
    _, edges, batch = random_graphs([11, 17, 6])
    counts = torch.tensor([11, 17, 6])
    start = torch.tensor([0, 11, 28])
    position = torch.arange(34) - start[batch]
    ties = tie_noise(position, 2, 5)
    together = ORDERS[name](edges, batch, ties)
    for number in range(3):
        nodes = (batch == number).nonzero().squeeze(1)
        own = edges[:, batch[edges[0]] == number] - start[number]
        size = int(counts[number])
        alone = ORDERS[name](own, one_graph(size), tie_noise(torch.arange(size), 2, 5))
        mine = together[..., nodes]
        for a, b in zip(mine.view(-1, size), alone.view(-1, size), strict=True):
            assert rank_of(lexsort(a, ties[0, nodes])).equal(rank_of(lexsort(b, ties[0, nodes])))


@pytest.mark.parametrize("name", sorted(set(ORDERS) - {"index"}))
def test_order_follows_the_nodes_when_they_are_relabelled(name, random_graphs):
    _, edges, batch = random_graphs([23])
    ties = torch.randperm(23)
    moved = torch.randperm(23)  # node v becomes node moved[v]
    before = ORDERS[name](edges, batch, ties)
    after = ORDERS[name](
        moved[edges][:, torch.randperm(edges.size(1))],
        batch,
        torch.empty_like(ties).scatter(0, moved, ties),
    )
    assert after[moved].equal(before)


@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("nodes", [0, 1, 3])
def test_order_without_edges(name, nodes):
    empty = torch.empty(2, 0, dtype=torch.int64)
    ties = tie_noise(torch.arange(nodes), 2, 0)
    scores = ORDERS[name](empty, one_graph(nodes), ties)
    assert scores.shape in ((nodes,), (2, nodes))


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_order_with_loops_and_double_edges(name):
    edges = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 2, 2]])
    scores = ORDERS[name](edges, one_graph(4), torch.arange(4))
    assert scores.shape == (4,)


def test_tie_noise_is_one_to_one_and_differs_by_seed_and_permutation():
    noise = tie_noise(torch.arange(50_000), 3, 7)
    assert noise.shape == (3, 50_000)
    assert int(noise.min()) >= 0
    assert int(noise.max()) < 2**32
    for row in noise:
        assert row.unique().numel() == 50_000
    orders = torch.cat([noise, tie_noise(torch.arange(50_000), 1, 8)]).argsort(1)
    for a in range(4):
        for b in range(a):
            # random permutations have about one fixed point in common
            assert int((orders[a] == orders[b]).sum()) < 10


def test_tie_noise_is_spread_evenly():
    noise = tie_noise(torch.arange(4096), 8, 0)
    counts = torch.bincount((noise >> 28).flatten(), minlength=16).double()
    expected = noise.numel() / 16
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 37.7  # 15 degrees of freedom, one in a thousand
    # neighbours in memory do not stay neighbours
    places = rank_of(noise[0].argsort()).double()
    assert abs(float(torch.corrcoef(torch.stack([places[1:], places[:-1]]))[0, 1])) < 0.06


def test_tie_noise_takes_a_seed_tensor():
    position = torch.arange(9)
    assert tie_noise(position, 2, torch.tensor(3)).equal(tie_noise(position, 2, 3))
    assert tie_noise(position, 1, -1).shape == (1, 9)


@pytest.mark.parametrize("num_perms", [1, 3])
def test_tie_noise_takes_several_seeds(num_perms):
    position, seeds = torch.randperm(40), [3, -8, 2**40 + 5]
    alone = torch.cat([tie_noise(position, num_perms, seed) for seed in seeds])
    assert tie_noise(position, num_perms, seeds).equal(alone)
    assert tie_noise(position, num_perms, torch.tensor(seeds).view(3, 1, 1)).equal(alone)


def test_numbers_are_hashed_on_the_host_as_on_a_device():
    numbers = [0, 1, 2**31, 2**32 - 1, *torch.randint(2**32, (50,)).tolist()]
    assert hash_bits(torch.tensor(numbers)).tolist() == [hash_bits(number) for number in numbers]
    # fixed for good: other numbers would change what trained models see
    assert tie_noise(torch.arange(3), 1, 0).tolist() == [[0, 3979630085, 65356255]]


@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("nodes", [1, 7])
def test_scores_stay_below_their_limit(name, nodes):
    # all edges are loops of one node, whose degree is the highest there can be
    edges = torch.full((2, 9), nodes - 1)
    limit = score_limit(ORDERS[name], edges, nodes)
    assert (limit is not None) == (name in ("degree", "index", "random"))
    if limit is not None:
        scores = ORDERS[name](edges, one_graph(nodes), torch.arange(nodes))
        assert scores.dtype == torch.int64
        assert int(scores.min()) >= 0
        assert int(scores.max()) == limit - 1


def test_lexsort_compares_the_first_key_first():
    first = torch.tensor([1, 0, 1, 0, 1])
    second = torch.tensor([0.5, 2.0, -1.0, 2.0, 0.5])
    assert lexsort(first, second).tolist() == [1, 3, 2, 0, 4]


def test_resolve_order_takes_names_functions_and_sequences():
    def mine_order(edge_index, batch, ties):
        return ties

    assert resolve_order("rcm") == (ordering.rcm_order,)
    assert resolve_order(["degree", mine_order]) == (ordering.degree_order, mine_order)
    assert order_name(resolve_order(["degree", mine_order])) == "degree+mine"


def test_resolve_order_refuses_what_is_no_order():
    with pytest.raises(ValueError, match=r"order must be a function or one of bfs, .* 'size'"):
        resolve_order("size")
    with pytest.raises(ValueError, match="order must hold at least one"):
        resolve_order([])
