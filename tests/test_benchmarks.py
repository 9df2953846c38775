"""The benchmarks run, measure nothing that is wrong, and write what their README describes."""

import csv
import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import rl_speed, run
from benchmarks.accuracy import beyond, measure_accuracy
from benchmarks.check import CheckError, errors, exact, output_gradient, require
from benchmarks.floor import Ceilings, Work, ceilings
from benchmarks.mixers import MixerRow
from benchmarks.ops import OPS, Inputs, Op
from benchmarks.peers import PEERS, Skip, ours
from benchmarks.reference import MAX_STEPS, SEGMENT, scan_gradients
from benchmarks.report import AccuracyRow, Row, columns, environment, read_csv, table, write_csv
from benchmarks.shapes import SHAPES, Shape, shapes_of
from benchmarks.sweep import Result
from benchmarks.timing import measure
from benchmarks.vision import VisionRow
from torch import Tensor

CPU = torch.device("cpu")
RATES = Ceilings(1e9, 1e9)
CONVOLVE = OPS["causal_conv1d"].run


@pytest.fixture(scope="module")
def toy_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    """Every benchmark once, as the command line runs it."""
    out = tmp_path_factory.mktemp("bench") / "rows.csv"
    threads = torch.get_num_threads()
    try:
        arguments = ["all", "--toy", "--device", "cpu", "--no-peers", "--out", str(out)]
        assert run.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    return read_csv(out), out


def test_every_benchmark_runs_at_toy_size(toy_rows: tuple[list[Row], Path]):
    rows, _ = toy_rows
    found = {(row.op, row.shape, row.passes) for row in rows}
    for op in OPS.values():
        for shape in shapes_of(op.name, "cpu", toy=True):
            assert (op.name, shape.name, run.FORWARD) in found
            assert ((op.name, shape.name, run.BOTH) in found) == op.backward
    for row in rows:
        assert row.median_us is not None
        assert row.p20_us is not None
        assert row.p80_us is not None
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.error is not None
        assert row.error < 1e-4
        if row.op != "mixer":
            assert row.floor_fraction is not None
            assert row.gb_s is not None
            assert row.gb_s > 0
            assert row.floor_fraction > 0


def test_csv_has_the_documented_columns(toy_rows: tuple[list[Row], Path]):
    _, out = toy_rows
    readme = (Path(run.__file__).parent / "README.md").read_text()
    for path, kind in ((out, Row), (out.with_suffix(".accuracy.csv"), AccuracyRow)):
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            lines = list(reader)
        assert reader.fieldnames == columns(kind)
        assert lines
        for name in columns(kind):
            assert f"`{name}`" in readme, f"the README does not explain {name}"
        for line in lines:
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["date"])
            assert line["torch"] == torch.__version__
            assert line["commit"]
            assert int(line["threads"]) >= 1


def test_committed_results_have_todays_columns():
    folder = Path(run.__file__).parent / "results"
    files = sorted(folder.glob("*.csv"))
    assert files
    # the first that fits the name
    kinds = {
        "_table.csv": Result,
        ".accuracy.csv": AccuracyRow,
        "vision_": VisionRow,
        "rl_speed": rl_speed.Row,
        "mixer_scores": Result,
        "mixers_": MixerRow,
        "": Row,
    }
    for path in files:
        kind = next(row for part, row in kinds.items() if part in path.name)
        plain = [field.name for field in dataclasses.fields(kind)]
        expected = plain if kind in (Result, rl_speed.Row) else columns(kind)
        with path.open(newline="") as file:
            assert next(csv.reader(file)) == expected, path.name


def wrong_output(inputs: Inputs) -> Tensor:
    return CONVOLVE(inputs) * 1.001


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, dout: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 1.001 * dout


def wrong_gradient(inputs: Inputs) -> Tensor:
    tensors = inputs.tensors | {"bias": _WrongGradient.apply(inputs.tensors["bias"])}
    return CONVOLVE(dataclasses.replace(inputs, tensors=tensors))


def not_a_number(inputs: Inputs) -> Tensor:
    out = CONVOLVE(inputs)
    mask = torch.zeros_like(out)
    mask[0, 0, 0] = float("nan")
    return out + mask


