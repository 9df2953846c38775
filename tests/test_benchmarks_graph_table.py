"""The table of graph models: fair settings, jobs in the right order, rows of cut-off sweeps."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("torch_geometric")
pytest.importorskip("torchmetrics")

from benchmarks import graph_job, graph_models, graph_table
from benchmarks.graph_models import MODELS, SETS, match_width, settings

from scanweave.graph.build import build_model
from scanweave.graph.datasets import GraphSplits
from scanweave.graph.tasks import Task

# what decides a model and may differ between rows of the table
_OWN = {
    "model",
    "mixer",
    "order",
    "precompute_order",
    "ties",
    "attn_type",
    "num_repeats",
    "hidden_channels",
}


def config(name: str, model: str, seed: int = 0):
    folder = Path("run")
    return settings(
        name, model, seed, epochs=2, folder=folder, data_dir=Path("data"), cache_dir=folder
    )


@pytest.mark.parametrize("name", SETS)
def test_all_models_of_a_set_are_trained_alike(name):
    plain = dataclasses.asdict(config(name, "convolution alone"))
    for model in MODELS:
        other = dataclasses.asdict(config(name, model))
        assert {key for key in plain if plain[key] != other[key]} <= _OWN, model
    seeds = [config(name, "GMN", seed) for seed in (0, 1)]
    assert [c.train.seed for c in seeds] == [0, 1]
    assert [c.split_seed for c in seeds] == [0, int(SETS[name].own_splits)]


@pytest.mark.parametrize("model", MODELS)
def test_all_models_of_a_set_have_equally_many_parameters(model):
    task = Task("graph", "multilabel", 10, "ap")
    splits = GraphSplits([], [], [], 47, 5, 10, task)
    chosen = match_width(config("Peptides-func", model), splits, 400_000)
    count = sum(p.numel() for p in build_model(chosen, splits).parameters())
    assert abs(count - 400_000) <= 0.05 * 400_000
    assert chosen.hidden_channels % 4 == 0


def options(out: Path, **given) -> argparse.Namespace:
    values = {
        "seeds": 0,
        "epochs": 3,
        "long_epochs": 0,
        "data_dir": Path("data"),
        "cache_dir": Path("cache"),
        "out": out,
        "csv": None,
    }
    return argparse.Namespace(**values | given)


def test_jobs_come_with_seeds_outermost(tmp_path):
    models = ["GMN", "convolution alone"]
    given = options(tmp_path, long_epochs=9)
    jobs = graph_table.make_jobs(["Peptides-func", "MUTAG"], models, given)
    assert [job.name for job in jobs] == [
        *(f"Peptides-func, long/GMN/seed{seed}" for seed in range(3)),
        *(f"Peptides-func/{model}/seed{seed}" for seed in range(3) for model in models),
        *(f"MUTAG/{model}/seed0" for model in models),
    ]
    values = [dict(zip(job.arguments[::2], job.arguments[1::2], strict=True)) for job in jobs]
    assert [value["--epochs"] for value in values] == ["9"] * 3 + ["3"] * 8
    assert values[-1]["--seeds"] == "0,1,2,3,4,5,6,7,8,9"
    assert {value["--set"] for value in values} == {"Peptides-func", "MUTAG"}


def finished(job, out: Path, seeds: list[int], value: float) -> None:
    """What a job leaves that was stopped after these seeds."""
    folder = out / job.name
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"arguments": list(job.arguments)}))
    for seed in seeds:
        (folder / f"seed{seed}").mkdir()
        found = {
            "test": {"accuracy": value + 0.1 * seed, "loss": 1.0},
            "val": {"accuracy": 0.5, "loss": 1.0},
            "parameters": 7,
            "seconds": 2.0,
        }
        (folder / f"seed{seed}" / "results.json").write_text(json.dumps(found))


def test_rows_of_stopped_jobs_count(tmp_path):
    given = options(tmp_path, seeds=3)
    jobs = graph_table.make_jobs(["MUTAG"], ["GMN", "convolution alone"], given)
    finished(jobs[0], tmp_path, [0, 1], 0.6)
    finished(jobs[1], tmp_path, [0, 1, 2], 0.5)
    facts = {"device": "cpu", "versions": "torch 1", "commit": "abc"}
    rows = graph_table.collect(jobs, tmp_path, facts)
    tests = [(r.model, r.seed, r.value) for r in rows if r.metric == "accuracy"]
    assert tests[:2] == [("GMN", 0, 0.6), ("GMN", 1, 0.7)]
    assert len(tests) == 5
    assert all(row.commit == "abc" for row in rows)
    text = graph_table.write(jobs, given, facts)
    assert "0.6500 ± 0.0707 (2 of 3)" in text
    assert "0.6000 ± 0.1000 (3)" in text
    assert (tmp_path / "results.csv").read_text().count("\n") == 11
    # results of other settings are not these jobs'
    others = graph_table.make_jobs(["MUTAG"], ["GMN"], options(tmp_path, seeds=2))
    assert graph_table.collect(others, tmp_path, facts) == []


def write_peptides(folder: Path, graphs: int = 24) -> None:
    """Paths of three to five atoms in the layout of Peptides-func."""
    sizes = np.arange(graphs) % 3 + 3
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    np.savez(
        folder / "peptides_func_graphs.npz",
        num_nodes=sizes,
        num_edges=sizes - 1,
        node_feat=rng.integers(0, 3, (sizes.sum(), 9)),
        edge_index=np.concatenate(
            [np.stack([np.arange(n - 1), np.arange(1, n)]) for n in sizes], 1
        ),
        edge_feat=rng.integers(0, 2, ((sizes - 1).sum(), 3)),
        # both answers to every label in every part
        y=(np.arange(graphs)[:, None] // 4 + np.arange(10)) % 2,
        split=np.arange(graphs) % 4 // 2 + (np.arange(graphs) % 4 == 3),
    )


def test_runs_are_made_once(tmp_path, monkeypatch):
    write_peptides(tmp_path / "data" / "peptides_func")
    small = dataclasses.replace(SETS["Peptides-func"], parameters=9_000)
    monkeypatch.setitem(graph_models.SETS, "Peptides-func", small)
    arguments = ["graph_job", "--folder", str(tmp_path / "run"), "--set", "Peptides-func"]
    arguments += ["--model", "GraphMambaConv, BFS", "--seeds", "0,1", "--epochs", "1"]
    arguments += ["--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", arguments)
    precision = torch.get_float32_matmul_precision()
    try:
        graph_job.main()
        results = tmp_path / "run" / "results.json"
        found = json.loads(results.read_text())
        assert set(found["seeds"]) == {"0", "1"}
        assert 0 <= found["seeds"]["1"]["test"]["ap"] <= 1
        assert found["parameters"] == pytest.approx(9_000, rel=0.3)
        monkeypatch.setattr(graph_job.script, "train", lambda *_: pytest.fail("trained again"))
        results.unlink()
        graph_job.main()
        assert json.loads(results.read_text()) == found
    finally:
        torch.set_float32_matmul_precision(precision)


def test_unknown_names_are_refused(monkeypatch, capsys):
    for extra in (["--sets", "Cora,Nothing"], ["--models", "Nothing"]):
        monkeypatch.setattr(sys, "argv", ["graph_table", "--data-dir", "x", *extra])
        with pytest.raises(SystemExit):
            graph_table.main()
        assert "'Nothing' is none of " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_whole_command(tmp_path, monkeypatch, capsys):
    """Jobs as processes, a table at the end, and nothing to do the second time."""
    write_peptides(tmp_path / "data" / "peptides_func")
    command = ["graph_table", "--data-dir", str(tmp_path / "data"), "--devices", "cpu"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    command += ["--sets", "Peptides-func", "--models", "convolution alone", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--epochs", "1", "--commit", "abc"])
    graph_table.main()
    first = capsys.readouterr().out
    assert "| convolution alone | 399,1" in first or "| convolution alone | 4" in first
    assert "missing" not in first
    monkeypatch.setattr(graph_table, "run_jobs", lambda jobs, out, **_: {})
    graph_table.main()
    assert capsys.readouterr().out == first
    assert (tmp_path / "out" / "results.md").read_text() in first
