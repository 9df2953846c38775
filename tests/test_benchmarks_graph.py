"""The graph benchmark runs, refuses what is off, and its batches are like the sets' own."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import graph, graph_plot
from benchmarks.graph_batches import SETS, batch_of, one_graph, padding_of, set_batch
from benchmarks.graph_layers import GROWING, LAYERS, operations, too_large
from benchmarks.report import Row, columns, read_csv
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    """Both commands at toy size."""
    out = tmp_path_factory.mktemp("graph") / "rows.csv"
    shared = ["--toy", "--device", "cpu", "--out", str(out)]
    assert graph.main(["batches", "--sets", "proteins", *shared]) == 0
    assert graph.main(["growth", *shared, "--layers", "packed; GPSConv performer"]) == 0
    return read_csv(out), out


def test_every_layer_is_checked_and_timed(rows: tuple[list[Row], Path]):
    found = {(row.op, row.shape, row.implementation, row.passes) for row in rows[0]}
    for name in LAYERS:
        for passes in graph.PASSES.values():
            assert ("graph_batch", "proteins_4", name, passes) in found
    assert ("graph_growth", "n200", "packed", "forward") in found
    for row in rows[0]:
        assert row.median_us is not None
        assert row.error is not None
        assert row.error < 1e-4
        assert row.checked_by.endswith("float64")
        assert row.checked_by.startswith(row.implementation.replace("padded", "packed"))


def test_rows_have_the_columns_of_the_other_benchmarks(rows: tuple[list[Row], Path]):
    assert rows[1].read_text().splitlines()[0].split(",") == columns(Row)
    text = graph.table(rows[0])
    assert "| n200 | packed |" in text
    assert text.count("\n") == len({(r.shape, r.implementation) for r in rows[0]}) + 1


def test_growth_is_drawn(rows: tuple[list[Row], Path]):
    path = graph_plot.save(rows[1])
    assert path.read_text().count("<svg") == 1
    with pytest.raises(ValueError, match="rows must hold times of growth, got 0 rows"):
        graph_plot.draw([], "")


class Off(nn.Module):
    """Twice its argument, and a little more in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x if x.dtype == torch.float64 else 2.001 * x


def test_a_layer_that_is_off_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LAYERS, "off", lambda batch: Off())
    run = graph.Run(CPU, torch.float32, ["off"], None, True)
    run.measure("graph_batch", one_graph(20))
    assert [row.median_us for row in run.rows] == [None]
    assert "not timed: off by" in run.rows[0].note
    assert len(run.wrong) == 1


def test_padding_is_refused_where_it_leaks(monkeypatch: pytest.MonkeyPatch):
    def unmasked(batch):
        made = LAYERS["padded"](batch)
        made.layer.mixer.masked = False
        return made

    monkeypatch.setitem(LAYERS, "padded, unmasked", unmasked)
    monkeypatch.setitem(LAYERS, "packed, unmasked", LAYERS["packed"])
    run = graph.Run(CPU, torch.float32, ["padded, unmasked"], None, True)
    run.measure("graph_batch", batch_of("two", np.array([40, 9]), 2.0, ""))
    assert "not timed: off by" in run.rows[0].note


def test_nothing_is_started_after_the_deadline():
    run = graph.Run(CPU, torch.float32, ["packed"], None, True, deadline=-math.inf)
    run.measure("graph_batch", one_graph(20))
    assert not run.rows


def test_huge_graphs_are_left_out_of_attention():
    huge = dataclasses.replace(one_graph(4), batch=torch.zeros(200_000, dtype=torch.int64))
    for name in GROWING:
        assert too_large(name, huge, CPU) == (name == "GPSConv multihead")


def test_part_of_a_batch_is_its_first_graphs():
    batch = batch_of("three", np.array([4, 5, 6]), 2.0, "")
    part = batch.first(10)
    assert (part.num_graphs, part.nodes) == (2, 9)
    assert part.edge_index.equal(batch.edge_index[:, batch.edge_index[0] < 9])
    assert batch.first(3).num_graphs == 0
    assert batch.first(15).edge_index.equal(batch.edge_index)


@pytest.mark.parametrize(("name", "padding"), [("peptides", 0.61), ("proteins", 0.86)])
def test_batches_are_like_those_of_the_sets(name: str, padding: float, data_dir: Path):
    for batch in (set_batch(SETS[name], 128), set_batch(SETS[name], 128, data_dir)):
        assert abs(batch.padding - padding) < 0.03
        assert abs(batch.edge_index.size(1) / batch.nodes - SETS[name].edges) < 0.1
        source, target = batch.batch[batch.edge_index]
        assert source.equal(target)
        assert batch.num_graphs == 128


def test_stored_sizes_are_those_that_the_table_says(data_dir: Path):
    for graph_set in SETS.values():
        sizes, source = graph_set.sizes(data_dir)
        assert source == f"sizes of {graph_set.name}"
        assert sizes.size == graph_set.graphs
        assert abs(sizes.mean() - graph_set.mean) < 0.1
        assert sizes.max() == graph_set.most
        assert np.median(sizes) == graph_set.median


def test_padding_of_equal_sizes_is_none():
    assert padding_of(np.array([4, 4, 4])) == 0
    assert padding_of(np.array([1, 3])) == pytest.approx(1 / 3)


def test_views_and_unfilled_tensors_are_no_operations():
    x = torch.randn(3, 4)
    assert operations(lambda: x.t().reshape(3, 4).add(1).view(-1)[2:].unsqueeze(0)) == 2
    assert operations(lambda: (torch.empty(3), torch.empty_like(x), x.sum().item())) == 1
    assert operations(lambda: x.clone().add_(1)) == 2


@pytest.mark.parametrize(
    ("name", "orders", "forward"), [("packed", 26, 67), ("packed, one way", 26, 61)]
)
def test_operators_of_a_layer_do_not_creep_up(name: str, orders: int, forward: int):
    # every one is a launch or more, 0.05 ms of a slow host; by degree, 26 of them make the order
    batch = batch_of("three", np.array([4, 5, 6]), 2.0, "")
    made = LAYERS[name](batch)
    x = torch.randn(batch.nodes, 96)
    arguments = batch.edge_index, batch.batch, batch.num_graphs
    for training in (False, True):
        made.train(training)
        assert operations(lambda: made.layer.sequences(*arguments)) <= orders  # pyright: ignore
        with torch.set_grad_enabled(training):
            assert operations(lambda: made(x)) <= forward


def test_operators_are_listed(capsys: pytest.CaptureFixture[str]):
    assert graph.main(["operations", "--toy", "--device", "cpu", "--layers", "packed"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert row[1].strip() == "packed"
    inference, training = map(int, row[2].split("/"))
    assert 40 < inference < training < 110


def test_exponents_are_slopes():
    made = [
        Row("graph_growth", f"n{n}", 1, n, 96, 16, "float32", "forward", "packed", "")
        for n in (10, 50_000, 100_000, 400_000)
    ]
    timed = [dataclasses.replace(r, median_us=3.0 * r.length**1.5, peak_mb=r.length) for r in made]
    found = graph.exponents(timed)
    assert [(name, what) for name, _, what, _ in found] == [
        ("packed", "time"),
        ("packed", "memory"),
    ]
    assert [slope for *_, slope in found] == pytest.approx([1.5, 1.0])


def test_command_line_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["batches", "--layers", "gcn"], "--layers must be among packed;"),
        (["plot"], "--out must name the CSV to draw, got none"),
    ):
        with pytest.raises(SystemExit):
            graph.main(arguments)
        assert message in capsys.readouterr().err
