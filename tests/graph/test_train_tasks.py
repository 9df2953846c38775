"""Nodes, links and many labels: the training script beyond classes of graphs."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.utils import to_undirected

pytest.importorskip("accelerate")
pytest.importorskip("torchmetrics")

from scanweave.core.training import TrainConfig
from scanweave.graph import GraphSplits, datasets, train
from scanweave.graph.batches import PackedGraphs, PartitionLoader
from scanweave.graph.splitting import split_links, split_one_graph
from scanweave.graph.tasks import Task
from scanweave.graph.train import Config, build_model, evaluate, fit, load, make_loader, scored

CPU = torch.device("cpu")


def two_communities(nodes: int = 40) -> Data:
    """Two dense groups with few edges between; features tell half of the story."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(nodes) % 2
    pairs = torch.randint(nodes, (2, 12 * nodes), generator=generator)
    same = label[pairs[0]] == label[pairs[1]]
    keep = (same | (torch.rand(pairs.size(1), generator=generator) < 0.05)) & (pairs[0] != pairs[1])
    x = torch.randn(nodes, 4, generator=generator)
    x[:, 0] += label.float()
    return Data(x=x, edge_index=to_undirected(pairs[:, keep]), y=label)


def node_splits(metric: str = "accuracy") -> GraphSplits:
    parts = split_one_graph(two_communities(), (0.2, 0.3), 0)
    kind = "multiclass" if metric == "accuracy" else "binary"
    outputs = 2 if metric == "accuracy" else 1
    task = Task("node", kind, outputs, metric)
    return GraphSplits(*parts, in_channels=4, edge_dim=None, num_classes=outputs, task=task)


def link_splits() -> GraphSplits:
    parts = split_links(two_communities(), (0.1, 0.2), 0)
    task = Task("link", "binary", 1, "auroc")
    return GraphSplits(*parts, in_channels=4, edge_dim=None, num_classes=1, task=task)


def config(tmp_path, *, loop: dict | None = None, **kwargs) -> Config:
    settings = {
        "output_dir": tmp_path / "run",
        "epochs": 30,
        "batch_size": 8,
        "lr": 1e-2,
        "cpu": True,
        "progress": False,
        "tensorboard": False,
        **(loop or {}),
    }
    kwargs = {"hidden_channels": 16, "num_layers": 1, "conv": "gcn", **kwargs}
    return Config(train=TrainConfig(**settings), **kwargs)


@pytest.mark.parametrize("metric", ["accuracy", "auroc"])
def test_nodes_are_told_apart(metric, tmp_path):
    splits = node_splits(metric)
    model, result = fit(config(tmp_path), splits)
    assert result.steps == 30  # one graph is one step
    assert evaluate(model, splits.test, task=splits.target)[metric] > 0.9
    # the best epoch's weights are back
    found = evaluate(model, splits.val, task=splits.target)
    name = "loss" if metric == "accuracy" else metric
    assert found[name] == pytest.approx(result.best_metrics[name], rel=1e-5)


def test_only_labelled_nodes_teach(tmp_path):
    """Labels outside the training mask change nothing."""
    weights = []
    for flip in (False, True):
        splits = node_splits()
        data = splits.train[0]
        if flip:
            data.y = torch.where(data.mask, data.y, 1 - data.y)
        loop = {"output_dir": tmp_path / str(flip), "epochs": 3, "best_metric": ""}
        model, _ = fit(config(tmp_path, loop=loop), splits._replace(val=[]))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert weights[0].equal(weights[1])


@pytest.mark.parametrize("kind", ["full", "random", "cluster"])
def test_every_loader_of_one_graph_learns(kind, tmp_path):
    splits = node_splits()
    # pieces of neighbours are of one class: batch norm would learn from nothing else
    settings = config(tmp_path, loader=kind, num_parts=2, norm="none", loop={"epochs": 15})
    loader = make_loader(settings, splits, CPU)
    assert isinstance(loader, PartitionLoader) == (kind == "cluster")
    assert sum(1 for _ in loader) == (1 if kind == "full" else 2)
    labelled = sum(scored(splits.target, _Echo(), batch)[1].numel() for batch in loader)
    assert labelled == int(splits.train[0].mask.sum())
    before = evaluate(build_model(settings, splits).eval(), splits.train, task=splits.target)
    model, result = fit(settings, splits)
    assert result.steps == (15 if kind == "full" else 30)
    after = evaluate(model, splits.train, task=splits.target)
    assert after["loss"] < 0.9 * before["loss"]


class _Echo(torch.nn.Module):
    """Returns the features, to see which nodes a loss is given."""

    def forward(self, x, edge_index, edge_attr=None, batch=None, batch_size=None):
        return x


def test_nodes_that_a_neighbor_loader_started_from_are_first():
    data = Data(
        x=torch.arange(5.0).unsqueeze(1),
        edge_index=torch.zeros(2, 0).long(),
        y=torch.arange(5),
        mask=torch.ones(5, dtype=torch.bool),
        input_id=torch.tensor([7, 3]),
    )
    scores, labels = scored(Task("node", "multiclass", 5, "accuracy"), _Echo(), data)
    assert scores.flatten().tolist() == labels.tolist() == [0, 1]