@pytest.mark.parametrize(
    ("broken", "named"), [(wrong_output, "out"), (wrong_gradient, "bias"), (not_a_number, "out")]
)
def test_an_op_that_is_off_is_not_timed(
    broken, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("timed although its check fails")

    op = dataclasses.replace(OPS["causal_conv1d"], run=broken)
    shape = Shape("odd", 2, 7, 4, state=0)
    monkeypatch.setattr(run, "measure", never)
    with pytest.raises(CheckError, match=rf"off by more than 2e-05 from float64: .*{named} "):
        run.measure_shape(op, shape, torch.float32, CPU, RATES)
    monkeypatch.setitem(run.OPS, op.name, op)
    monkeypatch.setattr(run, "ceilings", lambda device, toy: RATES)
    arguments = ["causal_conv1d", "--toy", "--device", "cpu", "--shapes", "rl", "--no-peers"]
    assert run.main(arguments) == 1
    assert "causal_conv1d rl: not timed, off by more than" in capsys.readouterr().err


def test_a_wrong_state_is_noticed():
    op = OPS["selective_scan_step"]

    def stale(inputs: Inputs) -> Tensor:
        assert inputs.state is not None
        return op.run(dataclasses.replace(inputs, state=inputs.state.clone()))

    broken = dataclasses.replace(op, run=stale)
    with pytest.raises(CheckError, match="state"):
        run.measure_shape(broken, Shape("s", 2, 1, 4), torch.float32, CPU, RATES)


def test_a_step_leaves_the_inputs_as_they_are():
    """Else peers would start from another state than the reference."""
    op = OPS["selective_scan_step"]
    inputs = op.make(Shape("s", 2, 1, 4), torch.float32, CPU)
    reference = exact(op, inputs, output_gradient(op, inputs))
    for _ in range(2):
        require(errors(reference, ours(op, inputs), inputs.tensors["x"]), torch.float32)


def test_peers_are_chosen_by_name():
    op, shape = OPS["causal_conv1d"], Shape("odd", 2, 7, 4, state=0)
    for peers, names in ((set(), {"scanweave"}), ({"torch"}, {"scanweave", "torch"})):
        rows = run.measure_shape(op, shape, torch.float32, CPU, RATES, peers=peers, toy=True)
        assert {row.implementation for row in rows} == names


def test_a_wrong_peer_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch):
    op, shape = OPS["causal_conv1d"], Shape("odd", 2, 7, 4, state=0)

    def off(op: Op, inputs: Inputs):
        prepared = PEERS["causal_conv1d"][-1].prepare(op, inputs)
        return dataclasses.replace(prepared, call=lambda: 1.1 * prepared.call())

    def absent(op: Op, inputs: Inputs):
        raise Skip("not installed")

    def broken(op: Op, inputs: Inputs):
        raise RuntimeError("no kernel for this device\nlong story")

    kind = type(PEERS["causal_conv1d"][0])
    peers = [kind(f.__name__, "nobody", f) for f in (off, absent, broken)]
    monkeypatch.setitem(run.PEERS, "causal_conv1d", (*peers, PEERS["causal_conv1d"][-1]))
    rows = run.measure_shape(op, shape, torch.float32, CPU, RATES, toy=True)
    timed = {row.implementation for row in rows if row.median_us is not None}
    assert timed == {"scanweave", "torch"}
    notes = {row.implementation: row.note for row in rows if row.note}
    assert notes["off"].startswith("not timed: off by more than")
    assert notes["absent"] == "skipped: not installed"
    assert notes["broken"] == "fails: no kernel for this device"


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
@pytest.mark.parametrize("packed", [False, True])
def test_peers_give_our_results(op: Op, packed: bool):
    """Layouts, flips and padding of peers do not change what is computed."""
    if packed and (
        op.name in ("rms_norm_gated", "mixer") or "path" in op.name or "step" in op.name
    ):
        pytest.skip("no packed shapes")
    mixer = "mamba" if op.name == "mixer" else ""
    shape = Shape("s", 2, 9, 4, state=3, head=2, grid=(3, 3), mixer=mixer)
    if packed:
        shape = dataclasses.replace(shape, batch=1, length=21, packed=(2, 9))
    if "step" in op.name:
        shape = dataclasses.replace(shape, length=1)
    inputs = op.make(shape, torch.float32, CPU)
    dout = output_gradient(op, inputs)
    reference = exact(op, inputs, dout)
    count = 0
    for peer in PEERS[op.name]:
        try:
            prepared = peer.prepare(op, inputs)
        except Skip:
            continue
        require(errors(reference, prepared, dout), torch.float32)
        count += 1
    if op.name == "causal_conv1d":
        assert count, "torch is always there"


@pytest.mark.parametrize("suffixes", [("",), ("", "_r")])
def test_segments_of_the_definition_do_not_change_it(suffixes: tuple[str, ...]):
    """Longer than a segment, against the op in float64 with its own backward."""
    op = OPS["selective_scan" if len(suffixes) == 1 else "bidirectional_selective_scan"]
    inputs = op.make(Shape("s", 1, SEGMENT + 5, 2, state=2), torch.float64, CPU).double()
    dout = output_gradient(op, inputs)
    reference = scan_gradients(inputs.tensors, dout, None, suffixes)
    assert reference.by == "definition"
    require(errors(reference, ours(op, inputs), dout), torch.float64)


