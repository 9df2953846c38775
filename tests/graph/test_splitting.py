"""Folds, masks and links."""

from collections import Counter

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

from scanweave.graph.splitting import cut_folds, split_links, split_numbers, split_one_graph


def labelled(counts: dict[int, int]) -> list[Data]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Data(x=torch.tensor([[float(i)]]), y=torch.tensor([y])) for i, y in enumerate(labels)]


def names(graphs) -> list[int]:
    return [int(graph.x) for graph in graphs]


def test_folds_are_disjoint_complete_and_stratified():
    graphs = labelled({0: 21, 1: 42})
    tests, validations = [], []
    for number in range(10):
        train, val, test = cut_folds(graphs, 10, number)
        assert sorted(names(train) + names(val) + names(test)) == list(range(63))
        counts = Counter(int(graph.y) for graph in test)
        assert 2 <= counts[0] <= 3
        assert 4 <= counts[1] <= 5
        tests.append(set(names(test)))
        validations.append(set(names(val)))
    assert set.union(*tests) == set(range(63))
    assert sum(len(part) for part in tests) == 63
    assert validations == tests[1:] + tests[:1]
    again = cut_folds(graphs, 10, 13)
    assert set(names(again[2])) == tests[3]


def graph(nodes: int = 30, **extra) -> Data:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    edge_index = to_undirected(pairs[:, pairs[0] != pairs[1]])
    return Data(x=torch.rand(nodes, 2), edge_index=edge_index, y=torch.arange(nodes) % 3, **extra)


def test_nodes_are_split_by_their_own_masks():
    masks = {f"{part}_mask": torch.rand(30) > 0.5 for part in ("train", "val", "test")}
    parts = split_one_graph(graph(**masks), (0.1, 0.2), seed=5)
    for (part,), name in zip(parts, masks, strict=True):
        assert part.mask.equal(masks[name])
        assert "train_mask" not in part
    several = {name: torch.rand(30, 4) > 0.5 for name in masks}
    parts = split_one_graph(graph(**several), (0.1, 0.2), seed=5)
    for (part,), name in zip(parts, several, strict=True):
        assert part.mask.equal(several[name][:, 1])


def test_nodes_without_masks_are_split_at_random():
    parts = split_one_graph(graph(), (0.1, 0.2), seed=0)
    masks = torch.stack([part.mask for (part,) in parts])
    assert masks.sum(0).eq(1).all()
    assert masks.sum(1).tolist() == [21, 3, 6]
    again = split_one_graph(graph(), (0.1, 0.2), seed=0)
    assert all(a.mask.equal(b.mask) for (a,), (b,) in zip(parts, again, strict=True))
    other = split_one_graph(graph(), (0.1, 0.2), seed=1)
    assert not other[0][0].mask.equal(masks[0])


def pairs(index: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(sorted(pair)) for pair in index.t().tolist()}


def test_links_are_hidden_from_those_who_predict_them():
    whole = graph()
    state = torch.random.get_rng_state()
    (train,), (val,), (test,) = split_links(whole, (0.1, 0.2), seed=0)
    assert torch.random.get_rng_state().equal(state)
    every = pairs(whole.edge_index)
    assert train.edge_label.eq(1).all()
    assert pairs(train.edge_label_index) == pairs(train.edge_index)
    assert pairs(val.edge_index) == pairs(train.edge_index)
    shown = pairs(train.edge_index)
    for part in (val, test):
        true = pairs(part.edge_label_index[:, part.edge_label == 1])
        false = pairs(part.edge_label_index[:, part.edge_label == 0])
        assert not true & pairs(part.edge_index)
        assert not false & every
        assert len(true) == len(false)
        shown |= true
    assert shown == every
    repeated = split_links(whole, (0.1, 0.2), seed=0)[1][0]
    assert repeated.edge_label_index.equal(val.edge_label_index)
    other = split_links(whole, (0.1, 0.2), seed=1)[1][0]
    assert not other.edge_label_index.equal(val.edge_label_index)


def test_refusals():
    with pytest.raises(ValueError, match="folds must be at least 3, got 2"):
        cut_folds(labelled({0: 9}), 2, 0)
    for split in (
        lambda fractions: split_numbers(torch.zeros(4).long(), fractions, 0),
        lambda fractions: split_links(graph(), fractions, 0),
    ):
        with pytest.raises(ValueError, match="fractions must be at least 0 with a sum below 1"):
            split((0.5, 0.5))
