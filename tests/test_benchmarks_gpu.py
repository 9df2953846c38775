"""What the benchmarks add on a GPU, as far as it can be tested without one, and the plot."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks import plot, run, timing
from benchmarks.check import errors, exact, output_gradient, require
from benchmarks.gated_ops import attention_prepared, both_prepared, decays_prepared, one_prepared
from benchmarks.ops import OPS
from benchmarks.path_peers import path_prepared
from benchmarks.paths import along, natural, spread
from benchmarks.prepared import Skip
from benchmarks.report import Row, environment, ratio, read_csv, table, write_csv
from benchmarks.shapes import SHAPES, Shape
from benchmarks.timing import Kernel, kernel_time, split_calls
from torch import Tensor

CPU = torch.device("cpu")
SIZE = ("selective_scan", "s", 1, 2, 3, 4, "float32")
OWN = Row(*SIZE, run.FORWARD, "scanweave", "1", 10.0, 9.0, 11.0, kernel_us=4.0, floor_us=2.0)
OTHER = Row(*SIZE, run.FORWARD, "other", "2", 15.0, 9.0, 11.0, kernel_us=12.0)
MARK = "void elementwise_kernel<AUnaryFunctor<int, BitwiseXorFunctor<int>>>"


def test_kernels_belong_to_the_call_before_which_the_mark_ran():
    kernels = [Kernel("forward", 7.0, 3.0), Kernel(MARK, 0.0, 100.0), Kernel("fill", 5.0, 1.0)]
    kernels += [Kernel(MARK, 20.0, 100.0), Kernel("forward", 121.0, 2.5)]
    kernels += [Kernel("earlier", -9.0, 50.0)]
    assert split_calls(kernels) == [4.0, 2.5]
    assert split_calls([]) == []


def test_a_profiler_that_sees_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch):
    events = [SimpleNamespace(device_type=SimpleNamespace(name="CPU"), name="aten::add")]

    class Profiler:
        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(timing, "profile", lambda **_: Profiler())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(RuntimeError, match="the profiler saw 0 kernels in 0 calls"):
        kernel_time(lambda: None, CPU, about=1e6)


@pytest.mark.gpu
def test_kernels_are_seen_on_a_gpu():
    device = torch.device("cuda")
    source = torch.ones(1 << 20, device=device)
    target = torch.empty_like(source)
    assert kernel_time(lambda: target.copy_(source), device, about=10.0) > 0


def test_what_cannot_be_measured_is_said(monkeypatch: pytest.MonkeyPatch):
    assert run._without_launches(lambda: None, CPU, True, 1.0) == (None, None, "")

    def fails(*_: object) -> float:
        raise RuntimeError("no library\nlong story")

    monkeypatch.setattr(run, "kernel_time", fails)
    monkeypatch.setattr(run, "graph_time", lambda *_: 3.0)
    found = run._without_launches(lambda: None, torch.device("cuda"), True, 1.0)
    assert found == (None, 3.0, "no kernel time: no library")


def test_kernels_times_decide_where_both_have_them():
    assert OWN.time_us == 4.0
    assert ratio(OTHER, OWN) == 3.0
    assert ratio(dataclasses.replace(OTHER, kernel_us=None), OWN) == 1.5
    header, lines = table([OWN, OTHER])
    assert [line[header.index("kernel us")] for line in lines] == ["4", "12"]
    assert [line[header.index("/ ours")] for line in lines] == ["1", "3"]


def test_steps_and_both_directions_are_measured_at_every_size():
    assert [s.batch for s in SHAPES["selective_scan_step"]["cuda"]] == [1, 16, 64, 256, 1024, 4096]
    assert {s.name for s in SHAPES["bidirectional_selective_scan"]["cuda"]} >= {"vim_s", "graph"}
    for shape in SHAPES["path_selective_scan"]["cuda"]:
        assert shape.grid[0] * shape.grid[1] == shape.length


def test_paths_there_and_back():
    paths = torch.stack([torch.randperm(5) for _ in range(3)])
    v = torch.randn(2, 5, 3, 4)
    assert torch.equal(natural(along(v, paths), paths), v)
    assert torch.equal(natural(spread(v[:, :, 0], paths), paths)[:, :, 2], v[:, :, 0])
    assert torch.equal(along(v, paths)[1, 4, 2], v[1, paths[2, 4], 2])


def cross_scan(x: Tensor, in_channel_first: bool, out_channel_first: bool) -> Tensor:
    """The four orders of (B, D, H, W), copied, as VMamba's paper draws them."""
    assert in_channel_first
    assert out_channel_first
    ways = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
    return torch.cat([ways, ways.flip(3)], 1)