def test_loaders_refuse(tmp_path):
    for kind in ("packed", "collate"):
        with pytest.raises(ValueError, match="loader must be full, random, cluster or neighbor"):
            make_loader(config(tmp_path, loader=kind), node_splits(), CPU)
    with pytest.raises(ValueError, match="loader must be full for links, got 'cluster'"):
        make_loader(config(tmp_path, loader="cluster"), link_splits(), CPU)
    if not (train.WITH_PYG_LIB or train.WITH_TORCH_SPARSE):
        with pytest.raises(ImportError, match="loader='neighbor' needs pyg-lib"):
            make_loader(config(tmp_path, loader="neighbor"), node_splits(), CPU)


@pytest.mark.parametrize("score", ["dot", "hadamard", "concat"])
def test_links_are_learned(score, tmp_path):
    splits = link_splits()
    loop = {"epochs": 20, "lr": 2e-2, "log_every": 5}
    model, result = fit(config(tmp_path, link_score=score, head_layers=2, loop=loop), splits)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    # the score of a pair knows its direction only where both vectors are given
    data = splits.val[0].clone()
    with torch.no_grad():
        pairs = data.edge_label_index
        one, other = (train.predict(model, data, p) for p in (pairs, pairs.flip(0)))
    assert one.allclose(other, atol=1e-5) == (score != "concat")


def test_missing_links_are_found(tmp_path):
    splits = link_splits()
    model, _ = fit(config(tmp_path, loop={"epochs": 30, "lr": 2e-2}), splits)
    assert evaluate(model, splits.test, task=splits.target)["auroc"] > 0.65


def test_training_draws_pairs_that_are_none(tmp_path):
    splits = link_splits()
    model = build_model(config(tmp_path), splits)
    task = splits.target
    torch.manual_seed(0)
    scores, labels = scored(task, model.train(), splits.train[0])
    count = splits.train[0].edge_label.numel()
    assert scores.shape == labels.shape == (2 * count,)
    assert labels.tolist() == [1.0] * count + [0.0] * count
    again = scored(task, model, splits.train[0])[0]
    assert again[:count].allclose(scores[:count])
    assert not again[count:].allclose(scores[count:])
    scores, labels = scored(task, model.eval(), splits.val[0])
    assert labels.equal(splits.val[0].edge_label)


def rings(count: int) -> list[Data]:
    step = torch.arange(5)
    edges = to_undirected(torch.stack([step, (step + 1) % 5]))
    return [
        Data(x=torch.rand(5, 1), edge_index=edges, y=torch.tensor([i % 2])) for i in range(count)
    ]


def labelled_graphs(count: int, seed: int) -> list[Data]:
    """Graphs with two labels: more than four nodes, and a positive sum."""
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for _ in range(count):
        size = int(torch.randint(2, 8, (), generator=generator))
        step = torch.arange(size - 1)
        x = torch.randn(size, 2, generator=generator)
        y = torch.tensor([[float(size > 4), float(x[:, 0].sum() > 0)]])
        edges = to_undirected(torch.stack([step, step + 1]))
        graphs.append(Data(x=x, edge_index=edges, y=y))
    return graphs


@pytest.fixture
def multilabel() -> GraphSplits:
    parts = (labelled_graphs(n, seed) for seed, n in enumerate((96, 32, 32)))
    task = Task("graph", "multilabel", 2, "ap")
    return GraphSplits(*parts, in_channels=2, edge_dim=None, num_classes=2, task=task)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"model": "graph_mamba", "pool": "add"},
        {"model": "gmn", "walk_length": 2, "num_walks": 2, "num_repeats": 1, "pool": "add"},
        {"model": "gps", "heads": 2, "pool": "add", "head_layers": 2},
        {"model": "gps", "attn_type": "performer", "heads": 2, "pool": "add"},
        {"mixer": "bimamba_separate", "d_state": 4, "pool": "add"},
    ],
    ids=str,
)
def test_every_model_learns_labels(kwargs, tmp_path, multilabel):
    settings = config(tmp_path, conv="gin", loop={"epochs": 5, "batch_size": 16}, **kwargs)
    model, _ = fit(settings, multilabel)
    assert evaluate(model, multilabel.train, task=multilabel.target)["ap"] > 0.85


@pytest.mark.parametrize("level", ["graph", "node"])
def test_heads_of_several_layers(level, tmp_path, multilabel):
    splits = multilabel if level == "graph" else node_splits()
    plain = build_model(config(tmp_path), splits)
    headed = build_model(config(tmp_path, head_layers=3), splits)
    layers = [m for m in headed.head.modules() if hasattr(m, "weight")]
    assert len(layers) == 3
    data = Batch.from_data_list(splits.train[:2])
    with torch.no_grad():
        assert train.predict(plain, data).shape == train.predict(headed, data).shape
    assert headed.out_channels == plain.out_channels or headed.out_channels is None


