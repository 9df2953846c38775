"""Walks, the subgraphs on them and their edges against definitions and brute force."""

import itertools

import pytest
import torch
from torch_geometric.utils import subgraph

from scanweave.graph.walks import (
    Neighbours,
    induced_edges,
    random_walks,
    token_lengths,
    token_subgraphs,
    token_weights,
    walked_edges,
)


def walk(edges, nodes, *sizes, **kwargs):
    every = torch.arange(nodes)
    return random_walks(Neighbours(edges, nodes), every, every, *sizes, **kwargs)


def test_every_step_is_an_edge(random_graphs):
    _, edges, _ = random_graphs([12, 9])
    walks = walk(edges, 23, 5, 3, 2)  # nodes 21 and 22 are isolated
    assert walks.shape == (23, 11, 3, 6)
    pairs = {tuple(pair) for pair in edges.t().tolist()}
    lengths = token_lengths(5, 2, "cpu").tolist()
    assert lengths == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0]
    for root in range(23):
        for token, length in enumerate(lengths):
            for steps in walks[root, token].tolist():
                assert steps[0] == root
                assert set(steps[length + 1 :]) <= {root}
                for a, b in itertools.pairwise(steps[: length + 1]):
                    assert (a, b) in pairs or (root > 20 and a == b == root)


def test_edges_are_walked_one_way_and_ends_hold():
    walks = walk(torch.tensor([[0, 1], [1, 2]]), 3, 3)
    assert walks[0, 0, 0].tolist() == [0, 1, 2, 2]
    assert walks[2, 0, 0].tolist() == [2, 2, 2, 2]


def test_neighbours_are_equally_likely():
    # a star with a double edge: 1 is twice as likely as 2 to 6
    edges = torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 2, 3, 4, 5, 6]])
    steps = walk(edges, 7, 1, 14_000)[0, 0, :, 1]
    counts = torch.bincount(steps, minlength=7)[1:].double()
    expected = torch.tensor([4000.0, 2000, 2000, 2000, 2000, 2000], dtype=torch.float64)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 5 degrees of freedom, one in a thousand


def test_second_steps_do_not_depend_on_first_ones():
    pair = torch.cartesian_prod(torch.arange(4), torch.arange(4)).t()
    walks = walk(pair, 4, 2, 4000)[:, 0]
    counts = torch.bincount((walks[..., 1] * 4 + walks[..., 2]).flatten(), minlength=16).double()
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 37.7  # 15 degrees of freedom, one in a thousand


def test_walks_follow_the_seed_and_differ_between_tokens(random_graphs):
    _, edges, _ = random_graphs([40])
    walks = walk(edges, 40, 4, 2, 2, seed=3)
    assert walks.equal(walk(edges, 40, 4, 2, 2, seed=3))
    assert walks.equal(walk(edges, 40, 4, 2, 2, seed=torch.tensor(3)))
    assert not walks.equal(walk(edges, 40, 4, 2, 2, seed=4))
    # the order in which edges are stored does not matter
    assert walks.equal(walk(edges[:, torch.randperm(edges.size(1))], 40, 4, 2, 2, seed=3))
    assert not walks[:, 0, 0].equal(walks[:, 0, 1])
    assert not walks[:, 0].equal(walks[:, 1])
    assert not walks[:, 1, :, :4].equal(walks[:, 2, :, :4])


def test_shared_prefixes(random_graphs):
    _, edges, _ = random_graphs([40])
    walks = walk(edges, 40, 4, 2, 2, share_prefix=True)
    for token, length in enumerate(token_lengths(4, 2, "cpu")[:-1].tolist()):
        longest = walks[:, token % 2, :, : length + 1]
        assert walks[:, token, :, : length + 1].equal(longest)
    assert not walks[:, 0].equal(walks[:, 1])


def test_walks_do_not_depend_on_other_graphs(random_graphs):
    _, edges, batch = random_graphs([7, 12])
    position = torch.cat([torch.arange(7), torch.arange(12)])
    both = random_walks(Neighbours(edges, 19), torch.arange(19), position, 3, 2)
    alone = walk(edges[:, batch[edges[0]] == 1] - 7, 12, 3, 2)
    assert both[7:].equal(alone + 7)


