"""Data sets of PyG by name: real files where they are, made-up ones elsewhere; no network."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.datasets import HeterophilousGraphDataset

from scanweave.graph.sources import find_class, read_peptides, read_set


@pytest.mark.parametrize(
    ("name", "family", "own"),
    [
        ("Cora", "Planetoid", "Cora"),
        ("citeseer", "Planetoid", "CiteSeer"),
        ("Minesweeper", "HeterophilousGraphDataset", "minesweeper"),
        ("Roman-empire", "HeterophilousGraphDataset", "roman_empire"),
        ("Peptides-struct", "LRGBDataset", "peptides-struct"),
        ("PATTERN", "GNNBenchmarkDataset", "PATTERN"),
        ("PROTEINS", "TUDataset", "PROTEINS"),
        ("Amazon:Photo", "Amazon", "Photo"),
    ],
)
def test_names(name, family, own):
    assert find_class(name) == (family, own)


def write_heterophilous(folder: Path, name: str = "minesweeper") -> None:
    """Six nodes on a path, in the layout of the benchmark."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    masks = np.zeros((3, 10, 6), bool)
    for split in range(10):
        for part in range(3):
            masks[part, split, (2 * part + split) % 6] = True
    np.savez(
        raw / f"{name}.npz",
        node_features=np.eye(6, 3, dtype=np.float32),
        node_labels=np.arange(6) % 2,
        edges=np.stack([np.arange(5), np.arange(1, 6)], 1),
        train_masks=masks[0],
        val_masks=masks[1],
        test_masks=masks[2],
    )


def test_files_are_only_read(tmp_path):
    """PyG writes into the cache, in every call the same, and the data may be read-only."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    write_heterophilous(data / "heterophilous")
    for folder in (data, *data.rglob("*")):
        if folder.is_dir():
            folder.chmod(0o555)
    before = sorted(data.rglob("*"))
    found = [read_set("Minesweeper", data, cache) for _ in range(2)]
    assert sorted(data.rglob("*")) == before
    for folder in (data, *data.rglob("*")):
        if folder.is_dir():
            folder.chmod(0o755)
    for raw in found:
        assert (raw.family, raw.name, raw.split) == (
            "HeterophilousGraphDataset",
            "minesweeper",
            None,
        )
        (graph,) = raw.graphs
        assert graph.num_nodes == 6
        assert graph.num_edges == 10
        assert graph.train_mask.shape == (6, 10)
    assert (cache / "HeterophilousGraphDataset" / "minesweeper" / "processed").is_dir()


def test_cache_follows_data_that_moved(tmp_path):
    cache = tmp_path / "cache"
    write_heterophilous(tmp_path / "one")
    read_set("Minesweeper", tmp_path / "one", cache)
    os.replace(tmp_path / "one", tmp_path / "two")
    read_set("Minesweeper", tmp_path / "two", cache)
    link = cache / "HeterophilousGraphDataset" / "minesweeper" / "raw"
    assert link.resolve() == (tmp_path / "two" / "minesweeper" / "raw").resolve()


def test_nothing_is_downloaded_unasked(tmp_path, monkeypatch):
    def download(self):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(HeterophilousGraphDataset, "download", download)
    with pytest.raises(ValueError, match=r"files in .*tolokers/raw, as .*Heterophilous.*download="):
        read_set("Tolokers", tmp_path, tmp_path / "cache")
    with pytest.raises(AssertionError, match="the network was asked"):
        read_set("Tolokers", tmp_path, tmp_path / "cache", download=True)
    with pytest.raises(ValueError, match="dataset must be a set or class of PyG, got 'Nothing:x'"):
        read_set("Nothing:x", tmp_path, tmp_path / "cache")


def test_official_parts_of_a_class_that_has_them(tmp_path):
    """LRGB's layout: a list of (x, edge_attr, edge_index, y) for each part."""
    raw = tmp_path / "peptides-func" / "raw"
    raw.mkdir(parents=True)
    for number, part in enumerate(("train", "val", "test")):
        graph = (
            torch.full((2, 9), number),
            torch.zeros(2, 3).long(),
            torch.tensor([[0, 1], [1, 0]]),
            torch.zeros(1, 10),
        )
        torch.save([graph] * (3 - number), raw / f"{part}.pt")
    found = read_set("Peptides-func", tmp_path, tmp_path / "cache")
    assert found.split == [0, 0, 0, 1, 1, 2]
    assert [int(graph.x[0, 0]) for graph in found.graphs] == found.split
    assert found.family == "LRGBDataset"


def write_peptides(folder: Path) -> Path:
    """Two molecules: three atoms in a row, and one atom."""
    folder.mkdir(parents=True)
    file = folder / "peptides_func_graphs.npz"
    np.savez(
        file,
        num_nodes=np.array([3, 1], np.int32),
        num_edges=np.array([2, 0], np.int32),
        node_feat=np.arange(36, dtype=np.uint8).reshape(4, 9),
        edge_index=np.array([[0, 1], [1, 2]], np.int16),
        edge_feat=np.array([[1, 0, 0], [2, 0, 1]], np.uint8),
        y=np.eye(2, 10, dtype=np.uint8),
        split=np.array([0, 2], np.uint8),
    )
    return file


def test_peptides_in_one_file(tmp_path):
    write_peptides(tmp_path / "peptides_func")
    found = read_set("peptides-func", tmp_path, tmp_path / "cache")
    assert found.split == [0, 2]
    one, other = found.graphs
    assert one.edge_index.tolist() == [[0, 1, 1, 2], [1, 2, 0, 1]]
    assert one.edge_attr.tolist() == [[1, 0, 0], [2, 0, 1]] * 2
    assert one.x[2].tolist() == list(range(18, 27))
    assert other.edge_index.shape == (2, 0)
    assert other.y.tolist() == [[0.0, 1.0] + [0.0] * 8]
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_real_peptides(data_dir):
    file = data_dir / "peptides_func" / "peptides_func_graphs.npz"
    if not file.is_file():
        pytest.skip("no Peptides-func")
    found = read_peptides(file)
    assert np.bincount(found.split).tolist() == [10_873, 2_331, 2_331]
    assert sum(graph.num_nodes for graph in found.graphs) == 2_344_859
    assert sum(graph.num_edges for graph in found.graphs) == 4_773_974


@pytest.mark.parametrize(("name", "nodes", "edges"), [("Cora", 2708, 10556)])
def test_real_planetoid(name, nodes, edges, data_dir, tmp_path):
    if not (data_dir / "planetoid" / name).is_dir():
        pytest.skip(f"no {name}")
    (graph,) = read_set(name, data_dir, tmp_path).graphs
    assert (graph.num_nodes, graph.num_edges) == (nodes, edges)
    assert [int(graph[f"{part}_mask"].sum()) for part in ("train", "val", "test")] == [
        140,
        500,
        1000,
    ]
