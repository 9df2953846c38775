"""Packed graphs against PyG's own collation, and pieces of large graphs."""

import pytest
import torch
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from torch_geometric.utils import to_undirected

from scanweave.core.training.batches import ResumableLoader
from scanweave.graph import rcm_order
from scanweave.graph.batches import PackedGraphs, PartitionLoader, cut_by_order, first


def graphs(sizes=(3, 1, 5, 2), seed=0) -> list[Data]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, size in enumerate(sizes):
        edge_index = torch.randint(size, (2, 2 * size if size > 1 else 0), generator=generator)
        made.append(
            Data(
                x=torch.rand(size, 4, generator=generator),
                edge_index=edge_index,
                edge_attr=torch.rand(edge_index.size(1), 2, generator=generator),
                node_order=torch.randperm(size, generator=generator),
                y=torch.tensor([[float(number), -1.0]]),
            )
        )
    return made


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [2], [3, 1], [1], [2, 2, 0]], ids=str)
def test_batches_equal_those_of_pyg(chosen):
    stored = graphs()
    batch = PackedGraphs(stored).__getitems__(chosen)
    expected = Batch.from_data_list([stored[i] for i in chosen])
    assert set(batch.keys()) == set(expected.keys())
    for key in expected.keys():  # noqa: SIM118 (a Data is no mapping)
        assert batch[key].equal(expected[key]), key
    assert batch.num_graphs == len(chosen)
    assert batch.num_nodes == expected.num_nodes
    assert batch.validate()


def test_numbers_of_rows_that_agree_by_chance():
    """Rings have as many edges as nodes, and single nodes as many nodes as labels."""
    ring = torch.stack([torch.arange(3), (torch.arange(3) + 1) % 3])
    stored = [
        Data(x=torch.rand(3, 1), edge_index=ring, edge_attr=torch.rand(3, 1), y=torch.ones(1))
        for _ in range(2)
    ]
    for chosen in (stored, [Data(x=g.x[:1], edge_index=ring[:, :0], y=g.y) for g in stored]):
        batch = PackedGraphs(chosen).__getitems__([1, 0])
        expected = Batch.from_data_list(chosen[::-1])
        for key in expected.keys():  # noqa: SIM118 (a Data is no mapping)
            assert batch[key].equal(expected[key]), key


def test_single_graphs_and_batches_in_order():
    stored = graphs()
    packed = PackedGraphs(stored)
    assert len(packed) == 4
    assert packed[2]["x"].equal(stored[2]["x"])
    parts = packed.batches(3)
    assert [part.num_graphs for part in parts] == [3, 1]
    assert torch.cat([part["x"] for part in parts]).equal(torch.cat([g["x"] for g in stored]))


def test_trainer_can_read_it_in_a_seeded_order():
    packed = PackedGraphs(graphs(range(1, 12)))
    loader = DataLoader(packed, 4, shuffle=True, collate_fn=first)
    seen = []
    for seed in (0, 0, 1):
        batches = list(ResumableLoader(loader, seed).epoch(0))
        assert [count for _, count in batches] == [4, 4, 3]
        seen.append(torch.cat([batch["y"][:, 0] for batch, _ in batches]))
    assert sorted(seen[0].tolist()) == list(range(11))
    assert seen[0].equal(seen[1])
    assert not seen[0].equal(seen[2])


def test_packing_refuses():
    with pytest.raises(ValueError, match="graphs must hold at least one graph, got none"):
        PackedGraphs([])
    stored = graphs()
    del stored[1].edge_attr
    with pytest.raises(ValueError, match=r"graphs must all hold \[.*'edge_attr'.*got \["):
        PackedGraphs(stored)
    odd = {"walk_index": torch.zeros(1, 3)}, {"name": "text"}, {"rows": torch.zeros(2)}
    for extra in odd:
        with pytest.raises(ValueError, match=r"row per node.* without node numbers: got '(w|n|r)"):
            PackedGraphs([Data(x=torch.ones(3, 1), edge_index=torch.zeros(2, 0).long(), **extra)])


def path_graph(nodes: int) -> Data:
    """A path whose nodes are stored in a random order; `mask` marks every third of it."""
    names = torch.randperm(nodes, generator=torch.Generator().manual_seed(0))
    edge_index = to_undirected(torch.stack([names[:-1], names[1:]]))
    return Data(x=names.float().unsqueeze(1), edge_index=edge_index, mask=names % 3 == 0)


def test_pieces_are_stretches_of_the_order():
    data = path_graph(50)
    part = cut_by_order(data, 5, rcm_order)
    assert torch.bincount(part).tolist() == [10] * 5
    # stretches of a path: only the four edges between them are cut, both ways
    ends = part[data.edge_index]
    assert int((ends[0] != ends[1]).sum()) == 8


def test_partition_loader_shows_every_node_once_with_its_edges():
    data = path_graph(50)
    part = cut_by_order(data, 5, rcm_order)
    loader = PartitionLoader(data, part, parts_per_batch=2)
    seen = []
    for batch in loader:
        own = batch.node_id
        assert batch.x.equal(data.x[own])
        assert batch.mask.equal(data.mask[own])
        inside = torch.zeros(50, dtype=torch.bool)
        inside[own] = True
        kept = data.edge_index[:, inside[data.edge_index].all(0)]
        assert sorted(own[batch.edge_index].t().tolist()) == sorted(kept.t().tolist())
        seen.append(own)
    assert [own.numel() for own in seen] == [20, 20, 10]
    assert torch.cat(seen).sort().values.equal(torch.arange(50))
    assert "node_id" not in data


def test_pieces_refuse():
    data = path_graph(6)
    with pytest.raises(ValueError, match=r"num_parts must be in \[1, 6\], got 7"):
        cut_by_order(data, 7, rcm_order)
    with pytest.raises(ValueError, match=r"part must be one number per node: got \(5,\) for 6"):
        PartitionLoader(data, torch.zeros(5).long())
    with pytest.raises(ValueError, match="parts_per_batch must be at least 1, got 0"):
        PartitionLoader(data, torch.zeros(6).long(), 0)
