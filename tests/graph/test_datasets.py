"""Reading and splitting: real TU files where they are, tiny ones made on the spot elsewhere."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Data

from scanweave.graph.datasets import load_splits, read_tu_set, split_graphs


def write_set(folder: Path, name: str = "TINY", graphs: int = 10, **extra: str) -> Path:
    """Triangles and two-node paths in turn, in the layout of the TU collection."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    edges, indicator, labels, first = [], [], [], 1
    for number in range(graphs):
        size = 3 if number % 2 else 2
        nodes = range(first, first + size)
        edges += [f"{a}, {b}" for a in nodes for b in nodes if a != b]
        indicator += [str(number + 1)] * size
        labels.append(str(number % 2))
        first += size
    files = {"A": edges, "graph_indicator": indicator, "graph_labels": labels}
    for key, lines in files.items():
        (raw / f"{name}_{key}.txt").write_text("\n".join(lines) + "\n")
    for key, line in extra.items():
        count = len(edges) if key.startswith("edge") else len(indicator)
        rows = [line.format(i=i, parity=i % 2) for i in range(count)]
        (raw / f"{name}_{key}.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_graphs_come_out_as_they_were_written(tmp_path):
    graphs = read_tu_set("TINY", write_set(tmp_path, node_labels="{parity}"))
    assert len(graphs) == 10
    assert [graph.num_nodes for graph in graphs] == [2, 3] * 5
    assert [int(graph.y) for graph in graphs] == [0, 1] * 5
    for graph in graphs:
        assert graph.num_edges == (2 if graph.num_nodes == 2 else 6)
        assert graph.x.shape == (graph.num_nodes, 2)
        assert graph.x.sum(1).eq(1).all()
        graph.validate()
    assert {path.name for path in (tmp_path / "TINY").iterdir()} == {"raw"}


def test_nodes_without_features_get_their_degree(tmp_path):
    graphs = read_tu_set("TINY", write_set(tmp_path))
    expected = torch.tensor([[1.0, 3.0]] * 3)
    torch.testing.assert_close(graphs[1].x, torch.stack([expected[:, 0], expected[:, 1].log()], 1))


def test_splits_know_widths_and_classes(tmp_path):
    write_set(tmp_path, node_attributes="{i}, 5.0", edge_labels="{parity}")
    splits = load_splits("TINY", tmp_path, val_fraction=0.2, test_fraction=0.2)
    assert (splits.in_channels, splits.edge_dim, splits.num_classes) == (2, 2, 2)
    x = torch.cat([graph.x for graph in splits.train])
    torch.testing.assert_close(x[:, 0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, 0].std(), torch.tensor(1.0))
    assert x[:, 1].eq(0).all()  # a constant column is only centred


@pytest.mark.parametrize(
    ("name", "graphs", "in_channels", "edge_dim", "classes"),
    [("MUTAG", 188, 7, 4, 2), ("ENZYMES", 600, 21, None, 6)],
)
def test_real_sets(name, graphs, in_channels, edge_dim, classes, data_dir):
    if not (data_dir / "tudataset" / name).is_dir():
        pytest.skip(f"{name} is not there")
    splits = load_splits(name, data_dir / "tudataset")
    assert sum(len(part) for part in splits[:3]) == graphs
    assert (splits.in_channels, splits.edge_dim, splits.num_classes) == (
        in_channels,
        edge_dim,
        classes,
    )


def test_digits_need_no_folder():
    pytest.importorskip("sklearn")
    splits = load_splits("digits", "nowhere", coordinates=1)
    assert [len(part) for part in splits[:3]] == [1259, 179, 359]
    assert (splits.in_channels, splits.edge_dim, splits.num_classes) == (2, None, 10)


def many(counts: dict[int, int]) -> list[Data]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Data(x=torch.tensor([[float(i)]]), y=torch.tensor([y])) for i, y in enumerate(labels)]


def test_split_is_stratified_complete_and_seeded():
    graphs = many({0: 50, 1: 100})
    parts = split_graphs(graphs, (0.1, 0.2), seed=3)
    for part, (zeros, ones) in zip(parts, ((35, 70), (5, 10), (10, 20)), strict=True):
        assert Counter(int(graph.y) for graph in part) == {0: zeros, 1: ones}
    ids = [float(graph.x) for part in parts for graph in part]
    assert sorted(ids) == [float(i) for i in range(150)]
    again = split_graphs(graphs, (0.1, 0.2), seed=3)
    assert [float(g.x) for part in again for g in part] == ids
    other = split_graphs(graphs, (0.1, 0.2), seed=4)
    assert [float(g.x) for part in other for g in part] != ids


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.5, 0.5)])
def test_split_refuses_fractions(fractions):
    with pytest.raises(ValueError, match="fractions must be at least 0 with a sum below 1"):
        split_graphs(many({0: 4}), fractions, seed=0)


def test_missing_set_says_where_and_how(tmp_path):
    with pytest.raises(ValueError, match=r"dataset must be 'digits' or .* got 'NCI1'; .*TUDataset"):
        load_splits("NCI1", tmp_path)