def test_long_sequences_are_checked_too():
    op = OPS["selective_scan"]
    inputs = op.make(Shape("s", 1, MAX_STEPS + 1, 1, state=1), torch.float32, CPU)
    dout = output_gradient(op, inputs)
    reference = exact(op, inputs, dout)
    assert reference.by == "portable float64"
    require(errors(reference, ours(op, inputs), dout), torch.float32)


def test_work_at_the_documented_shape():
    """Both directions of Vim-S: the sums behind the floors of 200 and 590 us on an H100."""
    work = OPS["bidirectional_selective_scan"].work
    assert work is not None
    (vim,) = (s for s in SHAPES["selective_scan"]["cuda"] if s.name == "vim_s")
    forward, backward = work(vim, torch.bfloat16)
    elements = 128 * 197 * 768
    assert forward.exponentials == elements * (2 * 18 + 2)
    assert backward.exponentials == elements * (2 * 36 + 2)
    # x and dt of two directions, z and the output; B, C and weights are 1 % of it
    assert math.isclose(forward.bytes, 2 * 6 * elements, rel_tol=0.03)
    h100 = Ceilings(3.0e12, 3.7e12)
    assert math.isclose(h100.floor_us(forward), 199, rel_tol=0.01)
    assert math.isclose(h100.floor_us(forward, backward), 587, rel_tol=0.01)


def test_floor_is_the_slower_of_bytes_and_exponentials():
    assert Ceilings(1e9, 1e6).floor_us(Work(1000, 10)) == pytest.approx(10)
    assert Ceilings(1e6, 1e9).floor_us(Work(1000, 10)) == pytest.approx(1000)
    assert Ceilings(1e6, 0).floor_us(Work(10, 10**9), Work(5, 1)) == pytest.approx(15)


def test_ceilings_are_measured():
    rates = ceilings(CPU, toy=True)
    assert rates.bytes > 1e8
    assert rates.exponentials == 0, "a CPU has no special unit for them"


def test_measure_takes_turns():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure(calls, CPU, toy=True)
    assert order[-4:] == ["a", "b", "a", "b"]
    assert all(t.cpu is not None and t.samples == 2 for t in times.values())


def test_table_shows_ratios_to_ours():
    size = ("op", "s", 1, 2, 3, 4, "float32")
    rows = [
        Row(*size, run.FORWARD, "scanweave", "1", 10.0, 9.0, 11.0),
        Row(*size, run.FORWARD, "other", "2", 25.0, 9.0, 11.0),
        Row(*size, run.FORWARD, "absent", "", note="skipped: not installed"),
    ]
    header, lines = table(rows)
    column = header.index("/ ours")
    assert [line[column] for line in lines] == ["1", "2.5"]


def test_out_with_other_columns_is_refused(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("something,else\n")
    row = Row("op", "s", 1, 2, 3, 4, "float32", run.FORWARD, "scanweave", "1")
    with pytest.raises(ValueError, match=r"out must have the columns .* got a file with"):
        write_csv(path, environment(CPU), [row])


def test_rows_survive_the_csv(tmp_path: Path):
    row = Row(
        "op", "s", 1, 2, 3, 4, "float32", run.FORWARD, "x", "1", 1.5, 1.0, 2.0, 3, note="n, m"
    )
    where = environment(CPU, commit="abc")
    for _ in range(2):
        write_csv(tmp_path / "rows.csv", where, [row])
    assert read_csv(tmp_path / "rows.csv") == [row, row]


def test_accuracy_notices_errors():
    rows = list(measure_accuracy(CPU, toy=True))
    assert {row.tensor for row in rows} >= {"out", "x", "dt", "A", "B", "C", "D", "z", "dt_bias"}
    assert not beyond(rows)
    wrong = dataclasses.replace(rows[0], relative_l2=float("nan"))
    assert beyond([*rows, wrong]) == [wrong]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice"),
        (["all", "--toy", "--device", "cpu", "--shapes", "huge"], "--shapes must be among"),
        (["all", "--toy", "--device", "cpu", "--peers", "nobody"], "--peers must be among"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_absent_device_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run.main(["all", "--device", "cuda"])
    assert "--device must be available here, got cuda" in capsys.readouterr().err


def test_against_another_commit(capsys: pytest.CaptureFixture[str]):
    if environment(CPU).commit == "unknown":
        pytest.skip("no git checkout")
    command = ["selective_scan_step", "--toy", "--device", "cpu", "--shapes", "step_b1"]
    assert run.main([*command, "--no-peers", "--against", "HEAD"]) == 0
    commit = environment(CPU).commit.rstrip("+")
    assert f"scanweave@{commit}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="against must be a commit of this repository"):
        run.main([*command, "--no-peers", "--against", "no-such-ref"])


def test_tables_need_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    command = ["selective_scan_step", "--toy", "--device", "cpu", "--shapes", "step_b1"]
    assert run.main([*command, "--no-peers"]) == 0
    assert "| shape | implementation |" in capsys.readouterr().out