def cross_merge(ys: Tensor, in_channel_first: bool, out_channel_first: bool) -> Tensor:
    assert in_channel_first
    assert out_channel_first
    height, width = ys.shape[3:]
    ways = ys.flatten(3)
    ways = ways[:, :2] + ways[:, 2:].flip(3)
    columns = ways[:, 1].unflatten(2, (width, height)).transpose(2, 3).flatten(2)
    return ways[:, 0] + columns


def channel_first_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, softplus: bool
) -> Tensor:
    from scanweave.core import selective_scan

    last = (v.transpose(1, 2) for v in (u, dt))
    grouped = (v.permute(0, 3, 1, 2) for v in (B, C))
    x, delta = last
    y = selective_scan(x, delta, A, *grouped, D, dt_bias=bias, dt_softplus=softplus)
    return y.transpose(1, 2)


def test_vmambas_layout_gives_our_results():
    """Its cross-scan, scan and merge on converted inputs, so that the GPU times the same thing."""
    op = OPS["path_selective_scan"]
    shape = Shape("s", 2, 12, 8, state=3, gate=False, grid=(3, 4))
    inputs = op.make(shape, torch.float32, CPU)
    dout = output_gradient(op, inputs)
    assert inputs.paths is not None
    peer = path_prepared(inputs, inputs.paths, channel_first_scan, cross_scan, cross_merge)
    require(errors(exact(op, inputs, dout), peer, dout), torch.float32)


def mamba2_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any
) -> Tensor:
    from scanweave.core import ssd

    assert options.pop("dt_softplus")
    seq_idx = options.pop("seq_idx", None)
    cu_seqlens = None
    if seq_idx is not None:
        counts = torch.bincount(seq_idx[0])
        cu_seqlens = F.pad(counts.cumsum(0), (1, 0)).int()
    return ssd(x, dt, A, B, C, **options, cu_seqlens=cu_seqlens)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, cu_seqlens: Tensor | None
) -> tuple[Tensor, None]:
    from scanweave.core import gated_linear_attention

    cu_seqlens = None if cu_seqlens is None else cu_seqlens.int()
    out = gated_linear_attention(q, k, v, g, scale=scale, cu_seqlens=cu_seqlens)
    assert isinstance(out, Tensor)
    return out, None


@pytest.mark.parametrize("packed", [False, True])
def test_mamba2s_layouts_give_our_results(packed: bool):
    """Of both directions as a batch, and as attention, so that the GPU times the same thing."""
    shape = Shape("s", 1 if packed else 2, 21, 8, state=3, head=4, packed=(2, 9 * packed))
    peers = [
        ("ssd", lambda inputs: one_prepared(inputs, mamba2_scan)),
        ("ssd", lambda inputs: attention_prepared(inputs, linear_attention)),
        ("bidirectional_ssd", lambda inputs: both_prepared(inputs, mamba2_scan)),
    ]
    for name, prepare in peers[: 2 if packed else 3]:
        op = OPS[name]
        inputs = op.make(shape, torch.float32, CPU)
        dout = output_gradient(op, inputs)
        require(errors(exact(op, inputs, dout), prepare(inputs), dout), torch.float32)
    if packed:
        inputs = OPS["bidirectional_ssd"].make(shape, torch.float32, CPU)
        with pytest.raises(Skip, match="has no packed sequences"):
            both_prepared(inputs, mamba2_scan)