def test_packed_and_collated_batches_train_alike(tmp_path, multilabel):
    weights = []
    for kind in ("packed", "collate"):
        settings = config(tmp_path, loader=kind, loop={"output_dir": tmp_path / kind, "epochs": 2})
        assert isinstance(make_loader(settings, multilabel, CPU).dataset, PackedGraphs) == (
            kind == "packed"
        )
        model, _ = fit(settings, multilabel)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]), name


def test_orders_are_left_out_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "digit_graphs", lambda coordinates: rings(12))
    for model in ("graph_mamba", "gps"):
        splits = load(config(tmp_path, model=model, order=("rcm",), precompute_order=True))
        assert ("node_order" in splits.train[0]) == (model == "graph_mamba")


def test_files_are_kept_between_runs(tmp_path):
    folder = tmp_path / "data" / "minesweeper" / "raw"
    folder.mkdir(parents=True)
    masks = np.arange(6)[None, :] % 3 == np.arange(3)[:, None]
    np.savez(
        folder / "minesweeper.npz",
        node_features=np.eye(6, 3, dtype=np.float32),
        node_labels=np.array([0, 0, 0, 1, 1, 1]),
        edges=np.stack([np.arange(5), np.arange(1, 6)], 1),
        **{f"{name}_masks": masks[i : i + 1] for i, name in enumerate(("train", "val", "test"))},
    )
    settings = config(
        tmp_path,
        dataset="Minesweeper",
        data_dir=tmp_path / "data",
        cache_dir=tmp_path / "cache",
        order=("bfs",),
        precompute_order=True,
        rwse=3,
        loop={"epochs": 1},
    )
    results = train.train(settings)
    assert (tmp_path / "cache" / "minesweeper-bfs.npz").is_file()
    assert (tmp_path / "cache" / "minesweeper-rwse3.npz").is_file()
    assert set(results["test"]) == {"auroc", "loss"}  # what the set's authors use
    splits = load(settings)
    assert splits.in_channels == 6
    # a split is given once more to a second run on the same graphs
    settings = dataclasses.replace(
        settings, train=dataclasses.replace(settings.train, output_dir=tmp_path / "again")
    )
    assert train.train(settings, splits)["test"] == results["test"]
    with pytest.raises(ValueError, match="task must be 'node' or 'link' for Minesweeper, got 'gr"):
        load(dataclasses.replace(settings, task="graph"))
    links = load(dataclasses.replace(settings, task="link", val_fraction=0.2, test_fraction=0.2))
    assert links.target.level == "link"
    # orders and encodings of what each part may see, not of all edges
    assert links.train[0].num_edges < links.test[0].num_edges
    assert "node_order" in links.train[0]


def test_nodes_of_many_graphs(tmp_path):
    """Every node has a label and no mask: batches are of graphs, targets of nodes."""
    graphs = [two_communities(n) for n in (12, 20, 16, 14, 18, 12)]
    task = Task("node", "multiclass", 2, "f1")
    splits = GraphSplits(graphs[:4], graphs[4:5], graphs[5:], 4, None, 2, task)
    settings = config(tmp_path, loop={"batch_size": 2, "epochs": 10})
    batch = next(iter(make_loader(settings, splits, CPU)))
    assert batch.y.numel() == batch.num_nodes
    model, result = fit(settings, splits)
    assert result.steps == 20
    assert evaluate(model, splits.train, task=task)["f1"] > 0.8


def test_many_graphs_have_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "digit_graphs", lambda coordinates: rings(12))
    with pytest.raises(ValueError, match="task must be graph or node for 12 graphs, got 'link'"):
        load(config(tmp_path, task="link"))


def test_other_settings_cannot_be_resumed(tmp_path):
    splits = node_splits()
    settings = config(tmp_path, loop={"epochs": 4, "max_steps": 2})
    fit(settings, splits)
    loop = dataclasses.replace(settings.train, resume=True)
    moved = dataclasses.replace(settings, train=loop, cache_dir=tmp_path / "other")
    fit(moved, splits)
    with pytest.raises(ValueError, match=r"dropout must be 0.0 as in .* to resume, got 0.5; to ch"):
        fit(dataclasses.replace(settings, train=loop, dropout=0.5), splits)
    extra = json.loads((tmp_path / "run" / "config.json").read_text())["extra"]
    assert extra["model"] == "graph_mamba"
    assert "train" not in extra


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"folds": 2}, "folds must be 0 or at least 3, got 2"),
        ({"rwse": -1}, "rwse must be at least 0, got -1"),
        ({"lap_pe": -1}, "lap_pe must be at least 0, got -1"),
        ({"num_parts": 0}, "num_parts must be at least 1, got 0"),
        ({"head_layers": 0}, "head_layers must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_refuse(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **kwargs)


def test_gmn_needs_a_mixer(tmp_path):
    with pytest.raises(ValueError, match="mixer must be a name for the model gmn, got 'none'"):
        build_model(config(tmp_path, model="gmn", mixer="none"), node_splits())