def test_sets_hold_each_visited_node_once(random_graphs):
    _, edges, _ = random_graphs([15])
    walks = walk(edges, 15, 3, 2, 2)
    nodes, token, ptr, root = token_subgraphs(walks)
    flat = walks.flatten(0, 1).flatten(1)
    for number, visited in enumerate(flat.tolist()):
        part = slice(int(ptr[number]), int(ptr[number + 1]))
        assert nodes[part].tolist() == sorted(set(visited))
        assert token[part].unique().tolist() == [number]
        assert nodes[root[number]] == visited[0]


def test_weights_count_each_visited_node_once(random_graphs):
    _, edges, _ = random_graphs([12])
    walks = walk(edges, 12, 3, 2, 2)
    nodes, weights = token_weights(walks)
    assert nodes.shape == weights.shape == (12 * 7, 8)
    for row, weight, visited in zip(nodes, weights, walks.flatten(0, 1).flatten(1), strict=True):
        counted = row[weight > 0].tolist()
        assert counted == sorted(set(visited.tolist()))
        assert weight.sum() == pytest.approx(1)
        assert weight[weight > 0].unique().numel() == 1


@pytest.mark.parametrize("directed", [False, True])
def test_induced_edges_are_those_of_brute_force(directed, random_graphs):
    _, edges, _ = random_graphs([15])
    if directed:  # with loops and double edges
        edges = torch.randint(0, 15, (2, 60))
    neighbours = Neighbours(edges, 15)
    walks = walk(edges, 15, 3, 2)
    sets = token_subgraphs(walks)
    local, number = induced_edges(sets, neighbours)
    assert sets.nodes[local].equal(edges[:, number])
    assert sets.token[local[0]].equal(sets.token[local[1]])
    for token in range(sets.ptr.numel() - 1):
        part = sets.nodes[sets.ptr[token] : sets.ptr[token + 1]]
        expected = subgraph(part, edges, num_nodes=15)[0].t().tolist()
        mine = edges[:, number[sets.token[local[0]] == token]].t().tolist()
        assert sorted(mine) == sorted(expected)


def test_walked_edges_are_those_of_the_walks(random_graphs):
    _, edges, _ = random_graphs([15])
    walks = walk(edges, 15, 3, 2)
    sets = token_subgraphs(walks)
    local, number = walked_edges(walks, sets, Neighbours(edges, 15))
    assert sets.nodes[local].equal(edges[:, number])
    lengths = token_lengths(3, 1, "cpu").tolist()
    for root in range(15):
        for token, length in enumerate(lengths):
            expected = set()
            for steps in walks[root, token].tolist():
                for a, b in itertools.pairwise(steps[: length + 1]):
                    expected |= {(a, b), (b, a)}
            mine = edges[:, number[sets.token[local[0]] == root * 4 + token]].t().tolist()
            assert sorted(map(tuple, mine)) == sorted(expected)


def test_walked_edges_go_back_only_where_there_is_an_edge():
    edges = torch.tensor([[0, 1], [1, 2]])
    walks = walk(edges, 3, 2)
    sets = token_subgraphs(walks)
    _, number = walked_edges(walks, sets, Neighbours(edges, 3))
    # root 0 takes both and then the first; root 1 the second, twice; root 2 none
    assert number.tolist() == [0, 1, 0, 1, 1]


@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_without_edges(nodes):
    none = torch.empty(2, 0, dtype=torch.int64)
    walks = walk(none, nodes, 2, 2)
    assert walks.shape == (nodes, 3, 2, 3)
    sets = token_subgraphs(walks)
    assert sets.nodes.numel() == 3 * nodes
    assert induced_edges(sets, Neighbours(none, nodes))[0].shape == (2, 0)
    assert walked_edges(walks, sets, Neighbours(none, nodes))[0].shape == (2, 0)


def test_length_zero_is_the_node_alone(random_graphs):
    _, edges, _ = random_graphs([5])
    assert walk(edges, 5, 0, 2).tolist() == [[[[v], [v]]] for v in range(5)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 1), "walk_length must be at least 0, got -1"),
        ((1, 0, 1), "num_walks must be at least 1, got 0"),
        ((1, 1, 0), "num_repeats must be at least 1, got 0"),
    ],
)
def test_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        walk(torch.tensor([[0], [1]]), 2, *sizes)