def linear_attention_of_channels(q: Tensor, k: Tensor, *rest: Tensor, **options: Any) -> tuple:
    from scanweave.core import gated_linear_attention

    v, g, *bonus = rest
    cu_seqlens = options.pop("cu_seqlens")
    options["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.int()
    out = gated_linear_attention(q, k, v, g, bonus=bonus[0] if bonus else None, **options)
    return out, None


@pytest.mark.parametrize("name", ["gated_linear_attention", "rwkv6"])
def test_attentions_arguments_give_our_results(name: str):
    for packed in (False, True) if name == "gated_linear_attention" else (False,):
        shape = Shape("s", 1 if packed else 2, 21, 8, state=3, head=4, packed=(2, 9 * packed))
        op = OPS[name]
        inputs = op.make(shape, torch.float32, CPU)
        assert ("bonus" in inputs.tensors) == (name == "rwkv6")
        dout = output_gradient(op, inputs)
        peer = decays_prepared(inputs, linear_attention_of_channels)
        require(errors(exact(op, inputs, dout), peer, dout), torch.float32)


def test_work_of_gated_linear_attention():
    """At GLA's size: five tensors of 134 MB, and a decay for every key."""
    op = OPS["gated_linear_attention"]
    assert op.work is not None
    (shape,) = (s for s in SHAPES["gated_linear_attention"]["cuda"] if s.name == "lm")
    forward, backward = op.work(shape, torch.bfloat16)
    tensor = 8 * 4096 * 2048
    assert (forward.bytes, backward.bytes) == (5 * 2 * tensor, 9 * 2 * tensor)
    assert forward.exponentials == tensor


def test_work_of_mamba2():
    """Its scan at a language model's size moves at least 0.3 GB."""
    op = OPS["ssd"]
    assert op.work is not None
    (shape,) = (s for s in SHAPES["ssd"]["cuda"] if s.name == "lm")
    forward, backward = op.work(shape, torch.bfloat16)
    tokens = 8 * 4096
    assert forward.bytes == 2 * tokens * (2 * 2048 + 2 * 128 + 32)
    assert backward.bytes == 2 * tokens * (3 * 2048 + 4 * 128 + 2 * 32)
    assert forward.exponentials == 3 * tokens * 32


def test_work_of_four_paths():
    """SS2D at the first stage of VMamba-T: 0.25 ms of exponentials at the measured rate."""
    op = OPS["path_selective_scan"]
    assert op.work is not None
    (shape,) = (s for s in SHAPES["path_selective_scan"]["cuda"] if s.name == "ss2d_56")
    forward, backward = op.work(shape, torch.bfloat16)
    elements = 128 * 3136 * 192
    assert forward.exponentials == 4 * 3 * elements
    assert forward.exponentials / 3.7e12 == pytest.approx(0.25e-3, rel=0.01)
    # dt of four directions, x, out; B and C are two numbers a token and direction
    assert forward.bytes == pytest.approx(2 * 6 * elements, rel=0.01)
    assert backward.bytes == pytest.approx(2 * 11 * elements, rel=0.01)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    both = [dataclasses.replace(row, passes=run.BOTH) for row in (OWN, OTHER)]
    only = dataclasses.replace(OWN, op="selective_scan_step", shape="step_b1")
    nothing = Row(*SIZE, run.FORWARD, "absent", "", note="skipped: not installed")
    write_csv(path, environment(CPU, "abc"), [OWN, OTHER, *both, only, nothing])
    return path


def test_plot_at_toy_size(results: Path, capsys: pytest.CaptureFixture[str]):
    assert plot.main([str(results)]) == 0
    out = results.with_suffix(".svg")
    assert capsys.readouterr().out == f"{out}\n"
    first = out.read_bytes()
    assert first.startswith(b"<?xml")
    assert plot.main([str(results)]) == 0
    assert out.read_bytes() == first, "the same rows give the same file"
    assert plot.main([str(results), "--out", str(results.with_suffix(".png"))]) == 0
    assert results.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_plot_shows_every_line_and_ratio(results: Path):
    figure = plot.draw(read_csv(results), "title")
    left, right = figure.axes
    labels = [text.get_text() for text in left.get_yticklabels()]
    assert labels == ["scan s (1x2x3, N4)", "step b1 (1x2x3, N4)"]
    assert [text.get_text() for text in left.texts] == ["3.0x"]
    assert [text.get_text() for text in right.texts] == ["3.0x"]
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == {"scanweave", "other", "floor of the hardware"}
    # of a repeated measurement the last
    again = dataclasses.replace(OWN, kernel_us=2.0)
    assert plot.lines([OWN, again]) == plot.lines([again])


def test_plot_refuses_what_it_cannot_draw(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ValueError, match="rows must hold times of scanweave, got 1 rows without"):
        plot.draw([OTHER], "title")
    with pytest.raises(SystemExit):
        plot.main([str(results), "--ops", "nothing"])
    assert "--ops must be among ['selective_scan', 'selective_scan_step'], got nothing" in (
        capsys.readouterr().err
    )
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'scanweave\[train\]'"):
        plot.draw([OWN], "title")
